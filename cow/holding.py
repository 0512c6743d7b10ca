"""Taking a lock that is mostly free.

`async with lock` lets every other task run first, also where nobody has the lock; a sync, which takes three, would cost
three rounds of the scheduler. The fairness that this is for is kept: a lock that somebody waits for is not free.
"""

from types import TracebackType

import trio


class holding:  # noqa: N801 (used as a function is)
    """As `async with lock`, at once where it is free."""

    __slots__ = ("_lock",)

    def __init__(self, lock: trio.Lock) -> None:
        self._lock = lock

    async def __aenter__(self) -> None:
        try:
            self._lock.acquire_nowait()
        except trio.WouldBlock:
            await self._lock.acquire()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._lock.release()
