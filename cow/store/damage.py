"""Damage: chunks that cannot be used any more, and the state of the snapshots that read them.

That chunks are lost is durable with the journal, and readers get EIO from then on. That a snapshot is damaged follows
from it: the catalog is told later, by the housekeeping, and after a crash in between it is found out at the opening.
"""

import time
from collections.abc import Mapping, Sequence

import trio
from pyroaring import BitMap64

from cow.durable.commits import Commits
from cow.events import Damaged, Rescued, Tell
from cow.geometry import runs_of
from cow.layers.layer import Layer
from cow.records.catalog import Catalog, State
from cow.records.journal import Kind, Record
from cow.store.housekeeping import Housekeeping
from cow.store.snapshot import Snapshot


class Damage:
    """Trio thread only. `snapshots` are the store's, by id; `layout` guards them."""

    def __init__(
        self,
        catalog: Catalog,
        commits: Commits,
        housekeeping: Housekeeping,
        layout: trio.Lock,
        snapshots: Mapping[int, Snapshot],
        tell: Tell,
    ) -> None:
        self._catalog = catalog
        self._commits = commits
        self._housekeeping = housekeeping
        self._layout = layout
        self._snapshots = snapshots
        self._tell = tell
        self._by_loss: set[int] = set()  #: those that are damaged by nothing but what was lost to the origin's writers
        self._unrecorded: list[Snapshot] = []  #: whose state the catalog has to be told

    async def lose(self, layer: Layer, lost: BitMap64) -> None:
        """Record that chunks of a layer cannot be used: reading them is EIO from then on, durably.

        Raises OSError or CowError when that cannot be recorded; nothing is lost then.
        """
        affected = [one.id for one in self._snapshots.values() if one.exists and one.reads(layer, lost)]
        record = Record(Kind.LOST, layer.id, time.time_ns(), list(runs_of(lost)))
        await self._commits.commit([record], lambda: layer.lose(lost))
        self._by_loss -= set(affected)
        self.mark(
            affected, f"{len(lost)} chunks were found damaged and given up; they read EIO, and the rest stays readable"
        )

    async def found(self, number: int, sentence: str) -> None:
        """A read of a snapshot found it damaged; the catalog has it on return. Raises OSError or CowError."""
        self._by_loss.discard(number)
        if self._is_valid(number):
            self.mark([number], sentence)
            await self.record()

    def lost(self, numbers: Sequence[int], sentence: str) -> None:
        """Chunks were lost when the origin overwrote them. As `mark`; `rescued` may take it back."""
        self._by_loss |= {number for number in numbers if self._is_valid(number)}
        self.mark(numbers, sentence)

    def rescued(self) -> None:
        """What was lost may be there again: those that lack nothing any more are valid."""
        for snapshot in [self._snapshots[one] for one in self._by_loss & self._snapshots.keys()]:
            if snapshot.row.state is State.DAMAGED and not any(image.lost() for image in snapshot.images):
                snapshot.row.state, snapshot.row.reason = State.VALID, ""
                self._by_loss.discard(snapshot.id)
                self._tell(Rescued(snapshot.name))
                self._unrecorded.append(snapshot)
                self._housekeeping.wake()

    def mark(self, numbers: Sequence[int], sentence: str) -> None:
        """Make those that are valid damaged ones; the catalog is told by `record`."""
        for snapshot in [self._snapshots[number] for number in numbers if self._is_valid(number)]:
            snapshot.row.state, snapshot.row.reason = State.DAMAGED, sentence
            self._tell(Damaged(snapshot.name, sentence))
            self._unrecorded.append(snapshot)
            self._housekeeping.wake()

    def _is_valid(self, number: int) -> bool:
        return number in self._snapshots and self._snapshots[number].row.state is State.VALID

    async def record(self) -> None:
        """Have the catalog told of what was marked; durable on return. Raises OSError or CowError; the rest waits."""
        async with self._layout:
            while self._unrecorded:
                row = self._unrecorded[0].row
                if row.id in self._snapshots:
                    await trio.to_thread.run_sync(self._catalog.set_state, row.id, row.state, row.reason)
                self._unrecorded.pop(0)  # others are put behind it meanwhile
