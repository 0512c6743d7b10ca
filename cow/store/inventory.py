"""Inventory: the origins, snapshots and layers of a store, and how they relate.

It is the one place that everything else of the store asks. A change is made in the catalog first and then here, under
the one lock: a task that holds it sees no half of another's change, and nobody changes anything meanwhile.
"""

import resource
from collections.abc import AsyncIterator, Collection, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, nullcontext

import trio
from pyroaring import BitMap64

from cow.bell import Bell
from cow.disk.directory import Directory
from cow.durable.recovery import heir_of
from cow.errors import StoreFullError
from cow.images.image import Image
from cow.images.origins import Origins
from cow.layers.layer import OTHER_OPEN_FILES, Layer, open_files
from cow.records.rows import TRUSTED, LayerRow, State
from cow.store.snapshot import Snapshot


class Inventory:
    """Trio thread only. Answers hold until the next trio checkpoint, or while `lock` is held."""

    def __init__(self, directory: Directory, layers_directory: Directory) -> None:
        self.store_path = directory.label
        self.layers_directory = layers_directory
        self.label = layers_directory.label  #: of the store's layers, for messages
        self.origins = Origins()
        self.lock = trio.Lock()  #: guards snapshots, groups and layers against two changes at once
        self.changed = Bell()  #: rung when a snapshot came or went, so that there may be layers to merge
        self._layers: dict[int, Layer] = {}  #: by id
        self._snapshots: dict[int, Snapshot] = {}  #: by id, so oldest first
        self._named: dict[bytes, Snapshot] = {}  #: the same by name

    # -- snapshots -----------------------------------------------------------------------------------------------

    @property
    def snapshots(self) -> list[Snapshot]:
        """The snapshots that exist for users, oldest first."""
        return [one for one in self._snapshots.values() if one.exists]

    @property
    def all_snapshots(self) -> Collection[Snapshot]:
        """All snapshots that have a row in the catalog, oldest first: also one that is being taken or deleted."""
        return self._snapshots.values()

    def find(self, name: bytes) -> Snapshot | None:
        """The snapshot of that name, if it exists for users."""
        found = self._named.get(name)
        return found if found is not None and found.exists else None

    def by_id(self, number: int) -> Snapshot | None:
        """The snapshot of that id, if it exists for users."""
        found = self._snapshots.get(number)
        return found if found is not None and found.exists else None

    def get(self, number: int) -> Snapshot | None:
        """The snapshot of that id."""
        return self._snapshots.get(number)

    def is_taken(self, name: bytes) -> bool:
        """Whether a snapshot has that name, also one that does not exist for users yet."""
        return name in self._named

    @property
    def images(self) -> Iterator[Image]:
        """The images of all snapshots."""
        return (image for snapshot in self._snapshots.values() for image in snapshot.images)

    @property
    def usable(self) -> list[Snapshot]:
        """The snapshots that can be read at all, oldest first."""
        return [one for one in self._snapshots.values() if one.usable]

    @property
    def trusted(self) -> list[Snapshot]:
        """The snapshots of which it is certain what they read, oldest first."""
        return [one for one in self._snapshots.values() if one.row.state in TRUSTED]

    @property
    def is_doubted(self) -> bool:
        """Whether a snapshot is suspect: it tells by their ids which layers to believe, so no layer may be merged."""
        return any(one.row.state is State.SUSPECT for one in self._snapshots.values())

    def heir_of(self, snapshot: Snapshot) -> int | None:
        """The id of the snapshot that inherits another one's layers; None when there is none."""
        return heir_of([(one.id, one.row.state) for one in self._snapshots.values()], snapshot.id)

    def asking(self, layer: Layer) -> list[Snapshot]:
        """The usable snapshots that ask a layer for chunks."""
        return [one for one in self.usable if one.asks(layer)]

    def reading(self, layer: Layer, chunks: BitMap64) -> list[Snapshot]:
        """The snapshots that read any of the chunks, all held by `layer`, from there."""
        return [one for one in self.snapshots if one.reads(layer, chunks)]

    def add(self, snapshot: Snapshot) -> None:
        """Add a snapshot that the catalog has."""
        self._snapshots[snapshot.id] = self._named[snapshot.name] = snapshot

    def rename(self, snapshot: Snapshot, name: bytes) -> None:
        """Give a snapshot the name that the catalog has for it."""
        del self._named[snapshot.name]
        snapshot.row.name = name
        self._named[name] = snapshot

    def remove(self, snapshot: Snapshot) -> None:
        """Forget a snapshot that the catalog does not have any more."""
        del self._snapshots[snapshot.id], self._named[snapshot.name]

    # -- layers --------------------------------------------------------------------------------------------------

    @property
    def layers(self) -> Collection[Layer]:
        """All layers that the catalog has."""
        return self._layers.values()

    def layer(self, number: int) -> Layer:
        """The layer of that id. It must be there."""
        return self._layers[number]

    def has(self, layer: Layer) -> bool:
        """Whether the layer still belongs to some snapshot."""
        return self._layers.get(layer.id) is layer

    @asynccontextmanager
    async def settled(self, layer: Layer) -> AsyncIterator[None]:
        """A context in which no image writes to the layer."""
        image = next((one for one in self.images if one.delta.layer is layer), None)
        async with image.delta.settled() if image is not None else nullcontext():
            yield

    def load_layers(self, layers: Mapping[int, Layer]) -> None:
        """Take over, by id, the layers that recovery found."""
        self._layers.update(layers)

    def make_layers(self, rows: Iterable[LayerRow]) -> list[Layer]:
        """Make new layers that the catalog has; they have no files yet."""
        chunks = {origin.id: origin.chunks for origin in self.origins}
        made = [Layer(self.layers_directory, row.id, chunks[row.origin]) for row in rows]
        self._layers.update({layer.id: layer for layer in made})
        return made

    def forget_layers(self, numbers: Iterable[int]) -> list[Layer]:
        """Forget and return layers, by their ids, that the catalog does not have any more."""
        return [self._layers.pop(number) for number in numbers]

    def check_open_files(self) -> None:
        """Raise StoreFullError when the files of one more snapshot might be too many for this process."""
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        needed = self._most_open_files + 2 * sum(open_files(origin.chunks) for origin in self.origins)
        if limit != resource.RLIM_INFINITY and needed > limit:
            raise StoreFullError(
                f"{len(self._snapshots)} snapshots, and one more, may need {needed} open files, and this process may "
                f"open {limit}: rmdir snapshots, or raise its limit (ulimit -n, LimitNOFILE=) and mount again"
            )

    @property
    def _most_open_files(self) -> int:
        """How many files are open when all layers have all of theirs open."""
        return OTHER_OPEN_FILES + sum(open_files(layer.chunks) for layer in self._layers.values())

    def close_files(self) -> None:
        """Close the layers' files, whatever happened before."""
        for layer in self._layers.values():
            layer.close()
