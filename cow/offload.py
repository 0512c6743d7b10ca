"""Where blocking work is done: in a thread, or right here when it is short and its files never wait for a disk.

A thread costs two wake-ups, and takes the interpreter away from whoever serves: some 0.1 ms. A flush makes four such
trips one after the other, which is more than the work itself where the files are in memory.
"""

from collections.abc import Callable
from typing import TypeVar, TypeVarTuple

import trio

MOST_CHUNKS_HERE = 64  # about half a millisecond of work

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


async def offload(function: Callable[[*Ts], T], *arguments: *Ts, here: bool) -> T:
    """Call a function that blocks: in a thread or, with `here`, right away. Raises what it raises."""
    if here:
        await trio.lowlevel.checkpoint_if_cancelled()
        return function(*arguments)
    return await trio.to_thread.run_sync(function, *arguments)
