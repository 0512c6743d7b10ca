"""An image that was opened with O_TRUNC: what a tool skips reads as zeroes afterwards, as in a file that was empty.

An image cannot get shorter, so an open with O_TRUNC changes nothing by itself, as on a block device. But a tool takes
it for a regular file that is empty now, and many tools seek over zeroes in such a file (cp of a sparse file, dd
conv=sparse, tar -S). That must not leave old bytes where the tool means zeroes. So before a write, whatever is below it
and was not written through this open file is zeroed; and all the rest when the tool sets the size. What is above the
last write and not claimed in one of these ways stays, as on a block device.

The kernel drops its cached pages of the image before the open returns, as in a truncation. Otherwise a page that the
tool maps and stores into would still show, and write back, the old bytes beside the new ones.

dd does not set a size that the file has already: it asks for the size (fstat) after its last seek. What is below the
file position at that time is zeroed at the close, or at an fsync.
"""

import os
from collections.abc import Awaitable, Callable
from contextlib import suppress

import trio

from cow.buffer.memory import Memory
from cow.disk.ring import Reads
from cow.errors import CowError
from cow.geometry import covering_bytes
from cow.images.image import Image
from cow.images.origin import Origin
from cow.images.reading import Answer

PIECE_BYTES = 128 << 10  # zeroed at a time; other requests are served in between
# For the kernel to drop its cached pages before our answer to the truncation. It cannot drop pages that another process
# has mapped and stored into until that answer, because it writes them back only then: it goes on after it.
FORGETTING_SECONDS = 1.0
_ZEROES = bytes(PIECE_BYTES)


class Truncating:
    """The open file. Trio thread only. Raises what the image's reads and writes raise.

    `forget_cached(offset, length)` has the kernel drop its cached pages of that extent of the image, of length 0: to
    the end. When it is cancelled the kernel goes on with it.
    """

    def __init__(self, image: Image | Origin, forget_cached: Callable[[int, int], Awaitable[None]]) -> None:
        self.image = image
        self._forget_cached = forget_cached
        self._end = 0  #: all before it was written through this file, or reads as zeroes
        self._claimed = 0  #: up to here the tool has gone without writing
        self._zeroed: tuple[int, int] | None = None  #: first and last byte that the kernel may have cached otherwise
        self._zeroing = trio.Lock()

    async def begin(self) -> None:
        """To be called before the truncation is answered, and before the first use."""
        with trio.move_on_after(FORGETTING_SECONDS):
            await self._forget_cached(0, 0)

    def read_nowait(self, offset: int, length: int, into: memoryview) -> bytes | memoryview | None:
        """As of the image."""
        return self.image.read_nowait(offset, length, into)

    def begin_read(self, reads: Reads, offset: int, length: int, answer: Answer) -> bool:
        """As of the image."""
        return self.image.begin_read(reads, offset, length, answer)

    async def read_waiting(self, offset: int, length: int) -> bytes | bytearray:
        """As of the image."""
        return await self.image.read_waiting(offset, length)

    def write_nowait(self, offset: int, data: bytes | memoryview, memory: Memory | None = None) -> int | None:
        """As of the image, unless something below was skipped: then None."""
        if offset > self._end or self._zeroing.locked():
            return None
        written = self.image.write_nowait(offset, data, memory)
        if written is not None:
            self._note_written(offset + written)
        return written

    async def write_waiting(self, offset: int, data: bytes | memoryview, memory: Memory | None = None) -> int:
        """As of the image, after zeroing what was skipped below."""
        await self.make_way(offset, len(data))
        return await self.image.write_waiting(offset, data, memory)

    async def make_way(self, offset: int, length: int) -> None:
        """Zero what was skipped below an extent that is about to be written through this file."""
        async with self._zeroing:
            if offset < self.image.size_bytes:  # else the write will be refused
                await self._zero_to(offset)
                # Before it is written: another one may come meanwhile, and shall not take this one for skipped.
                self._note_written(min(offset + length, self.image.size_bytes))

    def _note_written(self, end: int) -> None:
        self._end = max(self._end, end)
        self._claimed = 0

    def claim(self, position: int) -> None:
        """The tool asked for the size at this file position, perhaps to see whether it has to extend the file."""
        self._claimed = position

    async def extend(self) -> None:
        """The tool sets the image's own size: all that it did not write reads as zeroes."""
        async with self._zeroing:
            await self._zero_to(self.image.size_bytes)
        with trio.move_on_after(FORGETTING_SECONDS):
            await self._forget_zeroed()

    async def sync(self) -> None:
        """Make all durable that was written, and what was skipped below it."""
        await self.flush()
        await self.image.sync()

    async def flush(self) -> None:
        """Zero what the tool has claimed, at a close. From then on nobody sees older bytes there."""
        async with self._zeroing:
            await self._zero_to(min(self._claimed, self.image.size_bytes))
        await self._forget_zeroed()

    async def _forget_zeroed(self) -> None:
        """Drop cached pages of what was zeroed. Not under the lock: a waiting write may hold such a page."""
        zeroed, self._zeroed = self._zeroed, None
        if zeroed is not None:
            await self._forget_cached(zeroed[0], zeroed[1] - zeroed[0])

    async def _zero_to(self, end: int) -> None:
        while self._end < end:
            offset = self._end
            length = min(PIECE_BYTES - offset % PIECE_BYTES, end - offset)
            await trio.lowlevel.checkpoint()
            if not await self._is_zero(offset, length):
                await self._zero(offset, length)
            self._end = offset + length

    async def _is_zero(self, offset: int, length: int) -> bool:
        """Whether it reads as zeroes already, so that nothing has to be preserved and written."""
        with suppress(CowError, OSError):  # what cannot be read can be written over
            at_once = self.image.read_nowait(offset, length, memoryview(bytearray(covering_bytes(length))))
            found = at_once if at_once is not None else await self.image.read_waiting(offset, length)
            return bytes(found) == _ZEROES[:length]
        return False

    async def _zero(self, offset: int, length: int) -> None:
        first = offset if self._zeroed is None else min(self._zeroed[0], offset)
        self._zeroed = first, max(offset + length, self._zeroed[1] if self._zeroed is not None else 0)
        data = _ZEROES[:length]
        if self.image.write_nowait(offset, data) is None:
            await self.image.write_waiting(offset, data)


def position_in(process: int, inode: int, name: bytes) -> int | None:
    """The position of a process (or thread) in a file of that inode and name that it has open for writing, or None.

    From /proc/PID/fdinfo, which has `pos`, `flags` in octal, and, since Linux 5.14, `ino`.
    """
    with suppress(OSError):
        for number in os.listdir(f"/proc/{process}/fd"):
            with suppress(OSError):  # it may close files meanwhile
                if not os.readlink(os.fsencode(f"/proc/{process}/fd/{number}")).endswith(b"/" + name):
                    continue
                with open(f"/proc/{process}/fdinfo/{number}", encoding="ascii", errors="replace") as lines:
                    found = dict(line.rstrip("\n").partition(":\t")[::2] for line in lines)
                if int(found["flags"], 8) & os.O_ACCMODE != os.O_RDONLY and int(found.get("ino", inode)) == inode:
                    return int(found["pos"])
    return None
