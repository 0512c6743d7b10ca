"""Commits: the one road from "written" to "durable", and the checkpoints that keep the journal short.

A commit appends records and then, in the same critical section, updates the layers' sets, so that a checkpoint sees
both or neither. A full journal file is followed by a new one at once; the old ones go when a checkpoint, made by the
store's housekeeping, has saved the layers.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from dataclasses import dataclass

import trio

from cow.disk.io import FULL
from cow.geometry import runs_of
from cow.holding import holding
from cow.layers.layer import Layer, pinned
from cow.layers.layermap import MapImage
from cow.offload import MOST_CHUNKS_HERE, offload
from cow.records.journal import FILE_BYTES, Journal, Kind, Record

MOST_INTENDED_CHUNKS = FILE_BYTES // 64  # of all layers: at 16 bytes a run at most a quarter of a journal file


@dataclass
class Checkpoint:
    """What a checkpoint has to save: the layers' sets at one moment, and the journal files that it makes needless."""

    maps: list[tuple[Layer, MapImage]]
    journals: list[int]
    unsaved: Layer | None = None  #: at which saving it failed

    def merged(self, later: "Checkpoint") -> "Checkpoint":
        """One that does for both. A layer's later map has all that the earlier one had."""
        maps = {layer.id: (layer, image) for layer, image in [*self.maps, *later.maps]}
        return Checkpoint(list(maps.values()), sorted({*self.journals, *later.journals}))


class Commits:
    """Serialises access to the journal. Trio thread only; the file work is done in threads.

    `layers` gives all layers of the store; `on_checkpoint` is told what a new journal file left to be saved; within
    `in_need()` the reserve can be let go when there is no room for one. `record_saved` puts the generations of maps, by
    layer, into the catalog. Within `settled(layer)` nobody writes to that layer.
    """

    def __init__(
        self,
        journal: Journal,
        layers: Callable[[], Iterable[Layer]],
        on_checkpoint: Callable[[Checkpoint], None],
        in_need: Callable[[], AbstractContextManager[Callable[[], None]]],
        record_saved: Callable[[Sequence[tuple[int, int]]], None],
        settled: Callable[[Layer], AbstractAsyncContextManager[None]],
    ) -> None:
        self._journal = journal
        self._layers = layers
        self._on_checkpoint = on_checkpoint
        self._in_need = in_need
        self._record_saved = record_saved
        self._settled = settled
        self._lock = trio.Lock()  #: guards the journal, and the layers' sets against a half-applied commit

    @property
    def intents_are_many(self) -> bool:
        """Whether images should commit what they overwrote in place, as a new journal file has to take all INTENTs."""
        return sum(len(layer.intended) for layer in self._layers()) > MOST_INTENDED_CHUNKS

    async def mend(self) -> None:
        """After a failed append that could not be made void: do so now, or raise OSError or CowError.

        What it says of chunks may be on the disk. Where they are written anew, recovery must not believe it. # I4
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
            # All go to one file: a new one tells what to save, and that is without what is not applied yet. # I1
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
        # What may be half overwritten must still be known once the older files are gone.
        intents = [
            Record(Kind.INTENT, layer.id, layer.written_ns, list(runs_of(layer.intended)))
            for layer in self._layers()
            if layer.intended
        ]
        try:
            older = await trio.to_thread.run_sync(self._journal.start_file, intents)
        except OSError as error:
            if error.errno not in FULL:
                raise
            with self._in_need() as let_go:
                await trio.to_thread.run_sync(let_go)
                older = await trio.to_thread.run_sync(self._journal.start_file, intents)
        maps = []
        for layer in self._layers():
            if layer.dirty and layer.damage is None:
                maps.append((layer, layer.encode_map()))
        self._on_checkpoint(Checkpoint(maps, older))

    async def save(self, checkpoint: Checkpoint) -> None:
        """Save the layers of a checkpoint and drop the journal files that it covers.

        After an error the files stay; the checkpoint, or a later one merged with it, can be saved again. Layers that
        are gone meanwhile are passed over.
        """
        saved = []
        try:
            for layer, image in checkpoint.maps:
                if layer in self._layers():
                    checkpoint.unsaved = layer
                    with pinned([layer]):
                        await self._save_layer(layer, image)
                    saved.append((layer.id, image.generation))
            checkpoint.unsaved = None
            if saved:
                await trio.to_thread.run_sync(self._record_saved, saved)
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
            async with self._settled(layer), self._lock:
                in_use = layer.files.pins > 1
                await trio.to_thread.run_sync(self._renew_sums, layer)
                layer.sums.in_doubt = in_use  # what the preserver wrote and has not committed yet: the next time
        await trio.to_thread.run_sync(layer.save, image)

    def _renew_sums(self, layer: Layer) -> None:
        records = (record for record in self._journal.records() if record.layer == layer.id and record.sums)
        layer.renew_sums((record.runs, record.sums) for record in records)
