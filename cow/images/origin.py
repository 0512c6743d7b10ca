"""An origin: the live device, and the epochs that its snapshots opened.

The groups are the heart of it: each usable snapshot, oldest first, with the layers that serve it, its own and those it
inherited from deleted newer ones. A chunk that is overwritten goes into the newest layer only; a snapshot reads the
first layer from its own group onwards that has it. So one copy serves all snapshots.

Reads and writes are async and take any offset and length; what blocks is done in a thread.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import trio
from pyroaring import BitMap64

from cow.buffer.behind import Behind, Untaken, write_out
from cow.buffer.contents import Contents, contents_of, covers, overlaid
from cow.buffer.memory import Memory
from cow.clock import after
from cow.disk.ailing import check_size, told, why_away
from cow.disk.source import OriginDevice
from cow.disk.superblock import Superblock
from cow.durable.preserver import Preserver
from cow.durable.rescue import Losses
from cow.errors import CowError, InvalidSnapshotError, PastEndError, ReadOnlyError, printable
from cow.events import Tell
from cow.geometry import CHUNK_BYTES, Run, chunks_in, chunks_of, covering
from cow.images.gate import Gate
from cow.layers.layer import Layer
from cow.offload import is_short, offload
from cow.records.catalog import OriginRow
from cow.records.fingerprint import digests, sampled

RESCUE_SECONDS = 1.0  # before what was lost is looked for on the device; then twice that, up to
MOST_RESCUE_SECONDS = 64.0
RESCUE_TRIES = 8  # in vain, one after the other
_LOOK_NS = 100_000_000  # between two looks at the size of a file, where writes do not wait


@dataclass
class Group:
    """The preserved layers that serve one snapshot, in the order in which they are asked."""

    snapshot: int
    layers: list[Layer]


class Origin:
    """One live device. Trio thread only."""

    def __init__(
        self,
        row: OriginRow,
        device: OriginDevice,
        gate: Gate,
        preserver: Preserver,
        tell: Tell,
        *,
        read_only: bool,
        write_behind: bool,
        store_is_in_memory: bool,
    ) -> None:
        self.id = row.id
        self.name = row.name
        self.device = device
        self.size_bytes = device.size_bytes
        self.chunks = chunks_of(device.size_bytes)
        self.modified_ns = row.modified_ns  #: when the contents last changed, or may have
        self.fingerprint_of = row.fingerprint_of  #: the snapshot whose fingerprint the catalog has
        self.superblock = Superblock()  #: what it was called when somebody last looked
        self.groups: list[Group] = []  #: guarded by the store's layout lock, and by the gate where an epoch opens
        self.layout = 0  #: grows when the groups change
        self._gate = gate
        self._preserver = preserver
        self._read_only = read_only
        self._write_behind = write_behind
        self._look_again_ns = 0  #: at the size of a file
        is_in_memory = store_is_in_memory and device.is_in_memory
        self._losses = Losses()
        self._behind = Behind(device.label, self._take, tell, is_in_memory=is_in_memory)

    # -- the live image ------------------------------------------------------------------------------------------

    def read_nowait(self, offset: int, length: int, into: memoryview) -> bytes | memoryview | None:
        """As `read`, where that needs no waiting; else None. What is longer than a chunk is read into `into`."""
        if offset + length > self.device.intact_bytes or (
            self._behind.chunks and self._behind.holds(covering(offset, length))
        ):
            return None
        try:
            if length <= CHUNK_BYTES:
                return self.device.pread_nowait(length, offset)
            if length > len(into):
                return None
            self.device.fill_nowait(into[:length], offset)
        except OSError:  # BlockingIOError, or of the device: who waits is told
            return None
        return into[:length]

    async def read(self, offset: int, length: int) -> bytes:
        """Read the device as it is now; fewer bytes only at its end."""
        at_once = self.read_nowait(offset, length, memoryview(bytearray(length)))
        return bytes(at_once if at_once is not None else await self.read_waiting(offset, length))

    async def read_waiting(self, offset: int, length: int) -> bytes:
        """As `read`, for what cannot be had without waiting."""
        length = min(length, self.size_bytes - offset)
        if length <= 0:
            return b""
        newer = self._behind.pieces(offset, length)  # before the device, as what leaves the buffer goes there
        if newer and covers(newer, offset, length):  # so what is beneath need not be readable
            return overlaid(bytes(length), offset, newer)
        try:
            data = await self._read_device(offset, length)
        except OSError as error:
            if not newer:
                raise
            await self._behind.drain_or(error)  # perhaps what cannot be read is overwritten
            return await self._read_device(offset, length)
        return overlaid(data, offset, newer) if newer else data

    async def _read_device(self, offset: int, length: int) -> bytes:
        if offset + length > self.device.intact_bytes:
            raise self.device.shrunk()
        try:
            try:
                return self.device.pread_nowait(length, offset)
            except BlockingIOError:
                return await trio.to_thread.run_sync(self.device.pread, length, offset)
        except OSError as error:
            raise self._told(error, "read", offset) from error

    def _told(self, error: OSError, action: str, offset: int | None = None) -> OSError:
        return told(error, self.device, printable(self.name), action, offset)

    def write_nowait(self, offset: int, data: bytes | memoryview, memory: Memory | None = None) -> int | None:
        """As `write`, where that needs no waiting; else None.

        The memory of a view may be used for something else afterwards, unless it is `memory`, and kept.
        """
        # atomic: no checkpoint, so the gate need not be entered
        length, now_ns = len(data), time.time_ns()
        if self._read_only or self._gate.held or not length or offset + length > self.device.intact_bytes:
            return None
        if self._is_put_behind(offset, length):
            if self._behind.is_full:
                return None
            self._behind.put(offset, data, memory)
        else:
            may_write = (self._write_behind and not self._behind.is_long(length)) or self._is_preserved(offset, length)
            if not may_write or not self._may_write_now(offset + length, now_ns):
                return None
            try:
                if not self.device.pwrite_nowait(data, offset):
                    return None
            except OSError:  # who waits is told
                return None
        self.modified_ns = after(self.modified_ns)
        return length

    def _may_write_now(self, end: int, now_ns: int) -> bool:
        """Whether the file has its size yet: one that was cut must not get it back by a write, with a hole in it."""
        if now_ns >= self._look_again_ns or end >= self.size_bytes:
            try:
                check_size(self.device)
            except OSError:
                return False
            self._look_again_ns = now_ns + _LOOK_NS
        return True

    async def write(self, offset: int, data: bytes) -> int:
        """Write to the device, after the old bytes are safe for the snapshots that need them. # I1

        With write-behind it returns before that where old bytes have to be preserved. Returns the bytes written, fewer
        only at the device's end. Durable after `sync`. Raises PastEndError beyond the end, ReadOnlyError, OSError where
        the device itself fails, and the errors of `Preserver.preserve`; with write-behind, `sync` may raise them.
        """
        at_once = self.write_nowait(offset, data)
        return at_once if at_once is not None else await self.write_waiting(offset, data)

    async def write_waiting(self, offset: int, data: bytes | memoryview, memory: Memory | None = None) -> int:
        """As `write`, for what cannot be done without waiting.

        A view's memory must stay as it is until the return, and after it if it is `memory`, and kept.
        """
        if self._read_only:
            raise ReadOnlyError("the origin is opened read-only: mount without the option ro to write")
        if offset >= self.size_bytes:
            raise PastEndError(f"a write at offset {offset} is beyond the end of the device ({self.size_bytes} bytes)")
        if offset + len(data) > self.size_bytes:
            data = data[: self.size_bytes - offset]
        if not data:
            return 0
        run = covering(offset, len(data))
        await self._gate.enter()
        try:
            if self._is_put_behind(offset, len(data)):
                await self._behind.room()
                self._behind.put(offset, data, memory)
            else:
                check_size(self.device)
                await self._rescue(chunks_in([run]))
                await self._preserver.preserve(self, chunks_in([run]))
                written = contents_of(offset, data) if self._losses.chunks & chunks_in([run]) else Contents()
                self._losses.begin(written)
                try:
                    if written:
                        await trio.to_thread.run_sync(self.device.past_cache().pwrite, data, offset)
                    elif not self.device.pwrite_nowait(data, offset):
                        await trio.to_thread.run_sync(self.device.pwrite, data, offset)
                except OSError as error:
                    raise self._told(error, "written", offset) from error
                self._losses.end(written, Contents())
            self.modified_ns = after(self.modified_ns)
        finally:
            self._gate.leave()
        return len(data)

    def _is_put_behind(self, offset: int, length: int) -> bool:
        """Whether a write goes into the buffer: where old bytes are needed, and where it meets an older one there."""
        if not self._write_behind:
            return False
        chunk, start = divmod(offset, CHUNK_BYTES)
        if start + length <= CHUNK_BYTES:
            return self._behind.has(chunk) or not self._is_kept(chunk)
        if self._behind.holds(covering(offset, length)):
            return True
        return not self._behind.is_long(length) and not self._is_preserved(offset, length)

    async def _take(self, contents: Contents) -> Untaken:
        """Bring what was buffered to the device, after the old bytes are safe. # I1"""
        chunks = contents.chunks()
        check_size(self.device)
        await self._rescue(chunks)
        await self._preserver.preserve(self, chunks)
        self._losses.begin(contents)
        # What was lost may come back where the write fails, which the page cache would not tell.
        device = self.device.past_cache() if self._losses.chunks & chunks else self.device
        left = await offload(write_out, device, contents, here=device.is_in_memory and is_short(chunks))
        self._losses.end(contents, left.contents)
        if isinstance(left.cause, OSError):
            first = left.contents.chunks().min() * CHUNK_BYTES
            return Untaken(left.contents, self._told(left.cause, "written", first))
        return left

    async def drain(self) -> None:
        """Have all writes that were acknowledged written to the device; not yet durable. # I3"""
        await self._behind.drain()

    async def sync(self) -> None:
        """Make all writes that were acknowledged durable. # I3"""
        await self._behind.flush()
        try:
            await offload(self.device.sync, here=self.device.is_in_memory)
        except OSError as error:
            raise self._told(error, "flushed") from error

    async def allocated_bytes(self) -> int:
        """What the device takes where it is: less than its size for a sparse file."""
        if self.device.is_block:
            return self.size_bytes
        return await offload(lambda: self.device.allocated_bytes, here=self.device.is_in_memory)

    @property
    def is_in_memory(self) -> bool:
        """Whether its device never waits for a disk."""
        return self.device.is_in_memory

    @property
    def buffered_bytes(self) -> int:
        """What was acknowledged and is not on the device yet, in whole chunks."""
        return self._behind.chunks * CHUNK_BYTES

    async def run(self) -> None:
        """The origin's background work; runs until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._behind.run)
            nursery.start_soon(self._rescue_now_and_then)

    def note_lost(self, layer: Layer, chunks: BitMap64) -> None:
        """They were lost by the layer, and may be overwritten now."""
        self._losses.add(layer, chunks)

    async def _rescue_now_and_then(self) -> None:
        seconds = RESCUE_SECONDS
        while True:
            await self._losses.arrived.wait()
            await trio.sleep(seconds)
            await self._rescue(self._losses.chunks)
            seconds = min(2 * seconds, MOST_RESCUE_SECONDS) if self._losses.chunks else RESCUE_SECONDS

    async def _rescue(self, chunks: BitMap64) -> None:
        """Keep what was lost and is on the device all the same, where it can be read by now (durable/rescue.py)."""
        tries_left = RESCUE_TRIES
        for chunk in list(self._losses.chunks & chunks) if self._losses.chunks else ():
            try:
                content = await offload(self._read_past_cache, chunk, here=self.device.is_in_memory)
                layer = self._losses.layer_of(chunk)
                if layer is None or not any(layer in group.layers for group in self.groups):
                    pass  # nobody needs it any more
                elif self._losses.is_untouched(chunk, content):
                    await self._preserver.keep_late(layer, chunk, content)
                self._losses.forget([chunk])
            except (CowError, OSError):  # not now
                tries_left -= 1
                if not tries_left:
                    return

    def _read_past_cache(self, chunk: int) -> bytes:
        data = self.device.pread_past_cache(CHUNK_BYTES, chunk * CHUNK_BYTES)
        check_size(self.device)
        return data[: self.size_bytes - chunk * CHUNK_BYTES].ljust(CHUNK_BYTES, b"\0")

    def fingerprint(self) -> bytes:
        """The fingerprint of the device, as the newest snapshot sees it. Blocks.

        A sampled chunk that is overwritten meanwhile is known to a layer before that, and does not count then.
        """
        return digests(sampled(self.size_bytes), self.read_chunks)

    def knows(self, chunk: int) -> bool:
        """Whether a layer that is in use has the chunk, or has lost it."""
        return any(chunk in layer.held or chunk in layer.lost for group in self.groups for layer in group.layers)

    def read_chunks(self, run: Run) -> bytes:
        """Whole chunks of the device, the last one filled up with zeroes. Blocks."""
        first, chunks = run
        offset, length = first * CHUNK_BYTES, chunks * CHUNK_BYTES
        data = self.device.pread(min(length, self.size_bytes - offset), offset)
        check_size(self.device)  # after it: what was cut before reads like zeroes where it was written to again
        return data if len(data) == length else data.ljust(length, b"\0")

    def why_away(self, chunk: int, error: OSError) -> OSError | None:
        """Why a chunk that cannot be read is no bad sector; None when the device answers elsewhere. Blocks."""
        return why_away(self.device, chunk, error)

    def read_chunks_into(self, run: Run, into: memoryview, *, nowait: bool = False) -> None:
        """The same, into all of `into`. Under `nowait` raises BlockingIOError where it would block."""
        fill = self.device.fill_nowait if nowait else self.device.fill
        length = min(run.length, self.size_bytes - run.offset)
        if run.offset + length > self.device.intact_bytes:
            raise self.device.shrunk()
        try:
            fill(into[:length], run.offset)
        except BlockingIOError:
            raise
        except OSError as error:
            raise self._told(error, "read", run.offset) from error
        into[length:] = bytes(run.length - length)

    # -- epochs --------------------------------------------------------------------------------------------------

    def open_epoch(self, snapshot: int, layer: Layer) -> None:
        """From now on old bytes go into `layer`. No write may be under way."""
        self.groups.append(Group(snapshot, [layer]))
        self.layout += 1

    def add_layer(self, snapshot: int, layer: Layer) -> None:
        """Have one more layer serve a snapshot, asked after those that do."""
        self.group_of(snapshot).layers.append(layer)
        self.layout += 1

    def remove_layer(self, layer: Layer) -> None:
        """Have a layer serve nobody any more."""
        for group in self.groups:
            if layer in group.layers:
                group.layers.remove(layer)
        self.layout += 1

    @property
    def newest_layer(self) -> Layer:
        """Where old bytes go. There must be a snapshot."""
        return self.groups[-1].layers[-1]

    def unpreserved(self, chunks: BitMap64) -> BitMap64:
        """Those of `chunks` that some snapshot still reads from the device."""
        if not self.groups:
            return BitMap64()
        for layer in self.groups[-1].layers:
            chunks = chunks - layer.held
            if layer.lost:
                chunks -= layer.lost
        return chunks

    def _is_kept(self, chunk: int) -> bool:
        """Whether no snapshot reads the chunk from the device."""
        if not self.groups:
            return True
        if chunk in self._losses.chunks:
            return False  # so that whoever writes there passes by `_rescue`
        return any([chunk in layer.held or chunk in layer.lost for layer in self.groups[-1].layers])

    def _is_preserved(self, offset: int, length: int) -> bool:
        """Whether no snapshot reads any of the extent from the device."""
        if not self.groups:
            return True
        run = covering(offset, length)
        if any([layer.held.contains_range(run.first, run.end) for layer in self.groups[-1].layers]):
            return True  # mostly, and without making a set
        if self._losses.chunks and self._losses.chunks.range_cardinality(run.first, run.end):
            return False
        if not self._is_kept(run.first):
            return False
        return not self.unpreserved(chunks_in([run]))

    def layers_for(self, snapshot: int) -> Iterator[Layer]:
        """The layers that a snapshot reads, in order."""
        start = self._position(snapshot)
        return (layer for group in self.groups[start:] for layer in group.layers)

    def lost(self) -> Iterator[tuple[int, BitMap64]]:
        """Each snapshot, newest first, and the chunks that its layers have lost."""
        lost = BitMap64()
        for group in reversed(self.groups):
            for layer in reversed(group.layers):
                lost = (lost - layer.held) | layer.lost
            yield group.snapshot, lost

    def group_of(self, snapshot: int) -> Group:
        """The snapshot's group."""
        return self.groups[self._position(snapshot)]

    def _position(self, snapshot: int) -> int:
        for position, group in enumerate(self.groups):
            if group.snapshot == snapshot:
                return position
        raise InvalidSnapshotError("the snapshot was given up; its info says why")

    def needing(self, chunks: BitMap64) -> list[int]:
        """The snapshots that read some of `chunks` from the device, newest first."""
        found = []
        exposed = chunks
        for group in reversed(self.groups):
            for layer in group.layers:
                exposed = exposed - layer.known
            if not exposed:
                break
            found.append(group.snapshot)
        return found

    def freed_by(self, snapshot: int, heir: int | None) -> int:
        """How many chunks would be given back if the snapshot went."""
        layers = self.group_of(snapshot).layers
        if heir is None:
            return sum(len(layer.held) for layer in layers)
        before = self.group_of(heir).layers
        return sum(layer.held.intersection_cardinality(earlier.held) for layer in layers for earlier in before)

    def release(self, snapshot: int, heir: int | None) -> list[tuple[Layer, BitMap64]]:
        """Take a snapshot out. Its layers go on to serve `heir`, the next older one, or nobody.

        What `heir` has already is not needed twice: those chunks, by layer, are to be punched out.
        """
        group = self.groups.pop(self._position(snapshot))
        self.layout += 1
        if heir is None:
            return []
        inheriting = self.group_of(heir)
        found = []
        for layer in group.layers:
            shadowed = drop_shadowed(inheriting.layers, layer)
            if shadowed:
                found.append((layer, shadowed))
            inheriting.layers.append(layer)
        return found


def drop_shadowed(before: list[Layer], layer: Layer) -> BitMap64:
    """Take out of `layer` what layers asked before it hold, and return that."""
    shadowed = BitMap64()
    for earlier in before:
        known = earlier.known
        shadowed |= layer.held & known
        layer.lost -= known
    if shadowed:
        layer.held -= shadowed
        layer.dirty = True
    return shadowed
