"""The preserver: copies old bytes of the origins into the newest layers before they are overwritten. # I1

Writers that need chunks preserved join the next batch and wait. One task takes a batch at a time: read the old bytes,
write them to the layers, make them durable, commit once for all, wake the writers. While a batch is being committed
the next one gathers, so the number of syncs follows the disk and not the number of writes.

When a batch cannot be kept, snapshots are given up, durably, before any writer goes on: the origin comes first. # I8
"""

import errno
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

import trio
from pyroaring import BitMap64

from cow.commits import Commits
from cow.errors import CowError, QuotaError, StoreFullError
from cow.geometry import Run, pieces, runs_of
from cow.journal import Kind, Record
from cow.layer import Layer

COPY_CHUNKS = 256  # read and written at a time: 1 MiB
_FULL = {errno.ENOSPC, errno.EDQUOT}


class PreservedOrigin(Protocol):
    """What the preserver asks of an origin."""

    @property
    def newest_layer(self) -> Layer:
        """Where old bytes go."""

    def unpreserved(self, run: Run) -> list[Run]:
        """The parts of `run` that some snapshot still reads from the device."""

    def needing(self, chunks: BitMap64) -> list[int]:
        """The snapshots that read some of `chunks` from the device."""

    def read_chunks(self, run: Run) -> bytes:
        """Whole chunks of the device."""


class _Batch:
    def __init__(self) -> None:
        self.wanted: dict[PreservedOrigin, BitMap64] = {}
        self.done = trio.Event()
        self.error: Exception | None = None


class Preserver:
    """Trio thread only. `run` must be running.

    `reserve(bytes)` raises QuotaError or StoreFullError when the store has no room. `make_room()` gives up the
    least wanted snapshot and tells whether there was one. `give_up(snapshots, reason)` gives up those.
    """

    def __init__(
        self,
        commits: Commits,
        reserve: Callable[[int], Awaitable[None]],
        make_room: Callable[[], Awaitable[bool]],
        give_up: Callable[[Sequence[int], str], Awaitable[None]],
    ) -> None:
        self._commits = commits
        self._reserve = reserve
        self._make_room = make_room
        self._give_up = give_up
        self._next = _Batch()
        self._arrived = trio.Event()

    async def preserve(self, origin: PreservedOrigin, run: Run) -> None:
        """Return when no snapshot reads any of `run` from the device: it may be overwritten.

        Raises CowError only when neither the bytes could be preserved nor the snapshots be durably given up.
        """
        while missing := origin.unpreserved(run):
            batch = self._next
            wanted = batch.wanted.setdefault(origin, BitMap64())
            for part in missing:
                wanted.add_range(part.first, part.end)
            self._arrived.set()
            await batch.done.wait()
            if batch.error is not None:
                raise CowError(
                    f"the old bytes could not be preserved, nor the snapshots that need them be given up "
                    f"({batch.error}): check the store's disk; rmdir the snapshots to go on without them"
                ) from batch.error

    async def run(self) -> None:
        """Take batches until cancelled."""
        while True:
            await self._arrived.wait()
            self._arrived = trio.Event()
            batch, self._next = self._next, _Batch()
            try:
                await self._take(batch)
            except (CowError, OSError) as error:
                batch.error = error
            finally:
                batch.done.set()

    async def _take(self, batch: _Batch) -> None:
        while jobs := self._jobs(batch):
            try:
                await self._reserve(sum(layer.new_bytes(runs) for _, layer, runs in jobs))
                await self._copy(jobs)
            except (QuotaError, StoreFullError) as error:
                if not await self._make_room():
                    await self._give_up_all(batch, str(error))
            except (CowError, OSError) as error:
                if isinstance(error, OSError) and error.errno in _FULL and await self._make_room():
                    continue
                await self._give_up_all(batch, str(error))

    @staticmethod
    def _jobs(batch: _Batch) -> list[tuple[PreservedOrigin, Layer, list[Run]]]:
        """What is still missing, by origin. Asked anew after each round: the snapshots may have gone."""
        found = []
        for origin, wanted in batch.wanted.items():
            runs = [part for run in runs_of(iter(wanted)) for part in origin.unpreserved(run)]
            if runs:
                found.append((origin, origin.newest_layer, runs))
        return found

    async def _copy(self, jobs: list[tuple[PreservedOrigin, Layer, list[Run]]]) -> None:
        for _, layer, _ in jobs:
            layer.pin()
        try:
            records = await trio.to_thread.run_sync(_copy_durably, jobs)

            def apply() -> None:
                for _, layer, runs in jobs:
                    layer.commit(runs)

            await self._commits.commit(records, apply)
        finally:
            for _, layer, _ in jobs:
                layer.unpin()

    async def _give_up_all(self, batch: _Batch, cause: str) -> None:
        for origin, wanted in batch.wanted.items():
            await self._give_up(
                origin.needing(wanted),
                f"old bytes of the origin could not be preserved when they were overwritten: {cause}",
            )


def _copy_durably(jobs: list[tuple[PreservedOrigin, Layer, list[Run]]]) -> list[Record]:
    """Copy the runs into the layers; the data is durable on return, and the records say so once committed."""
    records = []
    for origin, layer, runs in jobs:
        sums = [layer.write(part.first, origin.read_chunks(part)) for run in runs for part in pieces(run, COPY_CHUNKS)]
        layer.sync_data()
        records.append(Record(Kind.PRESERVED, layer.id, time.time_ns(), runs, b"".join(sums)))
    return records
