"""Writes to an image as the file system makes them: in memory that is used for something else when it is free."""

from cow.buffer.memory import Memory
from cow.images.image import Image
from cow.images.origin import Origin


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
