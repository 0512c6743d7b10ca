"""Serves all requests that are ready before each visit to trio, which costs more than a request does.

pyfuse3's session loop takes a lock and waits for its descriptor through trio for every single request: two visits to
the scheduler and an epoll. This stands between: while requests are ready, or come within a moment, and for at most
`MOST_REQUESTS` or `MOST_SECONDS`, the waiting returns at once. Then one visit to trio lets everything else run.

The moment is for those who send one request at a time: to sleep between two of them, and to be woken, takes both sides
longer than the request does. When none comes in that time, nobody is waited for in this way until requests follow each
other closely again.

The seam: pyfuse3 looks `trio` up as an attribute of its own module, by which its `pyfuse3.asyncio.enable()` swaps it.
It uses `trio.Lock` to take turns in reading, and `trio.lowlevel` to wait. Where a pyfuse3 has no such attribute,
`drained` changes nothing, and its plain loop serves.
"""

import select
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, TracebackType
from typing import Any

import pyfuse3
import trio

MOST_REQUESTS = 64  # between two visits to trio
MOST_SECONDS = 0.002  # the same; a request that takes longer by itself is the only one then
PATIENCE_SECONDS = 0.0001  # for a next request, before the thread sleeps: to be woken takes longer than a request


class _TurnLock:
    """A lock whose taker does not visit trio when it is free, and whose next taker may be the one that gave it back."""

    def __init__(self) -> None:
        self._taken = False
        self._waiting = trio.lowlevel.ParkingLot()

    async def __aenter__(self) -> None:
        while self._taken:
            await self._waiting.park()
        self._taken = True

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._taken = False
        self._waiting.unpark()


class _LowLevel:
    """`trio.lowlevel` with another way to wait for the one descriptor that pyfuse3 waits for."""

    def __init__(self) -> None:
        self._poll = select.poll()
        self._fd = -1
        self._closing = False
        self._left = 0
        self._until = 0.0
        self._patience = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(trio.lowlevel, name)

    async def wait_readable(self, fd: int) -> None:
        if fd != self._fd:
            self._poll.register(fd, select.POLLIN)
            self._fd = fd
        if self._left > 0 and self._comes_soon():
            self._left -= 1
            return
        await self._pause()  # others run; cheaper than a wait when there is a request already
        if not self._poll.poll(0):
            began = time.monotonic()
            await trio.lowlevel.wait_readable(fd)
            self._patience = PATIENCE_SECONDS if time.monotonic() - began < PATIENCE_SECONDS else 0.0
        self._left = MOST_REQUESTS - 1
        self._until = time.monotonic() + MOST_SECONDS

    def _comes_soon(self) -> bool:
        """Whether there is a request, or there is one before patience ends. Short, as nobody else runs meanwhile."""
        now = time.monotonic()
        if now >= self._until:
            return False
        if self._poll.poll(0):
            return True
        impatient = now + self._patience
        while time.monotonic() < impatient:
            if self._poll.poll(0):
                return True
        self._patience = 0.0  # until they follow each other closely again
        return False

    async def _pause(self) -> None:
        await trio.lowlevel.checkpoint()
        if self._closing:
            raise trio.ClosedResourceError

    def notify_closing(self, fd: int) -> None:
        self._closing = True  # for a waiter that is in the checkpoint
        trio.lowlevel.notify_closing(fd)


class _Trio(ModuleType):
    """`trio` with the two differences."""

    def __init__(self) -> None:
        super().__init__("trio")
        self.Lock = _TurnLock
        self.lowlevel = _LowLevel()

    def __getattr__(self, name: str) -> Any:
        return getattr(trio, name)


@contextmanager
def drained() -> Iterator[None]:
    """Within the block, which must begin before pyfuse3.main(), pyfuse3 drains its queue."""
    seam: Any = pyfuse3  # whose stubs do not name it
    if getattr(seam, "trio", None) is not trio:
        yield
        return
    seam.trio = _Trio()
    try:
        yield
    finally:
        seam.trio = trio
