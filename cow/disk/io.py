"""The system calls of the engine, each a method of one `Io` object, which tests replace by a simulated disk.

Every call on the files of a store and on the devices, and every connection to the catalog's database, is made here; the
simulated disk keeps what a power cut would leave. Calls block: callers decide on which thread they run.
"""

import ctypes
import errno
import fcntl
import mmap
import os
import sqlite3
import stat
import struct
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

from cow.disk import trial, unwritable
from cow.disk.ring import Reads, Ring
from cow.disk.witness import witness_of
from cow.errors import RefusedError

MOST_PARTS = 1024  #: of one pwritev(2): IOV_MAX, limits.h(0p)
FULL = {errno.ENOSPC, errno.EDQUOT}  #: the errnos of "no room"
_BLKGETSIZE64 = 0x80081272
_BLKSSZGET = 0x1268
FALLOC_KEEP_SIZE = 0x01
FALLOC_PUNCH_HOLE = 0x02
_NO_DIRECT = {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOENT, errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE}
_MEMORY_FILESYSTEMS = {0x01021994, 0x858458F6}  # tmpfs, ramfs: statfs(2)

_libc = ctypes.CDLL(None, use_errno=True)


class Geometry(NamedTuple):
    """A source's size and logical block size, which is 512 or 4096 bytes (512 for a regular file)."""

    size_bytes: int
    logical_block_bytes: int
    is_block: bool


class Io:
    """The system calls, as they are. Descriptors are ints; errors are OSError."""

    open = staticmethod(os.open)
    close = staticmethod(os.close)
    pread = staticmethod(os.pread)
    preadv = staticmethod(os.preadv)
    pwrite = staticmethod(os.pwrite)
    pwritev = staticmethod(os.pwritev)
    fdatasync = staticmethod(os.fdatasync)
    fsync = staticmethod(os.fsync)
    ftruncate = staticmethod(os.ftruncate)
    fstat = staticmethod(os.fstat)
    fchmod = staticmethod(os.fchmod)
    fstatvfs = staticmethod(os.fstatvfs)
    mkdir = staticmethod(os.mkdir)
    rename = staticmethod(os.rename)
    unlink = staticmethod(os.unlink)
    rmdir = staticmethod(os.rmdir)
    posix_fadvise = staticmethod(os.posix_fadvise)
    flock = staticmethod(fcntl.flock)
    witness = staticmethod(witness_of)
    try_out = staticmethod(trial.try_out)
    file_system = staticmethod(trial.file_system)
    check_writable = staticmethod(unwritable.check_writable)

    def make_directories(self, path: str, mode: int) -> list[str]:
        """Create a directory and its missing parents. Returns those created, outermost first."""
        missing = []
        while path and not os.path.lexists(path):
            missing.append(path)
            path = os.path.dirname(path)
        made: list[str] = []
        try:
            for one in reversed(missing):
                with suppress(FileExistsError):  # another process just created it
                    os.mkdir(one, mode)
                    made.append(one)
        except OSError:
            for one in reversed(made):
                os.rmdir(one)
            raise
        return made

    def listdir(self, fd: int) -> list[str]:
        """The names in a directory, in any order."""
        return os.listdir(fd)

    def reads(self) -> Reads | None:
        """Reads that are under way in no thread; None where the kernel grants none."""
        try:
            return Ring()
        except OSError:
            return None

    def connect(self, path: str) -> sqlite3.Connection:
        """Open the database at `path`, in autocommit mode, for any thread."""
        return sqlite3.connect(path, check_same_thread=False, isolation_level=None)

    def identity(self, fd: int, name: str = "") -> tuple[int, int] | None:
        """Device and inode number of what a descriptor has open, or of the entry `name` in it; None without one."""
        try:
            status = os.stat(name, dir_fd=fd, follow_symlinks=False) if name else os.fstat(fd)
        except FileNotFoundError:
            return None
        return status.st_dev, status.st_ino

    def is_removed(self, fd: int) -> bool:
        """Whether a file or directory has no name any more."""
        return os.fstat(fd).st_nlink == 0

    def is_at(self, fd: int, path: str) -> bool:
        """Whether `path` is what the descriptor has open, and not a symbolic link to it."""
        try:
            return os.path.samestat(os.fstat(fd), os.lstat(path))
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                raise
            return False

    def fallocate(self, fd: int, mode: int, offset: int, length: int) -> None:
        """Reserve space or punch a hole: the modes of <linux/falloc.h>."""
        if _libc.fallocate(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length)) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    def pread_direct(self, fd: int, length: int, offset: int) -> bytes:
        """Read bypassing the page cache, through a descriptor of its own; both numbers are multiples of 4096.

        Without O_DIRECT, cached pages of the extent are dropped first.
        """
        try:
            own = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        except OSError as error:
            if error.errno not in _NO_DIRECT:
                raise
        else:
            try:
                with mmap.mmap(-1, length) as buffer:  # is page-aligned
                    return buffer[: os.preadv(own, [buffer], offset)]
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
            finally:
                os.close(own)
        self.posix_fadvise(fd, offset, length, os.POSIX_FADV_DONTNEED)
        return self.pread(fd, length, offset)

    def flush_by_another(self, fd: int) -> None:
        """Flush the device through a descriptor of its own, so that an error of that flush is reported to no other."""
        own = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(own)
        finally:
            os.close(own)

    def pwrite_direct(self, fd: int, data: bytes | memoryview, offset: int) -> None:
        """Write all of `data` bypassing the page cache, as `pread_direct` reads; without O_DIRECT, into the cache."""
        try:
            own = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
        except OSError as error:
            if error.errno not in _NO_DIRECT:
                raise
            self.pwrite(fd, data, offset)
            return
        try:
            with mmap.mmap(-1, len(data)) as buffer:
                buffer[:] = bytes(data)
                if os.pwrite(own, buffer, offset) != len(data):
                    raise OSError(errno.EIO, "it was written in part")
        finally:
            os.close(own)

    def is_in_memory(self, fd: int) -> bool:
        """Whether the descriptor is of a file or a directory that never waits for a disk."""
        buffer = ctypes.create_string_buffer(256)
        if _libc.fstatfs(fd, buffer) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        kind = int(struct.unpack_from("l", buffer)[0])
        return kind in _MEMORY_FILESYSTEMS and not stat.S_ISBLK(os.fstat(fd).st_mode)

    def open_source(self, path: str, flags: int) -> int:
        """Open a block device, exclusively, or a regular file. Raises RefusedError for anything else."""
        kind = os.stat(path).st_mode
        if not (stat.S_ISBLK(kind) or stat.S_ISREG(kind)):
            raise RefusedError(f"{path} is neither a block device nor a regular file: name a disk or a disk image")
        return os.open(path, flags | (os.O_EXCL if stat.S_ISBLK(kind) else 0))

    def geometry(self, fd: int) -> Geometry:
        """The size and the logical block size of a source."""
        status = os.fstat(fd)
        if not stat.S_ISBLK(status.st_mode):
            return Geometry(status.st_size, 512, is_block=False)
        size_bytes = struct.unpack("Q", fcntl.ioctl(fd, _BLKGETSIZE64, bytes(8)))[0]
        logical_block_bytes = struct.unpack("i", fcntl.ioctl(fd, _BLKSSZGET, bytes(4)))[0]
        return Geometry(size_bytes, logical_block_bytes, is_block=True)

    def entries_below(self, fd: int) -> Iterator[tuple[str, os.stat_result]]:
        """Everything below a directory: its path from there, and its status (lstat(2))."""
        for above, directories, files, place in os.fwalk(".", dir_fd=fd, follow_symlinks=False):
            for name in [*directories, *files]:
                with suppress(FileNotFoundError):  # removed while we looked
                    status = os.stat(name, dir_fd=place, follow_symlinks=False)
                    yield os.path.normpath(os.path.join(above, name)), status

    def allocated(self, fd: int) -> tuple[int, int]:
        """The bytes and the inodes that everything below a directory takes on the file system."""
        blocks = [status.st_blocks for _, status in self.entries_below(fd)]
        return sum(blocks) * 512, len(blocks)

    def allocated_here(self, fd: int) -> int:
        """The bytes that the entries of a directory take on the file system, without what is below them."""
        total = 0
        for name in os.listdir(fd):
            with suppress(FileNotFoundError):  # removed while we looked
                total += os.stat(name, dir_fd=fd, follow_symlinks=False).st_blocks * 512
        return total


SYSTEM = Io()
