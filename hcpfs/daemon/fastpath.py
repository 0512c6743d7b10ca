"""The fast path: reads, writes and syncs of open files are answered here, and all other requests by libfuse.

A request that goes through libfuse, pyfuse3 and trio costs several times what the work on it does. So those that come
tens of thousands of times a second are taken from the kernel's queue and answered in a loop of their own; for at most
`MOST_SECONDS`, then trio runs everything else. The others are passed on, one message each, through a socket that
libfuse holds to be its /dev/fuse, and its answers are passed back.

Who has the turn reads requests. A request that has to wait for something makes its task give the turn to another.

When there is no request, the next one is waited for awake for a moment: for those who send one at a time, to sleep
between two and to be woken takes both sides longer than the request does. When none comes in that time, or the
processor is wanted by others, nobody is waited for in this way until requests follow each other closely again. Then the
kernel's queue alone is waited for, for as long as trio may do without us, and only after that trio with all it has.
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
from cow.geometry import covering_bytes
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
from hcpfs.tree.handles import Handle
from hcpfs.tree.truncating import Truncating

MOST_SECONDS = 0.002  # between two visits to trio; a request that takes longer by itself is the only one then
MOST_SECONDS_PASSED = 0.0003  # the same while libfuse has requests, which take two visits each
PATIENCE_SECONDS = 0.0001  # for a next request, before the thread sleeps: to be woken takes longer than a request
CROWDED_SECONDS = 0.02  # without patience, after others wanted the processor: it would be taken from those who ask
DOZE_MILLISECONDS = 1  # in which it waits for the next request alone: a sleep in trio costs as much as two requests
LONG_BYTES = 256 << 10  # of a write: from here on the memory that it came in may be kept, where it would be copied
MOST_SPARE = 18  # of such memory, for the next ones: what one image may keep
MOST_FORGETTING = 4  # threads in which the kernel drops what it has cached
MOST_TASKS = 99  # that work on requests: pyfuse3's own number

_UNANSWERED = {Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT}  # and may be ignored: nothing is remembered
_UNMOUNTED = {errno.ENODEV, errno.ECONNABORTED}  # to a reader
_GONE = {errno.ENOENT, *_UNMOUNTED}  # to an answer: nobody waits for it any more

log = logging.getLogger("hcpfs")

Waits = Coroutine[Any, Any, None]  # the rest of a request, which may wait


class FastPath:
    """Between the kernel, at the descriptor `kernel`, and libfuse, at the other end of the socket `libfuse`.

    Both are non-blocking, and a whole message comes from each at a time. `errno_of(request, error)` gives the errno for
    what a handle raised; `on_unmount` is called when there will be no more requests. Trio thread only.
    """

    def __init__(
        self,
        kernel: int,
        libfuse: socket.socket,
        handles: Mapping[int, Handle],
        errno_of: Callable[[str, Exception], int],
        on_unmount: Callable[[], None],
    ) -> None:
        self._kernel = kernel
        self._libfuse = libfuse
        self._handles = handles
        self._errno_of = errno_of
        self._on_unmount = on_unmount
        self._request = bytearray(DATA_AT)  #: up to a write's data; whose turn it is reads it, and nobody after that
        self._memory = self._new_memory()  #: of the rest of the request
        self._spare: list[Memory] = []  #: that take its place while it is kept
        self._content = _pages(covering_bytes(MOST_DATA_BYTES))  #: of what is read without waiting
        self._answer = bytearray(MOST_REQUEST_BYTES)  #: of libfuse
        self._init = 0  #: the unique number of the request INIT
        self._passed: set[int] = set()  #: the unique numbers of the requests that libfuse has
        self._idle = trio.lowlevel.ParkingLot()
        self._forgetting = trio.CapacityLimiter(MOST_FORGETTING)
        self._tasks = 0
        self._working = 0  #: tasks whose requests wait for something
        self._turn = 0  #: grows when the turn is given away
        self._taken = False  #: whether somebody has the turn
        self._ended = False
        self._patience = 0.0
        self._crowded_until = 0.0  #: others want the processor
        self._poll = select.poll()
        self._poll.register(kernel, select.POLLIN)
        self._until = 0.0  #: when trio is to be visited

    async def serve(self) -> None:
        """Answer requests, and pass libfuse's answers back, until `end`."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            self._start_task()
            while not self._ended:
                with suppress(trio.ClosedResourceError):
                    await trio.lowlevel.wait_readable(self._libfuse)
                self._pass_back()

    def end(self) -> None:
        """Take no more requests; those that are worked on here are answered. libfuse must have answered its own."""
        self._ended = True
        trio.lowlevel.notify_closing(self._kernel)
        trio.lowlevel.notify_closing(self._libfuse)
        self._idle.unpark_all()

    async def forget_cached(self, inode: int, offset: int, length: int) -> None:
        """Have the kernel drop what it has cached of an extent of a file; the next read comes here.

        With length 0 to the end. It waits for reads and writes of those pages, which need us: so in a thread, and none
        that they might need. Cancelled, it goes on.
        """
        message = FORGET_CACHED.pack(FORGET_CACHED.size, FORGET_CACHED_CODE, 0, inode, offset, length)
        with suppress(FileNotFoundError):  # it has nothing of that file
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
        """For the next request: memory that nobody keeps."""
        if self._memory.is_kept:
            self._memory = self._spare.pop() if self._spare else self._new_memory()
        return self._memory.view

    def _take_memory_back(self, memory: Memory) -> None:
        if memory is not self._memory and len(self._spare) < MOST_SPARE:
            self._spare.append(memory)

    async def _take_requests(self, turn: int) -> None:
        """Answer requests until the turn was given away, or there are no more."""
        while self._turn == turn and not self._ended:
            await self._answer_ready()
        if self._turn != turn:
            self._working -= 1

    def _answer_ready(self) -> Awaitable[object]:
        """Answer the requests that are ready, and return what has to be awaited before the next."""
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
                if self._working or self._passed:
                    return self._sleep()
                if impatient and now - looked > PATIENCE_SECONDS:  # the processor was taken from us meanwhile
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
                    continue  # who had asked was interrupted meanwhile
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
                    return self._pass_on_later(length)  # the turn is kept, so that the buffer is ours

    async def _visit(self) -> None:
        """Have everything else run that can."""
        await trio.lowlevel.checkpoint()
        self._until = time.monotonic() + (MOST_SECONDS_PASSED if self._passed else MOST_SECONDS)

    def _doze(self) -> bool:
        """Sleep until there is a request, for as long as others can do without trio; whether there is one."""
        began = time.monotonic()
        if not self._poll.poll(DOZE_MILLISECONDS):
            return False
        self._note_wait(began, time.monotonic())
        return True

    async def _sleep(self) -> None:
        """Sleep until there is a request, while everything else runs."""
        began = time.monotonic()
        with suppress(trio.ClosedResourceError):
            await trio.lowlevel.wait_readable(self._kernel)
        now = time.monotonic()
        self._note_wait(began, now)
        self._until = now + MOST_SECONDS

    def _note_wait(self, began: float, ended: float) -> None:
        """Whether to stay awake for the next request is seen from how long this one took to come."""
        soon = ended - began < PATIENCE_SECONDS and ended >= self._crowded_until
        self._patience = PATIENCE_SECONDS if soon else 0.0

    async def _end_of_session(self) -> None:
        self._ended = True
        self._on_unmount()

    # -- requests: each is answered at once, or by what is returned ------------------------------------------------

    def _read(self, unique: int, number: int, offset: int, size: int, _flags: int) -> Waits | None:
        try:
            content = self._handles[number].read_nowait(offset, size, self._content)
        except Exception as error:
            self._fail("read", unique, error)
            return None
        if content is None:
            return self._read_waiting(unique, number, offset, size)
        self._send((ANSWER.pack(ANSWER.size + len(content), 0, unique), content))
        return None

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
                handle = handle.image  # perhaps not written through this open file
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
        """An answer is refused: have the request fail, and nothing else."""
        _, _, unique = ANSWER.unpack_from(answer[0])
        log.error("a defect of hcpfs: the kernel refuses an answer of %d parts", len(answer), exc_info=error)
        with suppress(OSError):  # perhaps the request has failed by that
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
    """Memory that begins with a page: the kernel copies data by the page, and what lies across two it copies twice."""
    return memoryview(mmap.mmap(-1, length))


@coroutine
def _telling(waits: Waits, before: Callable[[], None]) -> Generator[Any, Any, None]:
    """Await something, and call `before` when it really waits, just before it does."""
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
