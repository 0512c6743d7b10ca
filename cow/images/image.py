"""A snapshot's image of one origin, as it is opened, read and written: the view and the delta behind a buffer.

With write-behind, writes wait in memory for a moment, to be written into the delta together. How much of all images may
wait is limited (I6), and a write is refused while its writer can still be told: when the store has no room for it, or a
partial chunk cannot be filled up.

`sync` makes the writes durable (I3). Until then a crash may keep, drop or tear them, as on any disk.
"""

import trio

from cow.buffer.behind import Behind, Unwritten
from cow.buffer.contents import Contents, contents_of
from cow.buffer.memory import Memory
from cow.clock import after
from cow.disk.ring import Reads
from cow.durable.space import Space
from cow.errors import PastEndError, QuotaError, StoreFullError, printable
from cow.events import Tell
from cow.geometry import CHUNK_BYTES, Run, chunks_in, covering, covering_bytes, ragged
from cow.images.delta import Delta
from cow.images.handle import Handle, from_buffer, read_through
from cow.images.reading import Answer
from cow.images.view import View

MOST_WAITING_CHUNKS = 8192  # in the buffers of all images together: 32 MiB


class Image(Handle):
    """Trio thread only. `tell` is called when acknowledged writes cannot be written out."""

    def __init__(self, view: View, delta: Delta, space: Space, tell: Tell, *, write_behind: bool) -> None:
        self.view = view
        self.delta = delta
        self.origin = view.origin
        self.size_bytes = view.size_bytes
        self.opened = 0  #: how many times the image is open
        self._space = space
        self._write_behind = write_behind
        label = f"image {printable(view.origin.name)} of snapshot {view.snapshot}"
        is_in_memory = delta.layer.is_in_memory
        self._behind = Behind(label, self._take, tell, self._wait_in_memory, is_in_memory=is_in_memory)
        self._running = trio.CancelScope()

    @property
    def modified_ns(self) -> int:
        """When the contents last changed."""
        return self.view.modified_ns

    async def allocated_bytes(self) -> int:
        """The bytes that the snapshot takes in the store for this image, checksums included."""
        return await self.view.allocated_bytes()

    # -- reading -------------------------------------------------------------------------------------------------

    def read_nowait(self, offset: int, length: int, into: memoryview) -> bytes | memoryview | None:
        """As `read`, where that needs no waiting and nothing is amiss; else None.

        An extent in more than one chunk is read into `into`, which has to have `covering_bytes(length)` for it.
        """
        if self._behind.touches(offset, length):
            return from_buffer(self._behind, offset, length) if self.view.is_usable else None
        return self.view.read_nowait(offset, length, into)

    def begin_read(self, reads: Reads, offset: int, length: int, answer: Answer) -> bool:
        """As `Handle.begin_read`; what the buffer has of it is read the other way."""
        return not self._behind.touches(offset, length) and self.view.begin_read(reads, offset, length, answer)

    async def read(self, offset: int, length: int) -> bytes:
        """Read; fewer bytes only at the image's end. Every chunk from the store is checked. # I4

        Raises DamagedError when one does not match its checksum, InvalidSnapshotError when the snapshot was given up,
        OSError when a disk fails.
        """
        at_once = self.read_nowait(offset, length, memoryview(bytearray(covering_bytes(length))))
        return bytes(at_once if at_once is not None else await self.read_waiting(offset, length))

    async def read_waiting(self, offset: int, length: int) -> bytes | bytearray:
        """As `read`, for an extent that cannot be read without waiting."""
        length = min(length, self.size_bytes - offset)
        if length <= 0:
            return b""
        self.view.layers()  # raises when the snapshot was given up
        return await read_through(self._behind, offset, length, self._read_beneath)

    async def _read_beneath(self, offset: int, length: int) -> bytearray:
        run = covering(offset, length)
        data = await self.delta.read(run)
        start = offset - run.offset
        return data if start == 0 and length == len(data) else data[start : start + length]

    # -- writing -------------------------------------------------------------------------------------------------

    def write_nowait(self, offset: int, data: bytes | memoryview, memory: Memory | None = None) -> int | None:
        """As `write`, where that needs no waiting, nothing is amiss, and there is plenty of room; else None.

        `data` is copied before this returns, unless it is a view of `memory`, which may be retained instead.
        """
        length = len(data)
        if not length or offset + length > self.size_bytes or offset % CHUNK_BYTES or length % CHUNK_BYTES:
            return None
        view = self.view
        if not self._write_behind or view.version != view.epochs.version:  # perhaps the snapshot was given up
            return None
        if self._behind.is_full or self._space.waiting_chunks >= MOST_WAITING_CHUNKS:
            return None
        if not self._space.is_roomy(length // CHUNK_BYTES):
            return None
        self._behind.put(offset, data, memory)
        view.delta_layer.written_ns = after(view.modified_ns)
        return length

    async def write(self, offset: int, data: bytes) -> int:
        """Write into the delta. Returns the bytes written, fewer only at the image's end. Durable after `sync`.

        Raises PastEndError beyond the end, InvalidSnapshotError, QuotaError or StoreFullError when the store has no
        room, and the errors of `read` when a partial chunk cannot be filled up. OSError when the store fails, which may
        leave a part written: raised here without write-behind, or when the buffers of all images are full; else by
        `sync`.
        """
        at_once = self.write_nowait(offset, data)
        return at_once if at_once is not None else await self.write_waiting(offset, data)

    async def write_waiting(self, offset: int, data: bytes | memoryview, memory: Memory | None = None) -> int:
        """As `write`, for a write that cannot be done without waiting.

        The memory of `data` must not change before this returns; that of `memory` may be retained after it.
        """
        if offset >= self.size_bytes:
            raise PastEndError(f"a write at offset {offset} is beyond the end of the image ({self.size_bytes} bytes)")
        if offset + len(data) > self.size_bytes:
            data = data[: self.size_bytes - offset]
        if not data:
            return 0
        self.view.layers()  # raises when the snapshot was given up
        if self._write_behind and self._space.waiting_chunks < MOST_WAITING_CHUNKS:  # of all images together # I6
            await self._check_parts(offset, len(data))
            await self._behind.room()
            await self._check_room(self.delta.layer.new_bytes(chunks_in([covering(offset, len(data))])))
            self._behind.put(offset, data, memory)
        else:
            await self._behind.drain()
            await self.delta.write(contents_of(offset, data), self._space.room_for_write)
        self.delta.layer.written_ns = after(self.modified_ns)
        return len(data)

    async def _check_parts(self, offset: int, length: int) -> None:
        """Raise when a partial chunk cannot be filled up, while the writer can still be told."""
        for chunk in ragged(offset, length):
            if not self._behind.touches(chunk * CHUNK_BYTES, CHUNK_BYTES):
                await self.delta.read(Run(chunk, 1))

    async def _check_room(self, count: int) -> None:
        try:
            await self._space.check_for_write(count)
        except (QuotaError, StoreFullError):
            if not self._behind.chunks:
                raise
            await self._behind.drain()  # the buffered writes may take less than was counted for them
            await self._space.check_for_write(count)

    def _wait_in_memory(self, chunks: int) -> None:
        self._space.waiting_chunks += chunks

    async def _take(self, contents: Contents) -> Unwritten:
        """Write what was buffered into the delta. There is room for it: that was checked before it was acknowledged."""
        return await self.delta.take(contents, self._space.keeping)

    async def sync(self) -> None:
        """Make all acknowledged writes durable. # I3

        Raises InvalidSnapshotError when the snapshot was given up, LostError once when something was lost, OSError or
        SyncError when the store fails.
        """
        await self._behind.flush()
        await self.delta.sync()

    # -- its background work -------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Write what was buffered into the delta; runs until `stop`."""
        with self._running:
            await self._behind.run()

    def stop(self) -> None:
        """Stop, because nobody uses the image any more; what is still buffered is dropped."""
        self._running.cancel()
        self._behind.forget()

    def give_up(self) -> None:
        """Note that the snapshot was given up: what is still buffered need not be kept."""
        self._behind.try_again()
