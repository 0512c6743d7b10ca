"""Housekeeping: what a store does in the background, and once more when it stops.

It saves checkpoints and drops the journal files that they make needless, frees what nobody reads, fills up the reserve,
measures the space, and does the further chores it is given. All of it can be stopped at any point and done again.
"""

import math
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import trio

from cow.bell import Bell
from cow.durable.commits import Commits
from cow.durable.space import Space
from cow.errors import CowError
from cow.events import Tell, Trouble
from cow.store.disposal import Disposal
from cow.store.removal import Removal

MOST_WAITING_JOURNALS = 8  # 32 MiB that could not be dropped
RETRY_SECONDS = 1.0  # before what was in use is tried again


class Housekeeping:
    """Trio thread only. Works when `due` rings, and a while after something was in use. `more` are further chores."""

    def __init__(
        self,
        commits: Commits,
        disposal: Disposal,
        space: Space,
        removal: Removal,
        more: Sequence[Callable[[], Awaitable[None]]],
        due: Bell,
        tell: Tell,
    ) -> None:
        self._commits = commits
        self._disposal = disposal
        self._space = space
        self._removal = removal
        self._more = more
        self._due = due
        self._tell = tell

    async def run(self) -> None:
        """Do what is due until cancelled. Errors are reported, not raised: nothing is lost when a chore is not done."""
        while True:
            with trio.move_on_after(RETRY_SECONDS if self._disposal.was_in_use else math.inf):
                await self._due.wait()
            self._disposal.was_in_use = False
            try:
                await self.do_all()
            except (CowError, OSError) as error:
                self._tell(
                    Trouble(f"housekeeping of the store {self._disposal.label} failed, nothing is lost: {error}")
                )

    async def do_all(self, *, closing: bool = False) -> None:
        """Do all that is due. A chore that fails keeps no other from being done, and is tried again the next time.

        Raises the first OSError or CowError at the end.
        """
        failures: list[Exception] = []
        fill_up: Callable[[], Awaitable[None]] = partial(self._fill_up, closing)
        chores = [
            self._save, self._disposal.sweep, self._disposal.punch, *self._more, fill_up, self._space.keep_up,
        ]  # fmt: skip
        for chore in chores:
            try:
                await chore()
            except (CowError, OSError) as error:
                failures.append(error)
        if failures:
            raise failures[0]

    async def _fill_up(self, closing: bool) -> None:
        if not self._space.reserve.is_full and not closing:
            await self._space.reserve.refill()

    async def _save(self) -> None:
        """Save the checkpoints that wait. When that fails for long, the readers of the layer are given up. # I6"""
        while self._commits.has_checkpoints:
            try:
                async with self._disposal.directories:
                    with self._space.changing_layers():
                        await self._space.reserve.see_through(self._commits.save)
            except (CowError, OSError) as error:
                unsaved = self._commits.unsaved
                if unsaved is not None and self._commits.waiting_journals > MOST_WAITING_JOURNALS:
                    await self._removal.give_up_readers(unsaved, error)
                raise
