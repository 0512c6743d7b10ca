"""A snapshot's image of one origin: the point in time, plus what was written to this image since.

What is written goes to the delta layer, which is asked first; what the origin overwrote is in the preserved layers;
the rest is still on the device. Writes are kept whole chunks at a time: a partial chunk is filled up from what the
image shows. With write-behind they wait in memory for a moment, to be taken there together. A chunk that the delta
holds durably is overwritten in place only after an INTENT is in the journal, so that a crash in the middle is told
apart from damage.

`sync` makes the writes durable (I3). Until then a crash may keep, drop or tear them, as on any disk.
"""

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import trio
from pyroaring import BitMap64

from cow.buffer.behind import Behind, Untaken
from cow.buffer.contents import Contents, Row, contents_of, overlaid
from cow.buffer.memory import Memory
from cow.clock import after
from cow.durable.commits import Commits
from cow.durable.space import Room, Space
from cow.errors import (
    CowError,
    DamagedError,
    InvalidSnapshotError,
    LostError,
    PastEndError,
    QuotaError,
    StoreFullError,
    SuspectError,
    printable,
)
from cow.events import Tell
from cow.geometry import CHUNK_BYTES, Run, chunks_in, covering, covering_bytes, ragged, runs_of
from cow.holding import holding
from cow.images.origin import Origin
from cow.layers.chain import Share, gather, holder_of, resolve
from cow.layers.layer import Layer, pinned
from cow.offload import is_short, offload
from cow.records.journal import Kind, Record

MOST_WAITING_CHUNKS = 8192  # in the buffers of all images together: 32 MiB
MOST_UNCOMMITTED_CHUNKS = 32768  # 128 MiB of data, so that a record fits into a journal file with ease


class Image:
    """Trio thread only.

    `on_damage(sentence)` records a mismatch; `tell` hears when what was acknowledged cannot be written.
    With `doubted_from` what is on the device may be wrong, and so what the layers from that id on have from it: reading
    it is refused.
    """

    def __init__(
        self,
        origin: Origin,
        snapshot: int,
        created_ns: int,
        delta: Layer,
        commits: Commits,
        space: Space,
        on_damage: Callable[[str], Awaitable[None]],
        tell: Tell,
        *,
        doubted_from: int | None,
        write_behind: bool,
    ) -> None:
        self.origin = origin
        self.size_bytes = origin.size_bytes
        self.delta = delta  #: written by this image alone # I9
        self.opened = 0  #: how many times the image is open
        self.is_doubted = False  #: whether its device was changed by others, so that what it shows may have changed
        self._snapshot = snapshot
        self._created_ns = created_ns
        self._doubted_ns = 0  #: when what it shows may have changed by others, at the latest
        self._commits = commits
        self._space = space
        self._on_damage = on_damage
        self.doubted_from = doubted_from
        self._changing = trio.Lock()  #: guards the delta's sets and files against two writers
        self._write_behind = write_behind
        label = f"image {printable(origin.name)} of snapshot {snapshot}"
        self._behind = Behind(label, self._take, tell, self._wait_in_memory, is_in_memory=delta.is_in_memory)
        self._running = trio.CancelScope()
        self._epochs = origin.epochs
        self._layers: list[Layer] = []  #: as of `_version` of the epochs
        self._version = -1
        self._torn = BitMap64()  #: chunks that the delta holds and whose checksums have to be written anew
        self._untold = ""  #: what was lost of what was acknowledged; the next sync tells
        self._is_crowded = False  #: whether the INTENTs of all images were too many after the last one of this image

    @property
    def is_usable(self) -> bool:
        """Whether its snapshot was not given up."""
        return self._epochs.serves(self._snapshot)

    @property
    def modified_ns(self) -> int:
        """When the contents last changed: the snapshot's time, or the last write to this image.

        With the device in doubt also the time from which it shows what it does now. It keeps that until it is opened
        again, as what is overwritten is preserved. # I2
        """
        if self.is_doubted and not self._doubted_ns:
            self._doubted_ns = self.origin.modified_ns
        return max(self._created_ns, self.delta.written_ns, self._doubted_ns)

    @property
    def written_bytes(self) -> int:
        """What was written to this image, in whole chunks."""
        return len(self.delta.held) * CHUNK_BYTES

    @property
    def preserved_bytes(self) -> int:
        """What the origin overwrote and this snapshot's layers keep, in whole chunks."""
        try:
            group = self._epochs.group_of(self._snapshot)
        except InvalidSnapshotError:
            return 0
        return sum(len(layer.held) for layer in group.layers) * CHUNK_BYTES

    def lost(self) -> list[Run]:
        """The runs that cannot be read because they were lost, ascending."""
        try:
            preserved = self._epochs.layers_for(self._snapshot)
        except InvalidSnapshotError:
            return []
        if not self.delta.lost and not any(layer.lost for layer in preserved):
            return []  # mostly, and without a look at all snapshots
        for snapshot, lost in self._epochs.lost():
            if snapshot == self._snapshot:
                return list(runs_of(self.lost_of(lost)))
        return []

    def lost_of(self, lost: BitMap64) -> BitMap64:
        """The chunks that cannot be read here when its snapshot's layers have lost these."""
        return (lost | self.delta.lost) - self.delta.held

    async def allocated_bytes(self) -> int:
        """What the snapshot takes in the store for this image, checksums included."""
        try:
            layers = [self.delta, *self._epochs.group_of(self._snapshot).layers]
        except InvalidSnapshotError:
            return 0
        written = [layer for layer in layers if layer.held]
        if not written:
            return 0
        with pinned(written):
            return await trio.to_thread.run_sync(lambda: sum(layer.files.allocated_bytes() for layer in written))

    def layers(self) -> list[Layer]:
        """What is asked for a chunk, in order. Raises InvalidSnapshotError when the snapshot was given up."""
        if self._version != self._epochs.version:
            self._layers = []  # none is kept in memory for a snapshot that was given up
            self._layers = [self.delta, *self._epochs.layers_for(self._snapshot)]
            self._version = self._epochs.version
        return self._layers

    def reads(self, layer: Layer, chunks: BitMap64) -> bool:
        """Whether it reads any of the chunks, all held by `layer`, from there."""
        if not self.is_usable:
            return False
        left = chunks
        for one in self.layers():
            if one is layer:
                return bool(left)
            left = left - one.known
        return False

    # -- reading -------------------------------------------------------------------------------------------------

    def read_nowait(self, offset: int, length: int, into: memoryview) -> bytes | memoryview | None:
        """As `read`, where that needs no waiting and nothing is amiss; else None.

        What is not all in one chunk is read into `into`, which has to have `covering_bytes(length)` for it.
        """
        chunk, start = divmod(offset, CHUNK_BYTES)
        if start + length > CHUNK_BYTES:
            return self._read_run_nowait(offset, length, into)
        if offset + length > self.size_bytes or not length or self.doubted_from is not None or self._behind.has(chunk):
            return None
        try:
            layer = holder_of(self.layers(), chunk)
            if layer is None:
                return self.origin.device.pread_nowait(length, offset)
        except (OSError, CowError):
            return None
        data = layer.read_chunk_nowait(chunk)
        return data if data is None or length == CHUNK_BYTES else data[start : start + length]

    def _read_run_nowait(self, offset: int, length: int, into: memoryview) -> memoryview | None:
        """The same of an extent that is not all in one chunk."""
        run = covering(offset, length)
        if offset + length > self.size_bytes or run.length > len(into):
            return None
        if self._behind.chunks and self._behind.holds(run):
            return None
        try:
            self._gather(resolve(self.layers(), run), run, into[: run.length], nowait=True)
        except (OSError, CowError):
            return None
        start = offset - run.offset
        return into[start : start + length]

    async def read(self, offset: int, length: int) -> bytes:
        """Read; fewer bytes only at the image's end. Every chunk from the store is checked. # I4

        Raises DamagedError when one does not match, InvalidSnapshotError when the snapshot was given up, OSError
        when a disk fails.
        """
        at_once = self.read_nowait(offset, length, memoryview(bytearray(covering_bytes(length))))
        return bytes(at_once if at_once is not None else await self.read_waiting(offset, length))

    async def read_waiting(self, offset: int, length: int) -> bytes | bytearray:
        """As `read`, for what cannot be had without waiting."""
        length = min(length, self.size_bytes - offset)
        if length <= 0:
            return b""
        run = covering(offset, length)
        newer = self._behind.pieces(offset, length)
        try:
            data = await self._read_chunks(run)
        except (CowError, OSError) as error:
            if not newer:
                raise
            await self._behind.drain_or(error)  # perhaps what cannot be read is overwritten
            newer, data = [], await self._read_chunks(run)
        start = offset - run.offset
        data = data if start == 0 and length == len(data) else data[start : start + length]
        return overlaid(data, offset, newer) if newer else data

    async def _read_chunks(self, run: Run) -> bytearray:
        try:
            return await self._read_once(run)
        except DamagedError:
            pass  # perhaps only torn by a write that is under way
        async with self._changing:
            return await self._read_settled(run)

    @asynccontextmanager
    async def settled(self) -> AsyncIterator[None]:
        """While no write to this image is under way, so that what does not match is damaged."""
        async with self._changing:
            await self._heal()
            yield

    async def _read_settled(self, run: Run) -> bytearray:
        """Read while no write to this image is under way, so that a mismatch is damage."""
        await self._heal()
        try:
            return await self._read_once(run)
        except DamagedError as error:
            await self._on_damage(str(error))
            raise

    async def _read_once(self, run: Run) -> bytearray:
        data = bytearray(run.length)
        into = memoryview(data)
        while True:
            layers = self.layers()
            found = resolve(layers, run)
            try:
                self._gather(found, run, into, nowait=True)
                return data
            except BlockingIOError:
                pass
            with pinned([share.layer for share in found if share.layer is not None]):
                await trio.to_thread.run_sync(self._gather, found, run, into)
            # A chunk that was read from the device may have been preserved and overwritten meanwhile. The set is
            # changed before the device is, so if it is still missing from all layers, the bytes are the old ones. # I2
            if not self._overtaken(found):
                return data

    def _gather(self, found: list[Share], run: Run, into: memoryview, nowait: bool = False) -> None:
        if self.doubted_from is not None and any(self._is_doubted(share.layer) for share in found):
            raise SuspectError(
                "the device was changed while hcpfs was not running, so what this snapshot reads from it may be wrong: "
                "mount with -o read_suspect to read it all the same"
            )
        gather(found, run.first, into, self.origin.read_chunks_into, nowait=nowait)

    def _is_doubted(self, layer: Layer | None) -> bool:
        return layer is None or (layer is not self.delta and layer.id >= (self.doubted_from or 0))

    def _overtaken(self, found: list[Share]) -> bool:
        from_device = [run for share in found if share.layer is None for run in share.runs]
        if not from_device:
            return False
        layers = self.layers()
        known = (chunks for layer in layers for chunks in (layer.held, layer.lost) if chunks)
        return any(chunks.range_cardinality(run.first, run.end) for chunks in known for run in from_device)

    # -- writing -------------------------------------------------------------------------------------------------

    def write_nowait(self, offset: int, data: bytes | memoryview, memory: Memory | None = None) -> int | None:
        """As `write`, where that needs no waiting, nothing is amiss, and there is plenty of room; else None.

        The memory of a view may be used for something else afterwards, unless it is `memory`, and kept.
        """
        length = len(data)
        if not length or offset + length > self.size_bytes or offset % CHUNK_BYTES or length % CHUNK_BYTES:
            return None
        if not self._write_behind or self._version != self._epochs.version:  # perhaps the snapshot was given up
            return None
        if self._behind.is_full or self._space.waiting_chunks >= MOST_WAITING_CHUNKS:
            return None
        if not self._space.is_roomy(length // CHUNK_BYTES):
            return None
        self._behind.put(offset, data, memory)
        self.delta.written_ns = after(self.modified_ns)
        return length

    async def write(self, offset: int, data: bytes) -> int:
        """Write into the delta. Returns the bytes written, fewer only at the image's end. Durable after `sync`.

        Raises PastEndError beyond the end, InvalidSnapshotError, QuotaError or StoreFullError when the store has no
        room, and the errors of `read` when a partial chunk cannot be filled up. OSError when the store fails, which may
        leave a part written: here without write-behind, and where the buffers of all images are full; else in `sync`.
        """
        at_once = self.write_nowait(offset, data)
        return at_once if at_once is not None else await self.write_waiting(offset, data)

    async def write_waiting(self, offset: int, data: bytes | memoryview, memory: Memory | None = None) -> int:
        """As `write`, for what cannot be done without waiting.

        A view's memory must stay as it is until the return, and after it if it is `memory`, and kept.
        """
        if offset >= self.size_bytes:
            raise PastEndError(f"a write at offset {offset} is beyond the end of the image ({self.size_bytes} bytes)")
        if offset + len(data) > self.size_bytes:
            data = data[: self.size_bytes - offset]
        if not data:
            return 0
        self.layers()  # raises when the snapshot was given up
        if self._write_behind and self._space.waiting_chunks < MOST_WAITING_CHUNKS:  # of all images together # I6
            await self._check_parts(offset, len(data))
            await self._behind.room()
            await self._check_room(self.delta.new_bytes(chunks_in([covering(offset, len(data))])))
            self._behind.put(offset, data, memory)
        else:
            await self._behind.drain()
            await self._write_into_delta(contents_of(offset, data), self._space.room_for_write)
        self.delta.written_ns = after(self.modified_ns)
        return len(data)

    async def _check_parts(self, offset: int, length: int) -> None:
        """Raise when a partial chunk cannot be filled up, while there is somebody to tell."""
        for chunk in ragged(offset, length):
            if not self._behind.has(chunk):
                await self._read_chunks(Run(chunk, 1))

    async def _check_room(self, count: int) -> None:
        try:
            await self._space.check_for_write(count)
        except (QuotaError, StoreFullError):
            if not self._behind.chunks:
                raise
            await self._behind.drain()  # it takes less than it might have
            await self._space.check_for_write(count)

    def _wait_in_memory(self, chunks: int) -> None:
        self._space.waiting_chunks += chunks

    async def _take(self, contents: Contents) -> Untaken:
        """Write what was buffered into the delta.

        A part of a chunk whose rest was lost meanwhile is lost with it; one whose rest cannot be read now stays.
        """
        unfilled: dict[int, Exception] = {}
        try:
            await self._write_into_delta(contents, self._space.keeping, unfilled)
        except InvalidSnapshotError as error:
            return Untaken(Contents(), error)  # nobody will ever read it
        lost = {chunk: error for chunk, error in unfilled.items() if isinstance(error, CowError)}
        if lost:
            self._untold = (
                f"acknowledged writes to a part of each of {len(lost)} chunks are lost, as the rest of each is: "
                f"{next(iter(lost.values()))}"
            )
        kept = unfilled.keys() - lost.keys()
        return Untaken(contents.only(kept), next((unfilled[chunk] for chunk in kept), None))

    async def _write_into_delta(
        self, contents: Contents, room: Callable[[int], Room], unfilled: dict[int, Exception] | None = None
    ) -> None:
        """Chunks that cannot be filled up are left out, with the error, in `unfilled`; without it that is raised."""
        async with holding(self._changing):
            self._epochs.group_of(self._snapshot)
            with pinned([self.delta]):  # until it is written, also when the snapshot is given up meanwhile
                await self._heal()
                if self._has_much_to_commit or self._is_crowded:
                    await self._commit()  # in vain the last time, when the store failed
                failed: dict[int, Exception] = {}
                rows = contents.rows(await self._filled_up(contents, failed))
                if unfilled is not None:
                    unfilled |= failed
                elif failed:
                    raise next(iter(failed.values()))
                if not rows:
                    return
                chunks = contents.chunks() - BitMap64(failed)
                async with room(self.delta.new_bytes(chunks)):
                    self._is_crowded = await self._announce(chunks)
                    await offload(self._write_delta, chunks, rows, here=self._is_short(chunks))
            self.delta.wrote(chunks)
            if self._is_crowded or self._has_much_to_commit:
                await self._commit()

    def _is_short(self, chunks: BitMap64) -> bool:
        return self.delta.is_in_memory and is_short(chunks)

    @property
    def _has_much_to_commit(self) -> bool:
        return len(self.delta.uncommitted) + len(self.delta.intended) > MOST_UNCOMMITTED_CHUNKS

    def _write_delta(self, chunks: BitMap64, rows: list[Row]) -> None:
        try:
            sums = [
                self.delta.write_chunks(run.first, content)
                if isinstance(content, list)
                else self.delta.write_data(run.first, content)
                for run, content in rows
            ]
            self.delta.sums.write_runs([run for run, _ in rows], b"".join(sums))
        except OSError:
            # Chunks that were overwritten in part are what they are now: undefined, as on a disk, but not damaged.
            self._torn |= chunks & self.delta.held
            raise

    async def _heal(self) -> None:
        """Take chunks that a failed write may have torn as they are now. Those that cannot be read are lost.

        While no write to this image is under way. Raises OSError or CowError when the store fails yet.
        """
        if not self._torn or not self.is_usable:
            return
        with pinned([self.delta]):
            unreadable = await trio.to_thread.run_sync(self.delta.rehash, self._torn)
            if unreadable:
                record = Record(Kind.LOST, self.delta.id, time.time_ns(), list(runs_of(unreadable)))
                await self._commits.commit([record], lambda: self.delta.lose(unreadable))
                self._untold = (
                    f"{len(unreadable)} chunks of layer {self.delta.name} cannot be read any more: they are lost"
                )
                await self._on_damage(self._untold)
            self._torn = BitMap64()

    async def _filled_up(self, contents: Contents, failed: dict[int, Exception]) -> dict[int, bytes]:
        """The chunks of which not all was written, as they shall be; the rest of others cannot be read."""
        filled = {}
        for chunk, part in contents.parts().items():
            try:
                filled[chunk] = overlaid(await self._read_settled(Run(chunk, 1)), 0, part.pieces())
            except (LostError, DamagedError, OSError) as error:
                failed[chunk] = error
        return filled

    async def _announce(self, chunks: BitMap64) -> bool:
        """Put an INTENT into the journal for the committed chunks that will be overwritten in place.

        Returns whether there are so many of all images that they should be committed soon.
        """
        overwritten = chunks & self.delta.held
        if overwritten:
            await self._commits.mend()
        overwritten -= self.delta.uncommitted
        overwritten -= self.delta.intended
        if not overwritten:
            return False
        self.delta.announce(overwritten)
        record = Record(Kind.INTENT, self.delta.id, after(self.modified_ns), list(runs_of(overwritten)))
        try:
            await self._commits.commit([record], lambda: None)
        except BaseException:
            self.delta.withdraw(overwritten)
            raise
        return self._commits.intents_are_many

    async def run(self) -> None:
        """The image's background work; runs until `stop`."""
        with self._running:
            await self._behind.run()

    def stop(self) -> None:
        """Nobody uses the image any more; what was not synced is forgotten."""
        self._running.cancel()
        self._behind.forget()

    def give_up(self) -> None:
        """The snapshot was given up: what was acknowledged and waits need not be kept."""
        self._behind.try_again()

    async def sync(self) -> None:
        """Make all writes that were acknowledged durable. # I3

        Raises InvalidSnapshotError when the snapshot was given up, LostError once when something was lost, OSError or
        SyncError when the store fails.
        """
        await self._behind.flush()
        async with holding(self._changing):
            self._epochs.group_of(self._snapshot)
            await self._commit()
        if self._untold:
            sentence, self._untold = self._untold, ""
            raise LostError(sentence)

    async def _commit(self) -> None:
        if self.delta.sums.in_doubt:
            self._torn |= self.delta.uncommitted | self.delta.intended
        await self._heal()
        written = self.delta.uncommitted | self.delta.intended
        if not written:
            return
        with pinned([self.delta]):
            runs = list(runs_of(written))
            sums = await offload(self._sync_data, runs, here=self._is_short(written))
            record = Record(Kind.DELTA, self.delta.id, self.delta.written_ns, runs, sums)
            await self._commits.commit([record], lambda: self.delta.commit(written))
        self._is_crowded = False

    def _sync_data(self, runs: list[Run]) -> bytes:
        self.delta.files.sync_data()
        return self.delta.sums.read_runs(runs)
