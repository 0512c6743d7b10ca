"""The ledger of open handles of the live images.

The kernel sends RELEASE for an open file when its last descriptor, mapping and loop device are gone, in any namespace.
So nobody can write to an image but through a handle that was opened for writing and not released. What is found by
other means must account for all of these.
"""

import os
from collections import Counter
from collections.abc import Iterable

from cow.images.origin import Origin

FIRST_INODE = 16


class LiveImages:
    """The live images of one mount, and the open handles that can write to them. Trio thread only."""

    def __init__(self, origins: Iterable[Origin]) -> None:
        self._origins = origins
        self.inodes = {
            f"live/{os.fsdecode(origin.name)}": FIRST_INODE + place for place, origin in enumerate(origins)
        }  #: by the path below the mount point
        self._paths = {inode: path for path, inode in self.inodes.items()}
        self._writable: dict[int, str] = {}
        self.openings = 0  #: how often one was opened for writing

    def opened(self, number: int, inode: int, flags: int) -> None:
        """A file of the mount was opened as handle `number`; the flags are those of open(2)."""
        if inode in self._paths and flags & os.O_ACCMODE != os.O_RDONLY:
            self._writable[number] = self._paths[inode]
            self.openings += 1

    def closed(self, number: int) -> None:
        """A handle was released."""
        self._writable.pop(number, None)

    @property
    def writable(self) -> dict[str, int]:
        """How many handles can write to each image, by path."""
        return {path: 0 for path in self.inodes} | Counter(self._writable.values())

    @property
    def written_ns(self) -> list[int]:
        """When each was last written to."""
        return [origin.modified_ns for origin in self._origins]
