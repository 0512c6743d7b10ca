"""What is done to a store before the power goes: one table of operations, and every short sequence of them.

After ACE (the bounded black-box method of CrashMonkey): all sequences of up to two operations and a seeded sample of
longer ones, from a small store that is in use, each ended by a persistence point.
"""

import os
import random
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from functools import partial
from itertools import product

import trio

from cow.config import Source
from cow.errors import CowError
from cow.events import Event
from cow.opening import open_store
from cow.store import flatten
from cow.store.store import Store
from tests.crash.disk import ELSEWHERE, STORE, Disk
from tests.crash.joined import Joined
from tests.crash.oracle import Oracle, Versions
from tests.support.inside import are_writes_held

CHUNK = 4096
SIZE = 6 * CHUNK + 1536  # the last chunk is a partial one
SMALL_QUOTA, LARGE_QUOTA = 64 << 20, 128 << 20


class StopError(Exception):
    """Ends a store as a kill would: nothing of a clean stop is done."""


Way = Callable[[Joined, int, int], Awaitable[bytes]]
_WAYS: tuple[Way, ...] = (Joined.read_served, Joined.read)  #: begun, and waited for in a thread


class Session:
    """A store in use on a disk, and the oracle, which is marked in the disk's log before and after each call."""

    def __init__(self, disk: Disk, oracle: Oracle, *, elsewhere: bool = False) -> None:
        self.disk = disk
        self._elsewhere = ELSEWHERE if elsewhere else None
        self.oracle = oracle
        self.events: list[Event] = []  #: that were told
        self.findings: list[str] = []
        self.was_clean = False
        self.store: Store
        self._counter = 0
        self._stack = AsyncExitStack()

    async def open(self, **options: object) -> None:
        self._stack = AsyncExitStack()
        opened = await self._stack.enter_async_context(
            open_store(
                STORE,
                [Source(os.path.basename(path).encode(), path) for path in self.disk.sources],
                elsewhere=self._elsewhere,
                io=self.disk,
                tell=self.events.append,
                **options,
            )
        )
        self.store, self.findings, self.was_clean = opened.store, opened.findings, opened.was_clean

    async def stop(self) -> None:
        await self._stack.aclose()

    async def kill(self) -> None:
        error = StopError()
        with suppress(StopError):
            try:
                await self._stack.__aexit__(StopError, error, None)
            except BaseExceptionGroup as group:
                _, others = group.split(StopError)
                if others is not None:
                    raise others from None

    # -- what is done, with the oracle following -----------------------------------------------------------------

    def fresh(self, length: int) -> bytes:
        """Bytes that were never written before."""
        self._counter += 1
        return (self._counter.to_bytes(4, "big") * (length // 4 + 1))[:length]

    def _mark(self, oracle: Oracle) -> None:
        self.oracle = oracle
        self.disk.mark(oracle)

    def tolerate_stop(self) -> None:
        """A stop failed, and whether it counts as clean is open."""
        self._mark(replace(self.oracle, may_be_clean=True))

    def mark_in_use(self) -> None:
        """From here on a cut leaves a stop that is not clean."""
        self._mark(replace(self.oracle, may_be_clean=False))

    def image(self, name: str) -> Joined:
        found = self.store.find(name.encode())
        assert found is not None, f"snapshot {name} is gone"
        return Joined(found.images, self.store.reads)

    @property
    def origin(self) -> Joined:
        return Joined(list(self.store.origins), self.store.reads)

    async def write_live(self, offset: int, length: int) -> None:
        data = self.fresh(min(length, SIZE - offset))
        self._mark(replace(self.oracle, live=self.oracle.live.write(offset, data)))
        try:
            await self.origin.write_served(offset, data)
        except (CowError, OSError):
            self._mark(replace(self.oracle, live=replace(self.oracle.live, loose=True)))
            raise

    async def write_snapshot(self, name: str, offset: int, length: int) -> None:
        data = self.fresh(min(length, SIZE - offset))
        self._mark(self.oracle.wrote(name, self.oracle.snapshots[name].write(offset, data)))
        try:
            await self.image(name).write_served(offset, data)
        except (CowError, OSError):
            self._mark(self.oracle.wrote(name, replace(self.oracle.snapshots[name], loose=True)))
            raise

    async def write_and_read_snapshot(self, name: str) -> None:
        for offset, length in ((CHUNK, 2 * CHUNK), (2 * CHUNK, CHUNK)):
            await self.write_snapshot(name, offset, length)
            found = await self.image(name).read(offset, length)
            assert found == self.oracle.snapshots[name].latest[offset : offset + length], "what was written is not read"

    async def read_while_overwritten(self, name: str) -> None:
        """What a snapshot shows is read, both ways, while it is overwritten in the live image. # I2"""
        expected = self.oracle.snapshots[name].latest
        self.disk.is_cold = True
        try:
            async with trio.open_nursery() as nursery:
                for at, way in product(range(6), _WAYS):
                    nursery.start_soon(self._read, way, self.image(name), at * CHUNK, CHUNK, expected)
                nursery.start_soon(self.write_live, 0, 3 * CHUNK)
                nursery.start_soon(self.write_live, 3 * CHUNK, 3 * CHUNK)
        finally:
            self.disk.is_cold = False

    async def read_on_its_way(self, name: str) -> None:
        """What was acknowledged is read, both ways, while it goes from the buffer to its place. # I3"""
        self.disk.is_cold = True
        try:
            for turns in range(6):
                await self.write_live(turns * CHUNK, CHUNK)
                await self.write_snapshot(name, turns * CHUNK, CHUNK)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self.sync_live)
                    nursery.start_soon(self.sync_snapshot, name)
                    await _turns(turns)
                    at = turns * CHUNK
                    live, snapshot = self.oracle.live.latest, self.oracle.snapshots[name].latest
                    for way in _WAYS:  # two chunks: what is wholly in the buffer is read at once
                        nursery.start_soon(self._read, way, self.origin, at, 2 * CHUNK, live)
                        nursery.start_soon(self._read, way, self.image(name), at, 2 * CHUNK, snapshot)
        finally:
            self.disk.is_cold = False

    async def _read(self, way: Way, image: Joined, offset: int, length: int, expected: bytes) -> None:
        found = await way(image, offset, length)
        assert found == expected[offset : offset + length], f"what is read at offset {offset} is wrong"

    async def sync_live(self) -> None:
        try:
            await self.origin.sync()
        except (CowError, OSError):
            self._mark(replace(self.oracle, live=replace(self.oracle.live, loose=True)))
            raise
        self._mark(replace(self.oracle, live=self.oracle.live.flush()))

    async def sync_snapshot(self, name: str) -> None:
        await self.image(name).sync()
        self._mark(self.oracle.wrote(name, self.oracle.snapshots[name].flush()))

    async def create(self) -> None:
        self._counter += 1
        name = f"s{self._counter}"
        live = self.oracle.live
        made = live if live.loose else Versions(live.latest)
        self._mark(self.oracle.making(name, made))
        try:
            await self.store.create_snapshot(name.encode())
        except (CowError, OSError):  # perhaps it was the sync of the origin
            self._mark(replace(self.oracle, live=replace(self.oracle.live, loose=True)))
            raise
        self._mark(self.oracle.made(name, made, self.oracle.live.flush()))

    async def delete(self, name: str) -> None:
        self._mark(self.oracle.dropping(name))
        await self.store.delete_snapshot(name.encode())
        self._mark(self.oracle.dropped(name))

    async def rename(self, name: str) -> None:
        self._counter += 1
        new = f"r{self._counter}"
        self._mark(self.oracle.renaming(name, new))
        await self.store.rename_snapshot(name.encode(), new.encode())
        self._mark(self.oracle.renamed(name, new))

    async def restart(self, **options: object) -> None:
        self._mark(replace(self.oracle, may_be_clean=True))
        try:
            await self.stop()
        except (CowError, OSError):
            # What was not synced before may or may not have been by this.
            snapshots = {name: replace(versions, loose=True) for name, versions in self.oracle.snapshots.items()}
            self._mark(replace(self.oracle, live=replace(self.oracle.live, loose=True), snapshots=snapshots))
            raise
        # A clean stop syncs all images.
        snapshots = {name: versions.flush() for name, versions in self.oracle.snapshots.items()}
        self._mark(replace(self.oracle, live=self.oracle.live.flush(), snapshots=snapshots))
        await self.open(**options)
        assert self.was_clean, "a clean stop was not recorded"
        self._mark(replace(self.oracle, may_be_clean=False))

    async def write_during(self, other: Callable[[], Awaitable[None]]) -> None:
        """Write to the live image while something else is done."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(other)
            nursery.start_soon(self.write_live, CHUNK, 3 * CHUNK)

    async def write_during_create(self, *, at_the_instant: bool = False) -> None:
        """The snapshot may or may not have the write. `at_the_instant`: all of it comes while writes are held."""
        self._counter += 1
        name, data = f"s{self._counter}", self.fresh(5 * CHUNK)
        before = self.oracle.live.latest
        made = Versions(before, ((0, data),), loose=True)
        self._mark(replace(self.oracle.making(name, made), live=self.oracle.live.write(0, data)))

        async def write() -> None:
            while at_the_instant and not are_writes_held(self.store):
                await _turns(1)
            for start in reversed(range(0, len(data), CHUNK)):  # some before the instant and some after it
                await self.origin.write(start, data[start : start + CHUNK])
                await _turns(1 if at_the_instant else 6)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.store.create_snapshot, name.encode())
            nursery.start_soon(write)
        self._mark(self.oracle.made(name, made, Versions(before, made.since)))
        taken = await self.image(name).read(0, len(data))
        has = [taken[start : start + CHUNK] == data[start : start + CHUNK] for start in range(0, len(data), CHUNK)]
        assert has == sorted(has), "the snapshot has a later write, and not the one before it"

    async def write_the_same_at_once(self) -> None:
        """The same bytes, so that the order does not matter: no write may overtake what another preserves."""
        data = self.fresh(2 * CHUNK)
        self._mark(replace(self.oracle, live=self.oracle.live.write(3 * CHUNK, data)))

        async def write(delay: int) -> None:
            await _turns(delay)
            await self.origin.write(3 * CHUNK, data)

        async with trio.open_nursery() as nursery:
            for delay in range(0, 60, 6):
                nursery.start_soon(write, delay)

    async def write_everywhere_at_once(self) -> None:
        """Each chunk by a write of its own, so that those of both disks are preserved together."""
        data = self.fresh(6 * CHUNK)
        self._mark(replace(self.oracle, live=self.oracle.live.write(0, data)))
        async with trio.open_nursery() as nursery:
            for start in range(0, len(data), CHUNK):
                nursery.start_soon(self.origin.write, start, data[start : start + CHUNK])

    async def write_again_and_again(self) -> None:
        """Overwrite chunks at many moments of their being preserved; the last write must win."""
        for turns in range(8):
            for length in (CHUNK, 2 * CHUNK):
                await self.write_live(2 * CHUNK, 3 * CHUNK)
                await _turns(turns)
                await self.write_live(3 * CHUNK, length)

    async def write_again_once_preserved(self) -> None:
        """Overwrite chunks whose old bytes are safe, while the first overwriting is on its way to the device."""
        for chunks, length in (((2,), CHUNK), ((2,), 2 * CHUNK), ((0, 2, 4), CHUNK)):
            await self.create()
            for chunk in chunks:
                await self.write_live(chunk * CHUNK, length)
            (image,) = self.store.snapshots[-1].images
            for _ in range(10_000):
                if image.view.preserved_bytes:
                    break
                await _turns(1)
            for chunk in chunks:
                await self.write_live(chunk * CHUNK, length)

    async def delete_and_flatten(self) -> None:
        """Delete a snapshot whose layer goes to an older one, and wait until that has been merged into its own."""
        await self.create()
        name = self.newest
        await self.write_live(2 * CHUNK, 3 * CHUNK)
        await self.create()
        await self.delete(name)
        await self._merged()

    async def delete_while_merging(self) -> None:
        """What serves the layers that are being merged is deleted, at some moment; what is older has some of them."""
        await self.write_live(0, CHUNK)
        await self.create()
        middle = self.newest
        await self.write_live(5 * CHUNK, CHUNK)
        await self.create()
        name = self.newest
        await self.write_live(0, 3 * CHUNK)
        await self.create()
        await self.delete(name)
        await _turns(self._counter % 16)
        await self.delete(middle)
        await self._merged()

    async def _merged(self) -> None:
        for _ in range(10_000):
            groups = [group for origin in self.store.origins for group in origin.epochs.groups[:-1]]
            if all(len(group.layers) <= flatten.MOST_LAYERS for group in groups):
                return
            await trio.lowlevel.checkpoint()
        raise AssertionError("the layers are not merged")

    @property
    def oldest(self) -> str | None:
        return next(iter(self.oracle.snapshots), None)

    @property
    def newest(self) -> str | None:
        return next(reversed(self.oracle.snapshots), None)


Action = Callable[[Session], Awaitable[None]]


def _on(pick: Callable[[Session], str | None], act: Callable[[Session, str], Awaitable[None]]) -> Action:
    """An action on a snapshot; nothing where there is none."""

    async def action(session: Session) -> None:
        name = pick(session)
        if name is not None:
            await act(session, name)

    return action


def _newest(session: Session) -> str | None:
    return session.newest


def _oldest(session: Session) -> str | None:
    return session.oldest


async def _checkpoint(session: Session) -> None:
    await session.store.checkpoint()


async def _turns(count: int) -> None:
    """Let others run for a while."""
    for _ in range(count):
        await trio.lowlevel.checkpoint()


OPERATIONS: dict[str, Action] = {
    "write a live chunk": lambda session: session.write_live(CHUNK, CHUNK),
    "write live chunks": lambda session: session.write_live(0, 4 * CHUNK),
    "write live sectors": lambda session: session.write_live(2 * CHUNK + 3584, 1024),
    "write the live end": lambda session: session.write_live(6 * CHUNK, CHUNK),
    "write a chunk of the newest": _on(_newest, lambda session, name: session.write_snapshot(name, CHUNK, CHUNK)),
    "write bytes of the newest": _on(_newest, lambda session, name: session.write_snapshot(name, 2 * CHUNK - 100, 900)),
    "write the newest and read it": _on(_newest, lambda session, name: session.write_and_read_snapshot(name)),
    "write chunks of the oldest": _on(_oldest, lambda session, name: session.write_snapshot(name, 0, 3 * CHUNK)),
    "sync live": lambda session: session.sync_live(),
    "sync the newest": _on(_newest, lambda session, name: session.sync_snapshot(name)),
    "create": lambda session: session.create(),
    "delete the oldest": _on(_oldest, lambda session, name: session.delete(name)),
    "delete the newest": _on(_newest, lambda session, name: session.delete(name)),
    "rename": _on(_oldest, lambda session, name: session.rename(name)),
    "checkpoint": _checkpoint,
    "idle": lambda session: _turns(300),  # so that the housekeeping comes to its end
    "restart": lambda session: session.restart(),
    "write the same live chunks at once": lambda session: session.write_the_same_at_once(),
    "write live chunks everywhere at once": lambda session: session.write_everywhere_at_once(),
    "write the same live chunks again and again": lambda session: session.write_again_and_again(),
    "write live during a create": lambda session: session.write_during_create(),
    "write live during a sync of the newest": _on(
        _newest, lambda session, name: session.write_during(partial(session.sync_snapshot, name))
    ),
    "write live during a delete of the oldest": _on(
        _oldest, lambda session, name: session.write_during(partial(session.delete, name))
    ),
    "write live during a checkpoint": lambda session: session.write_during(session.store.checkpoint),
    "write live during a write to the oldest": _on(
        _oldest, lambda session, name: session.write_during(partial(session.write_snapshot, name, CHUNK, 3 * CHUNK))
    ),
    "restart without write-behind": lambda session: session.restart(write_behind=False),
    "delete and flatten": lambda session: session.delete_and_flatten(),
    "delete while merging": lambda session: session.delete_while_merging(),
    "change the quota": lambda session: session.restart(quota_bytes=SMALL_QUOTA),
}
COSTLY = {"delete while merging"}  #: has so many states that the short sequences have it by itself only
PERSISTENCE = ("sync live", "sync the newest", "checkpoint", "restart")

Workload = tuple[str, ...]


# What the mutations are hunted with besides.
HUNTED: dict[str, Action] = {
    "write live at the instant of a create": lambda session: session.write_during_create(at_the_instant=True),
    "write live chunks again once they are preserved": lambda session: session.write_again_once_preserved(),
    "read the newest while live is overwritten": _on(
        _newest, lambda session, name: session.read_while_overwritten(name)
    ),
    "read what is on its way": _on(_newest, lambda session, name: session.read_on_its_way(name)),
}


def short_workloads() -> Iterator[Workload]:
    """Every sequence of up to two operations, each with a persistence point in turn."""
    pairs = product((one for one in OPERATIONS if one not in COSTLY), repeat=2)
    for place, sequence in enumerate([(), *((one,) for one in OPERATIONS), *pairs]):
        yield (*sequence, PERSISTENCE[place % len(PERSISTENCE)])


def long_workloads(random_: random.Random) -> Iterator[Workload]:
    """Sequences of three to ten operations, without end."""
    while True:
        length = random_.randint(3, 10)
        yield (*random_.choices(list(OPERATIONS), k=length), random_.choice(PERSISTENCE))


async def prepare(session: Session) -> None:
    """The store that the workloads start from: two snapshots, with chunks preserved for and written to them."""
    await session.open(quota_bytes=LARGE_QUOTA)
    session.mark_in_use()
    await session.create()
    await session.write_live(0, 2 * CHUNK)
    await session.create()
    await session.write_live(CHUNK, 2 * CHUNK)
    await session.write_snapshot(session.newest, 0, 2 * CHUNK)
    await session.sync_snapshot(session.newest)
