"""Write-behind: writes to an image are buffered in memory, and written to their places many at a time.

A disk has a volatile cache, so a write may be acknowledged before it is durable, as long as a flush waits for it. So
writes are acknowledged into a buffer. A task writes the gathered ones to their places, while the next ones gather: for
the live image that is one commit of old bytes and then the device, for a snapshot's image the delta. Readers look into
the buffer first. # I3

Writes that fail stay in the buffer and are tried again at the next sync, which fails until they succeed.
"""

from collections.abc import Awaitable, Callable, Iterator
from typing import NamedTuple

import trio

from cow.buffer.contents import Contents, Row
from cow.buffer.memory import Memory
from cow.disk.file import File
from cow.errors import CowError
from cow.events import Tell, Trouble, nobody
from cow.geometry import CHUNK_BYTES, covering
from cow.offload import MOST_CHUNKS_HERE

MOST_CHUNKS = 4096  # that gather if writing waits for a disk: 16 MiB. As much again may be on its way to the device
MOST_IN_EXTENTS_HERE = 2048  # in memory, with extents: 8 MiB, for which a thread is worth its wake-up
ENOUGH_CHUNKS = 1024  # that are worth a commit
LINGER_SECONDS = 0.01  # to wait for more writes, while there are fewer


class _Generation:
    """Writes that gather together, and are written together."""

    def __init__(self) -> None:
        self.contents = Contents()
        self.arrived = trio.Event()  #: fires when something is put into it
        self.hurry = trio.Event()  #: fires when it shall not wait for more writes
        self.taken = trio.Event()  #: fires when nothing more is put into it
        self.done = trio.Event()  #: fires when it is on the device, or `error` says why not
        self.error: Exception | None = None
        self.is_kept = True  #: whether, after an error, it is still in memory


_NOTHING = _Generation()


class Unwritten(NamedTuple):
    """Contents that could not be written, and the error; neither when all was. An error alone: they were dropped."""

    contents: Contents
    cause: Exception | None


class Behind:
    """The buffer of one image, called `label`. Trio thread only; `run` must be running.

    `take(contents)` writes them to their places and returns what could not be written; when it raises CowError or
    OSError, that is all of them. `is_in_memory` says that it waits for no disk: the buffer is small then, and a task
    that finds it full empties it, unless there are extents, which are worth a thread. `tell` is called when writes that
    were acknowledged cannot be written, `on_change` with the number of chunks by which the buffer grew.
    """

    def __init__(
        self,
        label: str,
        take: Callable[[Contents], Awaitable[Unwritten]],
        tell: Tell,
        on_change: Callable[[int], None] = lambda chunks: None,
        *,
        is_in_memory: bool = False,
    ) -> None:
        self._label = label
        self._take = take
        self._tell = tell
        self._on_change = on_change
        self._is_in_memory = is_in_memory
        self._most_chunks = MOST_CHUNKS_HERE if is_in_memory else MOST_CHUNKS
        self._gathering = _Generation()
        self._leaving = _NOTHING  #: on its way to the device; older than what gathers
        self._watched = _NOTHING  #: what `run` waits for, perhaps still after another task has taken it
        self._failing = False  #: whether the last flush left something unwritten

    @property
    def chunks(self) -> int:
        """How many chunks are in memory."""
        return len(self._gathering.contents) + len(self._leaving.contents)

    @property
    def _weight(self) -> int:
        return self._gathering.contents.weight + self._leaving.contents.weight

    def touches(self, offset: int, length: int) -> bool:
        """Whether the buffer has anything in the chunks that an extent touches."""
        newer, older = self._gathering.contents, self._leaving.contents
        if not newer.weight and not older.weight:
            return False
        chunk, start = divmod(offset, CHUNK_BYTES)
        if start + length <= CHUNK_BYTES:
            return newer.has(chunk) or (bool(older.weight) and older.has(chunk))
        run = covering(offset, length)
        return newer.holds(run) or older.holds(run)

    def pieces(self, offset: int, length: int) -> list[tuple[int, bytes]]:
        """What the buffer has of an extent, and perhaps around it: offsets and bytes, the newer pieces later."""
        newer, older = self._gathering.contents, self._leaving.contents
        if not newer and not older:
            return []
        run = covering(offset, length)
        return [*older.pieces(run), *newer.pieces(run)]

    @property
    def is_full(self) -> bool:
        """Whether there is no `room` for a write."""
        gathering = self._gathering.contents
        weight = self._weight if self._failing else gathering.weight  # writes on their way may come back
        return weight >= (MOST_IN_EXTENTS_HERE if self._is_for_thread(gathering) else self._most_chunks)

    def _is_for_thread(self, contents: Contents) -> bool:
        return self._is_in_memory and bool(contents.extents)

    def is_long(self, length: int) -> bool:
        """Whether a write is too long to be buffered: in memory, copying it would cost as much as writing it."""
        return self._is_in_memory and length > MOST_CHUNKS_HERE * CHUNK_BYTES

    async def room(self) -> None:
        """Wait while the buffer is full. If it stays full, raises the error that keeps it from being written."""
        while self.is_full:
            full = self._gathering
            if self._failing and self._leaving.contents:
                full = self._leaving
            elif self._is_in_memory and not full.contents.extents:
                await self._bring(full)
            else:
                self._hurry(full)
                await full.taken.wait()
            if self._failing:
                await full.done.wait()
                if self.is_full:
                    await _in_place(full)

    def put(self, offset: int, data: bytes | memoryview, memory: Memory | None = None) -> None:
        """Put in a write, for which there is `room`. `data` is copied, or `memory` retained, as `Contents.put` says."""
        gathering = self._gathering
        contents = gathering.contents
        before = contents.weight
        contents.put(offset, data, memory)
        weight = contents.weight
        if weight != before:
            self._on_change(weight - before)
        if not gathering.arrived.is_set():
            gathering.arrived.set()
        if weight >= ENOUGH_CHUNKS or (contents.extents and self._is_in_memory):
            gathering.hurry.set()

    def forget(self) -> None:
        """Drop what is in memory: nobody needs it any more, and nobody puts in anything else."""
        self._on_change(-self._weight)
        self._on_change = lambda chunks: None  # for what is still on its way
        self._tell = nobody
        self._gathering.contents.release()
        self._gathering, self._leaving = _Generation(), _NOTHING

    async def drain(self) -> None:
        """Return when everything that was put in is in its place, not yet durably. # I3

        Raises OSError or CowError when something is not; it stays in the buffer, and the next drain tries it again.
        """
        for generation in (self._leaving, self._gathering):
            if generation.contents:
                self._hurry(generation)
                await _in_place(generation)

    async def drain_or(self, error: Exception) -> None:
        """Like `drain`, for a reader that got `error`: raises that one if this fails."""
        try:
            await self.drain()
        except (CowError, OSError):
            raise error from None

    def try_again(self) -> None:
        """Have `run` retry what could not be written: now it can be, or nobody needs it any more."""
        if self.chunks:
            self._hurry(self._gathering)

    def _hurry(self, generation: _Generation) -> None:
        """Have `run` write a generation now, whatever else it waits for."""
        generation.arrived.set()  # contents that came back unwritten do not count as arrived
        generation.hurry.set()
        self._watched.hurry.set()

    async def flush(self) -> None:
        """Like `drain`, but in this task, so that no other has to be woken. Must not be cancelled before `forget`."""
        for generation in (self._leaving, self._gathering):
            if generation.contents:
                await self._bring(generation)
                await _in_place(generation)

    async def run(self) -> None:
        """Write what gathers, until cancelled."""
        while True:
            gathering = self._watched = self._gathering
            await gathering.arrived.wait()
            with trio.move_on_after(LINGER_SECONDS):
                await gathering.hurry.wait()
            await self._bring(gathering)

    async def _bring(self, generation: _Generation) -> None:
        """Write a generation, unless another task does or did."""
        while self._leaving.contents and not generation.taken.is_set():
            await self._leaving.done.wait()
        if not generation.taken.is_set():
            await self._flush()

    async def _flush(self) -> None:
        taken = self._leaving = self._gathering
        self._gathering = _Generation()
        taken.arrived.set()  # so that `run` goes on to the next one; contents that came back have not arrived
        taken.taken.set()
        taken.error = CowError("hcpfs was stopped before")  # until we know better
        left = Unwritten(taken.contents, None)
        try:
            left = await self._take(taken.contents)
            taken.error = left.cause
        except (CowError, OSError) as error:
            taken.error = error
        finally:
            taken.is_kept = bool(left.contents)
            before = self._weight
            self._gathering.contents.put_beneath(left.contents)
            self._leaving = _NOTHING
            taken.contents.release()
            self._on_change(self._weight - before)
            taken.done.set()
        self._note(taken.error if taken.is_kept else None)

    def _note(self, error: Exception | None) -> None:
        """Note whether the last flush left something in the buffer, and tell why."""
        if error is not None and not self._failing:
            self._tell(
                Trouble(
                    f"writes to {self._label} that were acknowledged are still in memory ({error}); every sync of it "
                    f"fails until they are taken"
                )
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


def write_out(device: File, contents: Contents) -> Unwritten:
    """Write contents to their places on a device, and return what it refused. Blocks; nothing is durable yet."""
    failed: set[int] = set()
    cause: Exception | None = None
    for row in contents.rows():
        try:
            _write_row(device, row)
        except OSError as error:
            cause = error
            failed.update(_write_singly(device, row))
    for chunk, part in contents.parts().items():
        try:
            for start, data in part.pieces():
                device.pwrite(data, chunk * CHUNK_BYTES + start)
        except OSError as error:
            cause = error
            failed.add(chunk)
    return Unwritten(contents.only(failed), cause) if failed else Unwritten(Contents(), None)


def _write_row(device: File, row: Row) -> None:
    run, content = row
    if isinstance(content, list):
        device.pwritev(content, run.offset)
    else:
        device.pwrite(content, run.offset)


def _write_singly(device: File, row: Row) -> Iterator[int]:
    """Write a row chunk by chunk, because only one sector may be bad; yields the chunks that the device refused."""
    run, content = row
    if run.chunks == 1:
        yield run.first
        return
    for chunk in range(run.first, run.end):
        place = chunk - run.first
        one = content[place] if isinstance(content, list) else content[place * CHUNK_BYTES : (place + 1) * CHUNK_BYTES]
        try:
            device.pwrite(one, chunk * CHUNK_BYTES)
        except OSError:
            yield chunk
