"""A layer: the exceptions of one epoch, or one snapshot's own writes, for one origin.

On disk it is a directory, made when first written: `data.NNNN` (sparse, at the device's own offsets, one file a TiB),
`sums` (8 bytes a chunk) and `map` (the set of chunks at the last checkpoint). The bytes are described in FORMAT.md.

Its sets of chunks (sets.py) change only on the trio thread; file calls are made from any thread. The layer does not
decide when anything is durable: its owner calls `files.sync_data`, commits to the journal, then changes the sets.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

from pyroaring import BitMap64
from xxhash import xxh3_64_digest

from cow.disk.directory import Directory
from cow.disk.passing import raise_if_passing, stays
from cow.errors import DamagedError
from cow.geometry import CHUNK_BYTES, Run, pieces, place_of, runs_of
from cow.layers import layermap
from cow.layers.layerfiles import INODES_OF_A_LAYER, OPEN_FILES_OF_A_LAYER, LayerFiles
from cow.layers.layermap import BadMapError, LayerMap, MapImage
from cow.layers.sets import LayerSets
from cow.layers.sums import FILE_NAME as SUMS
from cow.layers.sums import MASK_64, SLOTS_IN_PAGE, SUM_BYTES, Sums

SEGMENT_CHUNKS = (1 << 40) // CHUNK_BYTES  # ext4 files end at 16 TiB
OTHER_OPEN_FILES = 64  #: of a process, besides those of layers
_REHASH_CHUNKS = 256  # read at a time: 1 MiB


def segments_of(chunks: int) -> int:
    """How many files the data of a layer may take, for a device with that many chunks."""
    return -(-chunks // SEGMENT_CHUNKS)


def open_files(chunks: int) -> int:
    """How many files a layer of such a device has open at most."""
    return OPEN_FILES_OF_A_LAYER - 1 + segments_of(chunks)


def inodes(chunks: int) -> int:
    """How many inodes a layer of such a device takes at most."""
    return INODES_OF_A_LAYER - 1 + segments_of(chunks)


class Place(NamedTuple):
    """Where chunks of a layer are: descriptors of its files, and the first byte in that of the data."""

    data: int
    offset: int
    sums: int


class Layer(LayerSets):
    """A layer, in a directory of its own in `parent`. `chunks` is the size of the device in chunks."""

    def __init__(self, parent: Directory, layer_id: int, chunks: int) -> None:
        super().__init__()
        self.id = layer_id
        self.chunks = chunks
        self.written_ns = 0  #: time of the last write to a delta, 0 when there was none
        self.generation = 0  #: of the map that was encoded last; grows
        self.damage: str | None = None  #: why nothing in this layer can be trusted; recovery finds it
        self.files = LayerFiles(parent, f"{layer_id:016x}")
        self.sums = Sums(self.files, layer_id, chunks)

    @property
    def is_in_memory(self) -> bool:
        """Whether its files never wait for a disk."""
        return self.files.is_in_memory

    @property
    def name(self) -> str:
        """The layer's directory name."""
        return self.files.name

    def close(self) -> None:
        """Close the files, now or when the last thread has finished with them. Nothing is synced. Trio thread only."""
        self.files.close()

    # -- chunks --------------------------------------------------------------------------------------------------

    def write(self, first: int, data: bytes | memoryview) -> bytes:
        """Write whole chunks and their checksums, and return the checksums. Nothing is durable yet.

        The caller puts the chunks into `held` once the write has returned.
        """
        sums = self.write_data(first, data)
        self.sums.write(first, sums)
        return sums

    def write_data(self, first: int, data: bytes | memoryview) -> bytes:
        """Like `write`, but the caller writes the checksums."""
        segment, place = divmod(first, SEGMENT_CHUNKS)
        if place + len(data) // CHUNK_BYTES > SEGMENT_CHUNKS:
            here = (SEGMENT_CHUNKS - place) * CHUNK_BYTES
            view = memoryview(data)
            return self.write_data(first, view[:here]) + self.write_data(first + SEGMENT_CHUNKS - place, view[here:])
        self.files.file(segment, create=True).pwrite(data, place * CHUNK_BYTES)
        self.files.note_unsynced(segment)
        return self.sums.of_data(first, data)

    def write_chunks(self, first: int, chunks: Sequence[bytes | memoryview]) -> bytes:
        """Like `write_data`, for chunks that are not contiguous in memory."""
        segment, place = divmod(first, SEGMENT_CHUNKS)
        here = SEGMENT_CHUNKS - place
        if len(chunks) > here:
            return self.write_chunks(first, chunks[:here]) + self.write_chunks(first + here, chunks[here:])
        self.files.file(segment, create=True).pwritev(chunks, place * CHUNK_BYTES)
        self.files.note_unsynced(segment)
        return self.sums.of_chunks(first, chunks)

    def read(self, run: Run) -> memoryview:
        """Read whole chunks, checked. Raises what `fill` raises."""
        data = memoryview(bytearray(run.length))
        self.fill([run], run.first, data)
        return data

    def read_chunk_nowait(self, chunk: int) -> bytes | None:
        """The same for one chunk; None when it would wait for a disk, or anything is wrong."""
        segment, place = divmod(chunk, SEGMENT_CHUNKS)
        file, sums = self.files.opened.get(segment), self.files.opened.get(SUMS)
        if file is None or sums is None or self.damage is not None:
            return None
        try:
            data = file.pread_nowait(CHUNK_BYTES, place * CHUNK_BYTES)
            expected = sums.pread_nowait(SUM_BYTES, chunk * SUM_BYTES)
        except BlockingIOError:
            return None
        return data if xxh3_64_digest(data, self.sums.seed_of(chunk)) == expected else None

    def place_of(self, run: Run) -> Place | None:
        """Where whole chunks can be read without opening anything; None where that is not in one place."""
        segment, place = divmod(run.first, SEGMENT_CHUNKS)
        data, sums = self.files.opened.get(segment), self.files.opened.get(SUMS)
        if data is None or sums is None or self.damage is not None or place + run.chunks > SEGMENT_CHUNKS:
            return None
        return Place(data.fd, place * CHUNK_BYTES, sums.fd)

    def fill(self, runs: Sequence[Run], first: int, into: memoryview, *, nowait: bool = False) -> None:
        """Read runs, ascending, to their places in `into`, which begins with the chunk `first`, and check them. # I4

        Their checksums are read with one call, so they should be close together. Raises DamagedError naming the first
        chunk that does not match; BlockingIOError under `nowait` when it would wait for a disk.
        """
        if self.damage is not None:
            raise DamagedError(self.damage)
        if nowait and SUMS not in self.files.opened:  # opening it may wait for a disk
            raise BlockingIOError
        start, end = runs[0].first, runs[-1].end
        segment = start // SEGMENT_CHUNKS
        if end > (segment + 1) * SEGMENT_CHUNKS:
            for run in runs:
                for _, piece in _by_segment(run):
                    self.fill([piece], first, into, nowait=nowait)
            return
        read, digest, seed = self._reader(segment, nowait), xxh3_64_digest, self.sums.seed_of(start)
        sums = self._expected(Run(start, end - start), nowait)
        beginning = segment * SEGMENT_CHUNKS
        for run in runs:  # many of one chunk each if an image was written at random
            chunk, chunks = run
            at, size, slot = (chunk - first) * CHUNK_BYTES, chunks * CHUNK_BYTES, (chunk - start) * SUM_BYTES
            part = into[at : at + size]
            if read(part, (chunk - beginning) * CHUNK_BYTES) != size:
                raise self._cut_short(run)
            if chunks > 1:
                self._check(run, part, sums[slot : slot + chunks * SUM_BYTES])
            elif digest(part, (seed + chunk - start) & MASK_64) != sums[slot : slot + SUM_BYTES]:
                self._check(run, part, sums[slot : slot + SUM_BYTES])

    def _check(self, run: Run, data: memoryview, sums: bytes) -> None:
        found = self.sums.of_data(run.first, data)
        if found != sums:
            raise DamagedError(self._mismatch(run, found, sums))

    def read_unchecked(self, run: Run) -> tuple[memoryview, bytes]:
        """Whole chunks, and the checksums expected of them. Raises DamagedError if a file is missing or too short."""
        data = memoryview(bytearray(run.length))
        for segment, part in _by_segment(run):
            into = data[place_of(part, run.first)]
            if self._reader(segment, nowait=False)(into, part.first % SEGMENT_CHUNKS * CHUNK_BYTES) != len(into):
                raise self._cut_short(run)
        return data, self._expected(run, nowait=False)

    def _reader(self, segment: int, nowait: bool) -> Callable[[memoryview, int], int]:
        try:
            file = self.files.file(segment)
        except FileNotFoundError as error:
            raise self._missing(error) from error
        return file.fill_nowait if nowait else file.fill

    def _expected(self, run: Run, nowait: bool) -> bytes:
        """The checksums that the run should have."""
        try:
            sums = self.sums.read(run, nowait=nowait)
        except FileNotFoundError as error:
            raise self._missing(error) from error
        if len(sums) != run.chunks * SUM_BYTES:
            raise self._cut_short(run)
        return sums

    def _missing(self, error: FileNotFoundError) -> DamagedError:
        return DamagedError(f"a file of layer {self.name} is missing from the store: {error.filename}")

    def _cut_short(self, run: Run) -> DamagedError:
        return DamagedError(
            f"a file of layer {self.name} ends before chunk {run.end} (offset {run.end * CHUNK_BYTES}): it was cut "
            f"short"
        )

    def _mismatch(self, run: Run, found: bytes, expected: bytes) -> str:
        bad = next(
            (
                index
                for index in range(run.chunks)
                if found[index * SUM_BYTES :][:SUM_BYTES] != expected[index * SUM_BYTES :][:SUM_BYTES]
            ),
            0,
        )
        chunk = run.first + bad
        return (
            f"chunk {chunk} (offset {chunk * CHUNK_BYTES}) of layer {self.name} does not match its checksum: the disk "
            f"under the store, or something else, changed it; the rest stays readable"
        )

    # -- after a stop, and where something failed ----------------------------------------------------------------

    def rehash(self, chunks: BitMap64) -> BitMap64:
        """Take the chunks' bytes as they stand, make them durable, and write their checksums anew.

        For chunks under an INTENT after a crash: unflushed writes may be there, gone, or torn, as on any disk. They are
        written once more, because after a failed sync the kernel may show what the disk does not have. Returns those
        that cannot be read, whose checksums stay as they are.
        """
        unreadable = BitMap64()
        for found in runs_of(chunks):
            for part in (piece for _, segment in _by_segment(found) for piece in pieces(segment, _REHASH_CHUNKS)):
                unreadable |= self._rehash_part(part)
        self.files.sync_data()
        return unreadable

    def _rehash_part(self, part: Run) -> BitMap64:
        segment = part.first // SEGMENT_CHUNKS

        def read() -> bytes:
            return self.files.file(segment).pread(part.length, part.first % SEGMENT_CHUNKS * CHUNK_BYTES)

        try:
            data = stays(read, f"chunks of layer {self.name} cannot be read") if part.chunks == 1 else read()
        except OSError as error:
            raise_if_passing(error, f"chunks of layer {self.name} cannot be read")
            if part.chunks == 1:
                return BitMap64([part.first])
            return BitMap64.union(*(self._rehash_part(chunk) for chunk in pieces(part, 1)))
        data = data.ljust(part.length, b"\0")
        try:
            self.files.file(segment).pwrite(data, part.first % SEGMENT_CHUNKS * CHUNK_BYTES)
        except OSError:
            if part.chunks > 1:
                return BitMap64.union(*(self._rehash_part(chunk) for chunk in pieces(part, 1)))
            # The chunk stays as it was read. If the disk has something else, the checksum will show it.
        self.sums.write(part.first, self.sums.of_data(part.first, data))
        self.files.note_unsynced(segment)
        return BitMap64()

    def unreadable(self, chunks: BitMap64) -> BitMap64:
        """Those of `chunks` that cannot be read; their contents are not checked. Raises MayPassError."""
        bad = BitMap64()
        for chunk in chunks:
            segment, place = divmod(chunk, SEGMENT_CHUNKS)
            read = partial(self._read_chunk_of, segment, place)
            try:
                stays(read, f"chunks of layer {self.name} cannot be read")
            except OSError:
                bad.add(chunk)
        return bad

    def _read_chunk_of(self, segment: int, place: int) -> bytes:
        return self.files.file(segment).pread(CHUNK_BYTES, place * CHUNK_BYTES)

    # -- space ---------------------------------------------------------------------------------------------------

    def new_bytes(self, chunks: BitMap64) -> int:
        """An upper bound, in bytes, of what holding `chunks`, at least one, will add to the store."""
        fresh = len(chunks) - chunks.intersection_cardinality(self.held)
        pages = min(len(chunks), chunks.max() // SLOTS_IN_PAGE - chunks.min() // SLOTS_IN_PAGE + 1)
        return fresh * CHUNK_BYTES + pages * 4096

    def punch(self, chunks: BitMap64) -> None:
        """Punch out chunks that no snapshot reads here any more."""
        for run in runs_of(chunks):
            for segment, part in _by_segment(run):
                self.files.file(segment).punch(part.first % SEGMENT_CHUNKS * CHUNK_BYTES, part.length)

    # -- the checkpoint ------------------------------------------------------------------------------------------

    def encode_map(self) -> MapImage:
        """The set of committed chunks as the content of `map`, of a new generation. Trio thread only.

        The layer is not dirty after that; where the map cannot be saved, `note_unsaved` makes it so again.
        """
        self.note_encoded()
        self.generation += 1
        committed = self.held - self.uncommitted
        return layermap.encode(LayerMap(self.id, self.generation, self.written_ns, committed, self.lost))

    def save(self, image: MapImage) -> None:
        """Make `sums` and the map durable. The caller puts the map's generation into the catalog after that.

        After an error in `sums` (`Sums.in_doubt`) its latest checksums must be written anew before the next try.
        """
        self.sums.sync()
        layermap.replace(self.files.directory(), image)

    def renew_sums(self, records: Iterable[tuple[Sequence[Run], bytes]]) -> None:
        """Write checksums anew after a sync of them failed; what it covered may be lost. # I3

        `records` has those in the journal; those of chunks that are not committed are computed from their bytes. No
        write to the layer may be in flight.
        """
        for runs, sums in records:
            self.sums.write_runs(runs, sums)
        self.sums.forget_sync_failure()
        self.rehash(self.uncommitted | self.intended)

    def load(self, generation: int) -> None:
        """Read `map` into `held` and `lost`; a bad one sets `damage`, and so does one older than `generation`.

        A layer without a map, if the catalog knows of none (generation 0), holds nothing.
        """
        try:
            file = self.files.directory().open(layermap.FILE_NAME)
        except FileNotFoundError:
            if generation:
                self.damage = f"the map of layer {self.name} is missing: what it holds is unknown"
            return
        try:
            found = layermap.read(file, self.id, self.chunks)
        except BadMapError as error:
            self.damage = f"the map of layer {self.name} {error}: what it holds is unknown"
            return
        finally:
            file.close()
        self.take_over(found.held, found.lost)
        self.written_ns, self.generation = found.written_ns, found.generation
        if self.generation < generation:
            self.damage = f"the map of layer {self.name} is an old one: what it holds is unknown"


@contextmanager
def pinned(layers: Sequence[Layer]) -> Iterator[None]:
    """Keep the layers' files open while another thread works on them. Trio thread only."""
    for layer in layers:
        layer.files.pin()
    try:
        yield
    finally:
        for layer in layers:
            layer.files.unpin()


def _by_segment(run: Run) -> list[tuple[int, Run]]:
    segment, last = run.first // SEGMENT_CHUNKS, (run.end - 1) // SEGMENT_CHUNKS
    if segment == last:
        return [(segment, run)]
    head = Run(run.first, (segment + 1) * SEGMENT_CHUNKS - run.first)
    return [(segment, head), *_by_segment(Run(head.end, run.chunks - head.chunks))]
