"""A layer: the exceptions of one epoch, or one snapshot's own writes, for one origin.

On disk it is a directory, made when first written: `data.NNNN` (sparse, at the device's own offsets, one file a TiB),
`sums` (8 bytes a chunk) and `map` (the set of chunks at the last checkpoint). The bytes are described in FORMAT.md.

The sets of chunks live here and change only on the trio thread; file calls are made from any thread. The layer does
not decide when anything is durable: its owner calls `sync_data`, commits to the journal, then updates the sets.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count

from pyroaring import BitMap64
from xxhash import xxh3_64_digest

from cow import layermap
from cow.device import Directory, File
from cow.errors import CowError, DamagedError, SyncError
from cow.geometry import CHUNK_BYTES, Run, pieces, place_of, runs_of
from cow.layermap import BadMapError, LayerMap, MapImage

SEGMENT_CHUNKS = (1 << 40) // CHUNK_BYTES  # ext4 files end at 16 TiB
SUM_BYTES = 8
_REHASH_CHUNKS = 256  # read at a time: 1 MiB
_SUM_PAGE_CHUNKS = 4096 // SUM_BYTES
_MASK_64 = (1 << 64) - 1


FileKey = int | str  # of an open file: the number of a segment, or another file's name


class Layer:
    """A layer and its files. `chunks` is the size of the device in chunks."""

    def __init__(self, parent: Directory, layer_id: int, chunks: int) -> None:
        self.id = layer_id
        self.chunks = chunks
        self.held = BitMap64()  #: what readers find here
        self.lost = BitMap64()  #: what should be here and could not be kept: readers get EIO, unless it is held again
        self.uncommitted = BitMap64()  #: held, but recovery would not find it: written since the last commit
        self.intended = BitMap64()  #: committed earlier, perhaps overwritten in place since
        self.written_ns = 0  #: time of the last write to a delta, 0 when there was none
        self.generation = 0  #: of the map that was encoded last; grows
        self.dirty = False  #: whether the journal has commits that the last checkpoint had not
        self.sums_in_doubt = False  #: whether a sync of the checksums failed, so that some may be lost
        self.damage: str | None = None  #: why nothing in this layer can be trusted
        self._parent = parent
        self._directory: Directory | None = None
        self._files: dict[FileKey, File] = {}
        self._unsynced: set[int] = set()  #: segments
        self._entries_unsynced = False  #: whether files were made since the directory was synced
        self._summing = threading.Lock()  #: guards the checksums' slots against two writers of one page
        self._opening = threading.Lock()  #: guards `_directory`, `_files` and what is unsynced
        self.pins = 0  #: how many threads may be working on the files
        self._closing = False
        # Mixed into each checksum, so that a chunk at a wrong place or in a wrong layer is found out.
        self._seed = (layer_id * 0x9E3779B97F4A7C15) & _MASK_64

    @property
    def is_in_memory(self) -> bool:
        """Whether its files never wait for a disk."""
        return self._parent.is_in_memory

    @property
    def name(self) -> str:
        """The layer's directory name."""
        return f"{self.id:016x}"

    @property
    def known(self) -> BitMap64:
        """The chunks that readers look for here and no further: those held and those lost."""
        return self.held | self.lost if self.lost else self.held

    # -- files ---------------------------------------------------------------------------------------------------

    def _file(self, key: FileKey, *, create: bool = False) -> File:
        file = self._files.get(key)
        if file is not None:
            return file
        with self._opening:
            if key not in self._files:
                self._check_open()
                if self._directory is None:
                    self._directory = self._parent.subdirectory(self.name, create=create)
                name = _segment_name(key) if isinstance(key, int) else key
                try:
                    self._files[key] = self._directory.open(name)
                except FileNotFoundError:
                    if not create:
                        raise
                    self._files[key] = self._directory.open(name, create=True)
                    self._entries_unsynced = True
            return self._files[key]

    def _check_open(self) -> None:
        if self._closing and not self.pins:
            raise CowError(f"layer {self.name} is closed")

    def pin(self) -> None:
        """Keep the files open while another thread works on them; undone by `unpin`. Trio thread only."""
        self.pins += 1

    def unpin(self) -> None:
        """Undo one `pin`; the last one of a closed layer closes the files."""
        self.pins -= 1
        if self._closing and self.pins == 0:
            self.close()

    def close(self) -> None:
        """Close all files, now or when the last pin goes. Nothing is synced."""
        self._closing = True
        if self.pins:
            return
        with self._opening:
            for file in self._files.values():
                file.close()
            self._files.clear()
            if self._directory is not None:
                self._directory.close()
                self._directory = None

    def remove_files(self) -> None:
        """Delete the layer's directory. The catalog must not name the layer any more."""
        remove_layer_directory(self._parent, self.name)

    def allocated_bytes(self) -> int:
        """What the layer takes in the store. 0 before its first write."""
        with self._opening:
            if self._directory is None:
                self._check_open()
                try:
                    self._directory = self._parent.subdirectory(self.name)
                except FileNotFoundError:
                    return 0
            return self._directory.allocated_bytes()

    # -- chunks --------------------------------------------------------------------------------------------------

    def checksums(self, first: int, data: bytes | memoryview) -> bytes:
        """The checksums, 8 bytes each, of the whole chunks in `data`, which start at chunk `first`."""
        if len(data) == CHUNK_BYTES:
            return xxh3_64_digest(data, self._seed_of(first))
        view = memoryview(data)
        return self.checksums_of(first, [view[at : at + CHUNK_BYTES] for at in range(0, len(view), CHUNK_BYTES)])

    def checksums_of(self, first: int, chunks: Iterable[bytes | memoryview]) -> bytes:
        """The same of chunks that follow each other."""
        seed = self._seed_of(first)
        if seed + self.chunks > _MASK_64:
            return b"".join([xxh3_64_digest(chunk, one & _MASK_64) for one, chunk in enumerate(chunks, seed)])
        return b"".join(list(map(xxh3_64_digest, chunks, count(seed))))

    def _seed_of(self, chunk: int) -> int:
        return (self._seed + chunk) & _MASK_64

    def write(self, first: int, data: bytes | memoryview) -> bytes:
        """Write whole chunks and their checksums, and return the checksums. Nothing is durable yet.

        The caller puts the chunks into `held` once the write has returned.
        """
        sums = self.write_data(first, data)
        self.write_sums(first, sums)
        return sums

    def write_data(self, first: int, data: bytes | memoryview) -> bytes:
        """As `write`, and the caller writes the checksums."""
        segment, place = divmod(first, SEGMENT_CHUNKS)
        if place + len(data) // CHUNK_BYTES > SEGMENT_CHUNKS:
            here = (SEGMENT_CHUNKS - place) * CHUNK_BYTES
            view = memoryview(data)
            return self.write_data(first, view[:here]) + self.write_data(first + SEGMENT_CHUNKS - place, view[here:])
        file = self._files.get(segment) or self._file(segment, create=True)
        file.pwrite(data, place * CHUNK_BYTES)
        if segment not in self._unsynced:  # when it is, the write before this came before the sync
            self._note_unsynced(segment)
        return self.checksums(first, data)

    def write_chunks(self, first: int, chunks: Sequence[bytes | memoryview]) -> bytes:
        """As `write_data`, of chunks that lie apart in memory."""
        segment, place = divmod(first, SEGMENT_CHUNKS)
        here = SEGMENT_CHUNKS - place
        if len(chunks) > here:
            return self.write_chunks(first, chunks[:here]) + self.write_chunks(first + here, chunks[here:])
        self._file(segment, create=True).pwritev(chunks, place * CHUNK_BYTES)
        self._note_unsynced(segment)
        return self.checksums_of(first, chunks)

    def _note_unsynced(self, segment: int) -> None:
        with self._opening:
            self._unsynced.add(segment)

    def write_sums(self, first: int, sums: bytes) -> None:
        """Put checksums into their slots. Durable after a checkpoint; until then the journal has them."""
        with self._summing:
            self._file("sums", create=True).pwrite(sums, first * SUM_BYTES)

    def write_sums_of(self, runs: Sequence[Run], sums: bytes) -> None:
        """Put the checksums of several runs, ascending, into their slots: those of one page with one write."""
        if len(runs) == 1:
            return self.write_sums(runs[0].first, sums)
        file, at = self._file("sums", create=True), 0
        for near in _by_sum_page(runs):
            start, size = near[0][0], sum([chunks for _, chunks in near]) * SUM_BYTES
            mine = sums[at : at + size]
            at += size
            with self._summing:
                file.pwrite(mine if len(near) == 1 else self._woven(file, near, mine), start * SUM_BYTES)
        return None

    @staticmethod
    def _woven(file: File, near: Sequence[Run], sums: bytes) -> bytearray:
        """The slots that the runs span as they shall be: those between them stay."""
        start, at = near[0].first, 0
        length = (near[-1].end - start) * SUM_BYTES
        slots = bytearray(file.pread(length, start * SUM_BYTES).ljust(length, b"\0"))
        for first, chunks in near:
            place, size = (first - start) * SUM_BYTES, chunks * SUM_BYTES
            slots[place : place + size] = sums[at : at + size]
            at += size
        return slots

    def read_sums_of(self, runs: Sequence[Run]) -> bytes:
        """The checksums of several runs, ascending, from their slots: those of one page with one read."""
        file, found = self._file("sums"), list[bytes]()
        for near in _by_sum_page(runs):
            start = near[0][0]
            slots = file.pread((near[-1].end - start) * SUM_BYTES, start * SUM_BYTES)
            places = [((first - start) * SUM_BYTES, chunks * SUM_BYTES) for first, chunks in near]
            found += [slots[place : place + size] for place, size in places]
        return b"".join(found)

    def read(self, run: Run) -> memoryview:
        """Read whole chunks, checked. Raises as `fill`."""
        data = memoryview(bytearray(run.length))
        self.fill([run], run.first, data)
        return data

    def read_chunk_nowait(self, chunk: int) -> bytes | None:
        """The same of one chunk; None where a disk would have to be waited for, or something is amiss."""
        segment, place = divmod(chunk, SEGMENT_CHUNKS)
        file, sums = self._files.get(segment), self._files.get("sums")
        if file is None or sums is None or self.damage is not None:
            return None
        try:
            data = file.pread_nowait(CHUNK_BYTES, place * CHUNK_BYTES)
            expected = sums.pread_nowait(SUM_BYTES, chunk * SUM_BYTES)
        except BlockingIOError:
            return None
        return data if xxh3_64_digest(data, self._seed_of(chunk)) == expected else None

    def fill(self, runs: Sequence[Run], first: int, into: memoryview, *, nowait: bool = False) -> None:
        """Read runs, ascending, to their places in `into`, which begins with the chunk `first`, and check them. # I4

        Their checksums are read with one call: they should lie close. Raises DamagedError naming the first chunk that
        does not match; BlockingIOError under `nowait` when a disk would have to be waited for.
        """
        if self.damage is not None:
            raise DamagedError(self.damage)
        if nowait and "sums" not in self._files:  # to open it may take a while
            raise BlockingIOError
        start, end = runs[0].first, runs[-1].end
        segment = start // SEGMENT_CHUNKS
        if end > (segment + 1) * SEGMENT_CHUNKS:
            for run in runs:
                for _, piece in _by_segment(run):
                    self.fill([piece], first, into, nowait=nowait)
            return
        read, seed = self._reader(segment, nowait), self._seed
        sums = self._expected(Run(start, end - start), nowait)
        for run in runs:
            chunk, chunks = run
            at, size = (chunk - first) * CHUNK_BYTES, chunks * CHUNK_BYTES
            part = into[at : at + size]
            if read(part, (chunk - segment * SEGMENT_CHUNKS) * CHUNK_BYTES) != size:
                raise self._cut_short(run)
            expected = sums[(chunk - start) * SUM_BYTES : (chunk - start + chunks) * SUM_BYTES]
            if chunks > 1 or xxh3_64_digest(part, (seed + chunk) & _MASK_64) != expected:
                self._check(run, part, expected)

    def _check(self, run: Run, data: memoryview, sums: bytes) -> None:
        found = self.checksums(run.first, data)
        if found != sums:
            raise DamagedError(self._mismatch(run, found, sums))

    def read_unchecked(self, run: Run) -> tuple[memoryview, bytes]:
        """Whole chunks and what their checksums should be. Raises DamagedError when a file is missing or too short."""
        data = memoryview(bytearray(run.length))
        for segment, part in _by_segment(run):
            into = data[place_of(part, run.first)]
            if self._reader(segment, nowait=False)(into, part.first % SEGMENT_CHUNKS * CHUNK_BYTES) != len(into):
                raise self._cut_short(run)
        return data, self._expected(run, nowait=False)

    def _reader(self, segment: int, nowait: bool) -> Callable[[memoryview, int], int]:
        try:
            file = self._files.get(segment) or self._file(segment)
        except FileNotFoundError as error:
            raise self._missing(error) from error
        return file.fill_nowait if nowait else file.fill

    def _expected(self, run: Run, nowait: bool) -> bytes:
        """What the checksums of the run should be."""
        try:
            file = self._file("sums")
        except FileNotFoundError as error:
            raise self._missing(error) from error
        sums = (file.pread_nowait if nowait else file.pread)(run.chunks * SUM_BYTES, run.first * SUM_BYTES)
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

    def commit(self, chunks: BitMap64) -> None:
        """Take over chunks that the journal has: readers and the next checkpoint find them. Trio thread only."""
        self.held |= chunks
        self.uncommitted -= chunks
        self.intended -= chunks
        self.lost -= chunks
        self.dirty = True

    def lose(self, chunks: BitMap64) -> None:
        """Take over chunks that the journal says are lost. Trio thread only."""
        self.lost |= chunks
        self.held -= chunks
        self.uncommitted -= chunks
        self.intended -= chunks
        self.dirty = True

    def rehash(self, chunks: BitMap64) -> BitMap64:
        """Take the chunks' bytes as they stand, make them durable, and write their checksums anew.

        For chunks under an INTENT after a crash: unflushed writes may be there, gone, or torn, as on any disk. Returns
        those that cannot be read, whose checksums stay as they are.
        """
        unreadable = BitMap64()
        for found in runs_of(chunks):
            for part in (piece for _, segment in _by_segment(found) for piece in pieces(segment, _REHASH_CHUNKS)):
                unreadable |= self._rehash_part(part)
        self.sync_data()
        return unreadable

    def _rehash_part(self, part: Run) -> BitMap64:
        segment = part.first // SEGMENT_CHUNKS
        try:
            data = self._file(segment).pread(part.length, part.first % SEGMENT_CHUNKS * CHUNK_BYTES)
        except OSError:
            if part.chunks == 1:
                return BitMap64([part.first])
            return BitMap64.union(*(self._rehash_part(chunk) for chunk in pieces(part, 1)))
        self.write_sums(part.first, self.checksums(part.first, data.ljust(part.length, b"\0")))
        self._note_unsynced(segment)
        return BitMap64()

    def new_bytes(self, chunks: BitMap64) -> int:
        """An upper bound of what holding `chunks`, at least one, will add to the store, in bytes."""
        fresh = len(chunks) - chunks.intersection_cardinality(self.held)
        pages = min(len(chunks), chunks.max() // _SUM_PAGE_CHUNKS - chunks.min() // _SUM_PAGE_CHUNKS + 1)
        return fresh * CHUNK_BYTES + pages * 4096

    def sync_data(self) -> None:
        """Make all data written so far durable. The checksums become durable with the journal's record."""
        with self._opening:
            segments, self._unsynced = self._unsynced, set()
            entries, self._entries_unsynced = self._entries_unsynced, False
        try:
            for segment in segments:
                self._file(segment).sync()
            if entries and self._directory is not None:
                self._directory.sync()
        except (OSError, SyncError):
            with self._opening:
                self._unsynced |= segments
                self._entries_unsynced |= entries
            raise

    def give_up_unsynced(self) -> None:
        """After a failed sync whose chunks are durably lost: later writes can be synced again."""
        with self._opening:
            for segment in self._unsynced & self._files.keys():
                self._files[segment].forget_sync_failure()
            self._unsynced.clear()

    def punch(self, chunks: BitMap64) -> None:
        """Give back the space of chunks that nobody reads here any more."""
        for run in runs_of(chunks):
            for segment, part in _by_segment(run):
                self._file(segment).punch(part.first % SEGMENT_CHUNKS * CHUNK_BYTES, part.length)

    # -- the checkpoint ------------------------------------------------------------------------------------------

    def encode_map(self) -> MapImage:
        """The set of committed chunks as the content of `map`, of a new generation. Trio thread only."""
        self.generation += 1
        committed = self.held - self.uncommitted
        return layermap.encode(LayerMap(self.id, self.generation, self.written_ns, committed, self.lost))

    def save(self, image: MapImage) -> None:
        """Make `sums` and the map durable. The caller puts the map's generation into the catalog after that.

        After an error in `sums` (`sums_in_doubt`) its latest checksums must be written anew before the next try.
        """
        try:
            self._file("sums", create=True).sync()
        except (OSError, SyncError):
            self.sums_in_doubt = True
            raise
        assert self._directory is not None  # `_file` opened it
        layermap.replace(self._directory, image)

    def renew_sums(self, records: Iterable[tuple[Sequence[Run], bytes]]) -> None:
        """Write checksums anew after a sync of them failed; what it covered may be lost. # I3

        `records` has those that are in the journal; of chunks that are not committed the bytes count. No write to the
        layer may be under way.
        """
        sums = self._file("sums")
        for runs, digests in records:
            at = 0
            for run in runs:
                self.write_sums(run.first, digests[at : at + SUM_BYTES * run.chunks])
                at += SUM_BYTES * run.chunks
        sums.forget_sync_failure()
        self.rehash(self.uncommitted | self.intended)

    def load(self, generation: int) -> None:
        """Read `map` into `held` and `lost`; a bad one sets `damage`, and so does one older than `generation`.

        A layer that has none, and none of which the catalog knows (generation 0), holds nothing.
        """
        try:
            self._directory = self._parent.subdirectory(self.name)
            file = self._directory.open(layermap.FILE_NAME)
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
        self.held, self.lost, self.written_ns, self.generation = (
            found.held,
            found.lost,
            found.written_ns,
            found.generation,
        )
        if self.generation < generation:
            self.damage = f"the map of layer {self.name} is an old one: what it holds is unknown"


@contextmanager
def pinned(layers: Sequence[Layer]) -> Iterator[None]:
    """Keep the layers' files open while another thread works on them. Trio thread only."""
    for layer in layers:
        layer.pin()
    try:
        yield
    finally:
        for layer in layers:
            layer.unpin()


def remove_layer_directory(layers: Directory, name: str) -> None:
    """Delete a layer's directory and what is in it; a missing one is fine."""
    try:
        directory = layers.subdirectory(name)
    except FileNotFoundError:
        return
    for file in directory.names():
        directory.unlink(file)
    directory.close()
    layers.rmdir(name)


def _by_sum_page(runs: Sequence[Run]) -> Iterator[list[Run]]:
    """Those together whose checksums begin in the same page."""
    near: list[Run] = []
    page = -1
    for run in runs:
        if run[0] // _SUM_PAGE_CHUNKS == page:
            near.append(run)
            continue
        if near:
            yield near
        near, page = [run], run[0] // _SUM_PAGE_CHUNKS
    if near:
        yield near


def _segment_name(segment: int) -> str:
    return f"data.{segment:04d}"


def _by_segment(run: Run) -> list[tuple[int, Run]]:
    segment, last = run.first // SEGMENT_CHUNKS, (run.end - 1) // SEGMENT_CHUNKS
    if segment == last:
        return [(segment, run)]
    head = Run(run.first, (segment + 1) * SEGMENT_CHUNKS - run.first)
    return [(segment, head), *_by_segment(Run(head.end, run.chunks - head.chunks))]
