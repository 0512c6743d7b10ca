"""Write-behind: writes to an image wait in memory, and go to where they belong many at a time.

A disk has a volatile cache, so a write may be acknowledged before it is durable, as long as a flush waits. So writes
are acknowledged into a buffer. A task takes all that has gathered to its place, while the next writes gather: with the
live image that is one commit of old bytes and then the device, with a snapshot's image the delta. Readers ask the
buffer first. # I3

The buffer has what was written, byte for byte and nothing more, so that it never covers what somebody wrote beside it.
What is not taken stays in the buffer: it is tried again at the next sync, which fails until it succeeds.
"""

from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import trio
from pyroaring import BitMap64

from cow.device import File
from cow.errors import CowError
from cow.geometry import CHUNK_BYTES, Run, chunks_of, covering, pieces, runs_of, split
from cow.offload import MOST_CHUNKS_HERE

MOST_CHUNKS = 4096  # that gather where a disk is waited for: 16 MiB. As much again may be on its way to the device
ENOUGH_CHUNKS = 1024  # that are worth a commit
LINGER_SECONDS = 0.01  # for more to come, when there are not enough
_WRITE_CHUNKS = 256  # in one write to the device: 1 MiB


class Part:
    """What was written of a chunk, when that is not all of it."""

    def __init__(self) -> None:
        self.content = bytearray(CHUNK_BYTES)
        self.extents: list[tuple[int, int]] = []  #: (start, end) in the chunk; ascending, and none touches another

    def put(self, start: int, data: bytes | memoryview) -> None:
        """Write over what there is."""
        end = start + len(data)
        self.content[start:end] = data
        beside = [one for one in self.extents if one[1] < start or one[0] > end]
        touched = [one for one in self.extents if one[0] <= end and one[1] >= start]
        starts, ends = zip((start, end), *touched, strict=True)
        self.extents = sorted([*beside, (min(starts), max(ends))])

    def pieces(self) -> Iterator[tuple[int, bytes]]:
        """Where in the chunk, and what."""
        return ((start, bytes(self.content[start:end])) for start, end in self.extents)


Whole = bytes | memoryview  # all of a chunk; a view is of a longer write, which is not copied
Content = Whole | Part  # of one chunk
Contents = Mapping[int, Content]  # by chunk


class _Generation:
    """What gathers together, and goes to the device together."""

    def __init__(self) -> None:
        self.chunks: dict[int, Content] = {}
        self.weight = 0  #: what it takes in memory, in chunks; twice that at most
        self._kept_chunks = 0  #: of the writes that the views are of, also where they were written over since
        self.arrived = trio.Event()  #: fires when something is put into it
        self.hurry = trio.Event()  #: fires when it shall not wait for more
        self.taken = trio.Event()  #: fires when nothing more is put into it
        self.done = trio.Event()  #: fires when it is on the device, or `error` says why not
        self.error: Exception | None = None
        self.is_kept = True  #: whether, after an error, it is in memory yet

    def put(self, offset: int, data: bytes | memoryview) -> None:
        if len(data) == CHUNK_BYTES and not offset % CHUNK_BYTES:
            self.chunks[offset // CHUNK_BYTES] = data
        else:
            self._put_long(offset, data)
        self._weigh()

    def _weigh(self) -> None:
        count = len(self.chunks)
        self.weight = count if count > self._kept_chunks else self._kept_chunks

    def _put_long(self, offset: int, data: bytes | memoryview) -> None:
        head, body, tail = split(offset, len(data))
        view = memoryview(data)
        if head:
            self._put_part(offset, view[:head])
        if body:
            first, end = (offset + head) // CHUNK_BYTES, head + body
            self.chunks |= enumerate([view[at : at + CHUNK_BYTES] for at in range(head, end, CHUNK_BYTES)], first)
            self._kept_chunks += chunks_of(len(data))
        if tail:
            self._put_part(offset + head + body, view[head + body :])

    def _put_part(self, offset: int, data: bytes | memoryview) -> None:
        chunk, start = divmod(offset, CHUNK_BYTES)
        content = self.chunks.setdefault(chunk, Part())
        if isinstance(content, Part):
            content.put(start, data)
        else:
            self.chunks[chunk] = b"".join((content[:start], data, content[start + len(data) :]))

    def put_beneath(self, chunk: int, older: Content) -> None:
        """Put in what was written before the rest."""
        newer = self.chunks.get(chunk)
        if newer is not None and not isinstance(newer, Part):
            return
        self.chunks[chunk] = older
        for start, data in () if newer is None else newer.pieces():
            self._put_part(chunk * CHUNK_BYTES + start, data)
        self._weigh()

    def pieces(self, run: Run) -> Iterator[tuple[int, Whole]]:
        """What it has of a run: offsets and bytes."""
        wanted = range(run.first, run.end) if run.chunks < len(self.chunks) else self.chunks
        for chunk in wanted:
            content = self.chunks.get(chunk) if run.first <= chunk < run.end else None
            if content is not None:
                yield from _pieces_of(chunk, content)


_NOTHING = _Generation()


class Untaken(NamedTuple):
    """What was not taken, and why; both empty when all was. A cause alone: it was dropped."""

    contents: Contents
    cause: Exception | None


class Behind:
    """The buffer of one image, called `label`. Trio thread only; `run` must be running.

    `take(contents)` brings them to where they belong and returns what was not taken; when it raises CowError or
    OSError, that is all of it. With `is_in_memory` it waits for no disk: the buffer is small then, and whoever finds it
    full empties it. `on_trouble` is told, with a sentence, when what was acknowledged is not taken, and
    `on_change` by how many chunks there are more in memory: a long write counts whole while a chunk of it waits.
    """

    def __init__(
        self,
        label: str,
        take: Callable[[Contents], Awaitable[Untaken]],
        on_trouble: Callable[[str], None],
        on_change: Callable[[int], None] = lambda chunks: None,
        *,
        is_in_memory: bool = False,
    ) -> None:
        self._label = label
        self._take = take
        self._on_trouble = on_trouble
        self._on_change = on_change
        self._is_in_memory = is_in_memory
        self._most_chunks = MOST_CHUNKS_HERE if is_in_memory else MOST_CHUNKS
        self._gathering = _Generation()
        self._leaving = _NOTHING  #: on its way to the device; older than what gathers
        self._failing = False  #: whether not all was taken the last time

    @property
    def chunks(self) -> int:
        """How many chunks are in memory."""
        return len(self._gathering.chunks) + len(self._leaving.chunks)

    @property
    def _weight(self) -> int:
        return self._gathering.weight + self._leaving.weight

    def has(self, chunk: int) -> bool:
        """Whether some of the chunk is in the buffer."""
        return chunk in self._gathering.chunks or chunk in self._leaving.chunks

    def holds(self, run: Run) -> bool:
        """Whether some of the run is in the buffer."""
        newer, older = self._gathering.chunks, self._leaving.chunks
        return any(chunks and not chunks.keys().isdisjoint(range(run.first, run.end)) for chunks in (newer, older))

    def pieces(self, offset: int, length: int) -> list[tuple[int, Whole]]:
        """What the buffer has of an extent, and perhaps around it: offsets and bytes, the later ones the newer."""
        if not self._gathering.chunks and not self._leaving.chunks:
            return []
        run = covering(offset, length)
        return [piece for generation in (self._leaving, self._gathering) for piece in generation.pieces(run)]

    @property
    def is_full(self) -> bool:
        """Whether there is no `room` for a write."""
        return self._gathering.weight >= self._most_chunks

    def is_long(self, length: int) -> bool:
        """Whether a write does not wait here: where there is only memory, to copy it would be to write it."""
        return self._is_in_memory and length > MOST_CHUNKS_HERE * CHUNK_BYTES

    async def room(self) -> None:
        """Wait while the buffer is full. Raises why nothing is taken when it stays so."""
        while self.is_full:
            full = self._gathering
            if self._is_in_memory:
                await self._bring(full)
            else:
                full.arrived.set()  # what was not taken the last time does not count as arrived
                full.hurry.set()
                await full.taken.wait()
            if self._failing:
                await full.done.wait()
                if self.is_full:
                    await _in_place(full)

    def put(self, offset: int, data: bytes | memoryview) -> None:
        """Take a write, for which there is `room`. A view is copied, as its memory may be used for something else."""
        gathering = self._gathering
        before = gathering.weight
        gathering.put(offset, bytes(data))
        weight = gathering.weight
        if weight != before:
            self._on_change(weight - before)
        if not gathering.arrived.is_set():
            gathering.arrived.set()
        if weight >= ENOUGH_CHUNKS:
            gathering.hurry.set()

    def forget(self) -> None:
        """Nobody wants what is in memory any more, nor will put anything there."""
        self._on_change(-self._weight)
        self._on_change = lambda chunks: None  # of what is on its way yet
        self._on_trouble = lambda sentence: None
        self._gathering, self._leaving = _Generation(), _NOTHING

    async def drain(self) -> None:
        """Return when all that was put is where it belongs, not yet durable there. # I3

        Raises OSError or CowError when something is not; it stays in the buffer, to be tried again by the next drain.
        """
        for generation in (self._leaving, self._gathering):
            if generation.chunks:
                generation.arrived.set()
                generation.hurry.set()
                await _in_place(generation)

    async def flush(self) -> None:
        """As `drain`, without waking anybody for it: it must not be cancelled before the buffer is forgotten."""
        for generation in (self._leaving, self._gathering):
            if generation.chunks:
                await self._bring(generation)
                await _in_place(generation)

    async def run(self) -> None:
        """Have taken what gathers, until cancelled."""
        while True:
            gathering = self._gathering
            await gathering.arrived.wait()
            with trio.move_on_after(LINGER_SECONDS):
                await gathering.hurry.wait()
            await self._bring(gathering)

    async def _bring(self, generation: _Generation) -> None:
        """Have a generation taken, unless somebody else has."""
        while self._leaving.chunks and not generation.taken.is_set():
            await self._leaving.done.wait()
        if not generation.taken.is_set():
            await self._flush()

    async def _flush(self) -> None:
        taken = self._leaving = self._gathering
        self._gathering = _Generation()
        taken.arrived.set()  # so that `run` looks for the next one; what was not taken before has not arrived
        taken.taken.set()
        taken.error = CowError("hcpfs was stopped before")  # until we know better
        left = Untaken(taken.chunks, None)
        try:
            left = await self._take(taken.chunks)
            taken.error = left.cause
        except (CowError, OSError) as error:
            taken.error = error
        finally:
            taken.is_kept = bool(left.contents)
            before = self._weight
            for chunk, content in left.contents.items():  # of which one must not keep a long write in memory
                self._gathering.put_beneath(chunk, content if isinstance(content, Part) else bytes(content))
            self._leaving = _NOTHING
            self._on_change(self._weight - before)
            taken.done.set()
        self._tell(taken.error if taken.is_kept else None)

    def _tell(self, error: Exception | None) -> None:
        if error is not None and not self._failing:
            self._on_trouble(
                f"writes to {self._label} that were acknowledged are still in memory ({error}); every sync of it fails "
                f"until they are taken"
            )
        self._failing = error is not None


async def _in_place(generation: _Generation) -> None:
    if not generation.done.is_set():
        await generation.done.wait()
    error = generation.error
    kept = "are still in memory" if generation.is_kept else "were dropped"
    sentence = f"writes that were acknowledged {kept}: {error}"
    if isinstance(error, OSError):
        raise OSError(error.errno, sentence) from error
    if isinstance(error, CowError):
        again = CowError(sentence)
        again.errno = error.errno
        raise again from error


def contents_of(offset: int, data: bytes | memoryview) -> Contents:
    """A write, chunk by chunk."""
    generation = _Generation()
    generation.put(offset, data)
    return generation.chunks


def write_out(device: File, contents: Contents) -> Untaken:
    """Write contents to their places on a device, and return what it does not take. Blocks; nothing is durable yet."""
    failed: set[int] = set()
    cause: Exception | None = None
    for row in rows(contents):
        try:
            _write_row(device, contents, row)
        except OSError as error:
            cause = error
            failed.update(_write_singly(device, contents, row) if row.chunks > 1 else (row.first,))
    return Untaken({chunk: contents[chunk] for chunk in sorted(failed)}, cause if failed else None)


def _write_row(device: File, contents: Contents, row: Run) -> None:
    first, chunks = row
    content = contents[first]
    if isinstance(content, Part):
        for offset, data in _pieces_of(first, content):
            device.pwrite(data, offset)
    elif chunks == 1:
        device.pwrite(content, first * CHUNK_BYTES)
    else:
        device.pwritev([contents[chunk] for chunk in range(first, row.end)], row.offset)  # type: ignore[misc]


def _write_singly(device: File, contents: Contents, row: Run) -> Iterator[int]:
    """Perhaps it is one bad sector: the chunks of a row that the device does not take."""
    for chunk in range(row.first, row.end):
        try:
            _write_row(device, contents, Run(chunk, 1))
        except OSError:
            yield chunk


def overlaid(data: bytes | bytearray, offset: int, pieces: Iterable[tuple[int, Whole]]) -> bytes:
    """What was read at `offset`, with the pieces (offsets and bytes) put over it, one after the other."""
    result = bytearray(data)
    for start, piece in pieces:
        at = start - offset
        visible = piece[max(0, -at) : max(0, len(data) - at)]
        result[max(0, at) : max(0, at) + len(visible)] = visible
    return bytes(result)


def _pieces_of(chunk: int, content: Content) -> Iterator[tuple[int, Whole]]:
    at = chunk * CHUNK_BYTES
    pieces: Iterable[tuple[int, Whole]] = content.pieces() if isinstance(content, Part) else [(0, content)]
    return ((at + start, data) for start, data in pieces)


def rows(contents: Contents) -> list[Run]:
    """The chunks, ascending, in runs that can be written at once. One that is not whole is by itself."""
    parts = [chunk for chunk, content in contents.items() if isinstance(content, Part)]
    found: list[Run] = []
    for run in runs_of(BitMap64(contents) - BitMap64(parts) if parts else BitMap64(contents)):
        found += pieces(run, _WRITE_CHUNKS) if run.chunks > _WRITE_CHUNKS else (run,)
    return sorted([*found, *(Run(chunk, 1) for chunk in parts)]) if parts else found
