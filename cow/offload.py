"""Where blocking work is done: in a thread, or inline when it is short and its files never wait for a disk.

A thread costs two wake-ups, and takes the interpreter away from the thread that serves requests: some 0.1 ms. A flush
makes four such trips one after the other, which take longer than the work itself if the files are in memory.
"""

from collections.abc import Callable
from typing import TypeVar, TypeVarTuple

import trio
from pyroaring import BitMap64

MOST_CHUNKS_HERE = 64  # about half a millisecond of work
MOST_IN_ONE_RUN = 512  # the same, if they are one run

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


async def offload(function: Callable[[*Ts], T], *arguments: *Ts, here: bool) -> T:
    """Call a blocking function: in a thread or, with `here`, inline. Raises what it raises."""
    if here:
        return function(*arguments)
    return await trio.to_thread.run_sync(function, *arguments)


def is_short(chunks: BitMap64) -> bool:
    """Whether work on these chunks, at least one, is short enough to be done inline."""
    count = len(chunks)
    return count <= MOST_CHUNKS_HERE or (count <= MOST_IN_ONE_RUN and chunks.max() - chunks.min() < count)
