"""Removal: removes snapshots that the user deletes or the store gives up, and hands their layers on.

The store gives up snapshots for the origin's sake (I8): the least wanted one when there is no room, those that read a
layer that cannot be saved, those whose old bytes cannot be kept, and all of them when nothing can be recorded any more.
A snapshot that was given up stays listed as invalid, until its user deletes it.
"""

from collections.abc import Callable, Sequence

import trio

from cow.durable.space import Space
from cow.errors import CowError
from cow.events import GivenUp, Tell, Trouble
from cow.layers.layer import Layer
from cow.records.catalog import Catalog
from cow.records.elsewhere import Elsewhere
from cow.records.rows import State
from cow.store.disposal import Disposal
from cow.store.inventory import Inventory
from cow.store.snapshot import Snapshot


class Removal:
    """Trio thread only. `elsewhere` records that all snapshots were given up, when the store takes no writes."""

    def __init__(
        self,
        catalog: Catalog,
        elsewhere: Elsewhere | None,
        inventory: Inventory,
        space: Space,
        disposal: Disposal,
        tell: Tell,
    ) -> None:
        self._catalog = catalog
        self._elsewhere = elsewhere
        self._inventory = inventory
        self._space = space
        self._disposal = disposal
        self._tell = tell

    async def delete(self, snapshot: Snapshot) -> None:
        """Take a snapshot out of the store, durably. The caller holds the inventory's lock.

        Raises CowError or OSError when that cannot be recorded; nothing is changed then.
        """
        snapshot.leaving = True
        heir = self._inventory.heir_of(snapshot)
        try:
            gone = await self._with_reserve(self._catalog.delete_snapshot, snapshot.id, heir)
        except BaseException:
            snapshot.leaving = False
            raise
        for image in snapshot.images:
            image.stop()
        self._release(snapshot, heir, gone)
        self._inventory.remove(snapshot)

    async def make_room(self) -> bool:
        """Give up one snapshot, durably: the policy drop-oldest. Returns whether there was one.

        Snapshots whose removal frees no space, because an older one needs all that they have, are considered last: they
        would be lost for nothing. Of the others the oldest that is not open goes, and if all are open the oldest.
        Raises as `give_up`.
        """
        usable = [one for one in self._inventory.usable if not one.leaving]
        if not usable:
            return False
        heir_of = self._inventory.heir_of
        least_wanted = min(usable, key=lambda one: (not one.frees_something(heir_of(one)), one.is_open, one.id))
        why = (
            "no other made room without being in use too" if least_wanted.is_open else "this was the oldest not in use"
        )
        await self.give_up([least_wanted.id], f"the store was full, and of the snapshots {why}")
        try:
            async with self._disposal.moving:  # no files are removed while they are in use
                await self._disposal.sweep()
            await self._space.reserve.refill()
            await self._space.measure()
        except (CowError, OSError) as error:  # the origin must not pay for it; if there is still no room, the next goes
            self._tell(Trouble(f"what the snapshot took could not be given back at once: {error}"))
        return True

    async def give_up_readers(self, layer: Layer, error: Exception) -> None:
        """Give up the snapshots that read a layer which cannot be saved: the journal must not grow for ever. # I6"""
        readers = [one.id for one in self._inventory.asking(layer)]
        await self.give_up(readers, f"what is known of its chunks could not be saved for long: {error}")

    async def give_up(self, numbers: Sequence[int], reason: str) -> None:
        """Make snapshots invalid, durably, so that the origin can go on. # I8

        Raises CowError or OSError when that can be recorded neither in the store nor elsewhere.
        """
        async with self._inventory.lock:
            for number in numbers:
                snapshot = self._inventory.get(number)
                if snapshot is None or not snapshot.usable:
                    continue
                heir = self._inventory.heir_of(snapshot)
                try:
                    gone = await self._with_reserve(self._catalog.give_up_snapshot, number, heir, reason)
                except (CowError, OSError) as error:
                    await self._give_up_elsewhere(f"{reason}; nor could that be recorded in the store: {error}", error)
                    return
                self._gave_up(snapshot, heir, gone, reason)

    async def _give_up_elsewhere(self, reason: str, error: Exception) -> None:
        """Give up all snapshots, because the store takes no more writes, and record that in the second place."""
        if self._elsewhere is None:
            raise error
        newest = max(one.id for one in self._inventory.all_snapshots)
        await trio.to_thread.run_sync(self._elsewhere.record, newest)
        for snapshot in self._inventory.usable:
            self._gave_up(snapshot, None, [], reason)

    def _gave_up(self, snapshot: Snapshot, heir: int | None, gone: Sequence[int], reason: str) -> None:
        self._release(snapshot, heir, gone)
        snapshot.row.state, snapshot.row.reason = State.INVALID, reason
        for image in snapshot.images:
            image.give_up()
        self._tell(GivenUp(snapshot.name, reason))

    async def _with_reserve(self, change: Callable[..., list[int]], *arguments: object) -> list[int]:
        """Make a change of the catalog that frees space, using the reserve if the disk is full."""
        return await self._space.reserve.see_through(lambda: trio.to_thread.run_sync(change, *arguments))

    def _release(self, snapshot: Snapshot, heir: int | None, gone: Sequence[int]) -> None:
        """Release a snapshot's layers; those in `gone` are not in the catalog any more."""
        if snapshot.usable:
            for image in snapshot.images:
                self._disposal.punch_later(image.origin.epochs.release(snapshot.id, heir))
        self._disposal.drop(self._inventory.forget_layers(gone))
        self._inventory.changed.ring()
