"""Errors of the disk at every call that the engine makes, once and for good, and what must hold all the same.

The origin's writers see an error only where the origin's own device fails. What a snapshot gives back is right, or it
is an error with a sentence. After a power cut at any later moment the same holds; a snapshot may have been given up,
with a reason, and may never be wrong.
"""

import errno
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import count as count_up

import trio

from cow.errors import CowError
from tests.crash.calls import Call, Fault
from tests.crash.cut import random_state_of
from tests.crash.disk import Disk, State, empty_state
from tests.crash.harness import CONTENT, ViolationError
from tests.crash.oracle import Oracle, Versions
from tests.crash.workloads import OPERATIONS, SIZE, Session, Workload, prepare

FAULTS = {
    "read": [Fault(errno.EIO), Fault(short=1024)],
    "write": [Fault(errno.EIO), Fault(errno.ENOSPC), Fault(short=1024)],
    "sync": [Fault(errno.EIO), Fault(errno.ENOSPC)],
    "truncate": [Fault(errno.EIO)],
    "allocate": [Fault(errno.EIO), Fault(errno.ENOSPC)],
    "punch": [Fault(errno.EIO)],
    "link": [Fault(errno.EIO), Fault(errno.ENOSPC)],
    "unlink": [Fault(errno.EIO)],
    "begin": [Fault(errno.EIO)],
    "commit": [Fault(errno.EIO), Fault(errno.ENOSPC)],
}
# Between them they make every call of the engine.
_FIRST = """
write a live chunk; write chunks of the oldest; sync the newest; create; write live chunks; checkpoint;
write live sectors; rename; write bytes of the newest; sync live; delete the newest; write live chunks; create;
write the live end; delete the oldest; write live chunks; restart; write live chunks; write a chunk of the newest;
sync the newest; create; write live chunks; checkpoint; sync live
"""
_SECOND = """
delete the oldest; create; write live chunks; create; write live chunks; create; write live chunks; create;
write chunks of the oldest; checkpoint; write chunks of the oldest; sync live; delete the newest; restart;
write live chunks; idle; sync live
"""
WORKLOADS: list[Workload] = [tuple(" ".join(text.split()).split("; ")) for text in (_FIRST, _SECOND)]
STATES_AFTER = 8
MOST_SECONDS = 60  #: longer is a hang
_STOPPING = {"restart", "change the quota"}
_OF_LIVE = {name for name in OPERATIONS if "live" in name}


@dataclass(frozen=True)
class Plan:
    """`fault` happens at the `nth` call that is `call`, counted from the end of the preparation, and then no more.

    Or, `for_good`, at every later one too; with `everywhere` at every later change on the same device.
    """

    call: Call
    fault: Fault
    nth: int
    for_good: bool
    everywhere: bool = False

    @property
    def is_of_source(self) -> bool:
        return self.call.is_source

    def decider(self) -> Callable[[Call], Fault | None]:
        return Decider(self)

    def __str__(self) -> str:
        extent = "on the whole device " * self.everywhere + ("for good" if self.for_good else "once")
        return f"{self.fault} at {self.call}, occurrence {self.nth}, {extent}"


@dataclass(frozen=True)
class Absence:
    """The source does not answer: every call on it fails, from the nth on, for a while. No snapshot loses by it."""

    first: int
    calls: int
    fault: Fault
    is_of_source = True

    def decider(self) -> Callable[[Call], Fault | None]:
        seen = count_up()

        def decide(call: Call) -> Fault | None:
            away = call.is_source and self.first <= next(seen) < self.first + self.calls
            return self.fault if away else None

        return decide

    def __str__(self) -> str:
        return f"{self.fault} at {self.calls} calls on the source, from the {self.first}th on"


def absences(counts: Counter[Call], random_: random.Random) -> Iterator[Absence]:
    """At every call on the source, for longer and shorter, as a bad sector's error and as one of a lost connection."""
    total = sum(number for call, number in counts.items() if call.is_source)
    for first in range(total):
        for calls in random_.sample((1, 2, 4, 10, 40), 2):
            yield Absence(first, calls, Fault(random_.choice((errno.EIO, errno.EIO, errno.ENOTCONN, errno.ENODEV))))


def plans(counts: Counter[Call], random_: random.Random) -> Iterator[Plan]:
    """Every call, with every fault that it can have, once and for good; and the whole device failing from there on."""
    for call, count in sorted(counts.items(), key=lambda item: str(item[0])):
        for fault in FAULTS[call.kind]:
            for for_good in (False, True):
                yield Plan(call, fault, random_.randrange(count), for_good)
        if call.kind in ("write", "sync", "commit", "allocate"):
            yield Plan(call, Fault(errno.EIO), random_.randrange(count), True, everywhere=True)


async def check_absences(seed: int) -> int:
    """Check the absences of all workloads, and return how many they are. Raises ViolationError."""
    random_ = random.Random(seed)
    done = 0
    for workload in WORKLOADS:
        for plan in absences(await count_calls(workload), random_):
            await check_plan(workload, plan, random_)
            done += 1
    return done


class Decider:
    """Carries out a plan; counts, once armed."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._seen = -1
        self.struck = False

    def __call__(self, call: Call) -> Fault | None:
        plan = self._plan
        same = call == plan.call
        self._seen += same
        if self.struck and plan.everywhere and call.is_source == plan.call.is_source:
            return plan.fault if call.kind not in ("read",) and not call.is_elsewhere else None
        if same and (self._seen == plan.nth or (self.struck and plan.for_good)):
            self.struck = True
            return plan.fault
        return None


async def count_calls(workload: Workload) -> Counter[Call]:
    """How often a workload makes each call, without its preparation."""
    disk = Disk(empty_state(CONTENT))
    session = Session(disk, Oracle(Versions(CONTENT)))
    await prepare(session)
    disk.calls = Counter()
    for name in workload:
        await OPERATIONS[name](session)
    calls, disk.calls = disk.calls, None
    await session.kill()
    return calls


async def check_plan(workload: Workload, plan: Plan | Absence, random_: random.Random) -> None:
    """Run the workload under the plan, cut the power at some moments, `STATES_AFTER` times.

    Raises ViolationError where the promise is broken.
    """
    done: list[str] = []
    try:
        with trio.fail_after(MOST_SECONDS):
            disk, armed_at = await _run(workload, plan, done)
            for number in range(STATES_AFTER):
                first = min(armed_at, len(disk.log) - 1) if number else len(disk.log) - 1
                found = random_state_of(disk, random_, first, len(disk.log))
                await examine_after_faults(found.state, found.mark, nothing_lost=isinstance(plan, Absence))
    except Exception as error:
        raise ViolationError(f"{type(error).__name__}: {error}\nwith {plan}\nafter {' / '.join(done)}") from error


async def _run(workload: Workload, plan: Plan | Absence, done: list[str]) -> tuple[Disk, int]:
    disk = Disk(empty_state(CONTENT))
    session = Session(disk, Oracle(Versions(CONTENT)), elsewhere=True)
    try:
        await prepare(session)
        armed_at = len(disk.log)
        disk.decide = plan.decider()
        await _work(session, workload, plan, done)
    finally:
        disk.decide = None
        await session.kill()
    return disk, armed_at


async def _work(session: Session, workload: Workload, plan: Plan | Absence, done: list[str]) -> None:
    for name in workload:
        try:
            await OPERATIONS[name](session)
            done.append(name)
        except (CowError, OSError) as error:
            done.append(f"{name} (failed: {error})")
            _has_a_sentence(error)
            if name in _OF_LIVE and name != "sync live" and not plan.is_of_source:
                raise ViolationError(f"a writer of the origin got an error of the store: {error}") from error
            if name in _STOPPING:
                await session.kill()
                session.tolerate_stop()
                with suppress(CowError, OSError):
                    await session.open()
                    session.mark_in_use()
                    continue
                return  # it cannot be opened while the disk fails so; after that it must be
        await _read_right(session)


def _has_a_sentence(error: Exception) -> None:
    if not str(error):
        raise ViolationError("an error without a sentence") from error


async def _read_right(session: Session) -> None:
    """Every snapshot reads as the oracle has it, or not at all."""
    present = {snapshot.name.decode(): snapshot for snapshot in session.store.snapshots}
    assert set(present) == set(session.oracle.snapshots), f"there are {set(present)}"
    for name, versions in session.oracle.snapshots.items():
        try:
            found = await session.image(name).read(0, SIZE)
        except (CowError, OSError) as error:
            _has_a_sentence(error)
            continue
        mismatch = versions.mismatch(found)
        assert mismatch is None, f"snapshot {name}: {mismatch}"
    live = session.disk.content()
    assert session.oracle.live.mismatch(live) is None, "the live image reads wrong"


async def examine_after_faults(state: State, oracle: object, *, nothing_lost: bool) -> None:
    """Open what a cut left, on a disk that is well again: all of it right, or an error that says why."""
    assert isinstance(oracle, Oracle)
    disk = Disk(state)
    session = Session(disk, oracle, elsewhere=True)
    await session.open()
    try:
        wanted = oracle.expect({snapshot.name.decode() for snapshot in session.store.snapshots})
        for snapshot in session.store.snapshots:
            row = snapshot.row
            assert row.state.value == "valid" or row.reason, f"a snapshot is {row.state} for no reason"
            assert not nothing_lost or row.state.value == "valid", f"a snapshot is {row.state}: {row.reason}"
            for chunk in range(0, SIZE, 4096):
                await _read_chunk(session, snapshot.name.decode(), wanted, chunk)
        mismatch = oracle.live.mismatch(disk.content())
        assert mismatch is None, f"the live image: {mismatch}"
        # A store that was healed goes on: a new snapshot is right.
        before = disk.content()
        await session.store.create_snapshot(b"healed")
        await session.origin.write(0, session.fresh(SIZE))
        found = await session.image("healed").read(0, SIZE)
        assert found == before, "a snapshot taken after the recovery is wrong"
    finally:
        await session.kill()


async def _read_chunk(session: Session, name: str, wanted: dict[str, Versions], offset: int) -> None:
    try:
        found = await session.image(name).read(offset, 4096)
    except (CowError, OSError) as error:
        _has_a_sentence(error)
        return
    versions = wanted[name]
    part = Versions(
        versions.flushed[offset : offset + 4096],
        tuple(
            (max(at, offset) - offset, data[max(0, offset - at) : offset + 4096 - at])
            for at, data in versions.since
            if at < offset + 4096 and offset < at + len(data)
        ),
        versions.loose,
    )
    mismatch = part.mismatch(found)
    assert mismatch is None, f"snapshot {name}, from offset {offset}: {mismatch}"
