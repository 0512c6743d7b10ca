"""An origin: the live device, reads from it, and the path of a write to it.

A write whose chunks some snapshot still reads from the device must not overtake their preservation (I1). Such writes
gather in a buffer, unless write-behind is off; a write that needs nothing preserved goes straight to the device.

Reads and writes are async and take any offset and length; calls that block are made in a thread.
"""

import time
from collections.abc import Sequence

import trio
from pyroaring import BitMap64

from cow.buffer.behind import Behind, Unwritten, write_out
from cow.buffer.contents import Contents, contents_of
from cow.buffer.memory import Memory
from cow.clock import after
from cow.disk.ailing import check_size, told, why_away
from cow.disk.ring import Reads
from cow.disk.source import OriginDevice
from cow.disk.superblock import Superblock
from cow.durable.preserver import Preserver
from cow.durable.rescue import Losses
from cow.errors import CowError, PastEndError, ReadOnlyError, printable
from cow.events import Tell
from cow.geometry import CHUNK_BYTES, Run, chunks_in, chunks_of, covering
from cow.images.gate import Gate
from cow.images.handle import Handle, from_buffer, read_through
from cow.images.reading import Answer, Reading
from cow.layers.chain import Share
from cow.layers.epochs import Epochs
from cow.layers.layer import Layer
from cow.offload import is_short, offload
from cow.records.fingerprint import digests, sampled
from cow.records.rows import OriginRow

RESCUE_SECONDS = 1.0  # before lost chunks are looked for on the device; then twice that, up to
MOST_RESCUE_SECONDS = 64.0
RESCUE_TRIES = 8  # that may fail in one go over the lost chunks
# A write from here on goes to a device that has to be waited for by itself, where nothing has to be done before it:
# with 1 MiB the buffer is half as fast as that, with 4 KiB it is six times as fast.
LONG_BYTES = 256 << 10
_LOOK_NS = 100_000_000  # between two checks of the size of a file, for writes that do not wait


class Origin(Handle):
    """One live device. Trio thread only."""

    def __init__(
        self,
        row: OriginRow,
        device: OriginDevice,
        gate: Gate,
        preserver: Preserver,
        tell: Tell,
        *,
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
        self.superblock = Superblock()  #: as it was last read
        self.epochs = Epochs()  #: guarded by the inventory's lock, and by the gate when an epoch is opened
        self._gate = gate
        self._preserver = preserver
        self._read_only = device.is_read_only
        self._write_behind = write_behind
        self._look_again_ns = 0  #: when to check the size of a file again
        is_in_memory = store_is_in_memory and device.is_in_memory
        self._writes_wait = not device.is_in_memory  #: so that many are made together, from the buffer
        self._losses = Losses()
        self._behind = Behind(device.label, self._take, tell, is_in_memory=is_in_memory)
        self._is_preserved = self.epochs.is_preserved  # asked for every short write

    # -- the live image ------------------------------------------------------------------------------------------

    def read_nowait(self, offset: int, length: int, into: memoryview) -> bytes | memoryview | None:
        """As `read`, where that needs no waiting; else None. More than a chunk is read into `into`."""
        if offset + length > self.device.intact_bytes:
            return None
        if self._behind.touches(offset, length):
            return from_buffer(self._behind, offset, length)
        try:
            if length <= CHUNK_BYTES:
                return self.device.pread_nowait(length, offset)
            if length > len(into):
                return None
            self.device.fill_nowait(into[:length], offset)
        except OSError:  # BlockingIOError, or of the device: `read_waiting` reports it
            return None
        return into[:length]

    def begin_read(self, reads: Reads, offset: int, length: int, answer: Answer) -> bool:
        """As `Handle.begin_read`; what the buffer has of it is read the other way."""
        if length <= 0 or offset + length > self.size_bytes or self._behind.touches(offset, length):
            return False
        return Reading(reads, self, [Share(None, [covering(offset, length)])], answer).begin(offset, length)

    def device_at(self, run: Run) -> int | None:
        """The descriptor to read a run of the device from; None where that would be short."""
        return self.device.fd if run.offset + run.length <= self.device.intact_bytes else None

    def is_overtaken(self, found: Sequence[Share]) -> bool:
        """Never: the live image shows what is on the device."""
        return False

    async def read(self, offset: int, length: int) -> bytes:
        """Read the device as it is now; fewer bytes only at its end."""
        at_once = self.read_nowait(offset, length, memoryview(bytearray(length)))
        return bytes(at_once if at_once is not None else await self.read_waiting(offset, length))

    async def read_waiting(self, offset: int, length: int) -> bytes | bytearray:
        """As `read`, for an extent that cannot be read without waiting."""
        length = min(length, self.size_bytes - offset)
        if length <= 0:
            return b""
        return await read_through(self._behind, offset, length, self._read_device)

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

        `data` is copied before this returns, unless it is a view of `memory`, which may be retained instead.
        """
        # atomic: no trio checkpoint, so the gate need not be entered
        length, now_ns = len(data), time.time_ns()
        if self._read_only or self._gate.held or not length or offset + length > self.device.intact_bytes:
            return None
        if self._must_buffer(offset, length):
            if self._behind.is_full or not self._may_write_now(offset + length, now_ns):
                return None
            self._behind.put(offset, data, memory)
        else:
            may_write = (self._write_behind and not self._behind.is_long(length)) or self._may_overwrite(offset, length)
            if not may_write or not self._may_write_now(offset + length, now_ns):
                return None
            try:
                if not self.device.pwrite_nowait(data, offset):
                    return None
            except OSError:  # `write_waiting` reports it
                return None
        self.modified_ns = after(self.modified_ns)
        return length

    def _may_write_now(self, end: int, now_ns: int) -> bool:
        """Whether a file still has its size: a truncated one must not be extended by a write, with a hole in it."""
        if now_ns >= self._look_again_ns or end >= self.size_bytes:
            try:
                check_size(self.device)
            except OSError:
                return False
            self._look_again_ns = now_ns + _LOOK_NS
        return True

    async def write(self, offset: int, data: bytes) -> int:
        """Write to the device, after the old bytes are safe for the snapshots that need them. # I1

        With write-behind it returns before that when old bytes have to be preserved. Returns the bytes written, fewer
        only at the device's end. Durable after `sync`. Raises PastEndError beyond the end, ReadOnlyError, OSError when
        the device itself fails, and the errors of `Preserver.preserve`; with write-behind, `sync` may raise them.
        """
        at_once = self.write_nowait(offset, data)
        return at_once if at_once is not None else await self.write_waiting(offset, data)

    async def write_waiting(self, offset: int, data: bytes | memoryview, memory: Memory | None = None) -> int:
        """As `write`, for a write that cannot be done without waiting.

        The memory of `data` must not change before this returns; that of `memory` may be retained after it.
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
            if self._must_buffer(offset, len(data)):
                check_size(self.device)
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

    def _must_buffer(self, offset: int, length: int) -> bool:
        """Whether a write has to go into the buffer.

        Because the device would have to be waited for, or old bytes must be preserved first, or because an older write
        to the same chunks waits there, which must not overwrite the newer one later.
        """
        if not self._write_behind:
            return False
        if self._writes_wait and length < LONG_BYTES:
            return True
        chunk, start = divmod(offset, CHUNK_BYTES)
        if start + length <= CHUNK_BYTES:
            if not self._is_preserved(chunk) or self._behind.touches(offset, length):
                return True
            return chunk in self._losses.chunks  # a write to those must go through `_rescue`
        if self._behind.touches(offset, length):
            return True
        return not self._behind.is_long(length) and not self._may_overwrite(offset, length)

    def _may_overwrite(self, offset: int, length: int) -> bool:
        """Whether nothing has to be done for snapshots before the extent is written to the device."""
        run = covering(offset, length)
        if not self.epochs.is_run_preserved(run):
            return False
        lost = self._losses.chunks
        return not lost or not lost.range_cardinality(run.first, run.end)

    async def _take(self, contents: Contents) -> Unwritten:
        """Write what was buffered to the device, after the old bytes are safe. # I1"""
        chunks = contents.chunks()
        check_size(self.device)
        await self._rescue(chunks)
        await self._preserver.preserve(self, chunks)
        self._losses.begin(contents)
        # A lost chunk may be rescued when the write fails, which the page cache would not report.
        device = self.device.past_cache() if self._losses.chunks & chunks else self.device
        left = await offload(write_out, device, contents, here=device.is_in_memory and is_short(chunks))
        self._losses.end(contents, left.contents)
        if isinstance(left.cause, OSError):
            first = left.contents.chunks().min() * CHUNK_BYTES
            return Unwritten(left.contents, self._told(left.cause, "written", first))
        return left

    async def drain(self) -> None:
        """Have all acknowledged writes written to the device; not yet durable. # I3"""
        await self._behind.drain()

    async def sync(self) -> None:
        """Make all acknowledged writes durable. # I3"""
        await self._behind.flush()
        try:
            await offload(self.device.sync, here=self.device.is_in_memory)
        except OSError as error:
            raise self._told(error, "flushed") from error

    async def allocated_bytes(self) -> int:
        """The bytes that the device takes where it is: fewer than its size for a sparse file."""
        if self.device.is_block:
            return self.size_bytes
        return await offload(lambda: self.device.allocated_bytes, here=self.device.is_in_memory)

    @property
    def is_in_memory(self) -> bool:
        """Whether its device never waits for a disk."""
        return self.device.is_in_memory

    @property
    def buffered_bytes(self) -> int:
        """The bytes that were acknowledged and are not on the device yet, in whole chunks."""
        return self._behind.chunks * CHUNK_BYTES

    async def run(self) -> None:
        """The origin's background work; runs until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._behind.run)
            nursery.start_soon(self._rescue_now_and_then)

    def note_lost(self, layer: Layer, chunks: BitMap64) -> None:
        """Note that the layer has lost the chunks, which may be overwritten now."""
        self._losses.add(layer, chunks)

    async def _rescue_now_and_then(self) -> None:
        seconds = RESCUE_SECONDS
        while True:
            await self._losses.arrived.wait()
            await trio.sleep(seconds)
            await self._rescue(self._losses.chunks)
            seconds = min(2 * seconds, MOST_RESCUE_SECONDS) if self._losses.chunks else RESCUE_SECONDS

    async def _rescue(self, chunks: BitMap64) -> None:
        """Preserve lost chunks that are still on the device, where they can be read by now (durable/rescue.py)."""
        tries_left = RESCUE_TRIES
        for chunk in list(self._losses.chunks & chunks) if self._losses.chunks else ():
            try:
                content = await offload(self._read_past_cache, chunk, here=self.device.is_in_memory)
                layer = self._losses.layer_of(chunk)
                if layer is None or self.epochs.group_with(layer) is None:
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

    def will_read(self, run: Run) -> None:
        """Have the kernel begin to read chunks of the device into its cache. Does not wait for them."""
        if not self.device.is_in_memory:
            self.device.will_read(run.offset, run.length)

    def read_chunks(self, run: Run) -> bytes:
        """Whole chunks of the device, the last one filled up with zeroes. Blocks."""
        first, chunks = run
        offset, length = first * CHUNK_BYTES, chunks * CHUNK_BYTES
        data = self.device.pread(min(length, self.size_bytes - offset), offset)
        check_size(self.device)  # after the read: a file that was cut, and extended by a write, has a hole of zeroes
        return data if len(data) == length else data.ljust(length, b"\0")

    def why_away(self, chunk: int, error: OSError) -> OSError | None:
        """Why an unreadable chunk is not just a bad sector; None when the device answers elsewhere. Blocks."""
        return why_away(self.device, chunk, error)

    def read_chunks_into(self, run: Run, into: memoryview, *, nowait: bool = False) -> None:
        """As `read_chunks`, into all of `into`. With `nowait` it raises BlockingIOError where it would block."""
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
