"""The disks of a consistency group as one, one behind the other: so whoever knows of one disk can use several."""

from collections.abc import Awaitable, Callable, Iterator, Sequence

import trio

from cow.disk.ring import Reads
from cow.images.image import Image
from cow.images.origin import Origin
from tests.support.served import read_served, write_served


class Joined:
    """Live images, or the images of a snapshot. What concerns several of them is done in all of them at once."""

    def __init__(self, parts: Sequence[Image | Origin], reads: Reads | None) -> None:
        self._parts = parts
        self._reads = reads

    async def read(self, offset: int, length: int) -> bytes:
        return b"".join([await part.read(at, size) for part, at, _, size in self._pieces(offset, length)])

    async def read_served(self, offset: int, length: int) -> bytes:
        """As the file system does."""
        pieces = self._pieces(offset, length)
        return b"".join([await read_served(part, self._reads, at, size) for part, at, _, size in pieces])

    async def write(self, offset: int, data: bytes) -> None:
        await self._each(lambda part, at, piece: part.write(at, piece), offset, data)

    async def write_served(self, offset: int, data: bytes) -> None:
        """As the file system does."""
        await self._each(write_served, offset, data)

    async def sync(self) -> None:
        await _all_at_once([part.sync for part in self._parts])

    async def drain(self) -> None:
        await _all_at_once([part.drain for part in self._parts if isinstance(part, Origin)])

    async def _each(self, write: Callable[..., Awaitable[object]], offset: int, data: bytes) -> None:
        writes = []
        for part, at, start, size in self._pieces(offset, len(data)):
            writes.append(_bound(write, part, at, data[start : start + size]))
        await _all_at_once(writes)

    def _pieces(self, offset: int, length: int) -> Iterator[tuple[Image | Origin, int, int, int]]:
        """(part, offset in it, offset from the beginning, length) of what the range has of each part."""
        begin, end = 0, offset + length
        for part in self._parts:
            first, last = max(offset, begin), min(end, begin + part.size_bytes)
            if first < last:
                yield part, first - begin, first - offset, last - first
            begin += part.size_bytes


def _bound(write: Callable[..., Awaitable[object]], *arguments: object) -> Callable[[], Awaitable[object]]:
    return lambda: write(*arguments)


async def _all_at_once(calls: Sequence[Callable[[], Awaitable[object]]]) -> None:
    if len(calls) == 1:
        await calls[0]()  # whose error is raised as it is
        return
    async with trio.open_nursery() as nursery:
        for call in calls:
            nursery.start_soon(call)
