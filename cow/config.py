"""The engine's settings: which devices it serves, and what happens to snapshots when their store is full.

A module of its own, so that a command line that uses these names need not load the engine.
"""

from enum import StrEnum
from typing import NamedTuple


class Source(NamedTuple):
    """What to take snapshots of: the image's name and the path of the device or file."""

    name: bytes
    path: str


class OnFull(StrEnum):
    """What happens when there is no room for the origin's old bytes."""

    DROP_OLDEST = "drop-oldest"  # the oldest snapshot that is not open is given up, then the next
    LOSE_CHUNKS = "lose-chunks"  # the chunks read EIO from then on, in the snapshots that need them
    BLOCK_WRITES = "block-writes"  # the writer gets ENOSPC
