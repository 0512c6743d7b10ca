"""Flattening: merges the layers that deleted snapshots left behind, so that only a few serve a snapshot.

It works in the background, a small piece at a time, with rests. The two smallest layers of a group are merged, so that
a chunk is moved a few times at most: what the newer one holds is moved into the older one, and then the newer one is
dropped.

Always into the older one, because after a crash, or with an old map, several layers of a group may know a chunk. The
oldest of them is asked, and what it has must be right. So a chunk may move to an older layer, once it is durable there,
and never to a newer one, where a punched hole may be taken for it.
"""

import time
from collections.abc import Sequence
from itertools import islice

import trio
from pyroaring import BitMap64

from cow.durable.commits import Commits
from cow.durable.preserver import is_full
from cow.durable.space import Space
from cow.errors import CowError
from cow.events import Tell, Trouble
from cow.geometry import Run, runs_of
from cow.layers.epochs import Epochs
from cow.layers.layer import Layer, pinned
from cow.records.catalog import Catalog
from cow.records.journal import Kind, Record
from cow.store.disposal import Disposal
from cow.store.inventory import Inventory

MOST_LAYERS = 8  # of a group, before some are merged
PIECE_CHUNKS = 256  # moved at a time: 1 MiB
PUNCH_CHUNKS = 512  # given back at a time: until then 2 MiB are there twice
REST = 4.0  # after each piece, as a multiple of the time that it took


class Flattener:
    """Trio thread only. `run` may be cancelled anywhere."""

    def __init__(
        self, catalog: Catalog, commits: Commits, inventory: Inventory, space: Space, disposal: Disposal, tell: Tell
    ) -> None:
        self._catalog = catalog
        self._commits = commits
        self._inventory = inventory
        self._space = space
        self._disposal = disposal
        self._tell = tell
        self._failed: set[int] = set()  #: ids of layers that are left as they are, until the next opening

    async def run(self) -> None:
        """Merge layers until cancelled.

        Errors go to `tell` and are not raised: chunks that cannot be moved stay where they are. When there is no room
        they stay too, until the next snapshot comes or goes.
        """
        while True:
            await self._inventory.changed.wait()
            for epochs in self._inventory.origins.epochs:
                crowded: set[int] = set()  # the snapshots whose layers find no room
                while (found := self._pair(epochs, crowded)) is not None:
                    snapshot, source, target = found
                    if not await self._merge(epochs, source, target):
                        crowded.add(snapshot)

    def _pair(self, epochs: Epochs, crowded: set[int]) -> tuple[int, Layer, Layer] | None:
        """A snapshot, the layer of its group to be dropped, and the one that takes over what that layer knows.

        None when nothing is to be merged, except for the crowded snapshots.
        """
        for group in epochs.groups:
            if len(group.layers) > MOST_LAYERS and group.snapshot not in crowded and not self._inventory.is_doubted:
                # Old bytes go into the newest layer at any moment.
                usable = [
                    one
                    for one in group.layers
                    if one is not epochs.newest_layer and one.damage is None and one.id not in self._failed
                ]
                if len(usable) > 1:
                    small, other = sorted(usable, key=lambda one: len(one.held) + len(one.lost))[:2]
                    source, target = (small, other) if small.id > other.id or not small.known else (other, small)
                    return group.snapshot, source, target
        return None

    async def _merge(self, epochs: Epochs, source: Layer, target: Layer) -> bool:
        """Move everything from `source` to `target`, and drop `source`. Returns whether there was room."""
        # A chunk that was being preserved when its snapshot went may be here although the heir does not need it.
        moved = epochs.drop_shadowed(source)
        try:
            if source.held:  # better not begun than half done
                await self._space.check_for_merge(target.new_bytes(source.held))
            while source.known and epochs.group_with(source, target) is not None:
                began = trio.current_time()
                moved |= await self._move(epochs, source, target)
                if len(moved) >= PUNCH_CHUNKS and source.known:
                    self._disposal.punch_later([(source, moved)])
                    moved = BitMap64()
                await trio.sleep(REST * (trio.current_time() - began))
            if not source.known:
                await self._drop(epochs, source, target)
        except (CowError, OSError) as error:
            if is_full(error):
                return False
            self._failed |= {source.id, target.id}
            self._tell(
                Trouble(
                    f"layers {source.name} and {target.name} of {self._inventory.label} could not be merged, and "
                    f"are left as they are: {error}"
                )
            )
        finally:
            self._disposal.punch_later([(source, moved)] if source.known else [])
        return True

    async def _move(self, epochs: Epochs, source: Layer, target: Layer) -> BitMap64:
        """Move a piece: on return durable in `target`, and not known to `source` any more. Returns the held chunks."""
        async with self._disposal.moving:
            if epochs.group_with(source, target) is None:
                return BitMap64()
            # atomic: no trio checkpoint until both are pinned, so that the chosen chunks are not punched out
            held, lost = _some_of(source.held), BitMap64()
            if not held:
                lost = _some_of(source.lost)
            if not held and not lost:
                return BitMap64()
            runs = list(runs_of(held or lost))

            def apply() -> None:
                source.hand_over(target, held, lost)

            with pinned([source, target]):
                sums = await self._copied(source, target, held, runs) if held else b""
                kind = Kind.PRESERVED if held else Kind.LOST
                await self._commits.commit([Record(kind, target.id, time.time_ns(), runs, sums)], apply)
            return held

    async def _copied(self, source: Layer, target: Layer, held: BitMap64, runs: Sequence[Run]) -> bytes:
        """Copy chunks, where there is room, and return their checksums in `target`. Durable on return."""
        async with self._space.room_for_write(target.new_bytes(held)):
            try:
                return await trio.to_thread.run_sync(_copy, source, target, runs)
            except (CowError, OSError):
                target.files.give_up_unsynced()  # nothing depends on it, and later syncs must not fail because of it
                raise

    async def _drop(self, epochs: Epochs, source: Layer, target: Layer) -> None:
        """Take a layer that knows nothing any more out of its group, durably."""
        async with self._inventory.lock:
            if epochs.group_with(source, target) is None:
                return  # its snapshot went, and was the last one that it served
            self._failed.add(source.id)  # until this succeeds its row may be gone, so nothing may be moved into it
            await trio.to_thread.run_sync(self._catalog.remove_layer, source.id)
            epochs.remove_layer(source)
            self._disposal.drop(self._inventory.forget_layers([source.id]))
            self._failed.remove(source.id)


def _some_of(chunks: BitMap64) -> BitMap64:
    return BitMap64(islice(chunks, PIECE_CHUNKS))


def _copy(source: Layer, target: Layer, runs: Sequence[Run]) -> bytes:
    """Copy chunks from layer to layer, checked, and return their checksums there. Durable on return. Blocks."""
    sums = b"".join([target.write_data(run.first, source.read(run)) for run in runs])
    target.sums.write_runs(runs, sums)
    target.files.sync_data()
    return sums
