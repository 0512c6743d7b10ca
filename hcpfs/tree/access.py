"""Who may use what the tree shows."""

import stat
from typing import NamedTuple


class Access(NamedTuple):
    """The owner of all files, and the permission bits of images, from which those of the others follow."""

    uid: int = 0
    gid: int = 0
    mode: int = 0o600

    @property
    def image_mode(self) -> int:
        """st_mode of an image."""
        return stat.S_IFREG | self.mode

    @property
    def text_mode(self) -> int:
        """st_mode of a file that can only be read: for those who may read the images."""
        return stat.S_IFREG | self.mode & 0o444

    @property
    def directory_mode(self) -> int:
        """st_mode of a directory: those who may read the images may list and search it."""
        readable = self.mode & 0o444
        return stat.S_IFDIR | 0o700 | readable | readable >> 2
