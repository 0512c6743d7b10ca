"""The checksums of a layer: what they are, and where they are kept.

A checksum is the XXH3-64 of a chunk, with a seed from its layer and its place: a chunk at a wrong place, or of a wrong
layer, does not match. Each has a slot of 8 bytes in the layer's file `sums`. The slots become durable with a
checkpoint; until then the journal has their contents.
"""

import threading
from collections.abc import Iterable, Iterator, Sequence
from itertools import count

from xxhash import xxh3_64_digest

from cow.disk.file import File
from cow.errors import SyncError
from cow.geometry import CHUNK_BYTES, Run
from cow.layers.layerfiles import LayerFiles

FILE_NAME = "sums"
SUM_BYTES = 8
SLOTS_IN_PAGE = 4096 // SUM_BYTES
MASK_64 = (1 << 64) - 1


class Sums:
    """The checksums of one layer. Safe to use from several threads.

    `chunks` is the size of the device in chunks. Checksums go in and out as bytes, 8 a chunk.
    """

    def __init__(self, files: LayerFiles, layer: int, chunks: int) -> None:
        self.in_doubt = False  #: whether a sync of the slots failed, so that some may be lost
        self._files = files
        self._chunks = chunks
        self._seed = (layer * 0x9E3779B97F4A7C15) & MASK_64
        self._writing = threading.Lock()  #: guards the slots against two writers of one page

    def seed_of(self, chunk: int) -> int:
        """The seed of a chunk's checksum."""
        return (self._seed + chunk) & MASK_64

    def of_data(self, first: int, data: bytes | memoryview) -> bytes:
        """The checksums of the whole chunks in `data`, which start at chunk `first`."""
        if len(data) == CHUNK_BYTES:
            return xxh3_64_digest(data, self.seed_of(first))
        view = memoryview(data)
        return self.of_chunks(first, [view[at : at + CHUNK_BYTES] for at in range(0, len(view), CHUNK_BYTES)])

    def of_chunks(self, first: int, chunks: Iterable[bytes | memoryview]) -> bytes:
        """The same for consecutive chunks."""
        seed = self.seed_of(first)
        if seed + self._chunks > MASK_64:
            return b"".join([xxh3_64_digest(chunk, one & MASK_64) for one, chunk in enumerate(chunks, seed)])
        return b"".join(list(map(xxh3_64_digest, chunks, count(seed))))

    def write(self, first: int, sums: bytes) -> None:
        """Write the checksums of consecutive chunks into their slots."""
        with self._writing:
            self._files.file(FILE_NAME, create=True).pwrite(sums, first * SUM_BYTES)

    def write_runs(self, runs: Sequence[Run], sums: bytes) -> None:
        """The same for several runs, ascending: those of one page with one write."""
        if len(runs) == 1:
            return self.write(runs[0].first, sums)
        file, at = self._files.file(FILE_NAME, create=True), 0
        for near in _by_page(runs):
            start, size = near[0][0], sum([chunks for _, chunks in near]) * SUM_BYTES
            mine = sums[at : at + size]
            at += size
            with self._writing:
                file.pwrite(mine if len(near) == 1 else _woven(file, near, mine), start * SUM_BYTES)
        return None

    def read_runs(self, runs: Sequence[Run]) -> bytes:
        """The checksums in the slots of several runs, ascending: those of one page with one read."""
        file, found = self._files.file(FILE_NAME), list[bytes]()
        for near in _by_page(runs):
            start = near[0][0]
            slots = file.pread((near[-1].end - start) * SUM_BYTES, start * SUM_BYTES)
            places = [((first - start) * SUM_BYTES, chunks * SUM_BYTES) for first, chunks in near]
            found += [slots[place : place + size] for place, size in places]
        return b"".join(found)

    def read(self, run: Run, *, nowait: bool = False) -> bytes:
        """The checksums in the slots of a run; fewer if the file ends before.

        Raises FileNotFoundError, and BlockingIOError under `nowait` when it would wait for a disk.
        """
        file = self._files.file(FILE_NAME)
        return (file.pread_nowait if nowait else file.pread)(run.chunks * SUM_BYTES, run.first * SUM_BYTES)

    def sync(self) -> None:
        """Make the slots durable. After an error they are `in_doubt`, and must be written anew before the next."""
        try:
            self._files.file(FILE_NAME, create=True).sync()
        except (OSError, SyncError):
            self.in_doubt = True
            raise

    def forget_sync_failure(self) -> None:
        """The slots were written anew, so let the next `sync` succeed."""
        self._files.file(FILE_NAME).forget_sync_failure()


def _woven(file: File, near: Sequence[Run], sums: bytes) -> bytearray:
    """The new content of the slots that the runs span: those between the runs stay."""
    start, at = near[0].first, 0
    length = (near[-1].end - start) * SUM_BYTES
    slots = bytearray(file.pread(length, start * SUM_BYTES).ljust(length, b"\0"))
    for first, chunks in near:
        place, size = (first - start) * SUM_BYTES, chunks * SUM_BYTES
        slots[place : place + size] = sums[at : at + size]
        at += size
    return slots


def _by_page(runs: Sequence[Run]) -> Iterator[list[Run]]:
    """The runs, grouped by the page in which their slots begin."""
    near: list[Run] = []
    page = -1
    for run in runs:
        if run[0] // SLOTS_IN_PAGE == page:
            near.append(run)
            continue
        if near:
            yield near
        near, page = [run], run[0] // SLOTS_IN_PAGE
    if near:
        yield near
