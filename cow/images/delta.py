"""A snapshot's own writes: the path into its delta layer, and how they become durable there.

They are stored in whole chunks; a partial chunk is filled up from what the snapshot shows. A chunk that the layer
holds durably is overwritten in place, but only after an INTENT is in the journal, so that a crash in the middle can be
told from damage. A write that fails half way leaves chunks whose checksums do not match: those are healed before
anything else is done with the delta.

`sync` makes the writes durable (I3). Until then a crash may keep, drop or tear them, as on any disk.
"""

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import trio
from pyroaring import BitMap64

from cow.buffer.behind import Unwritten
from cow.buffer.contents import Contents, Row, overlaid
from cow.clock import after
from cow.durable.commits import Commits
from cow.durable.space import Room
from cow.errors import CowError, DamagedError, InvalidSnapshotError, LostError
from cow.geometry import Run, runs_of
from cow.holding import holding
from cow.images.view import View
from cow.layers.layer import pinned
from cow.offload import is_short, offload
from cow.records.journal import Kind, Record

MOST_UNCOMMITTED_CHUNKS = 32768  # 128 MiB of data, so that a record fits into a journal file with ease


class Delta:
    """The delta of a view; nobody else writes to its layer. Trio thread only.

    `on_damage(sentence)` records that the snapshot is damaged.
    """

    def __init__(self, view: View, commits: Commits, on_damage: Callable[[str], Awaitable[None]]) -> None:
        self.layer = view.delta_layer  # I9
        self._view = view
        self._commits = commits
        self._on_damage = on_damage
        self._changing = trio.Lock()  #: guards the layer's sets and files against two writers
        self._torn = BitMap64()  #: chunks that the layer holds and whose checksums have to be written anew
        self._untold = ""  #: which acknowledged writes were lost; the next sync raises it
        self._is_crowded = False  #: whether the INTENTs of all images were too many after the last one of this delta

    # -- reading -------------------------------------------------------------------------------------------------

    async def read(self, run: Run) -> bytearray:
        """What the view shows of whole chunks. A mismatch is taken for damage only when no write is under way. # I4

        Raises as `View.read`; DamagedError only after the damage is recorded.
        """
        try:
            return await self._view.read(run)
        except DamagedError:
            pass  # perhaps only torn by a write that is under way
        async with self._changing:
            return await self._read_settled(run)

    @asynccontextmanager
    async def settled(self) -> AsyncIterator[None]:
        """A context without writes under way, so that a chunk that does not match its checksum is damaged."""
        async with self._changing:
            await self._heal()
            yield

    async def _read_settled(self, run: Run) -> bytearray:
        """The caller holds `_changing`."""
        await self._heal()
        try:
            return await self._view.read(run)
        except DamagedError as error:
            await self._on_damage(str(error))
            raise

    # -- writing -------------------------------------------------------------------------------------------------

    async def take(self, contents: Contents, room: Callable[[int], Room]) -> Unwritten:
        """Write acknowledged contents into the layer, not yet durably. Returns what is unwritten, to be tried again.

        A partial chunk whose rest was lost meanwhile is lost with it, which the next `sync` raises; one whose rest
        cannot be read now is not written. Raises OSError or CowError when the store fails: all is to be tried again.
        """
        unfilled: dict[int, Exception] = {}
        try:
            await self.write(contents, room, unfilled)
        except InvalidSnapshotError as error:
            return Unwritten(Contents(), error)  # nobody will ever read it
        lost = {chunk: error for chunk, error in unfilled.items() if isinstance(error, CowError)}
        if lost:
            self._untold = (
                f"acknowledged writes to a part of each of {len(lost)} chunks are lost, as the rest of each is: "
                f"{next(iter(lost.values()))}"
            )
        kept = unfilled.keys() - lost.keys()
        return Unwritten(contents.only(kept), next((unfilled[chunk] for chunk in kept), None))

    async def write(
        self, contents: Contents, room: Callable[[int], Room], unfilled: dict[int, Exception] | None = None
    ) -> None:
        """Write into the layer, within `room(bytes)`; not durable yet.

        Chunks that cannot be filled up are left out and put into `unfilled`, with the error; without `unfilled` that is
        raised. Raises InvalidSnapshotError when the snapshot was given up, what `room` raises, and OSError or CowError
        when the store fails, which may leave a part written.
        """
        layer = self.layer
        async with holding(self._changing):
            self._check_usable()
            with pinned([layer]):  # until it is written, also when the snapshot is given up meanwhile
                await self._heal()
                if self._has_much_to_commit or self._is_crowded:
                    await self._commit()  # failed the last time, because the store did
                failed: dict[int, Exception] = {}
                rows = contents.rows(await self._filled_up(contents, failed))
                if unfilled is not None:
                    unfilled |= failed
                elif failed:
                    raise next(iter(failed.values()))
                if not rows:
                    return
                chunks = contents.chunks() - BitMap64(failed)
                async with room(layer.new_bytes(chunks)):
                    self._is_crowded = await self._announce(chunks)
                    await offload(self._write_rows, chunks, rows, here=self._is_short(chunks))
            layer.wrote(chunks)
            if self._is_crowded or self._has_much_to_commit:
                await self._commit()

    def _check_usable(self) -> None:
        """Raise InvalidSnapshotError when the snapshot was given up."""
        self._view.epochs.group_of(self._view.snapshot)

    def _is_short(self, chunks: BitMap64) -> bool:
        return self.layer.is_in_memory and is_short(chunks)

    @property
    def _has_much_to_commit(self) -> bool:
        return len(self.layer.uncommitted) + len(self.layer.intended) > MOST_UNCOMMITTED_CHUNKS

    async def _filled_up(self, contents: Contents, failed: dict[int, Exception]) -> dict[int, bytes]:
        """The partly written chunks, filled up; `failed` gets those whose rest cannot be read, with the error."""
        filled = {}
        for chunk, part in contents.parts().items():
            try:
                filled[chunk] = overlaid(await self._read_settled(Run(chunk, 1)), 0, part.pieces())
            except (LostError, DamagedError, OSError) as error:
                failed[chunk] = error
        return filled

    async def _announce(self, chunks: BitMap64) -> bool:
        """Put an INTENT into the journal for the committed chunks that will be overwritten in place.

        Returns whether all images together have so many that they should be committed soon.
        """
        overwritten = chunks & self.layer.held
        if overwritten:
            await self._commits.mend()
        overwritten -= self.layer.uncommitted
        overwritten -= self.layer.intended
        if not overwritten:
            return False
        self.layer.announce(overwritten)
        record = Record(Kind.INTENT, self.layer.id, after(self._view.modified_ns), list(runs_of(overwritten)))
        try:
            await self._commits.commit([record], lambda: None)
        except BaseException:
            self.layer.withdraw(overwritten)
            raise
        return self._commits.intents_are_many

    def _write_rows(self, chunks: BitMap64, rows: list[Row]) -> None:
        try:
            sums = [
                self.layer.write_chunks(run.first, content)
                if isinstance(content, list)
                else self.layer.write_data(run.first, content)
                for run, content in rows
            ]
            self.layer.sums.write_runs([run for run, _ in rows], b"".join(sums))
        except OSError:
            # Chunks that were overwritten in part are what they are now: undefined, as on a disk, but not damaged.
            self._torn |= chunks & self.layer.held
            raise

    async def _heal(self) -> None:
        """Accept chunks that a failed write may have torn as they are now. Those that cannot be read are lost.

        The caller holds `_changing`. Raises OSError or CowError when the store still fails.
        """
        if not self._torn or not self._view.is_usable:
            return
        with pinned([self.layer]):
            unreadable = await trio.to_thread.run_sync(self.layer.rehash, self._torn)
            if unreadable:
                record = Record(Kind.LOST, self.layer.id, time.time_ns(), list(runs_of(unreadable)))
                await self._commits.commit([record], lambda: self.layer.lose(unreadable))
                self._untold = (
                    f"{len(unreadable)} chunks of layer {self.layer.name} cannot be read any more: they are lost"
                )
                await self._on_damage(self._untold)
            self._torn = BitMap64()

    # -- durability ----------------------------------------------------------------------------------------------

    async def sync(self) -> None:
        """Make everything that was written durable. # I3

        Raises InvalidSnapshotError when the snapshot was given up, LostError once when something was lost, OSError or
        SyncError when the store fails.
        """
        async with holding(self._changing):
            self._check_usable()
            await self._commit()
        if self._untold:
            sentence, self._untold = self._untold, ""
            raise LostError(sentence)

    async def _commit(self) -> None:
        if self.layer.sums.in_doubt:
            self._torn |= self.layer.uncommitted | self.layer.intended
        await self._heal()
        written = self.layer.uncommitted | self.layer.intended
        if not written:
            return
        with pinned([self.layer]):
            runs = list(runs_of(written))
            sums = await offload(self._sync_data, runs, here=self._is_short(written))
            record = Record(Kind.DELTA, self.layer.id, self.layer.written_ns, runs, sums)
            await self._commits.commit([record], lambda: self.layer.commit(written))
        self._is_crowded = False

    def _sync_data(self, runs: list[Run]) -> bytes:
        self.layer.files.sync_data()
        return self.layer.sums.read_runs(runs)
