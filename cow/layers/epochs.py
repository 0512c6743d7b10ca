"""Epochs: which layers keep an origin's old bytes, and which snapshots read them.

Each snapshot opens an epoch: from then on a chunk that the origin overwrites is preserved in the newest layer, and
nowhere else. A snapshot reads a chunk from the first layer, from its own group onwards, that knows it, else from the
device. So one copy serves all snapshots, and what an older snapshot needs from the device, a newer one needs too.

Sets and nothing else: no I/O, no lock. Chunks that are returned to be punched out have left the sets already.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from pyroaring import BitMap64

from cow.errors import InvalidSnapshotError
from cow.geometry import Run, chunks_in
from cow.layers.layer import Layer


@dataclass
class Group:
    """A snapshot and the layers that serve it, in the order in which they are asked.

    Its own layer comes first, then those that it inherited from newer snapshots that were deleted.
    """

    snapshot: int
    layers: list[Layer]


class Epochs:
    """The groups of one origin. The caller guards them: `groups` and the layers in them change by these methods only.

    Snapshots are known by their ids, which grow. Methods that need a snapshot's group raise InvalidSnapshotError if it
    has none.
    """

    def __init__(self) -> None:
        self.groups: list[Group] = []  #: one for each usable snapshot, oldest first
        self.version = 0  #: grows when the groups change, so that results derived from them can be cached until then

    # -- changes -------------------------------------------------------------------------------------------------

    def open_epoch(self, snapshot: int, layer: Layer) -> None:
        """Add a new snapshot; from now on old bytes are preserved in `layer`. No write may be in flight."""
        self.groups.append(Group(snapshot, [layer]))
        self.version += 1

    def add_layer(self, snapshot: int, layer: Layer) -> BitMap64:
        """Have one more layer serve a snapshot, asked after those that do.

        Chunks that those know are not needed twice: the layer drops them, and those that it held are returned.
        """
        self.group_of(snapshot).layers.append(layer)
        self.version += 1
        return self.drop_shadowed(layer)

    def remove_layer(self, layer: Layer) -> None:
        """Have a layer serve no snapshot any more."""
        for group in self.groups:
            if layer in group.layers:
                group.layers.remove(layer)
        self.version += 1

    def drop_shadowed(self, layer: Layer) -> BitMap64:
        """Have a layer drop the chunks that layers asked before it in its group know. Returns those that it held."""
        group = self.group_with(layer)
        shadowed = BitMap64()
        for earlier in group.layers[: group.layers.index(layer)] if group is not None else ():
            shadowed |= layer.shadow(earlier.known)
        return shadowed

    def release(self, snapshot: int, heir: int | None) -> list[tuple[Layer, BitMap64]]:
        """Take a snapshot out. Its layers go on to serve `heir`, the next older one; with None they serve nobody.

        Returns what is to be punched out, by layer: the chunks that `heir` has in other layers already.
        """
        group = self.groups.pop(self._position(snapshot))
        self.version += 1
        if heir is None:
            return []
        found = []
        for layer in group.layers:
            shadowed = self.add_layer(heir, layer)
            if shadowed:
                found.append((layer, shadowed))
        return found

    # -- snapshots and their layers ------------------------------------------------------------------------------

    def serves(self, snapshot: int) -> bool:
        """Whether the snapshot has a group: it was not given up."""
        return any(group.snapshot == snapshot for group in self.groups)

    def group_of(self, snapshot: int) -> Group:
        """The snapshot's group."""
        return self.groups[self._position(snapshot)]

    def group_with(self, *layers: Layer) -> Group | None:
        """The group that has all these layers; None when there is none, because no snapshot needs them any more."""
        return next((group for group in self.groups if all(layer in group.layers for layer in layers)), None)

    def layers_for(self, snapshot: int) -> Iterator[Layer]:
        """The layers that a snapshot reads, in the order in which they are asked."""
        start = self._position(snapshot)
        return (layer for group in self.groups[start:] for layer in group.layers)

    @property
    def newest_layer(self) -> Layer:
        """Where old bytes are preserved. There must be a snapshot."""
        return self.groups[-1].layers[-1]

    def _position(self, snapshot: int) -> int:
        for position, group in enumerate(self.groups):
            if group.snapshot == snapshot:
                return position
        raise InvalidSnapshotError("the snapshot was given up; its info says why")

    # -- chunks --------------------------------------------------------------------------------------------------

    def is_preserved(self, chunk: int) -> bool:
        """Whether no snapshot reads the chunk from the device."""
        groups = self.groups
        return not groups or any([chunk in layer.held or chunk in layer.lost for layer in groups[-1].layers])

    def is_run_preserved(self, run: Run) -> bool:
        """Whether no snapshot reads any chunk of the run from the device."""
        groups = self.groups
        if not groups or any([layer.held.contains_range(run.first, run.end) for layer in groups[-1].layers]):
            return True  # the usual case, without making a set
        return self.is_preserved(run.first) and not self.unpreserved(chunks_in([run]))

    def unpreserved(self, chunks: BitMap64) -> BitMap64:
        """Those of `chunks` that some snapshot reads from the device."""
        if not self.groups:
            return BitMap64()
        for layer in self.groups[-1].layers:
            chunks = chunks - layer.held
            if layer.lost:
                chunks -= layer.lost
        return chunks

    def needing(self, chunks: BitMap64) -> list[int]:
        """The snapshots that read some of `chunks` from the device, newest first."""
        found = []
        exposed = chunks
        for group in reversed(self.groups):
            for layer in group.layers:
                exposed = exposed - layer.known
            if not exposed:
                break
            found.append(group.snapshot)
        return found

    def knows(self, chunk: int) -> bool:
        """Whether any layer has preserved the chunk, or has lost it."""
        return any(chunk in layer.held or chunk in layer.lost for group in self.groups for layer in group.layers)

    def lost(self) -> Iterator[tuple[int, BitMap64]]:
        """Each snapshot, newest first, and the chunks that its layers have lost."""
        lost = BitMap64()
        for group in reversed(self.groups):
            for layer in reversed(group.layers):
                lost = (lost - layer.held) | layer.lost
            yield group.snapshot, lost

    def freed_by(self, snapshot: int, heir: int | None) -> int:
        """How many chunks `release` would free: those that it returns; with no heir all that the layers hold."""
        layers = self.group_of(snapshot).layers
        if heir is None:
            return sum(len(layer.held) for layer in layers)
        known = BitMap64.union(*(layer.known for layer in self.group_of(heir).layers))
        count = 0
        for layer in layers:
            count += layer.held.intersection_cardinality(known)
            known |= layer.known
        return count
