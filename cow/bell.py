"""A bell that wakes the one task that waits for it."""

import trio


class Bell:
    """One task waits at a time. A ring while no task waits ends the next wait at once. Trio thread only."""

    def __init__(self) -> None:
        self._rung = trio.Event()

    def ring(self) -> None:
        """Wake the task that waits, or the next one to wait."""
        self._rung.set()

    async def wait(self) -> None:
        """Return once the bell has rung since the last wait."""
        await self._rung.wait()
        self._rung = trio.Event()
