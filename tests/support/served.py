"""Reads and writes of an image as the file system makes them: in memory that has another use when it is free."""

import trio

from cow.buffer.memory import Memory
from cow.disk.ring import Reads
from cow.geometry import covering_bytes
from cow.images.image import Image
from cow.images.origin import Origin


async def read_served(read: Image | Origin, reads: Reads | None, offset: int, length: int) -> bytes:
    """As `read`; what has to be waited for is waited for in no thread, where that can be."""
    at_once = read.read_nowait(offset, length, memoryview(bytearray(covering_bytes(length))))
    if at_once is not None:
        return bytes(at_once)
    come, answered = list[bytes | None](), trio.Event()

    def answer(content: memoryview | None) -> None:
        come.append(None if content is None else bytes(content))
        answered.set()

    if reads is not None and read.begin_read(reads, offset, length, answer):
        reads.submit()
        await answered.wait()
        [content] = come
        if content is not None:
            return content
    return bytes(await read.read_waiting(offset, length))


async def write_served(written: Image | Origin, offset: int, data: bytes) -> int:
    """As `write`; what reads the memory after it was given back reads rubbish."""
    memory = Memory(memoryview(bytearray(data)), _spoil)
    memory.keep()
    try:
        at_once = written.write_nowait(offset, memory.view, memory)
        return at_once if at_once is not None else await written.write_waiting(offset, memory.view, memory)
    finally:
        memory.release()


def _spoil(memory: Memory) -> None:
    memory.view[:] = b"\xee" * len(memory.view)
