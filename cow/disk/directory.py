"""A directory of the store: paths are resolved against its descriptor, and never through symbolic links."""

import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from typing import Self

from cow.disk.file import File
from cow.disk.io import SYSTEM, Io
from cow.errors import RefusedError

_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Directory:
    """An open directory of the store. Names are single components; symbolic links are never followed."""

    def __init__(self, io: Io, fd: int, label: str) -> None:
        self.fd = fd
        self.label = label
        self.is_in_memory = io.is_in_memory(fd)  #: nothing in it ever waits for a disk
        self._io = io
        self._made: list[str] = []  #: the directories that were created for it, outermost first

    @classmethod
    def open_path(cls, path: str, io: Io = SYSTEM, *, create: bool = False) -> Self:
        """Open the directory at `path`, whose last component may not be a symbolic link.

        With `create` a missing one is created, mode 0700, with its missing parents.
        """
        try:
            made = io.make_directories(path, 0o700) if create else []
            directory = cls(io, io.open(path, _FLAGS), path)
        except (NotADirectoryError, FileExistsError) as error:
            raise RefusedError(f"{path} is not a directory, or a symbolic link: name the directory itself") from error
        directory._made = made
        return directory

    def unmake(self) -> None:
        """Remove the directories that `open_path` created, as far as they are empty."""
        with suppress(OSError):
            for path in reversed(self._made):
                self._io.rmdir(path)

    @property
    def io(self) -> Io:
        """The system calls through which this directory is used."""
        return self._io

    def check_ours(self) -> None:
        """Raise RefusedError when somebody else owns the directory or could change it."""
        _check_ours(self._io.fstat(self.fd), self.label)

    def check_ours_below(self) -> None:
        """Raise RefusedError when others own or could change something below, or a file there has other hard links.

        This is for the opening, where a refusal costs nothing. Files opened later are checked for their type alone: a
        user who makes hard links to a store in use, or opens it to others, shall not lose snapshots by it. # I8
        """
        for path, status in self.entries_below():
            label = f"{self.label}/{path}"
            if stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode):
                _check_ours(status, label)
            if stat.S_ISREG(status.st_mode) and status.st_nlink > 1:
                raise RefusedError(
                    f"{label} has another name (a hard link), and what is behind that would change with it: remove "
                    f"that name, and copy a store with cp -a, while it is not mounted"
                )

    def entries_below(self) -> Iterator[tuple[str, os.stat_result]]:
        """Everything below: its path from here, and its status (lstat(2))."""
        return self._io.entries_below(self.fd)

    @property
    def is_at_its_path(self) -> bool:
        """Whether the directory is still where it was opened."""
        return self._io.is_at(self.fd, self.label)

    @property
    def is_removed(self) -> bool:
        """Whether it has no name any more."""
        return self._io.is_removed(self.fd)

    @property
    def is_read_only(self) -> bool:
        """Whether its file system is mounted read-only."""
        return bool(self._io.fstatvfs(self.fd).f_flag & os.ST_RDONLY)

    def identity(self, name: str) -> tuple[int, int] | None:
        """Device and inode number of the entry of that name, None when there is none."""
        return self._io.identity(self.fd, name)

    @property
    def own_identity(self) -> tuple[int, int] | None:
        """The same for the directory itself."""
        return self._io.identity(self.fd)

    def close_to_others(self) -> None:
        """Make the directory 0700."""
        self._io.fchmod(self.fd, 0o700)

    def open(self, name: str, *, create: bool = False) -> File:
        """Open a regular file for reading and writing.

        With `create` a missing one is created, mode 0600; the new entry is durable after `sync` of this directory.
        Raises FileNotFoundError, or RefusedError when the entry is not a regular file.
        """
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | (os.O_CREAT if create else 0)
        label = f"{self.label}/{name}"
        try:
            fd = self._io.open(name, flags, 0o600, dir_fd=self.fd)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
                raise RefusedError(f"{label} is not a regular file; the store was tampered with") from error
            raise
        if not stat.S_ISREG(self._io.fstat(fd).st_mode):
            self._io.close(fd)
            raise RefusedError(f"{label} is not a regular file; the store was tampered with")
        return File(self._io, fd, label)

    def subdirectory(self, name: str, *, create: bool = False) -> "Directory":
        """Open a subdirectory; with `create` a missing one is created, mode 0700, and its entry is durable on return.

        Raises FileNotFoundError, or RefusedError when the entry is not a directory.
        """
        if create:
            self._make_directory(name)
        label = f"{self.label}/{name}"
        try:
            return type(self)(self._io, self._io.open(name, _FLAGS, dir_fd=self.fd), label)
        except NotADirectoryError as error:
            raise RefusedError(f"{label} is not a directory; the store was tampered with") from error

    def _make_directory(self, name: str) -> None:
        try:
            self._io.mkdir(name, 0o700, dir_fd=self.fd)
        except FileExistsError:
            self.sync()  # the entry may be from an attempt whose sync failed
            return
        try:
            self.sync()
        except OSError:
            with suppress(OSError):
                self.rmdir(name)  # so that the next attempt makes, and syncs, a new entry
            raise

    def names(self) -> list[str]:
        """The names in the directory, sorted."""
        return sorted(self._io.listdir(self.fd))

    def rename(self, old: str, new: str) -> None:
        """Replace `new` by `old`, atomically. Durable after `sync`."""
        self._io.rename(old, new, src_dir_fd=self.fd, dst_dir_fd=self.fd)

    def unlink(self, name: str) -> None:
        """Remove a file. Durable after `sync`."""
        self._io.unlink(name, dir_fd=self.fd)

    def rmdir(self, name: str) -> None:
        """Remove an empty directory. Durable after `sync`."""
        self._io.rmdir(name, dir_fd=self.fd)

    def sync(self) -> None:
        """Make creations, renames and removals in this directory durable."""
        self._io.fsync(self.fd)

    def free_bytes(self) -> int:
        """The bytes that the file system still has for us."""
        stats = self._io.fstatvfs(self.fd)
        return stats.f_bavail * stats.f_frsize

    def filesystem_bytes(self) -> int:
        """The size of the file system, in bytes."""
        stats = self._io.fstatvfs(self.fd)
        return stats.f_blocks * stats.f_frsize

    def free_inodes(self) -> int | None:
        """How many inodes the file system still has for us; None if it does not count them, like btrfs."""
        stats = self._io.fstatvfs(self.fd)
        return stats.f_favail if stats.f_files else None

    def allocated(self) -> tuple[int, int]:
        """The bytes and the inodes that everything below takes on the file system."""
        return self._io.allocated(self.fd)

    def allocated_bytes(self) -> int:
        """The bytes that everything below takes on the file system."""
        return self.allocated()[0]

    def allocated_here(self) -> int:
        """The bytes that its entries take on the file system, without what is below them."""
        return self._io.allocated_here(self.fd)

    def lock(self, name: str) -> File:
        """Take the lock file `name` for this process until it is closed. Raises BlockingIOError when it is taken."""
        file = self.open(name, create=True)
        try:
            self._io.flock(file.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise
        return file

    def close(self) -> None:
        """Close the descriptor."""
        self._io.close(self.fd)


def _check_ours(status: os.stat_result, label: str) -> None:
    if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise RefusedError(f"{label} can be written by others: see who did, then chown it to yourself and chmod go= it")
