"""A bell, which wakes the one task that waits for it."""

import trio


class Bell:
    """One task waits at a time. What rings while nobody waits is heard by the next wait. Trio thread only."""

    def __init__(self) -> None:
        self._rung = trio.Event()

    def ring(self) -> None:
        """Wake who waits, or who waits next."""
        self._rung.set()

    async def wait(self) -> None:
        """Return when it was rung since the last wait."""
        await self._rung.wait()
        self._rung = trio.Event()
