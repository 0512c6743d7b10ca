"""Engines with one thing left out or in the wrong order, which the harness must notice: what they are hunted with.

Three kinds: each sync, and each commit of the catalog, that a run of the workloads makes, found from the run itself;
and the edits of edits.py.
"""

import random
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from itertools import product

from cow.errors import CowError
from tests.crash.calls import Call
from tests.crash.corruption import check_many
from tests.crash.disk import Disk, empty_state
from tests.crash.edits import ORDER, Edit
from tests.crash.faults import check_absences
from tests.crash.harness import CONTENT, SPLIT, Tally, ViolationError, check_workload, record, run
from tests.crash.workloads import Workload

OPENINGS: Workload = ("sync live", "restart")  # in the end every state is checked, from the making of the store on
AGAIN_ONCE_PRESERVED: Workload = ("write live chunks again once they are preserved", "sync live")
AT_THE_INSTANT: Workload = ("write live chunks", "write live at the instant of a create") * 3
DURING_CREATES: Workload = ("write live during a create",) * 8
ON_ITS_WAY: Workload = (
    "create",
    "read what is on its way",
    "read what is on its way",
    "create",
    "read what is on its way",
)
# What the mutations are hunted with besides: every operation by itself, and what it takes to reach the rarer calls.
# Those that notice the most for their time come first.
HUNTS: list[Workload] = [
    ("delete the newest", "sync live"),
    ("rename", "delete the oldest"),
    ("rename", "write live chunks", "sync live"),
    ("restart without write-behind", *("create", "write the same live chunks at once") * 2),
    ("restart without write-behind", *("create", "write the same live chunks at once") * 3),
    ("checkpoint", "idle", "delete and flatten", "idle", "checkpoint", "idle", "delete and flatten", "sync live"),
    ("write a chunk of the newest", "idle", "checkpoint", "idle", "create", "write live chunks", "sync live"),
    ("write bytes of the newest", "idle", "checkpoint", "idle", "create", "write live chunks", "sync live"),
    ("write a chunk of the newest", "checkpoint", "idle", "write a chunk of the newest", "sync the newest", "restart"),
    ("restart without write-behind", "write live during a create", "write the same live chunks at once", "create"),
    ("write chunks of the oldest", "write bytes of the newest", "checkpoint", "idle", "sync live"),
    ("write a chunk of the newest", "write live during a create"),
    ("write live chunks", "sync live", "restart", "write live chunks"),
    AGAIN_ONCE_PRESERVED,
    ("create", "write live chunks") * 4,
    ("write live chunks", "delete the newest", "create", "idle") * 2,
    ("sync live", "write live during a create", "delete the oldest", "write live during a create"),
    AT_THE_INSTANT,
    ("create", "write the same live chunks at once", "write live at the instant of a create") * 2,
    ("idle", "write live during a create", "idle", "write live during a create"),
    ("create", "write the newest and read it", "write live during a create") * 2,
    ("write the same live chunks at once", "create") * 4,
    ("create", "write the same live chunks again and again") * 2,
    ("delete while merging", "idle", "delete while merging", "sync live"),
    DURING_CREATES,
    ("create", "read the newest while live is overwritten") * 3,
    ON_ITS_WAY,
]
# Calls that are made for a reason, and that nothing is lost without.
NEEDLESS = {
    # The commits that follow on them, before anything relies on either, make them durable too.
    "catalog.Catalog._transaction<catalog.Catalog._open",
    "catalog.Catalog._transaction<catalog.Catalog.add_origins",
    # Without it a changed device goes unnoticed, and nothing else: tests/mount/test_suspect.py.
    "catalog.Catalog._transaction<catalog.Catalog.set_fingerprint",
    # Without it a map that the disk forgot, or an old one, goes unnoticed: tests/mount/test_verify.py has them.
    "catalog.Catalog._transaction<catalog.Catalog.record_saved",
    # The entry of the catalog's file, which the simulated disk has not: tests/crash/test_catalog.py.
    "opening.open_directory<opening.open_store",
    # The directory of the layers: the sync that the first journal file makes, before any layer, has its entry too.
    "opening.open_store",
    # Matter only where several files go at once: test_journal_files_are_retired_without_a_gap.
    "journal.Journal.retire<commits.Commits._save",
    "journal.Journal.retire<recovery._recover",
}
GLANCES, SHARE, DOUBLES = 12, 0.05, 0.5  #: one glance at a share of the states finds most of them
QUICK_SHARE = 0.05  #: of the openings' states, for a first look
ALL_OPENINGS = 12  #: all of their states come after so many of the hunts, because the others take far longer


class BrokenEditError(Exception):
    """An edit that is no program: a name in it is gone, or something is used as what it is not. It proves nothing."""


def is_meant(error: BaseException) -> bool:
    """Whether the promise was seen to be broken, or the engine says so itself.

    Any other exception tells that the engine broke down, but not of what. Raises BrokenEditError for those that come
    of an edit whose names have gone, and not of what it leaves out.
    """
    if isinstance(error, BaseExceptionGroup):
        return any([is_meant(one) for one in error.exceptions])
    if isinstance(error, ViolationError) and error.__cause__ is not None:
        return is_meant(error.__cause__)
    if isinstance(error, (NameError, AttributeError, ImportError, TypeError)):
        raise BrokenEditError(f"{type(error).__name__}: {error}") from error
    return isinstance(error, (AssertionError, CowError, OSError))


_Searches = Iterator[Callable[[], Awaitable[object]]]
_MakeDisk = Callable[..., Disk]  #: with the keywords of `_make_disk`
_ON_A_DISK: dict[str, bool] = {}
_SOURCE_IN_MEMORY, _IN_MEMORY, _TWO_SOURCES = {"source_in_memory": True}, {"in_memory": True}, {"two_sources": True}
# What does not show on a disk: where writes need not wait, and between the devices of a consistency group.
_ELSEWHERE: list[tuple[dict[str, bool], Workload]] = [
    *((_SOURCE_IN_MEMORY, workload) for workload in (AGAIN_ONCE_PRESERVED, AT_THE_INSTANT)),
    *((_IN_MEMORY, workload) for workload in (AT_THE_INSTANT, DURING_CREATES, *HUNTS[3:5])),
    *((_TWO_SOURCES, workload) for workload in (DURING_CREATES, ON_ITS_WAY, *HUNTS[16:20])),
]
# What shows in a few crash states only, and at which share of them.
_FIRST_CUTS: list[tuple[dict[str, bool], Workload, float]] = [
    (_TWO_SOURCES, ("restart without write-behind", "create", "write the same live chunks at once"), 0.15),
    (_ON_A_DISK, ("rename", "delete the oldest"), 1.0),
]


def _make_disk(*, two_sources: bool = False, **kind: bool) -> Disk:
    return Disk(empty_state(*((CONTENT[:SPLIT], CONTENT[SPLIT:]) if two_sources else (CONTENT,))), **kind)


def _searches(make_disk: _MakeDisk, glances: int, share: float) -> _Searches:
    """What is looked at, one after the other. The kinds of disk take turns.

    A ValueError of those that look into an image, which are for one disk, says nothing.
    """
    for kind, workload in [*product([_ON_A_DISK], HUNTS), *_ELSEWHERE]:  # some show without a power cut
        yield partial(record, workload, make_disk(**kind))
    yield partial(check_workload, OPENINGS, random.Random(1), Tally(), share=QUICK_SHARE, whole=True, disk=make_disk())
    for kind, workload, first_share in _FIRST_CUTS:
        random_, disk = random.Random(1), make_disk(**kind)
        yield partial(check_workload, workload, random_, Tally(), share=first_share, disk=disk)
    for glance in range(glances):
        for number, workload in enumerate(HUNTS):
            if (glance, number) == (0, ALL_OPENINGS):
                random_, disk = random.Random(1), make_disk()
                yield partial(check_workload, OPENINGS, random_, Tally(), doubles=DOUBLES, whole=True, disk=disk)
            kind = _SOURCE_IN_MEMORY if (glance + number) % 2 else _ON_A_DISK
            random_, disk = random.Random(f"{glance} {number}"), make_disk(**kind)
            yield partial(check_workload, workload, random_, Tally(), share=share, doubles=DOUBLES, disk=disk)


def hunt(make_disk: _MakeDisk = _make_disk, glances: int = GLANCES, share: float = SHARE) -> str | None:
    """What the harness says of the engine as it is now, on such disks; None when it has nothing to say.

    Each search is a run of its own, so that what one finds does not hang on those before it. Each glance is at a
    `share` of the crash states. Raises BrokenEditError.
    """
    for search in _searches(make_disk, glances, share):
        try:
            run(search)
        except Exception as error:
            if is_meant(error):
                return str(error) or type(error).__name__
    return None


async def calls_of(workloads: list[Workload], kinds: set[str]) -> list[Call]:
    """The distinct calls of these kinds that the workloads make, each by its line in the engine."""
    counts: Counter[Call] = Counter()
    for workload in workloads:
        disk = Disk(empty_state(CONTENT))
        disk.calls = counts
        await record(workload, disk)
    return sorted((call for call in counts if call.kind in kinds), key=str)


def disk_without(left_out: Call, **kind: bool) -> Disk:
    """A disk on which that call does nothing."""
    disk = _make_disk(**kind)
    disk.left_out = lambda call: call == left_out
    return disk


DAMAGED_STORES = 4000


def unnoticed_check(edit: Edit) -> str | None:
    """The missing check in words when no damaged store shows that it is missing, else None."""
    with edit.applied():
        try:
            run(partial(check_many, DAMAGED_STORES, 2))
        except ViolationError as error:
            is_meant(error)  # an error that is none of ours is a broken promise here, but not one of a broken edit
            return None
    return edit.what


def unnoticed_away(edit: Edit) -> str | None:
    """The mutation in words when no absence of the source shows it, else None."""
    with edit.applied():
        try:
            run(check_absences, 2)
        except ViolationError:
            return None
    return edit.what


def unnoticed(mutation: Call | Edit) -> str | None:
    """The mutation in words when the harness does not notice it, else None."""
    if isinstance(mutation, Call):
        return str(mutation) if hunt(partial(disk_without, mutation)) is None else None
    with mutation.applied():
        return mutation.what if hunt() is None else None


def all_mutations() -> list[Call | Edit]:
    """Every sync and commit that the workloads make, save those that are known to be needless, and every edit."""
    calls = run(partial(calls_of, [OPENINGS, *HUNTS], {"sync", "commit"}))
    assert {call.site for call in calls} >= NEEDLESS
    return [*(call for call in calls if call.site not in NEEDLESS), *ORDER]
