"""Writes that wait: chunks, parts of chunks, and extents, newer bytes over older ones.

Exactly the bytes that were written are kept, so that they never overwrite what somebody wrote beside them. A long write
is one extent, in one piece of memory, however many chunks it has: there is no work per chunk. Later writes into an
extent change its bytes, so that extents never overlap and none is ever split.
"""

from bisect import bisect
from collections.abc import Iterable, Iterator

from pyroaring import BitMap64

from cow.buffer.memory import Memory
from cow.geometry import CHUNK_BYTES, Run, chunks_of, covering, pieces, runs_of, split

EXTENT_CHUNKS = 16  # from here on a write is an extent: 64 KiB
_ROW_CHUNKS = 256  # of single chunks in one write: 1 MiB


class Part:
    """A chunk that was written in part: its content, and which of its bytes were written."""

    def __init__(self) -> None:
        self.content = bytearray(CHUNK_BYTES)
        self.extents: list[tuple[int, int]] = []  #: (start, end) in the chunk; ascending, and none touches another

    def put(self, start: int, data: bytes | memoryview) -> None:
        """Write over the bytes that are there."""
        end = start + len(data)
        self.content[start:end] = data
        beside = [one for one in self.extents if one[1] < start or one[0] > end]
        touched = [one for one in self.extents if one[0] <= end and one[1] >= start]
        starts, ends = zip((start, end), *touched, strict=True)
        self.extents = sorted([*beside, (min(starts), max(ends))])

    def pieces(self) -> Iterator[tuple[int, bytes]]:
        """The bytes that were written: offsets in the chunk and bytes."""
        return ((start, bytes(self.content[start:end])) for start, end in self.extents)


Whole = bytes | memoryview  # all of a chunk, or of the chunks of an extent
Row = tuple[Run, Whole | list[Whole]]  # consecutive chunks and their bytes: in one piece, or chunk by chunk


class Extent:
    """Consecutive whole chunks, in one piece of memory."""

    def __init__(self, run: Run, content: Whole) -> None:
        self.run = run
        self.content = content

    def put(self, offset: int, data: memoryview) -> None:
        """Write over the bytes that are there. `data` lies within the extent."""
        at = offset - self.run.offset
        if not isinstance(self.content, memoryview) or self.content.readonly:
            self.content = memoryview(bytearray(self.content))
        self.content[at : at + len(data)] = data

    def chunk(self, number: int) -> Whole:
        """One of its chunks."""
        at = (number - self.run.first) * CHUNK_BYTES
        return self.content[at : at + CHUNK_BYTES]


def _first(extent: Extent) -> int:
    return extent.run.first


class Contents:
    """The writes that wait for one image."""

    def __init__(self) -> None:
        self.single: dict[int, bytes | Part] = {}  #: by chunk: those that are in no extent
        self.extents: list[Extent] = []  #: ascending; none overlaps another
        self.weight = 0  #: what it takes in memory, in chunks
        self._kept: list[Memory] = []
        self._extent_chunks = 0
        self._kept_chunks = 0  #: the size of the extents' memory, with what they do not use of it

    def __len__(self) -> int:
        """How many chunks were written, wholly or in part."""
        return len(self.single) + self._extent_chunks

    # -- putting in ----------------------------------------------------------------------------------------------

    def put(self, offset: int, data: bytes | memoryview, memory: Memory | None = None) -> None:
        """Put in a write, over the bytes that are there.

        `data` is copied, unless it is long enough for an extent and is either a read-only view, because then it does
        not change, or a view of `memory`, which is retained until `release`.
        """
        if len(data) == CHUNK_BYTES and not offset % CHUNK_BYTES and not self.extents:
            self.single[offset // CHUNK_BYTES] = bytes(data)
        else:
            self._put_long(offset, data, memory)
        self.weight = len(self.single) + self._kept_chunks

    def _put_long(self, offset: int, data: bytes | memoryview, memory: Memory | None) -> None:
        view = memoryview(data)
        done = offset
        for extent in self._overlapping(covering(offset, len(view))) if self.extents else ():
            start, end = max(done, extent.run.offset), min(offset + len(view), extent.run.offset + extent.run.length)
            if done < start:
                self._put_beside(done, view[done - offset : start - offset])
            extent.put(start, view[start - offset : end - offset])
            done = end
        if done < offset + len(view):
            self._put_beside(done, view[done - offset :], memory)

    def _put_beside(self, offset: int, view: memoryview, memory: Memory | None = None) -> None:
        """Put in a write that overlaps no extent."""
        head, body, tail = split(offset, len(view))
        if head:
            self._put_part(offset, view[:head])
        if body >= EXTENT_CHUNKS * CHUNK_BYTES:
            self._put_extent(covering(offset + head, body), view[head : head + body], memory)
        else:
            first = (offset + head) // CHUNK_BYTES
            cuts = range(head, head + body, CHUNK_BYTES)
            self.single |= enumerate([bytes(view[at : at + CHUNK_BYTES]) for at in cuts], first)
        if tail:
            self._put_part(offset + head + body, view[head + body :])

    def _put_part(self, offset: int, data: memoryview) -> None:
        chunk, start = divmod(offset, CHUNK_BYTES)
        content = self.single.setdefault(chunk, Part())
        if isinstance(content, Part):
            content.put(start, data)
        else:
            self.single[chunk] = b"".join((content[:start], data, content[start + len(data) :]))

    def _put_extent(self, run: Run, view: memoryview, memory: Memory | None) -> None:
        for chunk in self._single_in(run):
            del self.single[chunk]
        if memory is not None:
            memory.keep()
            self._kept.append(memory)
        content: Whole = view if memory is not None or view.readonly else bytes(view)
        self.extents.insert(bisect(self.extents, run.first, key=_first), Extent(run, content))
        self._extent_chunks += run.chunks
        self._kept_chunks += run.chunks if memory is None else chunks_of(len(memory.view))

    def put_beneath(self, older: "Contents") -> None:
        """Put in older contents, beneath what is there. Everything is copied."""
        for chunk, content in older.singly():
            newer = self.single.get(chunk)
            if self._overlapping(Run(chunk, 1)) or isinstance(newer, bytes):
                continue
            self.single[chunk] = content if isinstance(content, Part) else bytes(content)
            for start, data in () if newer is None else newer.pieces():
                self._put_part(chunk * CHUNK_BYTES + start, memoryview(data))
        self.weight = len(self.single) + self._kept_chunks

    def release(self) -> None:
        """Drop the references to retained memory. The extents in it must not be looked at any more."""
        kept, self._kept = self._kept, []
        for memory in kept:
            memory.release()

    # -- looking -------------------------------------------------------------------------------------------------

    def has(self, chunk: int) -> bool:
        """Whether any byte of the chunk is here."""
        return chunk in self.single or (bool(self.extents) and bool(self._overlapping(Run(chunk, 1))))

    def holds(self, run: Run) -> bool:
        """Whether any byte of the run is here."""
        if self.single and not self.single.keys().isdisjoint(range(run.first, run.end)):
            return True
        return bool(self.extents) and bool(self._overlapping(run))

    def chunks(self) -> BitMap64:
        """All chunks that were written, wholly or in part."""
        found = BitMap64(self.single)
        for extent in self.extents:
            found.add_range(extent.run.first, extent.run.end)
        return found

    def parts(self) -> dict[int, Part]:
        """The chunks that were written in part."""
        return {chunk: content for chunk, content in self.single.items() if isinstance(content, Part)}

    def pieces(self, run: Run) -> Iterator[tuple[int, bytes]]:
        """What is here of a run: offsets and bytes. These are copies, which neither changes nor `release` affect."""
        for chunk in self._single_in(run):
            yield from _pieces_of(chunk, self.single[chunk])
        for extent in self._overlapping(run):
            first, end = max(run.first, extent.run.first), min(run.end, extent.run.end)
            at = (first - extent.run.first) * CHUNK_BYTES
            yield first * CHUNK_BYTES, bytes(extent.content[at : at + (end - first) * CHUNK_BYTES])

    def rows(self, filled: dict[int, bytes] | None = None) -> list[Row]:
        """The whole chunks, and partly written ones as `filled` has them, to be written a row at a time."""
        whole = {chunk: content for chunk, content in self.single.items() if isinstance(content, bytes)}
        if filled:
            whole |= filled
        found: list[Row] = []
        for run in runs_of(BitMap64(whole)):
            if run.chunks == 1:
                found.append((run, whole[run.first]))
            else:
                found += [
                    (row, [whole[chunk] for chunk in range(row.first, row.end)]) for row in pieces(run, _ROW_CHUNKS)
                ]
        if self.extents:
            found = sorted([*found, *((extent.run, extent.content) for extent in self.extents)], key=_run_of)
        return found

    def only(self, chunks: Iterable[int]) -> "Contents":
        """Contents with these chunks alone."""
        wanted, found = frozenset(chunks), Contents()
        found.single = {
            chunk: content if isinstance(content, Part) else bytes(content)
            for chunk, content in self.singly()
            if chunk in wanted
        }
        return found

    def singly(self) -> Iterator[tuple[int, Whole | Part]]:
        """Chunk by chunk, in any order."""
        yield from self.single.items()
        for extent in self.extents:
            yield from ((chunk, extent.chunk(chunk)) for chunk in range(extent.run.first, extent.run.end))

    def _single_in(self, run: Run) -> list[int]:
        wanted = range(run.first, run.end)
        if run.chunks < len(self.single):
            return [chunk for chunk in wanted if chunk in self.single]
        return [chunk for chunk in self.single if chunk in wanted]

    def _overlapping(self, run: Run) -> list[Extent]:
        if not self.extents:
            return []
        start = bisect(self.extents, run.first, key=_first)
        if start and self.extents[start - 1].run.end > run.first:
            start -= 1
        return self.extents[start : bisect(self.extents, run.end - 1, key=_first)]


def contents_of(offset: int, data: bytes | memoryview) -> Contents:
    """The contents of one write. Its memory must not change while they are used."""
    contents = Contents()
    contents.put(offset, memoryview(data).toreadonly())
    return contents


def overlaid(data: bytes | bytearray, offset: int, pieces: Iterable[tuple[int, Whole]]) -> bytes:
    """What was read at `offset`, overlaid with the pieces (offsets and bytes), one after the other."""
    result = bytearray(data)
    for start, piece in pieces:
        at = start - offset
        visible = piece[max(0, -at) : max(0, len(data) - at)]
        result[max(0, at) : max(0, at) + len(visible)] = visible
    return bytes(result)


def covers(pieces: Iterable[tuple[int, Whole]], offset: int, length: int) -> bool:
    """Whether the pieces (offsets and bytes) cover all of an extent."""
    at = offset
    for start, piece_bytes in sorted((start, len(piece)) for start, piece in pieces):
        if start > at:
            break
        at = max(at, start + piece_bytes)
    return at >= offset + length


def _run_of(row: Row) -> Run:
    return row[0]


def _pieces_of(chunk: int, content: bytes | Part) -> Iterator[tuple[int, bytes]]:
    at = chunk * CHUNK_BYTES
    if isinstance(content, Part):
        yield from ((at + start, data) for start, data in content.pieces())
    else:
        yield at, content
