"""The preserver: copies old bytes of the origins into the newest layers before they are overwritten. # I1

Writers that need chunks preserved join the next batch. One batch is processed at a time: read the old bytes, write them
to the layers, make them durable, commit once for all, wake the writers. The first writer processes its own batch; while
that is being committed the next one gathers, so the number of syncs follows the disk and not the number of writes.

The origin comes first (I8). Chunks that cannot be kept because a disk fails are recorded as lost, so that reading them
gives EIO; where that cannot be recorded either, the snapshots that need them are given up. When there is no room the
policy decides. All of it is durable before any writer goes on. But where the origin's device as a whole does not answer
(`why_away`), the write would fail as well: then the writer gets the error, and nothing is lost.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Protocol

import trio
from pyroaring import BitMap64

from cow.buffer.memory import is_out_of_memory, out_of_memory
from cow.config import OnFull
from cow.disk.io import FULL
from cow.durable.commits import Commits
from cow.durable.space import Space
from cow.errors import CowError, NoMemoryError, QuotaError, StoreFullError
from cow.geometry import CHUNK_BYTES, Run, pieces, runs_of
from cow.holding import holding
from cow.layers.epochs import Epochs
from cow.layers.layer import Layer, pinned
from cow.layers.sums import SUM_BYTES
from cow.offload import is_short, offload
from cow.records.journal import Kind, Record

COPY_CHUNKS = 256  # read and written at a time: 1 MiB
AHEAD_PARTS = 64  # of those: how many more the kernel is told of before they are read, to read them side by side
MOST_CHUNKS = 32768  # of an origin in one commit, so that its record fits into a journal file with ease
FEWEST_CHUNKS = 16  # tried when there is no room for more


class PreservedOrigin(Protocol):
    """What the preserver asks of an origin."""

    @property
    def is_in_memory(self) -> bool:
        """Whether its device never waits for a disk."""

    @property
    def epochs(self) -> Epochs:
        """Which layers its snapshots read."""

    def read_chunks(self, run: Run) -> bytes:
        """Whole chunks of the device."""

    def will_read(self, run: Run) -> None:
        """Chunks of the device will be read soon. Does not wait for them."""

    def note_lost(self, layer: Layer, chunks: BitMap64) -> None:
        """Note that the layer has lost the chunks, which may be overwritten now."""

    def why_away(self, chunk: int, error: OSError) -> OSError | None:
        """Why an unreadable chunk is not just a bad sector; None when the device answers elsewhere. Blocks."""


class GivesUp(Protocol):
    """What the preserver asks of the object that gives up snapshots."""

    async def make_room(self) -> bool:
        """Give up the least wanted snapshot, durably. Returns whether there was one. Raises as `give_up`."""

    async def give_up(self, numbers: Sequence[int], reason: str) -> None:
        """Make snapshots invalid, durably. Raises CowError or OSError when that can be recorded nowhere."""


class NotesLosses(Protocol):
    """The object that the preserver tells what became of old bytes."""

    def lost(self, numbers: Sequence[int], sentence: str) -> None:
        """Chunks were lost to these snapshots."""

    def rescued(self) -> None:
        """Chunks that were lost are kept after all."""


class _Batch:
    def __init__(self) -> None:
        self.wanted: dict[PreservedOrigin, BitMap64] = {}
        self.done = trio.Event()
        self.error: Exception | None = None
        self.away: dict[PreservedOrigin, OSError] = {}  #: why the devices of some cannot be read


@dataclass
class _Job:
    """What has to be copied from one origin, and what became of it."""

    origin: PreservedOrigin
    layer: Layer
    chunks: BitMap64
    lost: BitMap64 = field(default_factory=BitMap64)
    sums: dict[int, bytes] = field(default_factory=dict)  #: of those that are not lost, by the first chunk of a part
    cause: str = ""
    away: OSError | None = None  #: why the device cannot be read; what was not copied before stays as it is
    _runs: list[Run] | None = None

    def lose(self, chunk: int, error: Exception) -> None:
        self.lost.add(chunk)
        self.cause, self._runs = str(error), None

    def lose_all(self, error: Exception) -> None:
        self.lost, self.sums, self.cause, self._runs = self.chunks, {}, str(error), None

    def keep_what_was_copied(self, copied: BitMap64) -> None:
        """The device is away: nothing is lost, because nothing will be overwritten."""
        self.sums = {first: sums for first, sums in self.sums.items() if first in copied}
        self.chunks, self.lost, self._runs = copied, BitMap64(), None

    @property
    def kept(self) -> BitMap64:
        return self.chunks - self.lost

    @property
    def runs(self) -> list[Run]:
        """The runs of the chunks that are kept."""
        if self._runs is None:
            self._runs = list(runs_of(self.kept))
        return self._runs

    @property
    def joined_sums(self) -> bytes:
        """The checksums of the chunks that are kept, ascending."""
        return b"".join(self.sums[first] for first in sorted(self.sums))

    def records(self) -> Iterator[Record]:
        if self.runs:
            yield Record(Kind.PRESERVED, self.layer.id, time.time_ns(), self.runs, self.joined_sums)
        if self.lost:
            yield Record(Kind.LOST, self.layer.id, time.time_ns(), list(runs_of(self.lost)))


class Preserver:
    """Trio thread only. `run` must be running."""

    def __init__(self, commits: Commits, space: Space, removal: GivesUp, damage: NotesLosses, on_full: OnFull) -> None:
        self._commits = commits
        self._space = space
        self._removal = removal
        self._damage = damage
        self._on_full = on_full
        self._next = _Batch()
        self._arrived = trio.Event()  #: fires when a writer joins a batch that another task has to process
        self._turn = trio.Lock()  #: held by the task that processes a batch

    async def preserve(self, origin: PreservedOrigin, chunks: BitMap64) -> None:
        """Return when no snapshot reads any of `chunks` from the device: they may be overwritten.

        Raises StoreFullError under the policy block-writes, OSError when the device is away, so that it can neither be
        read nor written, NoMemoryError when there is no memory, and CowError when the chunks could neither be preserved
        nor recorded as lost nor the snapshots be given up.
        """
        while missing := origin.epochs.unpreserved(chunks):
            batch = self._next
            batch.wanted[origin] = batch.wanted.get(origin, BitMap64()) | missing
            if self._turn.locked():
                self._arrived.set()
                await batch.done.wait()
            else:
                async with holding(self._turn):
                    await self._take_next()
            if isinstance(batch.error, (NoMemoryError, StoreFullError)):
                raise type(batch.error)(str(batch.error)) from batch.error
            if batch.error is not None:
                raise CowError(
                    f"the old bytes could not be preserved, nor the snapshots that need them be given up "
                    f"({batch.error}): check the store's disk; rmdir the snapshots to go on without them"
                ) from batch.error
            away = batch.away.get(origin)
            if away is not None and origin.epochs.unpreserved(chunks):
                raise away

    async def keep_late(self, layer: Layer, chunk: int, data: bytes) -> None:
        """Preserve old bytes of a chunk that the layer lost; durable on return. Raises OSError or CowError.

        Nothing is committed when the chunk is not lost to the layer any more.
        """
        one = BitMap64([chunk])
        with pinned([layer]):
            async with self._space.room(layer.new_bytes(one)):
                sums = await offload(_write_late, layer, chunk, data, here=layer.is_in_memory)
                if chunk in layer.lost:
                    record = Record(Kind.PRESERVED, layer.id, time.time_ns(), [Run(chunk, 1)], sums)
                    await self._commits.commit([record], lambda: layer.commit(one))
        self._damage.rescued()

    async def run(self) -> None:
        """Process the batches that gathered while another was processed, until cancelled."""
        while True:
            await self._arrived.wait()
            async with holding(self._turn):
                self._arrived = trio.Event()
                if self._next.wanted:
                    await self._take_next()

    async def _take_next(self) -> None:
        batch, self._next = self._next, _Batch()
        try:
            await self._take(batch)
        except (CowError, OSError) as error:
            batch.error = error
        finally:
            batch.done.set()

    async def _take(self, batch: _Batch) -> None:
        most = MOST_CHUNKS
        while jobs := self._jobs(batch, most):
            try:
                async with self._space.room(sum(job.layer.new_bytes(job.chunks) for job in jobs)):
                    await self._copy(jobs, _copy_durably)
                for job in jobs:
                    if job.away is not None:
                        batch.away[job.origin] = job.away
                        del batch.wanted[job.origin]
                if all(len(job.chunks) < most for job in jobs):
                    return  # that was all; the writers check again
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                if most <= FEWEST_CHUNKS:
                    raise NoMemoryError(f"old bytes are to be kept first: {out_of_memory(error)}") from error
                most = min(most, max(len(job.chunks) for job in jobs)) // 4
            except (CowError, OSError) as error:
                if not is_full(error):
                    await self._give_up_all(batch, error)
                elif await self._space.reserve.let_inodes_go():
                    pass  # it was a file that could not be made, and now it can
                elif most > FEWEST_CHUNKS:
                    most = min(most, max(len(job.chunks) for job in jobs)) // 4  # there may be room for fewer
                else:
                    await self._when_full(batch, error)
                    most = MOST_CHUNKS

    @staticmethod
    def _jobs(batch: _Batch, most: int) -> list[_Job]:
        """What is still missing, by origin, up to `most` chunks of each.

        Determined anew after each round: the snapshots may be gone.
        """
        found = []
        for origin, wanted in batch.wanted.items():
            missing = origin.epochs.unpreserved(wanted)
            if missing:
                chunks = missing if len(missing) <= most else BitMap64(islice(missing, max(1, most)))
                found.append(_Job(origin, origin.epochs.newest_layer, chunks))
        return found

    async def _copy(self, jobs: list[_Job], copy: Callable[[list[_Job]], None]) -> None:
        """Copy the jobs, in a thread unless they are short and in memory, and commit what became of them."""
        with pinned([job.layer for job in jobs]):
            here = all(is_short(job.chunks) and job.layer.is_in_memory and job.origin.is_in_memory for job in jobs)
            commits = await offload(_records_of, copy, jobs, here=here)
            for job, records in zip(jobs, commits, strict=True):  # what one origin loses costs the others nothing
                if not records:
                    continue
                await self._commits.commit(records, partial(self._apply, job))

    def _apply(self, job: _Job) -> None:
        job.layer.commit(job.kept)
        if job.lost:
            affected = job.origin.epochs.needing(job.lost)
            job.layer.lose(job.lost)
            job.layer.files.give_up_unsynced()
            job.origin.note_lost(job.layer, job.lost)
            self._damage.lost(
                affected,
                f"{len(job.lost)} chunks could not be preserved when the origin overwrote them ({job.cause}), the "
                f"first at offset {job.lost.min() * CHUNK_BYTES}; they read EIO, and the rest stays readable",
            )

    async def _when_full(self, batch: _Batch, error: Exception) -> None:
        if self._on_full is OnFull.BLOCK_WRITES:
            raise StoreFullError(f"{error}; the policy on_full=block-writes stops the writer") from error
        if self._on_full is OnFull.DROP_OLDEST:
            if not await self._removal.make_room():
                await self._give_up_all(batch, error)
            return

        def lose(jobs: list[_Job]) -> None:
            for job in jobs:
                job.lose_all(error)

        try:
            await self._copy(self._jobs(batch, MOST_CHUNKS), lose)
        except (CowError, OSError) as second:
            await self._give_up_all(batch, second)

    async def _give_up_all(self, batch: _Batch, error: Exception) -> None:
        for origin, wanted in batch.wanted.items():
            await self._removal.give_up(
                origin.epochs.needing(wanted),
                f"old bytes of the origin could not be preserved when they were overwritten: {error}",
            )


def is_full(error: Exception) -> bool:
    """Whether an error says that there is no room."""
    return isinstance(error, (QuotaError, StoreFullError)) or (isinstance(error, OSError) and error.errno in FULL)


def _records_of(copy: Callable[[list[_Job]], None], jobs: list[_Job]) -> list[list[Record]]:
    """Copy the jobs, and return the records that say what became of each."""
    copy(jobs)
    return [list(job.records()) for job in jobs]


def _write_late(layer: Layer, chunk: int, data: bytes) -> bytes:
    sums = layer.write(chunk, data)
    layer.files.sync_data()
    return sums


def _copy_durably(jobs: list[_Job]) -> None:
    """Copy the chunks into the layers; what is kept is durable on return. Raises OSError when there is no room."""
    for job in jobs:
        _copy_all(job)
        if not job.chunks:
            continue
        _write_sums(job)
        try:
            job.layer.files.sync_data()
        except (OSError, CowError) as error:
            if is_full(error):  # a file system may find out only here
                job.layer.files.give_up_unsynced()
                raise
            job.lose_all(error)


def _copy_all(job: _Job) -> None:
    copied = BitMap64()
    parts = [part for run in job.runs for part in pieces(run, COPY_CHUNKS)]
    for place, part in enumerate(parts):
        if place % AHEAD_PARTS == 0:
            for one in parts[place + AHEAD_PARTS if place else 0 : place + 2 * AHEAD_PARTS]:
                job.origin.will_read(one)
        _copy_part(job, part)
        if job.away is not None:
            job.keep_what_was_copied(copied - job.lost)
            return
        copied.add_range(part.first, part.end)


def _copy_part(job: _Job, part: Run) -> None:
    try:
        data = job.origin.read_chunks(part)
    except OSError as error:
        _copy_singly(job, part, error)
        return
    _keep(job, part, data)


def _copy_singly(job: _Job, part: Run, error: OSError) -> None:
    """It may be one bad sector: what fails is read again, and in between the device must answer elsewhere."""
    if part.chunks == 1:
        unread = [part.first]
    else:
        unread = [chunk.first for chunk in pieces(part, 1) if _copy_one(job, chunk.first) is not None]
    if unread:
        job.away = job.origin.why_away(unread[0], error)
    for chunk in unread if job.away is None else ():
        if (again := _copy_one(job, chunk)) is None:
            continue
        if again.errno != error.errno and (away := job.origin.why_away(chunk, again)) is not None:
            job.away = away
            return
        job.lose(chunk, again)


def _copy_one(job: _Job, chunk: int) -> OSError | None:
    """Copy one chunk. Returns why it cannot be read, if so."""
    try:
        data = job.origin.read_chunks(Run(chunk, 1))
    except OSError as error:
        return error
    _keep(job, Run(chunk, 1), data)
    return None


def _keep(job: _Job, part: Run, data: bytes) -> None:
    try:
        job.sums[part.first] = job.layer.write_data(part.first, data)
    except OSError as error:
        if error.errno in FULL:
            raise
        if part.chunks == 1:
            job.lose(part.first, error)
            return
        for chunk in pieces(part, 1):  # perhaps it is one bad sector of the store
            _keep(job, chunk, data[chunk.offset - part.offset :][:CHUNK_BYTES])


def _write_sums(job: _Job) -> None:
    sums = job.joined_sums
    try:
        job.layer.sums.write_runs(job.runs, sums)
        return
    except OSError as error:
        if error.errno in FULL:
            raise
    job.sums = {}
    for chunk, start in zip(job.kept, range(0, len(sums), SUM_BYTES), strict=True):  # perhaps it is one bad sector
        one = sums[start : start + SUM_BYTES]
        try:
            job.layer.sums.write(chunk, one)
        except OSError as error:
            job.lose(chunk, error)
        else:
            job.sums[chunk] = one
