"""The fast path: reads, writes and syncs of open files are answered here, all other requests by libfuse.

The way through libfuse, pyfuse3 and trio costs several times as much as the work on a request. So we read requests from
/dev/fuse ourselves and answer the frequent ones in a plain loop, for at most `MOST_SECONDS`; then trio runs its other
tasks. All other requests are forwarded to libfuse through a socket that it takes for /dev/fuse, one message each, and
its answers are copied back.

One task at a time has the turn: it reads the requests. When a request has to wait, its task hands the turn to another
one and goes on with the request.

When no request is ready, we wait for the next one in three steps. First we spin on the queue for `PATIENCE_SECONDS`: if
requests come one at a time, sleeping and waking cost both sides more than the request itself. We do not spin while
requests are far apart, or while other processes want the processor. Then we poll /dev/fuse alone for
`DOZE_MILLISECONDS`, which costs less than trio's wait. Last we wait in trio, where all other tasks run.
"""

import errno
import logging
import mmap
import os
import select
import socket
import time
from collections.abc import Awaitable, Callable, Coroutine, Generator, Mapping, Sequence
from contextlib import suppress
from types import coroutine
from typing import Any

import trio

from cow.buffer.memory import Memory
from cow.disk.ring import Reads, Ring
from cow.geometry import covering_bytes
from cow.images.handle import Handle
from hcpfs.daemon.protocol import (
    ANSWER,
    DATA_AT,
    FORGET_CACHED,
    FORGET_CACHED_CODE,
    FROM_CACHE,
    MOST_DATA_BYTES,
    MOST_REQUEST_BYTES,
    REQUEST,
    WRITTEN,
    Opcode,
    change_init,
)
from hcpfs.tree.truncating import Truncating

MOST_SECONDS = 0.002  # between two checkpoints of trio, unless a single request takes longer
MOST_SECONDS_PASSED = 0.0003  # the same while libfuse has requests, which need two checkpoints each
PATIENCE_SECONDS = 0.0001  # of spinning before the thread sleeps: a wake-up takes longer than a request
CROWDED_SECONDS = 0.02  # without spinning, after another process wanted the processor: it may be the one that asks us
DOZE_MILLISECONDS = 1  # of polling /dev/fuse alone: a wait in trio costs as much as two requests
LONG_BYTES = 256 << 10  # a write from this size on may retain the memory it was received in, which saves a copy
MOST_SPARE = 18  # pieces of such memory that are kept for reuse: as many as one image may retain
COLD_READS = 16  # begun without a try, after one that had to wait: a try in vain costs a third of the read
READS_SECONDS = 0.001  # between two looks for the last reads, at the end
MOST_FORGETTING = 4  # threads that wait for the kernel to drop cached pages
MOST_TASKS = 99  # that work on requests, as in pyfuse3

_UNANSWERED = {Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT}  # they want no answer, and change nothing here
_UNMOUNTED = {errno.ENODEV, errno.ECONNABORTED}  # what a read of /dev/fuse fails with then
_GONE = {errno.ENOENT, *_UNMOUNTED}  # what an answer fails with when nobody waits for it any more

log = logging.getLogger("hcpfs")

Waits = Coroutine[Any, Any, None]  # the rest of the work on a request that may have to wait


class FastPath:
    """Serves the kernel, at the descriptor `kernel`, with libfuse at the other end of the socket `libfuse`.

    Both descriptors are non-blocking and keep message boundaries. `errno_of(request, error)` gives the errno for an
    exception of a handle; `on_unmount` is called when there will be no more requests. Trio thread only.
    """

    def __init__(
        self,
        kernel: int,
        libfuse: socket.socket,
        handles: Mapping[int, Handle],
        errno_of: Callable[[str, Exception], int],
        on_unmount: Callable[[], None],
        reads: Reads | None = None,
    ) -> None:
        self._kernel = kernel
        self._libfuse = libfuse
        self._handles = handles
        self._errno_of = errno_of
        self._on_unmount = on_unmount
        self._reads = reads if isinstance(reads, Ring) else None  #: for what has to be waited for
        self._reading = 0  #: how many of them are under way
        self._cold = 0  #: how many of the next reads are not tried without waiting
        self._request = bytearray(
            DATA_AT
        )  #: its first bytes, up to a write's data; only valid until the turn is handed over
        self._memory = self._new_memory()  #: that the rest of the request is received in
        self._spare: list[Memory] = []  #: for reuse when the present one is retained
        self._content = _pages(covering_bytes(MOST_DATA_BYTES))  #: for the data of a read that needs no waiting
        self._answer = bytearray(MOST_REQUEST_BYTES)  #: the message from libfuse
        self._init = 0  #: the unique number of the request INIT
        self._passed: set[int] = set()  #: the unique numbers of the requests that were forwarded to libfuse
        self._idle = trio.lowlevel.ParkingLot()
        self._forgetting = trio.CapacityLimiter(MOST_FORGETTING)
        self._tasks = 0
        self._working = 0  #: how many tasks wait with a request
        self._turn = 0  #: counts how often it was handed over
        self._taken = False  #: whether a task has the turn
        self._ended = False
        self._patience = 0.0
        self._crowded_until = 0.0  #: until then other processes are taken to want the processor
        self._poll = select.poll()
        self._poll.register(kernel, select.POLLIN)
        if self._reads is not None:
            self._poll.register(self._reads.fileno, select.POLLIN)
        self._until = 0.0  #: when the next checkpoint is due

    async def serve(self) -> None:
        """Answer requests, and pass libfuse's answers back, until `end`."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            self._start_task()
            while not self._ended:
                with suppress(trio.ClosedResourceError):
                    await trio.lowlevel.wait_readable(self._libfuse)
                self._pass_back()
            while self._reads is not None and self._reading:
                if not self._tell_of_reads():
                    await trio.sleep(READS_SECONDS)

    def end(self) -> None:
        """Read no more requests. Those under way here are still answered; libfuse must have answered its own."""
        self._ended = True
        trio.lowlevel.notify_closing(self._kernel)
        trio.lowlevel.notify_closing(self._libfuse)
        self._idle.unpark_all()

    async def forget_cached(self, inode: int, offset: int, length: int) -> None:
        """Have the kernel drop its cached pages of an extent of a file (length 0: to the end), so that reads come here.

        The kernel waits for reads and writes of those pages under way, which need us: so this is done in a thread, with
        a limit of its own, because those requests may need threads, too. When cancelled, the thread goes on.
        """
        message = FORGET_CACHED.pack(FORGET_CACHED.size, FORGET_CACHED_CODE, 0, inode, offset, length)
        with suppress(FileNotFoundError):  # it has no pages of that file
            await trio.to_thread.run_sync(
                os.write, self._kernel, message, limiter=self._forgetting, abandon_on_cancel=True
            )

    # -- turns ---------------------------------------------------------------------------------------------------

    def _start_task(self) -> None:
        self._tasks += 1
        self._nursery.start_soon(self._work)

    async def _work(self) -> None:
        while not self._ended:
            if self._taken:
                await self._idle.park()
            else:
                self._taken = True
                await self._take_requests(self._turn)

    def _give_turn(self) -> None:
        self._working += 1
        self._turn += 1
        self._taken = False
        if self._idle:
            self._idle.unpark()
        elif self._tasks < MOST_TASKS:
            self._start_task()

    def _new_memory(self) -> Memory:
        return Memory(_pages(MOST_REQUEST_BYTES - DATA_AT), self._take_memory_back)

    def _free_memory(self) -> memoryview:
        """Memory for the next request that nobody retains."""
        if self._memory.is_kept:
            self._memory = self._spare.pop() if self._spare else self._new_memory()
        return self._memory.view

    def _take_memory_back(self, memory: Memory) -> None:
        if memory is not self._memory and len(self._spare) < MOST_SPARE:
            self._spare.append(memory)

    async def _take_requests(self, turn: int) -> None:
        """Answer requests until the turn is handed over, or the session ends."""
        while self._turn == turn and not self._ended:
            await self._answer_ready()
        if self._turn != turn:
            self._working -= 1

    def _answer_ready(self) -> Awaitable[object]:
        """Answer the requests that are ready. Returns what has to be awaited before the next one is read."""
        kernel, request = self._kernel, self._request
        into: list[bytearray | memoryview] = [request, self._free_memory()]
        monotonic, readv, unpack = time.monotonic, os.readv, REQUEST.unpack_from
        answered_here = {
            Opcode.READ: self._read,
            Opcode.WRITE: self._write,
            Opcode.FSYNC: self._sync,
            Opcode.FLUSH: self._flush,
        }.get
        impatient = looked = 0.0
        while True:
            now = monotonic()
            if now >= self._until or self._ended:
                return self._visit()
            try:
                length = readv(kernel, into)
            except BlockingIOError:
                if self._reading and self._tell_of_reads():
                    continue
                if self._working or self._passed:
                    return self._sleep()
                if impatient and now - looked > PATIENCE_SECONDS:  # another process had the processor meanwhile
                    self._crowded_until = now + CROWDED_SECONDS
                    impatient = now
                impatient, looked = impatient or now + self._patience, now
                if now >= impatient:
                    if not self._doze():
                        return self._sleep()
                    impatient = 0.0
                continue
            except OSError as error:
                if error.errno == errno.ENOENT:
                    continue  # the process that had asked was interrupted
                if error.errno not in _UNMOUNTED:
                    raise
                length = 0
            if not length:
                return self._end_of_session()
            impatient = 0.0
            length, opcode, unique, number, offset, size, flags = unpack(request)
            answer = answered_here(opcode)
            if answer is not None:
                waits = answer(unique, number, offset, size, flags)
                if waits is not None:
                    return _telling(waits, self._give_turn)
                if size >= LONG_BYTES:
                    into[1] = self._free_memory()
            elif opcode not in _UNANSWERED:
                if opcode == Opcode.INIT:
                    self._init = unique
                self._passed.add(unique)
                self._until = min(self._until, now + MOST_SECONDS_PASSED)
                if not self._pass_on(length):
                    return self._pass_on_later(
                        length
                    )  # without handing the turn over, so that the buffer stays as it is

    def _tell_of_reads(self) -> int:
        """Have reads that were begun start, and answer those that have come. Returns how many came."""
        assert self._reads is not None
        self._reads.submit()
        return self._reads.reap()

    async def _visit(self) -> None:
        """Let trio run all other tasks that are ready."""
        if self._reading:
            self._tell_of_reads()
        await trio.lowlevel.checkpoint()
        self._until = time.monotonic() + (MOST_SECONDS_PASSED if self._passed else MOST_SECONDS)

    def _doze(self) -> bool:
        """Poll for a request for `DOZE_MILLISECONDS`, while no other task runs; whether there is one."""
        began = time.monotonic()
        if not self._poll.poll(DOZE_MILLISECONDS):
            return False
        self._note_wait(began, time.monotonic())
        return True

    async def _sleep(self) -> None:
        """Wait in trio until there is a request."""
        began = time.monotonic()
        with suppress(trio.ClosedResourceError):
            await trio.lowlevel.wait_readable(self._kernel)
        now = time.monotonic()
        self._note_wait(began, now)
        self._until = now + MOST_SECONDS

    def _note_wait(self, began: float, ended: float) -> None:
        """Decide whether to spin for the next request, by how long this one took to come."""
        soon = ended - began < PATIENCE_SECONDS and ended >= self._crowded_until
        self._patience = PATIENCE_SECONDS if soon else 0.0

    async def _end_of_session(self) -> None:
        self._ended = True
        self._on_unmount()

    # -- requests: each is answered at once, or by the coroutine that is returned ----------------------------------

    def _read(self, unique: int, number: int, offset: int, size: int, _flags: int) -> Waits | None:
        if self._cold:
            self._cold -= 1
            if self._begin_read(unique, number, offset, size):
                return None
        try:
            content = self._handles[number].read_nowait(offset, size, self._content)
        except Exception as error:
            self._fail("read", unique, error)
            return None
        if content is None:
            if not self._begin_read(unique, number, offset, size):
                return self._read_waiting(unique, number, offset, size)
            self._cold = COLD_READS
            return None
        self._send((ANSWER.pack(ANSWER.size + len(content), 0, unique), content))
        return None

    def _begin_read(self, unique: int, number: int, offset: int, size: int) -> bool:
        """Begin a read that is answered when it has come; False where it has to be read the other way."""

        def answer(content: memoryview | None) -> None:
            self._reading -= 1
            if content is None:
                self._nursery.start_soon(self._read_waiting, unique, number, offset, size)
            else:
                self._send((ANSWER.pack(ANSWER.size + len(content), 0, unique), content))

        handle = self._handles.get(number)
        if self._reads is None or handle is None or not handle.begin_read(self._reads, offset, size, answer):
            return False
        self._reading += 1
        return True

    async def _read_waiting(self, unique: int, number: int, offset: int, size: int) -> None:
        try:
            content = await self._handles[number].read_waiting(offset, size)
        except Exception as error:
            return self._fail("read", unique, error)
        self._send((ANSWER.pack(ANSWER.size + len(content), 0, unique), content))

    def _write(self, unique: int, number: int, offset: int, size: int, flags: int) -> Waits | None:
        data, memory = self._memory.view[:size], self._memory if size >= LONG_BYTES else None
        try:
            handle = self._handles[number]
            if flags & FROM_CACHE and isinstance(handle, Truncating):
                handle = handle.image  # the kernel names any handle that may write
            written = handle.write_nowait(offset, data, memory)
        except Exception as error:
            self._fail("write", unique, error)
            return None
        if written is None:
            if memory is None:
                return self._write_waiting(unique, handle, offset, bytes(data), None)
            return self._write_long(unique, handle, offset, data, memory)
        self._send((WRITTEN.pack(WRITTEN.size, 0, unique, written, 0),))
        return None

    async def _write_long(self, unique: int, handle: Handle, offset: int, data: memoryview, memory: Memory) -> None:
        memory.keep()
        await self._write_waiting(unique, handle, offset, data, memory)
        memory.release()

    async def _write_waiting(
        self, unique: int, handle: Handle, offset: int, data: bytes | memoryview, memory: Memory | None
    ) -> None:
        try:
            written = await handle.write_waiting(offset, data, memory)
        except Exception as error:
            return self._fail("write", unique, error)
        self._send((WRITTEN.pack(WRITTEN.size, 0, unique, written, 0),))

    def _flush(self, unique: int, number: int, _offset: int, _size: int, _flags: int) -> Waits | None:
        handle = self._handles.get(number)
        if isinstance(handle, Truncating):
            return self._flush_waiting(unique, handle)
        self._send((ANSWER.pack(ANSWER.size, 0, unique),))
        return None

    async def _flush_waiting(self, unique: int, handle: Truncating) -> None:
        try:
            await handle.flush()
        except Exception as error:
            return self._fail("close", unique, error)
        self._send((ANSWER.pack(ANSWER.size, 0, unique),))

    async def _sync(self, unique: int, number: int, _offset: int, _size: int, _flags: int) -> None:
        try:
            await self._handles[number].sync()
        except Exception as error:
            return self._fail("fsync", unique, error)
        self._send((ANSWER.pack(ANSWER.size, 0, unique),))

    def _fail(self, request: str, unique: int, error: Exception) -> None:
        self._send((ANSWER.pack(ANSWER.size, -self._errno_of(request, error), unique),))

    def _send(self, answer: Sequence[bytes | bytearray | memoryview]) -> None:
        try:
            os.writev(self._kernel, answer)
        except OSError as error:
            if error.errno not in _GONE:
                self._take_back(answer, error)

    def _take_back(self, answer: Sequence[bytes | bytearray | memoryview], error: OSError) -> None:
        """The kernel refuses an answer: fail that request, and go on."""
        _, _, unique = ANSWER.unpack_from(answer[0])
        log.error("a defect of hcpfs: the kernel refuses an answer of %d parts", len(answer), exc_info=error)
        with suppress(OSError):  # the request may have ended by that
            os.writev(self._kernel, (ANSWER.pack(ANSWER.size, -errno.EIO, unique),))

    # -- libfuse -------------------------------------------------------------------------------------------------

    def _pass_on(self, length: int) -> bool:
        try:
            if length <= DATA_AT:
                self._libfuse.send(memoryview(self._request)[:length])
            else:
                self._libfuse.sendmsg([self._request, self._memory.view[: length - DATA_AT]])
        except BlockingIOError:
            return False
        return True

    async def _pass_on_later(self, length: int) -> None:
        while not self._ended and not self._pass_on(length):
            with suppress(trio.ClosedResourceError):
                await trio.lowlevel.wait_writable(self._libfuse)

    def _pass_back(self) -> None:
        while True:
            try:
                length = self._libfuse.recv_into(self._answer)
            except BlockingIOError:
                return
            answer = memoryview(self._answer)[:length]
            unique = ANSWER.unpack_from(answer)[2]
            self._passed.discard(unique)
            if unique == self._init:
                change_init(answer)
            self._send((answer,))


def _pages(length: int) -> memoryview:
    """Memory aligned to a page: the kernel copies page by page, and copies what lies across two in two pieces."""
    return memoryview(mmap.mmap(-1, length))


@coroutine
def _telling(waits: Waits, before: Callable[[], None]) -> Generator[Any, Any, None]:
    """Await something, and call `before` just before it first has to wait, if ever."""
    try:
        wanted = waits.send(None)
    except StopIteration:
        return
    before()
    try:
        while True:
            try:
                result = yield wanted
            except BaseException as error:
                wanted = waits.throw(error)
            else:
                wanted = waits.send(result)
    except StopIteration:
        return
