"""Reads under way on the simulated disk: each comes after some turns of other tasks, the number from a seed."""

import errno
import random
from typing import TYPE_CHECKING, NamedTuple

import trio

from cow.disk.ring import Done, Reads, Slot

if TYPE_CHECKING:
    from tests.crash.disk import Disk


class _Read(NamedTuple):
    fd: int
    slot: Slot
    start: int
    length: int
    offset: int
    done: Done


class SimulatedReads(Reads):
    """As the ring: what is read is what the disk has at some moment between the beginning and the answer."""

    def __init__(self, disk: "Disk") -> None:
        self._disk = disk
        self._random = random.Random(1)
        self._begun: list[_Read] = []
        self._started: list[_Read] = []
        self._come: list[tuple[Done, int]] = []
        self._work = trio.Event()

    def slot(self, length: int) -> Slot | None:
        return Slot(1) if length <= 100 << 10 else None

    def give_back(self, slot: Slot) -> None:
        slot.view[:] = bytes(len(slot.view))  # what anybody still has of it is seen to be wrong

    def has_room(self, count: int) -> bool:
        return True

    def begin(self, fd: int, slot: Slot, start: int, length: int, offset: int, done: Done) -> None:
        self._begun.append(_Read(fd, slot, start, length, offset, done))

    def submit(self) -> None:
        self._started += self._begun
        self._begun = []
        self._work.set()

    def reap(self) -> int:
        come, self._come = self._come, []
        for done, result in come:
            done(result)
        return len(come)

    @property
    def under_way(self) -> int:
        return len(self._begun) + len(self._started) + len(self._come)

    async def ready(self) -> None:
        await self._work.wait()
        await self._some_turns()
        self._random.shuffle(self._started)
        while self._started:
            fd, slot, start, length, offset, done = self._started.pop()
            try:
                result = self._disk.preadv(fd, [slot.view[start : start + length]], offset)
            except OSError as error:
                result = -(error.errno or errno.EIO)
            self._come.append((done, result))
            await self._some_turns()
        self._work = trio.Event()

    async def _some_turns(self) -> None:
        for _ in range(self._random.choice((0, 1, 2, 4, 8))):
            await trio.lowlevel.checkpoint()

    def close(self) -> None:
        """Nobody waits for an answer any more."""
