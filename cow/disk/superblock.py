"""What the superblock at its beginning calls a device: the best name of a disk, because it moves with the bytes.

The engine does not know how to read superblocks: the caller that opens a store passes a function for it.
"""

from collections.abc import Callable
from typing import NamedTuple


class Superblock(NamedTuple):
    """The kind, such as ext4, and the UUID; empty if there is none, or it is not known."""

    kind: str = ""
    uuid: str = ""

    def __str__(self) -> str:
        return f"{self.kind} with the UUID {self.uuid}" if self.uuid else "no UUID"


SuperblockOf = Callable[[int], Superblock]  #: reads the superblock of an open descriptor; blocks, does not raise


def no_superblock(fd: int) -> Superblock:
    """For callers that need no names."""
    return Superblock()
