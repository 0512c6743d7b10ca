"""The gate that every write to an origin passes, so that an instant can be taken.

While the gate is held, new writes wait before it and those inside have come out. It holds no data and knows nothing
of snapshots. Trio thread only. Fair: a hold is not starved by writes that keep arriving.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from cow.errors import HoldTimeoutError


class Gate:
    """Writers use `enter()` and `leave()`, the taker of a snapshot uses `hold()`."""

    def __init__(self) -> None:
        self._holders = trio.Lock()
        self._inside = 0
        self._opened: trio.Event | None = None  #: set while held; fires at the release
        self._emptied: trio.Event | None = None  #: set while a hold waits; fires when the last writer is out

    @property
    def held(self) -> bool:
        """Whether writes have to wait."""
        return self._opened is not None

    async def enter(self) -> None:
        """Called before one write. Waits while the gate is held. `leave` must follow, whatever happens between."""
        while self._opened is not None:
            await self._opened.wait()
        self._inside += 1

    def leave(self) -> None:
        """Called after one write."""
        self._inside -= 1
        if self._inside == 0 and self._emptied is not None:
            self._emptied.set()

    @asynccontextmanager
    async def hold(self, drain_seconds: float) -> AsyncIterator[None]:
        """Keep new writes out and wait until those inside are done.

        Raises HoldTimeoutError, with the gate open again, when they take longer than `drain_seconds`.
        """
        async with self._holders:
            self._opened = trio.Event()
            try:
                await self._drain(drain_seconds)
                yield
            finally:
                self._opened.set()
                self._opened = None

    async def _drain(self, seconds: float) -> None:
        if self._inside == 0:
            return
        self._emptied = trio.Event()
        try:
            with trio.fail_after(seconds):
                await self._emptied.wait()
        except trio.TooSlowError as error:
            raise HoldTimeoutError(
                f"{self._inside} writes to the live image did not finish within {seconds:g} s, so no snapshot was "
                f"taken: check the device and the store for errors, then try again"
            ) from error
        finally:
            self._emptied = None
