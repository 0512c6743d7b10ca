"""The only raw I/O of the engine: files and directories of the store, and the origin devices.

Every durable effect goes through a `File` or a `Directory`, so a test can stand in for both. What a call makes
durable is said at each method; nothing else is durable. Paths are resolved against directory descriptors and
never through symbolic links. Calls block: callers decide on which thread they run.
"""

import ctypes
import errno
import fcntl
import os
import stat
import struct
from collections.abc import Callable
from typing import Self

from cow.errors import RefusedError, SyncError

_BLKGETSIZE64 = 0x80081272
_BLKSSZGET = 0x1268
_FALLOC_KEEP_SIZE = 0x01
_FALLOC_PUNCH_HOLE = 0x02
_MEMORY_FILESYSTEMS = {0x01021994, 0x858458F6}  # tmpfs, ramfs: statfs(2)

_libc = ctypes.CDLL(None, use_errno=True)


def _fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    if _libc.fallocate(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _filesystem_type(fd: int) -> int:
    buffer = ctypes.create_string_buffer(256)
    if _libc.fstatfs(fd, buffer) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(struct.unpack_from("l", buffer)[0])


class File:
    """An open file or block device. Safe to use from several threads.

    `label` names it in errors.
    """

    def __init__(self, fd: int, label: str) -> None:
        self.fd = fd
        self.label = label
        self._sync_failure: OSError | None = None
        # A file in memory never waits for a disk, and such file systems refuse RWF_NOWAIT.
        in_memory = _filesystem_type(fd) in _MEMORY_FILESYSTEMS and not stat.S_ISBLK(os.fstat(fd).st_mode)
        self._read_now: Callable[[int, int], bytes] = self.pread if in_memory else self._pread_cached
        self._in_memory = in_memory
        self._can_write_nowait = True

    def pread(self, length: int, offset: int) -> bytes:
        """Read `length` bytes; fewer only at the end of the file."""
        data = os.pread(self.fd, length, offset)
        if len(data) == length or not data:
            return data
        pieces = [data]
        got = len(data)
        while got < length:
            data = os.pread(self.fd, length - got, offset + got)
            if not data:
                break
            pieces.append(data)
            got += len(data)
        return b"".join(pieces)

    def pread_nowait(self, length: int, offset: int) -> bytes:
        """Read without waiting for a disk; raises BlockingIOError where that cannot be done in full."""
        return self._read_now(length, offset)

    def _pread_cached(self, length: int, offset: int) -> bytes:
        buffer = bytearray(length)
        try:
            got = os.preadv(self.fd, [buffer], offset, os.RWF_NOWAIT)
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:
                raise BlockingIOError(errno.EAGAIN, "no RWF_NOWAIT on this file") from error
            raise
        if got != length:
            raise BlockingIOError(errno.EAGAIN, "only partly cached")
        return bytes(buffer)

    def pwrite(self, data: bytes | memoryview, offset: int) -> None:
        """Write all of `data`. Durable only after `sync`."""
        written = os.pwrite(self.fd, data, offset)
        if written == len(data):
            return
        view = memoryview(data)
        while written < len(view):
            more = os.pwrite(self.fd, view[written:], offset + written)
            if more == 0:
                raise OSError(errno.EIO, f"a write to {self.label} at offset {offset + written} made no progress")
            written += more

    def pwrite_nowait(self, data: bytes, offset: int) -> bool:
        """Write without waiting for a disk; False when that could not be done in full, and `pwrite` has to."""
        if self._in_memory:
            self.pwrite(data, offset)
            return True
        if not self._can_write_nowait:
            return False
        try:
            return os.pwritev(self.fd, [data], offset, os.RWF_NOWAIT) == len(data)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:
                self._can_write_nowait = False
                return False
            raise

    def sync(self) -> None:
        """Make all earlier writes durable.

        Raises OSError when the kernel says so, and SyncError ever after: the kernel reports a lost write once and
        then marks the pages clean (fsyncgate), so success on a retry would be a lie. # I3
        """
        if self._sync_failure is not None:
            raise SyncError(
                f"an earlier sync of {self.label} failed ({self._sync_failure.strerror}), and what it covered may be "
                f"lost: check the device, then unmount and mount again"
            )
        try:
            os.fdatasync(self.fd)
        except OSError as error:
            self._sync_failure = error
            raise

    def allocate(self, length: int) -> None:
        """Reserve and zero-fill the first `length` bytes, so that writes into them find space."""
        _fallocate(self.fd, 0, 0, length)

    def truncate(self, length: int) -> None:
        """Set the file's size. Durable after `sync`."""
        os.ftruncate(self.fd, length)

    def punch(self, offset: int, length: int) -> None:
        """Give the extent's space back; it reads as zeroes. Not durable by itself."""
        _fallocate(self.fd, _FALLOC_PUNCH_HOLE | _FALLOC_KEEP_SIZE, offset, length)

    @property
    def size_bytes(self) -> int:
        """The file's present size."""
        return os.fstat(self.fd).st_size

    @property
    def allocated_bytes(self) -> int:
        """What the file takes on its file system."""
        return os.fstat(self.fd).st_blocks * 512

    def close(self) -> None:
        """Close the descriptor. Nothing is synced by it."""
        os.close(self.fd)


class Directory:
    """An open directory of the store. Names are single components; symbolic links are never followed."""

    def __init__(self, fd: int, label: str) -> None:
        self.fd = fd
        self.label = label

    @classmethod
    def open_path(cls, path: str) -> Self:
        """Open the directory at `path`, whose last component may not be a symbolic link."""
        return cls(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC), path)

    def open(self, name: str, *, create: bool = False) -> File:
        """Open a regular file for reading and writing.

        With `create` a missing one is made, 0600; the new entry is durable after `sync` of this directory.
        Raises FileNotFoundError, or RefusedError when something else than a regular file stands there.
        """
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | (os.O_CREAT if create else 0)
        label = f"{self.label}/{name}"
        try:
            fd = os.open(name, flags, 0o600, dir_fd=self.fd)
        except (IsADirectoryError, OSError) as error:
            if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
                raise RefusedError(f"{label} is not a regular file; the store was tampered with") from error
            raise
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise RefusedError(f"{label} is not a regular file; the store was tampered with")
        return File(fd, label)

    def subdirectory(self, name: str, *, create: bool = False) -> "Directory":
        """Open a directory below; with `create` a missing one is made, 0700, and its entry is durable on return."""
        if create:
            try:
                os.mkdir(name, 0o700, dir_fd=self.fd)
            except FileExistsError:
                pass
            else:
                self.sync()
        fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self.fd)
        return type(self)(fd, f"{self.label}/{name}")

    def names(self) -> list[str]:
        """The names in the directory, sorted."""
        return sorted(os.listdir(self.fd))

    def rename(self, old: str, new: str) -> None:
        """Replace `new` by `old`, atomically. Durable after `sync`."""
        os.rename(old, new, src_dir_fd=self.fd, dst_dir_fd=self.fd)

    def unlink(self, name: str) -> None:
        """Remove a file. Durable after `sync`."""
        os.unlink(name, dir_fd=self.fd)

    def rmdir(self, name: str) -> None:
        """Remove an empty directory. Durable after `sync`."""
        os.rmdir(name, dir_fd=self.fd)

    def sync(self) -> None:
        """Make creations, renames and removals in this directory durable."""
        os.fsync(self.fd)

    def free_bytes(self) -> int:
        """Space that the file system still has for us."""
        stats = os.fstatvfs(self.fd)
        return stats.f_bavail * stats.f_frsize

    def allocated_bytes(self) -> int:
        """What all files below take on the file system."""
        total = 0
        for _, directories, files, fd in os.fwalk(".", dir_fd=self.fd, follow_symlinks=False):
            for name in [*directories, *files]:
                try:
                    total += os.stat(name, dir_fd=fd, follow_symlinks=False).st_blocks * 512
                except FileNotFoundError:
                    continue  # removed while we looked
        return total

    def lock(self, name: str) -> File:
        """Take the lock file `name` for this process until it is closed. Raises BlockingIOError when it is taken."""
        file = self.open(name, create=True)
        try:
            fcntl.flock(file.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise
        return file

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self.fd)


class OriginDevice(File):
    """A source: a block device, held O_EXCL, or a regular file, held by flock(2). # I7

    `size_bytes` is fixed at opening; `logical_block_bytes` is 512 or 4096 (512 for a regular file).
    """

    def __init__(self, fd: int, label: str, size_bytes: int, logical_block_bytes: int) -> None:
        super().__init__(fd, label)
        self._size_bytes = size_bytes
        self.logical_block_bytes = logical_block_bytes

    @property
    def size_bytes(self) -> int:
        """The device's size when it was opened."""
        return self._size_bytes

    @classmethod
    def open_path(cls, path: str, *, read_only: bool = False) -> Self:
        """Open and own the source at `path`.

        Raises RefusedError when it is in use, empty, or neither a block device nor a regular file; OSError when it
        cannot be opened at all.
        """
        flags = (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC
        kind = os.stat(path).st_mode
        if not (stat.S_ISBLK(kind) or stat.S_ISREG(kind)):
            raise RefusedError(f"{path} is neither a block device nor a regular file: name a disk or a disk image")
        is_block = stat.S_ISBLK(kind)
        try:
            fd = os.open(path, flags | (os.O_EXCL if is_block else 0))
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            raise RefusedError(
                f"{path} is in use: it is mounted, part of a RAID or LVM set, or served by another hcpfs; "
                f"unmount or stop that first"
            ) from error
        try:
            if is_block:
                size_bytes = struct.unpack("Q", fcntl.ioctl(fd, _BLKGETSIZE64, bytes(8)))[0]
                logical_block_bytes = struct.unpack("i", fcntl.ioctl(fd, _BLKSSZGET, bytes(4)))[0]
            else:
                size_bytes, logical_block_bytes = os.fstat(fd).st_size, 512
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(fd)
            raise RefusedError(
                f"{path} is locked by another program, perhaps another hcpfs: stop that first"
            ) from error
        if size_bytes == 0:
            os.close(fd)
            raise RefusedError(f"{path} is empty (0 bytes): there is nothing to take a snapshot of")
        return cls(fd, path, size_bytes, logical_block_bytes)
