"""Engines with one thing left out or in the wrong order, which the harness must notice.

Three kinds: each sync, and each commit of the catalog, that a run of the workloads makes, found from the run itself;
and edits of the source, each of which takes out one check or one ordering edge.
"""

import importlib
import inspect
import random
import sys
import textwrap
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from unittest.mock import patch

from cow.errors import CowError
from tests.crash.calls import Call
from tests.crash.corruption import check_many
from tests.crash.disk import Disk, empty_state
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


@dataclass(frozen=True)
class Edit:
    """`old` in the source of `function` (module:Class.function) becomes `new`."""

    what: str
    function: str
    old: str
    new: str

    @property
    def unchanged(self) -> "Edit":
        """The control: the function compiled anew as it is."""
        return replace(self, new=self.old)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The engine with the edit in it."""
        module_name, _, path = self.function.partition(":")
        module = importlib.import_module(f"cow.{module_name}")
        owner_name, _, name = path.rpartition(".")
        owner = getattr(module, owner_name) if owner_name else module
        source = inspect.getsource(inspect.getattr_static(owner, name))
        assert source.count(self.old) == 1, (
            f"{self.what}: {self.old!r} is in {self.function} {source.count(self.old)} times"
        )
        # In its own globals: what it is imported into, or inherited by, has other names.
        home = sys.modules[inspect.unwrap(getattr(owner, name)).__module__]
        namespace: dict[str, object] = {}
        exec(
            compile(textwrap.dedent(source.replace(self.old, self.new)), f"<{self.what}>", "exec"),
            vars(home),
            namespace,
        )
        original = inspect.getattr_static(owner, name)
        with ExitStack() as stack:
            stack.enter_context(patch.object(owner, name, namespace[name]))
            for other in [one for key, one in sys.modules.items() if key.startswith("cow.") and not owner_name]:
                if vars(other).get(name) is original:  # imported by name
                    stack.enter_context(patch.object(other, name, namespace[name]))
            yield


ORDER = [
    Edit(
        "a commit is applied before it is durable",
        "durable.commits:Commits.commit",
        "        async with holding(self._lock):\n",
        "        async with holding(self._lock):\n            apply()\n",
    ),
    Edit(
        "the origin is overwritten before the old bytes are preserved",
        "images.origin:Origin.write_waiting",
        "                await self._preserver.preserve(self, chunks_in([run]))\n",
        "                self.device.pwrite(data, offset)\n"
        "                await self._preserver.preserve(self, chunks_in([run]))\n",
    ),
    Edit(
        "old bytes are not preserved at all",
        "images.origin:Origin.write_waiting",
        "                await self._preserver.preserve(self, chunks_in([run]))\n",
        "                pass\n",
    ),
    Edit(
        "what was buffered overwrites the origin before the old bytes are preserved",
        "images.origin:Origin._take",
        "        await self._preserver.preserve(self, chunks)\n",
        "        write_out(self.device, contents)\n        await self._preserver.preserve(self, chunks)\n",
    ),
    Edit(
        "old bytes of what was buffered are not preserved at all",
        "images.origin:Origin._take",
        "        await self._preserver.preserve(self, chunks)\n",
        "",
    ),
    Edit(
        "a write in a chunk passes by an older one in the buffer",
        "images.origin:Origin._must_buffer",
        "if not self._is_preserved(chunk) or self._behind.touches(offset, length):",
        "if not self._is_preserved(chunk):",
    ),
    Edit(
        "a write of several chunks passes by an older one in the buffer",
        "images.origin:Origin._must_buffer",
        "        if self._behind.touches(offset, length):",
        "        if False:",
    ),
    Edit(
        "reads of the live image pass over the buffer",
        "images.origin:Origin.read_waiting",
        "await read_through(self._behind, offset, length, self._read_device)",
        "await self._read_device(offset, length)",
    ),
    Edit(
        "reads of the live image that need no waiting pass over the buffer",
        "images.origin:Origin.read_nowait",
        "self._behind.touches(offset, length)",
        "False",
    ),
    Edit(
        "reads in a chunk of an image that need no waiting pass over the buffer",
        "images.image:Image.read_nowait",
        "self._behind.touches(offset, length)",
        "length > CHUNK_BYTES and self._behind.touches(offset, length)",
    ),
    Edit(
        "reads of several chunks of an image that need no waiting pass over the buffer",
        "images.image:Image.read_nowait",
        "self._behind.touches(offset, length)",
        "length <= CHUNK_BYTES and self._behind.touches(offset, length)",
    ),
    Edit(
        "a write that needs no waiting comes in while an instant is taken",
        "images.origin:Origin.write_nowait",
        "self._gate.held",
        "False",
    ),
    Edit(
        "a write that needs no waiting overwrites what is not preserved",
        "images.origin:Origin.write_nowait",
        "(self._write_behind and not self._behind.is_long(length)) or self._may_overwrite(offset, length)",
        "True",
    ),
    Edit(
        "an image asks the layers that served it once",
        "images.view:View.layers",
        "self.version != self.epochs.version",
        "self.version < 0",
    ),
    Edit(
        "the memory of a long write is used for something else while it waits",
        "buffer.contents:Contents._put_extent",
        "            memory.keep()\n            self._kept.append(memory)\n",
        "            pass\n",
    ),
    Edit(
        "the memory of a long write is used for something else while it is written",
        "buffer.behind:Behind._flush",
        "            left = await self._take(taken.contents)\n",
        "            taken.contents.release()\n            left = await self._take(taken.contents)\n",
    ),
    Edit(
        "a sync does not wait for the buffer", "images.origin:Origin.sync", "        await self._behind.flush()\n", ""
    ),
    Edit(
        "a sync of an image does not wait for it", "images.image:Image.sync", "        await self._behind.flush()\n", ""
    ),
    Edit(
        "reads of an image pass over the buffer",
        "images.image:Image.read_waiting",
        "await read_through(self._behind, offset, length, self._read_beneath)",
        "await self._read_beneath(offset, length)",
    ),
    Edit(
        "a snapshot is taken with writes in the buffer",
        "store.store:Store.create_snapshot",
        "                    await self.origins.drain(DRAIN_SECONDS)\n"
        "                    async with self.inventory.lock:\n",
        "                    async with self.inventory.lock:\n",
    ),
    Edit(
        "a snapshot is recorded as valid before the origin is synced",
        "store.store:Store.create_snapshot",
        "            for origin in self.origins:\n                await origin.sync()\n"
        "            async with self.inventory.lock:\n                await self._finish(snapshot, evidence)\n",
        "            async with self.inventory.lock:\n                await self._finish(snapshot, evidence)\n"
        "            for origin in self.origins:\n                await origin.sync()\n",
    ),
    Edit(
        "no intent is recorded", "images.delta:Delta._announce", "        if not overwritten:\n", "        if True:\n"
    ),
    Edit(
        "an intent is recorded after the overwriting",
        "images.delta:Delta.write",
        "                    self._is_crowded = await self._announce(chunks)\n"
        "                    await offload(self._write_rows, chunks, rows, here=self._is_short(chunks))\n",
        "                    await offload(self._write_rows, chunks, rows, here=self._is_short(chunks))\n"
        "                    self._is_crowded = await self._announce(chunks)\n",
    ),
    Edit(
        "open intents are not carried over",
        "durable.commits:Commits._start_file",
        "            if layer.intended\n",
        "            if False\n",
    ),
    Edit(
        "journal files are dropped before the layers are saved",
        "durable.commits:Commits._save",
        "        saved = []\n",
        "        saved = []\n"
        "        self._journal.retire([number for number in checkpoint.journals if number in self._journal.numbers])\n",
    ),
    Edit(
        "recovery drops the journal before the layers are saved",
        "durable.recovery:_recover",
        "    if not _save(layers, catalog, journal, rehashed):\n",
        "    journal.retire(journal.numbers)\n    if not _save(layers, catalog, journal, rehashed):\n",
    ),
    Edit(
        "recovery does not rehash what was being overwritten",
        "durable.recovery:_recover",
        "        if layer.intended:\n",
        "        if False:\n",
    ),
    Edit(
        "recovery keeps half-taken snapshots", "durable.recovery:_drop_pending", "row.state == State.PENDING]", "False]"
    ),
    Edit(
        "recovery does not apply the journal",
        "durable.recovery:_apply",
        "    layer.commit(chunks_in(record.runs) - lost)\n",
        "",
    ),
    Edit(
        "recovery does not restore the checksums",
        "durable.recovery:_apply",
        "        lost |= _write_sums(layer, run, record.sums[at : at + 8 * run.chunks])\n",
        "",
    ),
    Edit("an heir does not inherit", "layers.epochs:Epochs.release", "self.add_layer(heir, layer)", "BitMap64()"),
    Edit(
        "the catalog hands the layers of a deleted snapshot to nobody",
        "store.removal:Removal.delete",
        "self._catalog.delete_snapshot, snapshot.id, heir)",
        "self._catalog.delete_snapshot, snapshot.id, None)",
    ),
    Edit(
        "a checkpoint saves what is not committed",
        "layers.layer:Layer.encode_map",
        "committed = self.held - self.uncommitted",
        "committed = self.held | self.uncommitted",
    ),
    Edit(
        "a sync of an image does not reach the journal",
        "images.delta:Delta._commit",
        "            await self._commits.commit([record], lambda: self.layer.commit(written))\n",
        "            self.layer.commit(written)\n",
    ),
    Edit(
        "a sync of an image passes over what was overwritten in place",
        "images.delta:Delta._commit",
        "written = self.layer.uncommitted | self.layer.intended",
        "written = self.layer.uncommitted | BitMap64()",
    ),
    Edit(
        "a layer is merged into another before the data is durable",
        "store.flatten:_copy",
        "    target.files.sync_data()\n",
        "",
    ),
    Edit(
        "a layer is merged into another before that is committed",
        "store.flatten:Flattener._move",
        "                await self._commits.commit([Record(kind, target.id, time.time_ns(), runs, sums)], apply)\n",
        "                apply()\n",
    ),
    Edit(
        "the row of a layer goes before its chunks are moved",
        "store.flatten:Flattener._merge",
        "            while source.known and",
        "            await trio.to_thread.run_sync(self._catalog.remove_layer, source.id)\n"
        "            while source.known and",
    ),
    Edit(
        "a merged layer keeps its row",
        "store.flatten:Flattener._drop",
        "            await trio.to_thread.run_sync(self._catalog.remove_layer, source.id)\n",
        "",
    ),
    Edit(
        "chunks are moved into a newer layer",
        "store.flatten:Flattener._pair",
        "small.id > other.id",
        "small.id < other.id",
    ),
    Edit(
        "chunks are moved that an older layer has",
        "store.flatten:Flattener._merge",
        "epochs.drop_shadowed(source)",
        "BitMap64()",
    ),
    Edit(
        "moved chunks keep their checksums",
        "store.flatten:_copy",
        "    target.sums.write_runs(runs, sums)\n",
        "    target.sums.write_runs(runs, source.sums.read_runs(runs))\n",
    ),
    Edit(
        "a read that had to wait does not look at the sets again",
        "images.view:View.read",
        "            if not self.is_overtaken(found):\n",
        "            if True:\n",
    ),
    Edit(
        "a read that was begun does not look at the sets again",
        "images.reading:Reading._is_right",
        "not self._beneath.is_overtaken(self._found)",
        "True",
    ),
    Edit(
        "a read of a snapshot that is begun passes over the buffer",
        "images.image:Image.begin_read",
        "not self._behind.touches(offset, length) and ",
        "",
    ),
    Edit(
        "a read of the live image that is begun passes over the buffer",
        "images.origin:Origin.begin_read",
        " or self._behind.touches(offset, length)",
        "",
    ),
    Edit(
        "the buffer is asked after what is beneath it",
        "images.handle:read_through",
        "    if not newer:\n        return await read_beneath(offset, length)\n",
        "    data = await read_beneath(offset, length)\n"
        "    return overlaid(data, offset, behind.pieces(offset, length))\n",
    ),
]

CHECKS = [
    Edit(
        "chunks of a read that was begun are not checked",
        "images.reading:Reading._is_right",
        " or not self._matches()",
        "",
    ),
    Edit("chunks are not checked", "layers.layer:Layer._check", "        if found != sums:\n", "        if False:\n"),
    Edit(
        "a chunk by itself is not checked",
        "layers.layer:Layer.read_chunk_nowait",
        "data if xxh3_64_digest(data, self.sums.seed_of(chunk)) == expected else None",
        "data",
    ),
    Edit("checksums know no place", "layers.sums:Sums.seed_of", "(self._seed + chunk) & MASK_64", "7"),
    Edit("maps are not checked", "layers.layermap:_decode", "xxh3_64_digest(body) != digest", "False"),
    Edit(
        "maps of other layers are taken",
        "layers.layermap:_decode",
        "(magic, format_number, layer_id) != (MAP_MAGIC, MAP_FORMAT, layer)",
        "False",
    ),
    Edit(
        "a missing map is an empty one",
        "layers.layer:Layer.load",
        "            if generation:\n",
        "            if False:\n",
    ),
    Edit(
        "journal sectors are not checked",
        "records.journal:_open_sector",
        "_seal(payload, number, sector) == raw",
        "True",
    ),
    Edit(
        "a missing journal is an empty one", "records.journal:Journal._all_records", "found < self._expected", "False"
    ),
    Edit("a short journal is a young one", "records.journal:Journal._read_file", "len(content) < FILE_BYTES", "False"),
    Edit(
        "a record may be missing between others",
        "records.journal:_records_of",
        "header is not None and header[1] > sequence",
        "False",
    ),
    Edit("the catalog is not checked", "records.catalog:Catalog._open", "self._sum.is_right()", "True"),
]
AWAY = [
    Edit(
        "a device that is away is taken for bad sectors",
        "durable.preserver:_copy_singly",
        "        job.away = job.origin.why_away(unread[0], error)\n",
        "        pass\n",
    ),
    Edit(
        "who writes to a device that is away is not told",
        "durable.preserver:Preserver.preserve",
        "                raise away\n",
        "                return\n",
    ),
    Edit(
        "what was not read when the device went away counts as copied",
        "durable.preserver:_copy_all",
        "job.keep_what_was_copied(copied - job.lost)",
        "job.lose_all(job.away)",
    ),
]
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
