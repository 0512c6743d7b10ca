"""Chunks, runs and the arithmetic between bytes and chunks. Pure functions, no I/O, no state.

A *chunk* is the 4 KiB unit in which exceptions are kept. A *run* is a range of chunks. Most of the
engine works on runs.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

from pyroaring import BitMap64

CHUNK_BYTES = 4096


class Run(NamedTuple):
    """Chunks `first` to `first + chunks - 1`."""

    first: int
    chunks: int

    @property
    def end(self) -> int:
        """The first chunk after the run."""
        return self.first + self.chunks

    @property
    def offset(self) -> int:
        """Where the run begins, in bytes."""
        return self.first * CHUNK_BYTES

    @property
    def length(self) -> int:
        """The run's length in bytes."""
        return self.chunks * CHUNK_BYTES


_as_run: Callable[[tuple[int, int]], Run] = partial(tuple.__new__, Run)  # for very many: no call of a Python function


class Split(NamedTuple):
    """An extent cut at chunk borders: bytes in a first partial chunk, whole chunks, bytes in a last partial chunk.

    An extent inside one chunk is all head. Any part may be empty.
    """

    head_bytes: int
    body_bytes: int
    tail_bytes: int


def chunks_of(size_bytes: int) -> int:
    """How many chunks a device of that size has; the last one may be partial."""
    return -(-size_bytes // CHUNK_BYTES)


def covering(offset: int, length: int) -> Run:
    """The run of chunks that the extent touches. `length` is at least 1."""
    first = offset // CHUNK_BYTES
    return Run(first, chunks_of(offset + length) - first)


def covering_bytes(length: int) -> int:
    """An upper bound, in bytes, of the chunks that an extent of this length touches, wherever it starts."""
    return (chunks_of(length) + 1) * CHUNK_BYTES


def split(offset: int, length: int) -> Split:
    """Cut the extent into head, body and tail."""
    head = min(-offset % CHUNK_BYTES, length)
    tail = (length - head) % CHUNK_BYTES
    return Split(head, length - head - tail, tail)


def ragged(offset: int, length: int) -> Iterator[int]:
    """The chunks, at most two, that the extent covers only in part."""
    first, last = offset // CHUNK_BYTES, (offset + length - 1) // CHUNK_BYTES
    if offset % CHUNK_BYTES or (first == last and length < CHUNK_BYTES):
        yield first
    if (offset + length) % CHUNK_BYTES and first != last:
        yield last


def runs_of(chunks: BitMap64) -> Iterator[Run]:
    """The maximal runs of a set of chunks, ascending. Does not look at every chunk."""
    if not chunks:
        return iter(())
    first, count = chunks.min(), len(chunks)
    if chunks.max() - first < count:
        return iter((Run(first, count),))
    firsts, lasts = chunks - chunks.shift(1), chunks - chunks.shift(-1)
    return map(_as_run, [(first, last - first + 1) for first, last in zip(firsts, lasts, strict=True)])


def chunks_in(runs: Iterable[Run]) -> BitMap64:
    """The set of chunks of runs."""
    chunks = BitMap64()
    for run in runs:
        chunks.add_range(run.first, run.end)
    return chunks


def place_of(run: Run, first: int) -> slice:
    """Where a run is, in bytes, in a buffer that begins with the chunk `first`."""
    start, chunks = run
    return slice((start - first) * CHUNK_BYTES, (start + chunks - first) * CHUNK_BYTES)


def pieces(run: Run, most: int) -> Iterator[Run]:
    """Cut a run into pieces of at most `most` chunks."""
    for first in range(run.first, run.end, most):
        yield Run(first, min(most, run.end - first))
