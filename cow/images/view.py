"""What a snapshot shows of one origin: a point in time, with what was written to the snapshot's image since.

A chunk is looked up in the delta layer, then in the layers that preserve the origin's old bytes; a chunk that none of
them knows is still on the device. What comes from a layer is checked (I4). Reads take no lock; `read` says why
concurrent writes to the origin do no harm.
"""

from collections.abc import Sequence

import trio
from pyroaring import BitMap64

from cow.disk.ring import Reads
from cow.errors import CowError, SuspectError
from cow.geometry import CHUNK_BYTES, Run, covering, runs_of
from cow.images.origin import Origin
from cow.images.reading import Answer, Reading
from cow.layers.chain import Share, gather, holder_of, resolve
from cow.layers.layer import Layer, pinned


class View:
    """Trio thread only. `delta_layer` has the snapshot's own writes.

    Methods that need the layers raise InvalidSnapshotError when the snapshot was given up.
    """

    def __init__(self, origin: Origin, snapshot: int, created_ns: int, delta_layer: Layer) -> None:
        self.origin = origin
        self.epochs = origin.epochs
        self.size_bytes = origin.size_bytes
        self.snapshot = snapshot
        self.delta_layer = delta_layer
        self.version = -1  #: of the epochs, when `layers` last asked them
        self._device = origin.device
        self._shown_ns = created_ns  #: since when it has shown what it does, apart from writes to its image
        self._layers: list[Layer] = []  #: as of `version`
        self._is_newly_doubted = False  #: whether `_shown_ns` has yet to be set for that
        self._refused_from: int | None = None

    def doubt(self, first_layer: int, *, is_refused: bool) -> None:
        """Note that others changed the device: what is on it, and in layers from id `first_layer` on, may be wrong.

        With `is_refused`, reading that is refused from now on.
        """
        self._is_newly_doubted = True
        self._refused_from = first_layer if is_refused else None

    @property
    def is_usable(self) -> bool:
        """Whether the snapshot was not given up."""
        return self.epochs.serves(self.snapshot)

    @property
    def modified_ns(self) -> int:
        """When the contents last changed: the snapshot's time, or the last write to its image.

        When the device is in doubt, also the time since which it has shown what it does now. It keeps that until the
        store is opened again, because what is overwritten is preserved. # I2
        """
        if self._is_newly_doubted:
            self._is_newly_doubted = False
            self._shown_ns = max(self._shown_ns, self.origin.modified_ns)
        shown, written = self._shown_ns, self.delta_layer.written_ns
        return written if written > shown else shown  # asked for every write

    # -- layers --------------------------------------------------------------------------------------------------

    def layers(self) -> list[Layer]:
        """The chain: the layers that are asked for a chunk, in order."""
        if self.version != self.epochs.version:
            self._layers = []  # none is kept in memory for a snapshot that was given up
            self._layers = [self.delta_layer, *self.epochs.layers_for(self.snapshot)]
            self.version = self.epochs.version
        return self._layers

    def own_layers(self) -> list[Layer]:
        """The layers that the snapshot alone keeps in the store: its delta and its group; none once it was given up."""
        return [self.delta_layer, *self.epochs.group_of(self.snapshot).layers] if self.is_usable else []

    def reads(self, layer: Layer, chunks: BitMap64) -> bool:
        """Whether any of the chunks, all held by `layer`, is read from there."""
        left = chunks
        for one in self.layers() if self.is_usable else ():
            if one is layer:
                return bool(left)
            left = left - one.known
        return False

    def lost(self) -> list[Run]:
        """The runs that cannot be read because they were lost, ascending."""
        if not self.is_usable or not any(layer.lost for layer in self.layers()):
            return []  # the usual case, without going through all snapshots
        lost = next(chunks for snapshot, chunks in self.epochs.lost() if snapshot == self.snapshot)
        return list(runs_of(self.lost_of(lost)))

    def lost_of(self, lost: BitMap64) -> BitMap64:
        """The chunks that cannot be read here when the snapshot's preserved layers have lost `lost`."""
        return (lost | self.delta_layer.lost) - self.delta_layer.held

    @property
    def written_bytes(self) -> int:
        """The bytes that were written to the snapshot's image, in whole chunks."""
        return len(self.delta_layer.held) * CHUNK_BYTES

    @property
    def preserved_bytes(self) -> int:
        """The bytes that the origin overwrote and the snapshot's own group of layers keeps, in whole chunks."""
        return sum(len(layer.held) for layer in self.own_layers()[1:]) * CHUNK_BYTES

    async def allocated_bytes(self) -> int:
        """The bytes that the snapshot takes in the store for this origin, checksums included."""
        written = [layer for layer in self.own_layers() if layer.held]
        if not written:
            return 0
        with pinned(written):
            return await trio.to_thread.run_sync(lambda: sum(layer.files.allocated_bytes() for layer in written))

    # -- reading -------------------------------------------------------------------------------------------------

    def read_nowait(self, offset: int, length: int, into: memoryview) -> bytes | memoryview | None:
        """Read any extent without waiting; None where that cannot be done, or something is amiss.

        An extent in more than one chunk is read into `into`, which has to have `covering_bytes(length)` for it.
        """
        if offset + length > self.size_bytes or not length:
            return None
        chunk, start = divmod(offset, CHUNK_BYTES)
        try:
            layers = self._layers if self.version == self.epochs.version else self.layers()
            if start + length > CHUNK_BYTES:
                return self._read_run_nowait(layers, offset, length, into)
            if self._refused_from is not None:
                return None
            layer = holder_of(layers, chunk)
            if layer is None:
                return self._device.pread_nowait(length, offset)
        except (OSError, CowError):  # the waiting read reports it
            return None
        data = layer.read_chunk_nowait(chunk)
        return data if data is None or length == CHUNK_BYTES else data[start : start + length]

    def _read_run_nowait(self, layers: list[Layer], offset: int, length: int, into: memoryview) -> memoryview | None:
        run = covering(offset, length)
        if run.length > len(into):
            return None
        self._gather(resolve(layers, run), run, into[: run.length], nowait=True)
        start = offset - run.offset
        return into[start : start + length]

    def begin_read(self, reads: Reads, offset: int, length: int, answer: Answer) -> bool:
        """As `Handle.begin_read`, of what is beneath the buffer."""
        if length <= 0 or offset + length > self.size_bytes:
            return False
        try:
            found = resolve(self.layers(), covering(offset, length))
        except CowError:  # who reads the other way is told
            return False
        if self._refused_from is not None and any(self._is_refused(share.layer) for share in found):
            return False
        return Reading(reads, self, found, answer).begin(offset, length)

    def device_at(self, run: Run) -> int | None:
        """As of the origin."""
        return self.origin.device_at(run)

    async def read(self, run: Run) -> bytearray:
        """Read whole chunks; the device's last one is filled up with zeroes.

        Raises DamagedError when one does not match its checksum, which may be due to a write to the delta that
        is under way; LostError, SuspectError; OSError when a disk fails.
        """
        data = bytearray(run.length)
        into = memoryview(data)
        while True:
            found = resolve(self.layers(), run)
            try:
                self._gather(found, run, into, nowait=True)
                return data
            except BlockingIOError:
                pass
            with pinned([share.layer for share in found if share.layer is not None]):
                await trio.to_thread.run_sync(self._gather, found, run, into)
            # A chunk that was read from the device may have been preserved and overwritten meanwhile. The set is
            # changed before the device is, so if it is still missing from all layers, the bytes are the old ones. # I2
            if not self.is_overtaken(found):
                return data

    def _gather(self, found: list[Share], run: Run, into: memoryview, nowait: bool = False) -> None:
        if self._refused_from is not None and any(self._is_refused(share.layer) for share in found):
            raise SuspectError(
                "the device was changed while hcpfs was not running, so what this snapshot reads from it may be wrong: "
                "mount with -o read_suspect to read it all the same"
            )
        gather(found, run.first, into, self.origin.read_chunks_into, nowait=nowait)

    def _is_refused(self, layer: Layer | None) -> bool:
        return layer is None or (layer is not self.delta_layer and layer.id >= (self._refused_from or 0))

    def is_overtaken(self, found: Sequence[Share]) -> bool:
        """Whether any chunk that was read from the device is in a layer by now, or lost.

        Raises InvalidSnapshotError.
        """
        from_device = [run for share in found if share.layer is None for run in share.runs]
        if not from_device:
            return False
        known = (chunks for layer in self.layers() for chunks in (layer.held, layer.lost) if chunks)
        return any(chunks.range_cardinality(run.first, run.end) for chunks in known for run in from_device)
