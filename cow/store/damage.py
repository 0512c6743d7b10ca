"""Damage: chunks that cannot be used any more, and the state of the snapshots that read them.

A loss of chunks is durable once it is in the journal, and readers get EIO from then on. That a snapshot is damaged
follows from it: the housekeeping records it in the catalog later; after a crash in between the opening finds it out.
"""

import time
from collections import Counter
from collections.abc import Sequence

import trio
from pyroaring import BitMap64

from cow.bell import Bell
from cow.durable.commits import Commits
from cow.events import Damaged, Rescued, Tell
from cow.geometry import runs_of
from cow.layers.layer import Layer
from cow.records.catalog import Catalog
from cow.records.journal import Kind, Record
from cow.records.rows import State
from cow.store.inventory import Inventory
from cow.store.snapshot import Snapshot


class Damage:
    """Trio thread only. `due` is rung when there is something to `record`."""

    def __init__(self, catalog: Catalog, commits: Commits, inventory: Inventory, due: Bell, tell: Tell) -> None:
        self._catalog = catalog
        self._commits = commits
        self._inventory = inventory
        self._due = due
        self._tell = tell
        self._by_loss: set[int] = set()  #: ids of snapshots that are damaged only by losses to the origin's writers
        self._unrecorded: list[Snapshot] = []  #: whose state has yet to be recorded in the catalog

    async def lose(self, layer: Layer, lost: BitMap64) -> None:
        """Record that chunks of a layer cannot be used: reading them is EIO from then on, durably.

        Raises OSError or CowError when that cannot be recorded; nothing is lost then.
        """
        affected = [one.id for one in self._inventory.reading(layer, lost)]
        record = Record(Kind.LOST, layer.id, time.time_ns(), list(runs_of(lost)))
        await self._commits.commit([record], lambda: layer.lose(lost))
        self._by_loss -= set(affected)
        self.mark(
            affected, f"{len(lost)} chunks were found damaged and given up; they read EIO, and the rest stays readable"
        )

    async def found(self, number: int, sentence: str) -> None:
        """Note that a read found a snapshot damaged; the catalog has it on return. Raises OSError or CowError."""
        self._by_loss.discard(number)
        if self._valid(number) is not None:
            self.mark([number], sentence)
            await self.record()

    def lost(self, numbers: Sequence[int], sentence: str) -> None:
        """As `mark`, for chunks that were lost when the origin overwrote them; `rescued` may take it back."""
        self._by_loss |= {number for number in numbers if self._valid(number) is not None}
        self.mark(numbers, sentence)

    def rescued(self) -> None:
        """Lost chunks may have been rescued: make the snapshots valid again that lack nothing any more."""
        for snapshot in [one for one in self._inventory.all_snapshots if one.id in self._by_loss]:
            if snapshot.row.state is State.DAMAGED and not any(image.view.lost() for image in snapshot.images):
                snapshot.row.state, snapshot.row.reason = State.VALID, ""
                self._by_loss.discard(snapshot.id)
                self._tell(Rescued(snapshot.name))
                self._unrecorded.append(snapshot)
                self._due.ring()

    def find_lost(self) -> None:
        """Mark the snapshots that have lost chunks, according to their layers."""
        counts: Counter[int] = Counter()
        for origin in self._inventory.origins:
            for number, lost in origin.epochs.lost():
                snapshot = self._inventory.get(number)
                image = snapshot.image(origin.name) if snapshot is not None else None
                counts[number] += len(image.view.lost_of(lost)) if image is not None else 0
        for number, count in counts.items():
            if count:
                self.mark([number], f"{count} chunks were lost; they read EIO, and the rest stays readable")

    def mark(self, numbers: Sequence[int], sentence: str) -> None:
        """Make those snapshots damaged that are valid; `record` puts it into the catalog."""
        for snapshot in [one for number in numbers if (one := self._valid(number)) is not None]:
            snapshot.row.state, snapshot.row.reason = State.DAMAGED, sentence
            self._tell(Damaged(snapshot.name, sentence))
            self._unrecorded.append(snapshot)
            self._due.ring()

    def _valid(self, number: int) -> Snapshot | None:
        """The snapshot of that id, if it is valid."""
        found = self._inventory.get(number)
        return found if found is not None and found.row.state is State.VALID else None

    async def record(self) -> None:
        """Record in the catalog what was marked; durable on return. Raises OSError or CowError; the rest waits then."""
        async with self._inventory.lock:
            while self._unrecorded:
                row = self._unrecorded[0].row
                if self._inventory.get(row.id) is not None:
                    await trio.to_thread.run_sync(self._catalog.set_state, row.id, row.state, row.reason)
                self._unrecorded.pop(0)  # others may have been appended meanwhile
