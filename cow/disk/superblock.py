"""What a device is called by the superblock at its beginning: the best name of a disk, as it moves with the bytes.

The engine does not read superblocks: whoever opens a store says how they are read.
"""

from collections.abc import Callable
from typing import NamedTuple


class Superblock(NamedTuple):
    """The kind, such as ext4, and the UUID; empty: none, or not known."""

    kind: str = ""
    uuid: str = ""

    def __str__(self) -> str:
        return f"{self.kind} with the UUID {self.uuid}" if self.uuid else "no UUID"


SuperblockOf = Callable[[int], Superblock]  #: reads that of an open descriptor; blocks, and does not raise


def no_superblock(fd: int) -> Superblock:
    """For those who need no names."""
    return Superblock()
