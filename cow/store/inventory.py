"""Inventory: what a store has, its origins, snapshots and layers, and who among them has to do with whom.

It is the one place that everything else of the store asks. What is there changes in the catalog first and then here,
under the one lock: who holds it sees no half of another's change, and nobody changes anything in between.
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
    """Trio thread only. Answers are of this moment; they hold until the next checkpoint, or while `lock` is held."""

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
        """Those that exist for users, oldest first."""
        return [one for one in self._snapshots.values() if one.exists]

    @property
    def all_snapshots(self) -> Collection[Snapshot]:
        """All that have a row in the catalog, oldest first: also one that is being taken, or being deleted."""
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
        """Whether a snapshot has that name, or is about to."""
        return name in self._named

    @property
    def images(self) -> Iterator[Image]:
        """The images of all snapshots."""
        return (image for snapshot in self._snapshots.values() for image in snapshot.images)

    @property
    def usable(self) -> list[Snapshot]:
        """Those that can be read at all, oldest first."""
        return [one for one in self._snapshots.values() if one.usable]

    @property
    def trusted(self) -> list[Snapshot]:
        """Those of which it is certain what they read, oldest first."""
        return [one for one in self._snapshots.values() if one.row.state in TRUSTED]

    @property
    def is_doubted(self) -> bool:
        """Whether some snapshot counts which layers are older than the doubt: then no layer may be merged."""
        return any(one.row.state is State.SUSPECT for one in self._snapshots.values())

    def heir_of(self, snapshot: Snapshot) -> int | None:
        """The id of the one that inherits a snapshot's layers; None when nobody does."""
        return heir_of([(one.id, one.row.state) for one in self._snapshots.values()], snapshot.id)

    def asking(self, layer: Layer) -> list[Snapshot]:
        """The usable snapshots that ask a layer for chunks."""
        return [one for one in self.usable if one.asks(layer)]

    def reading(self, layer: Layer, chunks: BitMap64) -> list[Snapshot]:
        """The snapshots that read any of the chunks, all held by `layer`, from there."""
        return [one for one in self.snapshots if one.reads(layer, chunks)]

    def add(self, snapshot: Snapshot) -> None:
        """Take over a snapshot that the catalog has."""
        self._snapshots[snapshot.id] = self._named[snapshot.name] = snapshot

    def rename(self, snapshot: Snapshot, name: bytes) -> None:
        """Take over a name that the catalog has."""
        del self._named[snapshot.name]
        snapshot.row.name = name
        self._named[name] = snapshot

    def remove(self, snapshot: Snapshot) -> None:
        """Forget a snapshot that the catalog has no more."""
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
        """While no image writes to the layer."""
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
        """Forget layers, by their ids, that the catalog has no more."""
        return [self._layers.pop(number) for number in numbers]

    def check_open_files(self) -> None:
        """Raise StoreFullError when the files of one snapshot more might be too many for this process."""
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        needed = self._most_open_files + 2 * sum(open_files(origin.chunks) for origin in self.origins)
        if limit != resource.RLIM_INFINITY and needed > limit:
            raise StoreFullError(
                f"{len(self._snapshots)} snapshots, and one more, may need {needed} open files, and this process may "
                f"open {limit}: rmdir snapshots, or raise its limit (ulimit -n, LimitNOFILE=) and mount again"
            )

    @property
    def _most_open_files(self) -> int:
        """How many files are open when all layers have all theirs."""
        return OTHER_OPEN_FILES + sum(open_files(layer.chunks) for layer in self._layers.values())

    def close_files(self) -> None:
        """Close the layers' files, whatever came before."""
        for layer in self._layers.values():
            layer.close()
