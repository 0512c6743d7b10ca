"""Cuts the power everywhere in a workload, opens what is left with the real recovery, and asks the oracle."""

import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, TypeVar
from unittest.mock import patch

import trio

from cow.buffer import behind, contents
from cow.disk import passing
from cow.durable import reserve
from cow.records import journal
from cow.store import flatten
from tests.crash.cut import Found, random_state_of, states_of
from tests.crash.disk import Disk, State, empty_state
from tests.crash.oracle import Oracle, Versions
from tests.crash.workloads import (
    CHUNK,
    HUNTED,
    OPERATIONS,
    SIZE,
    Session,
    Workload,
    long_workloads,
    prepare,
    short_workloads,
)
from tests.support.constants import changed

LAST_EVENTS = 16  #: of a recovery, where it puts the new in place of the old
JOURNAL_BYTES = 4096  # so that a few commits fill a file
SPLIT = 3 * CHUNK  # where the second disk of two begins
CONTENT = bytes(0x80 | (place // 512 + 1) for place in range(SIZE))

T = TypeVar("T")


class ViolationError(AssertionError):
    """The store broke its promise; the text tells what was done, where the power went and what was found."""


@dataclass
class Tally:
    """What was checked."""

    states: int = 0
    in_recovery: int = 0  #: of them, after a second cut during the recovery from the first
    workloads: int = 0


class _Inline:
    """Stands for trio.to_thread.run_sync: in this thread, after others had a few turns, the number from a seed."""

    def __init__(self) -> None:
        self._random = random.Random(1)

    async def run_sync(self, function: Callable[..., T], *arguments: Any, **_: Any) -> T:
        for _ in range(self._random.choice((1, 1, 1, 2, 4, 8, 40))):
            await trio.lowlevel.checkpoint()
            if not _others_can_run():
                break
        return function(*arguments)


def _others_can_run() -> bool:
    """Whether a task besides the one that asks is due: more turns would change nothing without one."""
    runner = trio._core._run.GLOBAL_RUN_CONTEXT.runner
    return bool(runner.runq) or any(task._next_send_fn is not None for task in runner.tasks)


@contextmanager
def small_and_deterministic() -> Iterator[None]:
    """Small journal files, no threads, no waiting, layers merged at once, and trio's order of tasks from a seed.

    A write of two chunks is an extent; in memory one of more than two is a long one, and two fill a buffer.
    """
    trio._core._run._ALLOW_DETERMINISTIC_SCHEDULING = True
    trio._core._run._r.seed(1)
    with (
        patch.object(trio.to_thread, "run_sync", _Inline().run_sync),
        changed(journal, FILE_BYTES=JOURNAL_BYTES),
        changed(reserve, RESERVE_BYTES=2 * JOURNAL_BYTES, OPENING_BYTES=JOURNAL_BYTES // 2),
        changed(behind, LINGER_SECONDS=0, MOST_CHUNKS_HERE=2),
        changed(flatten, MOST_LAYERS=1, PIECE_CHUNKS=1, PUNCH_CHUNKS=1, REST=0),
        changed(passing, PAUSE_SECONDS=0),
        changed(contents, EXTENT_CHUNKS=2),
    ):
        yield


def run(function: Callable[..., Awaitable[T]], *arguments: Any) -> T:
    """Run an async function with all of the above."""
    with small_and_deterministic():
        return trio.run(partial(function, *arguments))


@asynccontextmanager
async def opened(disk: Disk, oracle: Oracle) -> AsyncIterator[Session]:
    """The store on the disk, killed at the end."""
    session = Session(disk, oracle)
    await session.open()
    try:
        yield session
    finally:
        await session.kill()


async def read_all(session: Session) -> dict[str, bytes]:
    """Every snapshot's content."""
    names = [snapshot.name.decode() for snapshot in session.store.snapshots]
    return {name: await session.image(name).read(0, SIZE) for name in names}


async def examine(state: State, oracle: Oracle) -> Disk:
    """Open what a cut left and check all of it, then use it. Raises AssertionError where the promise is broken.

    Returns the disk, with the log of the recovery up to a mark.
    """
    disk = Disk(state)
    async with opened(disk, oracle) as session:
        disk.mark(oracle)
        states = {snapshot.name.decode(): snapshot.row.state.value for snapshot in session.store.snapshots}
        wanted = oracle.expect(set(states))
        assert set(states.values()) <= {"valid"}, f"a crash alone damaged a snapshot: {states}, {session.findings}"
        assert session.events == [], [str(event) for event in session.events]
        assert oracle.may_be_clean or not session.was_clean, "the store takes this for a clean stop"
        found = await read_all(session)
        for name, versions in wanted.items():
            mismatch = versions.mismatch(found[name])
            assert mismatch is None, f"snapshot {name}: {mismatch}"
        mismatch = oracle.live.mismatch(disk.content())
        assert mismatch is None, f"the live image: {mismatch}"
        await _use(session, found)
    return disk


async def _use(session: Session, found: dict[str, bytes]) -> None:
    """What recovery believes must also hold when the store is used on: overwrite everything, look again."""
    name = next((name for name in session.oracle.maybe_made if name not in found), "one more")
    found = {**found, name: session.disk.content()}
    await session.store.create_snapshot(name.encode())
    await session.origin.write(0, session.fresh(SIZE))
    await session.origin.drain()
    for name, content in (await read_all(session)).items():
        assert content == found[name], f"snapshot {name} changed when the origin was overwritten after the recovery"
    assert session.events == [], [str(event) for event in session.events]


async def record(workload: Workload, disk: Disk | None = None) -> tuple[Disk, int]:
    """Run a workload; the disk with its log, and the place in the log where the workload itself begins."""
    disk = disk or Disk(empty_state(CONTENT))
    session = Session(disk, Oracle(Versions(CONTENT)))
    disk.mark(session.oracle)
    try:
        await prepare(session)
        first = len(disk.log)
        for name in workload:
            await (OPERATIONS | HUNTED)[name](session)
        contents = await read_all(session)
        for name, versions in session.oracle.snapshots.items():
            mismatch = versions.mismatch(contents[name]) if versions.loose else contents[name] != versions.latest
            assert not mismatch, f"snapshot {name} reads wrong before any cut"
        assert await session.origin.read(0, SIZE) == session.oracle.live.latest, "the live image reads wrong"
        assert session.events == [], [str(event) for event in session.events]
    finally:
        await session.kill()
    return disk, first


async def check_workload(
    workload: Workload, random_: random.Random, tally: Tally, *, share: float = 1.0, doubles: float = 0.0,
    whole: bool = False, disk: Disk | None = None,
) -> None:  # fmt: skip
    """Check a `share` of the states of a workload, of its preparation too when `whole`.

    For a share `doubles` of those the power is cut twice more during the recovery from the first cut. Raises
    ViolationError at the first state that is wrong.
    """
    disk, first = await record(workload, disk)
    tally.workloads += 1
    for found in states_of(disk, random_, first=0 if whole else first, share=share):
        recovered = await _examine(workload, found, "")
        tally.states += 1
        if random_.random() < doubles:
            await _cut_again(workload, found, recovered, random_, tally)


async def _cut_again(workload: Workload, found: Found, recovered: Disk, random_: random.Random, tally: Tally) -> None:
    """The power goes once more, at some moment of the recovery."""
    opened_at = next(place for place, (edge, _) in enumerate(recovered.log) if edge == "mark")
    for first in (0, max(0, opened_at - LAST_EVENTS)):
        second = random_state_of(recovered, random_, first, opened_at)
        # Once it is opened, the catalog may say of the stop what the first cut left.
        second = replace(second, mark=replace(found.mark, may_be_clean=True))
        await _examine(workload, second, f"after a first cut at event {found.event}, with\n{found.story}\n")
        tally.states += 1
        tally.in_recovery += 1


async def _examine(workload: Workload, found: Found, before: str) -> Disk:
    oracle = found.mark
    assert isinstance(oracle, Oracle)
    try:
        return await examine(found.state, oracle)
    except Exception as error:
        told = f"{error}\n{before}power cut at event {found.event} of {' / '.join(workload)}, with\n{found.story}"
        raise ViolationError(told) from error


async def check_workloads(
    workloads: Iterable[Workload], random_: random.Random, tally: Tally, *, share: float = 1.0, doubles: float = 0.0
) -> None:
    """Check many workloads, and the making of a store with the first.

    Every other one is done as if all were in memory, of the others every other one as if the sources were, and every
    third on two disks, which are a consistency group.
    """
    for number, workload in enumerate(workloads):
        contents = (CONTENT[:SPLIT], CONTENT[SPLIT:]) if number % 3 == 2 else (CONTENT,)
        disk = Disk(empty_state(*contents), in_memory=number % 2 == 1, source_in_memory=number % 4 == 2)
        await check_workload(workload, random_, tally, share=share, doubles=doubles, whole=number == 0, disk=disk)


def sweep(part: int, parts: int, seed: int, share: float, doubles: float) -> Tally:
    """One part of all short workloads; the parts can be swept side by side, each in a process of its own."""
    mine = islice(short_workloads(), part, None, parts)
    return _check_in_order(mine, f"{seed} {part}", share, doubles)


def roam(seed: int, workloads: int, share: float, doubles: float) -> Tally:
    """Some long workloads at random."""
    mine = islice(long_workloads(random.Random(seed)), workloads)
    return _check_in_order(mine, f"{seed}", share, doubles)


def _check_in_order(workloads: Iterable[Workload], seed: str, share: float, doubles: float) -> Tally:
    tally = Tally()
    run(partial(check_workloads, workloads, random.Random(seed), tally, share=share, doubles=doubles))
    return tally
