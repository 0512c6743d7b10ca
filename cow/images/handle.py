"""An open image: its interface, and how it is read through its buffer.

There are two kinds: `Origin`, the live image, and `Image`, that of a snapshot. Every request goes to a `_nowait` method
first, which answers in one plain call where no disk has to be waited for and nothing is amiss; a request that it does
not answer goes to the `_waiting` method, which handles all cases.
"""

from collections.abc import Awaitable, Callable
from typing import Protocol

from cow.buffer.behind import Behind
from cow.buffer.contents import covers, overlaid
from cow.buffer.memory import Memory
from cow.disk.ring import Reads
from cow.errors import CowError
from cow.images.reading import Answer


class Handle(Protocol):
    """An open image, or anything that is used like one. Trio thread only."""

    def read_nowait(self, offset: int, length: int, into: memoryview) -> bytes | memoryview | None:
        """Read without waiting, or return None where that is impossible. Short only at the end.

        The result may be a view of `into`, which should be `covering_bytes(length)` long.
        """

    def begin_read(self, reads: Reads, offset: int, length: int, answer: Answer) -> bool:
        """Begin to read what has to be waited for, in no thread and no task; False where that is impossible.

        When it has come `answer` is called, by `reads.reap`: with the contents, or with None where something is amiss,
        so that `read_waiting` has to be asked after all.
        """
        return False

    async def read_waiting(self, offset: int, length: int) -> bytes | bytearray:
        """Read, waiting where necessary. Short only at the end. Raises CowError or OSError."""

    def write_nowait(self, offset: int, data: bytes | memoryview, memory: Memory | None = None) -> int | None:
        """Write without waiting, or return None where that is impossible. Short only at the end.

        `data` is copied before this returns, unless it is a view of `memory`, which may be retained instead.
        """

    async def write_waiting(self, offset: int, data: bytes | memoryview, memory: Memory | None = None) -> int:
        """Write, waiting where necessary. Short only at the end. Raises CowError or OSError.

        The memory of `data` must not change before this returns; that of `memory` may be retained after it.
        """

    async def sync(self) -> None:
        """Make all acknowledged writes durable. # I3"""


def from_buffer(behind: Behind, offset: int, length: int) -> bytes | None:
    """An extent that is wholly in the buffer; None for any other."""
    newer = behind.pieces(offset, length)
    return overlaid(bytes(length), offset, newer) if covers(newer, offset, length) else None


async def read_through(
    behind: Behind, offset: int, length: int, read_beneath: Callable[[int, int], Awaitable[bytes | bytearray]]
) -> bytes | bytearray:
    """Read an extent within the image: what the buffer has of it, over what `read_beneath(offset, length)` gives.

    An extent that is wholly in the buffer need not be readable beneath. Where `read_beneath` fails, the buffer is
    drained, because that may overwrite the unreadable part, and the extent is read once more. Raises what
    `read_beneath` raises.
    """
    newer = behind.pieces(offset, length)  # before what is beneath, because what leaves the buffer goes there # I3
    if not newer:
        return await read_beneath(offset, length)
    if covers(newer, offset, length):
        return overlaid(bytes(length), offset, newer)
    try:
        data = await read_beneath(offset, length)
    except (CowError, OSError) as error:
        await behind.drain_or(error)
        return await read_beneath(offset, length)
    return overlaid(data, offset, newer)
