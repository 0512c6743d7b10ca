"""Commits: the one road from "written" to "durable", and the checkpoints that keep the journal short.

A commit appends records and then, in the same critical section, updates the layers' sets, so that a checkpoint sees
both or neither. A full journal file is followed by a new one at once, and the layers' sets at that moment are captured
as a checkpoint. It waits here until the store's housekeeping has saved it; then the older journal files are removed.
"""

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import reduce
from typing import Protocol

import trio

from cow.disk.io import FULL
from cow.durable.reserve import Reserve
from cow.geometry import runs_of
from cow.holding import holding
from cow.layers.layer import Layer, pinned
from cow.layers.layermap import MapImage
from cow.offload import MOST_CHUNKS_HERE, offload
from cow.records.catalog import Catalog
from cow.records.journal import FILE_BYTES, Journal, Kind, Record

MOST_INTENDED_CHUNKS = FILE_BYTES // 64  # of all layers: at 16 bytes a run at most a quarter of a journal file


@dataclass
class Checkpoint:
    """What a checkpoint has to save: the layers' sets at one moment, and the journal files that it makes needless."""

    maps: list[tuple[Layer, MapImage]]
    journals: list[int]

    def merged(self, later: "Checkpoint") -> "Checkpoint":
        """One checkpoint in place of both. A layer's later map has all that the earlier one had."""
        maps = {layer.id: (layer, image) for layer, image in [*self.maps, *later.maps]}
        return Checkpoint(list(maps.values()), sorted({*self.journals, *later.journals}))


class LayersInUse(Protocol):
    """What commits need to know of a store's layers."""

    @property
    def layers(self) -> Collection[Layer]:
        """All of them."""

    def settled(self, layer: Layer) -> AbstractAsyncContextManager[None]:
        """A context in which no image writes to the layer."""


class Commits:
    """Serialises access to the journal. Trio thread only; the file work is done in threads.

    `wake` is called when there is a checkpoint to be saved.
    """

    def __init__(
        self, journal: Journal, inventory: LayersInUse, reserve: Reserve, catalog: Catalog, wake: Callable[[], None]
    ) -> None:
        self._journal = journal
        self._inventory = inventory
        self._reserve = reserve
        self._catalog = catalog
        self._wake = wake
        self._lock = trio.Lock()  #: guards the journal, and the layers' sets against a half-applied commit
        self._checkpoints: list[Checkpoint] = []  #: not saved yet, oldest first
        self.unsaved: Layer | None = None  #: the layer at which the last save failed

    @property
    def intents_are_many(self) -> bool:
        """Whether images should commit what they overwrote in place: a new journal file has to take all INTENTs."""
        return sum(len(layer.intended) for layer in self._inventory.layers) > MOST_INTENDED_CHUNKS

    async def mend(self) -> None:
        """Make a failed append void, where that could not be done before, or raise OSError or CowError.

        Its record may be on the disk. Where the chunks it names are written anew, recovery must not believe it. # I4
        """
        if self._journal.is_broken:
            async with holding(self._lock):
                if self._journal.is_broken:
                    await self._start_file()

    async def commit(self, records: Sequence[Record], apply: Callable[[], None]) -> None:
        """Make the records durable, then call `apply`, which updates the layers' sets.

        The data that the records speak of must be durable already. Together the records must fit into a journal file.
        Raises OSError or CowError; nothing is applied then.
        """
        async with holding(self._lock):
            # All go to one file: a new one captures a checkpoint, which would lack what is not applied yet. # I1
            if not self._journal.has_room(records):
                await self._start_file()
            try:
                await self._append(records)
            except OSError:
                # What that file has of them is unknown, so all are written anew, to another one.
                await self._start_file()
                await self._append(records)
            apply()

    async def _append(self, records: Sequence[Record]) -> None:
        for record in records:
            short = self._journal.is_in_memory and len(record.runs) <= MOST_CHUNKS_HERE
            await offload(self._journal.append, [record], here=short)

    async def checkpoint(self) -> None:
        """Start a new journal file, so that all before it can be saved and dropped."""
        async with self._lock:
            await self._start_file()

    async def _start_file(self) -> None:
        # Chunks that may be half overwritten must still be known once the older files are gone.
        intents = [
            Record(Kind.INTENT, layer.id, layer.written_ns, list(runs_of(layer.intended)))
            for layer in self._inventory.layers
            if layer.intended
        ]
        try:
            older = await trio.to_thread.run_sync(self._journal.start_file, intents)
        except OSError as error:
            if error.errno not in FULL:
                raise
            with self._reserve.in_need() as let_go:
                await trio.to_thread.run_sync(let_go)
                older = await trio.to_thread.run_sync(self._journal.start_file, intents)
        maps = []
        for layer in self._inventory.layers:
            if layer.dirty and layer.damage is None:
                maps.append((layer, layer.encode_map()))
        self._checkpoints.append(Checkpoint(maps, older))
        self._wake()

    @property
    def waiting_journals(self) -> int:
        """How many journal files wait for the checkpoints that are not saved yet; 0 when all are saved."""
        return len({number for checkpoint in self._checkpoints for number in checkpoint.journals})

    @property
    def has_checkpoints(self) -> bool:
        """Whether there are checkpoints to be saved."""
        return bool(self._checkpoints)

    async def save(self) -> None:
        """Save the waiting checkpoints, as one, and drop the journal files that they cover.

        Raises OSError or CowError. The files stay then, and the checkpoints are saved with the next ones; `unsaved`
        is the layer that could not be saved, if it was one. One save at a time.
        """
        if not self._checkpoints:
            return
        checkpoint = reduce(Checkpoint.merged, self._checkpoints)
        self._checkpoints = []
        try:
            await self._save(checkpoint)
        except BaseException:
            self._checkpoints.insert(0, checkpoint)
            raise

    async def _save(self, checkpoint: Checkpoint) -> None:
        """Layers that are gone meanwhile are left out."""
        saved = []
        try:
            for layer, image in checkpoint.maps:
                if layer in self._inventory.layers:
                    self.unsaved = layer
                    with pinned([layer]):
                        await self._save_layer(layer, image)
                    saved.append((layer.id, image.generation))
            self.unsaved = None
            if saved:
                await trio.to_thread.run_sync(self._catalog.record_saved, saved)
        except BaseException:
            for layer, _ in checkpoint.maps:
                layer.note_unsaved()
            raise
        async with self._lock:
            present = set(self._journal.numbers)
            await trio.to_thread.run_sync(
                self._journal.retire, [number for number in checkpoint.journals if number in present]
            )

    async def _save_layer(self, layer: Layer, image: MapImage) -> None:
        if layer.sums.in_doubt:
            async with self._inventory.settled(layer), self._lock:
                in_use = layer.files.pins > 1
                await trio.to_thread.run_sync(self._renew_sums, layer)
                layer.sums.in_doubt = in_use  # what the preserver has not committed yet is renewed the next time
        await trio.to_thread.run_sync(layer.save, image)

    def _renew_sums(self, layer: Layer) -> None:
        records = (record for record in self._journal.records() if record.layer == layer.id and record.sums)
        layer.renew_sums((record.runs, record.sums) for record in records)
