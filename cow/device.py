"""The only raw I/O of the engine: files and directories of the store, and the origin devices.

Every system call on them, and every connection to the catalog's database, is a method of one `Io` object; tests stand
a simulated disk in for it, which keeps what a power cut would leave. `File`, `Directory` and `OriginDevice` give the
calls their meaning. What a call makes durable is said at each method; nothing else is durable. Paths are resolved
against directory descriptors and never through symbolic links. Calls block: callers decide on which thread they run.
"""

import ctypes
import errno
import fcntl
import mmap
import os
import resource
import sqlite3
import stat
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple, NoReturn, Self

from cow import trial, unwritable
from cow.errors import RefusedError, SyncError
from cow.limits import raise_limit
from cow.superblock import Superblock, SuperblockOf, no_superblock
from cow.witness import Witness, witness_of

MOST_PARTS = 1024  #: in one call: IOV_MAX, limits.h(0p)
FULL = {errno.ENOSPC, errno.EDQUOT}  #: the errnos of "no room"
_PAGE_BYTES = 4096  # what O_DIRECT takes everywhere
_BLKGETSIZE64 = 0x80081272
_BLKSSZGET = 0x1268
FALLOC_KEEP_SIZE = 0x01
FALLOC_PUNCH_HOLE = 0x02
_NO_DIRECT = {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOENT, errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE}
_MEMORY_FILESYSTEMS = {0x01021994, 0x858458F6}  # tmpfs, ramfs: statfs(2)
_DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

_libc = ctypes.CDLL(None, use_errno=True)


class Geometry(NamedTuple):
    """What a source is: its size, and 512 or 4096 bytes a logical block (512 for a regular file)."""

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
        """Make a directory and those above it that are missing. Returns those made, outermost first."""
        missing = []
        while path and not os.path.lexists(path):
            missing.append(path)
            path = os.path.dirname(path)
        made: list[str] = []
        try:
            for one in reversed(missing):
                with suppress(FileExistsError):  # by another just now
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

    def connect(self, path: str) -> sqlite3.Connection:
        """Open the database at `path`, in autocommit mode, for any thread."""
        return sqlite3.connect(path, check_same_thread=False, isolation_level=None)

    def identity(self, fd: int, name: str = "") -> tuple[int, int] | None:
        """Which file a descriptor has open, or which one has that name in its directory: None when there is none."""
        try:
            status = os.stat(name, dir_fd=fd, follow_symlinks=False) if name else os.fstat(fd)
        except FileNotFoundError:
            return None
        return status.st_dev, status.st_ino

    def is_removed(self, fd: int) -> bool:
        """Whether a file or directory has no name any more."""
        return os.fstat(fd).st_nlink == 0

    def is_at(self, fd: int, path: str) -> bool:
        """Whether `path` is what the descriptor has open, and no symbolic link to it."""
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
        """Read past the page cache, through a descriptor of its own; both figures are multiples of 4096.

        Where there is no O_DIRECT, what is cached of it is dropped before.
        """
        try:
            own = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        except OSError as error:
            if error.errno not in _NO_DIRECT:
                raise
        else:
            try:
                with mmap.mmap(-1, length) as buffer:  # which is aligned
                    return buffer[: os.preadv(own, [buffer], offset)]
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
            finally:
                os.close(own)
        self.posix_fadvise(fd, offset, length, os.POSIX_FADV_DONTNEED)
        return self.pread(fd, length, offset)

    def flush_by_another(self, fd: int) -> None:
        """Flush the device through a descriptor of its own, so that an error of that flush is told to no other."""
        own = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(own)
        finally:
            os.close(own)

    def pwrite_direct(self, fd: int, data: bytes | memoryview, offset: int) -> None:
        """Write all of it past the page cache, as `pread_direct` reads; where that cannot be had, into the cache."""
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
        """Whether it is a file or a directory that never waits for a disk."""
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
        """The size and the logical block of a source."""
        status = os.fstat(fd)
        if not stat.S_ISBLK(status.st_mode):
            return Geometry(status.st_size, 512, is_block=False)
        size_bytes = struct.unpack("Q", fcntl.ioctl(fd, _BLKGETSIZE64, bytes(8)))[0]
        logical_block_bytes = struct.unpack("i", fcntl.ioctl(fd, _BLKSSZGET, bytes(4)))[0]
        return Geometry(size_bytes, logical_block_bytes, is_block=True)

    def entries_below(self, fd: int) -> Iterator[tuple[str, os.stat_result]]:
        """All that is below a directory: its path from there, and what it is."""
        for above, directories, files, place in os.fwalk(".", dir_fd=fd, follow_symlinks=False):
            for name in [*directories, *files]:
                with suppress(FileNotFoundError):  # removed while we looked
                    status = os.stat(name, dir_fd=place, follow_symlinks=False)
                    yield os.path.normpath(os.path.join(above, name)), status

    def allocated(self, fd: int) -> tuple[int, int]:
        """What all that is below a directory takes on the file system: bytes, and inodes."""
        blocks = [status.st_blocks for _, status in self.entries_below(fd)]
        return sum(blocks) * 512, len(blocks)

    def allocated_here(self, fd: int) -> int:
        """What the entries of a directory take on the file system, without what is below them."""
        total = 0
        for name in os.listdir(fd):
            with suppress(FileNotFoundError):  # removed while we looked
                total += os.stat(name, dir_fd=fd, follow_symlinks=False).st_blocks * 512
        return total


SYSTEM = Io()


class File:
    """An open file or block device. Safe to use from several threads.

    `label` names it in errors.
    """

    def __init__(self, io: Io, fd: int, label: str) -> None:
        self.fd = fd
        self.label = label
        self._io = io
        self._sync_failure: OSError | None = None
        self._syncing = threading.Lock()  #: the kernel tells a lost write to one sync only: no two at once
        self.is_in_memory = io.is_in_memory(fd)  #: it never waits for a disk; such file systems refuse RWF_NOWAIT
        #: (length, offset): reads without waiting for a disk; raises BlockingIOError where that cannot be done in full
        self.pread_nowait: Callable[[int, int], bytes] = self._pread_memory if self.is_in_memory else self._pread_cached
        #: (into, offset): the same of `fill`
        self.fill_nowait: Callable[[memoryview, int], int] = self.fill if self.is_in_memory else self._fill_cached
        self._can_write_nowait = True

    def pread(self, length: int, offset: int) -> bytes:
        """Read `length` bytes; fewer only at the end of the file."""
        data = self._io.pread(self.fd, length, offset)
        if len(data) == length:
            return data
        while data and len(data) < length and (more := self._io.pread(self.fd, length - len(data), offset + len(data))):
            data += more
        self._check_end(offset + len(data), offset + length)
        return data

    def _check_end(self, end: int, wanted: int) -> None:
        """Called when there is nothing at `end`, and a read wanted what is before `wanted`."""

    def _pread_memory(self, length: int, offset: int) -> bytes:
        data = self._io.pread(self.fd, length, offset)
        return data if len(data) == length else self.pread(length, offset)

    def _pread_cached(self, length: int, offset: int) -> bytes:
        buffer = bytearray(length)
        self._fill_cached(memoryview(buffer), offset)
        return bytes(buffer)

    def fill(self, into: memoryview, offset: int) -> int:
        """Read as many bytes as `into` has, and return how many; fewer only at the end of the file."""
        got = self._io.preadv(self.fd, [into], offset)
        if got == len(into):
            return got
        while 0 < got < len(into) and (more := self._io.preadv(self.fd, [into[got:]], offset + got)):
            got += more
        self._check_end(offset + got, offset + len(into))
        return got

    def _fill_cached(self, into: memoryview, offset: int) -> int:
        try:
            got = self._io.preadv(self.fd, [into], offset, os.RWF_NOWAIT)
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:
                raise BlockingIOError(errno.EAGAIN, "no RWF_NOWAIT on this file") from error
            raise
        if got != len(into):
            raise BlockingIOError(errno.EAGAIN, "only partly cached")
        return got

    def pwrite(self, data: bytes | bytearray | memoryview, offset: int) -> None:
        """Write all of `data`. Durable only after `sync`."""
        try:
            written = self._io.pwrite(self.fd, data, offset)
        except OSError as error:
            _raise_file_limit(error)
            written = self._io.pwrite(self.fd, data, offset)
        if written == len(data):
            return
        view = memoryview(data)
        while written < len(view):
            more = self._io.pwrite(self.fd, view[written:], offset + written)
            if more == 0:
                raise OSError(errno.EIO, f"a write to {self.label} at offset {offset + written} made no progress")
            written += more

    def pwritev(self, parts: Sequence[bytes | memoryview], offset: int) -> None:
        """Write all of `parts`, at most `MOST_PARTS`, one after the other. Durable only after `sync`."""
        try:
            written = self._io.pwritev(self.fd, parts, offset)
        except OSError as error:
            _raise_file_limit(error)
            written = self._io.pwritev(self.fd, parts, offset)
        if written < sum(map(len, parts)):
            self.pwrite(b"".join(parts)[written:], offset + written)

    def pwrite_nowait(self, data: bytes | memoryview, offset: int) -> bool:
        """Write without waiting for a disk; False when that could not be done in full, and `pwrite` has to."""
        if self.is_in_memory:
            self.pwrite(data, offset)
            return True
        if not self._can_write_nowait:
            return False
        try:
            return self._io.pwritev(self.fd, [data], offset, os.RWF_NOWAIT) == len(data)
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
        with self._syncing:
            if self._sync_failure is not None:
                raise SyncError(
                    f"an earlier sync of {self.label} failed ({self._sync_failure.strerror}), and what it covered may "
                    f"be lost: check the device, then unmount and mount again"
                )
            try:
                self._io.fdatasync(self.fd)
            except OSError as error:
                self._sync_failure = error
                raise

    def forget_sync_failure(self) -> None:
        """Let syncs of later writes count again. What the failed one covered must have been given up, durably."""
        self._sync_failure = None

    def allocate(self, length: int) -> None:
        """Reserve and zero-fill the first `length` bytes, so that writes into them find space."""
        try:
            self._io.fallocate(self.fd, 0, 0, length)
        except OSError as error:
            _raise_file_limit(error)
            self._io.fallocate(self.fd, 0, 0, length)

    def truncate(self, length: int) -> None:
        """Set the file's size. Durable after `sync`."""
        self._io.ftruncate(self.fd, length)

    def punch(self, offset: int, length: int) -> None:
        """Give the extent's space back; it reads as zeroes. Not durable by itself."""
        self._io.fallocate(self.fd, FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE, offset, length)

    @property
    def is_removed(self) -> bool:
        """Whether it has no name any more."""
        return self._io.is_removed(self.fd)

    @property
    def size_bytes(self) -> int:
        """The file's present size."""
        return self._io.fstat(self.fd).st_size

    @property
    def allocated_bytes(self) -> int:
        """What the file takes on its file system."""
        return self._io.fstat(self.fd).st_blocks * 512

    def close(self) -> None:
        """Close the descriptor. Nothing is synced by it."""
        self._io.close(self.fd)


def _raise_file_limit(error: OSError) -> None:
    """Raise the error, unless it is of a limit that somebody has lowered since and that can be raised again."""
    if error.errno != errno.EFBIG or not raise_limit(resource.RLIMIT_FSIZE):
        raise error


class Directory:
    """An open directory of the store. Names are single components; symbolic links are never followed."""

    def __init__(self, io: Io, fd: int, label: str) -> None:
        self.fd = fd
        self.label = label
        self.is_in_memory = io.is_in_memory(fd)  #: nothing in it ever waits for a disk
        self._io = io
        self._made: list[str] = []  #: what was made for it, outermost first

    @classmethod
    def open_path(cls, path: str, io: Io = SYSTEM, *, create: bool = False) -> Self:
        """Open the directory at `path`, whose last component may not be a symbolic link.

        With `create` it is made, 0700, with those above it, when missing.
        """
        try:
            made = io.make_directories(path, 0o700) if create else []
            directory = cls(io, io.open(path, _DIRECTORY_FLAGS), path)
        except (NotADirectoryError, FileExistsError) as error:
            raise RefusedError(f"{path} is not a directory, or a symbolic link: name the directory itself") from error
        directory._made = made
        return directory

    def unmake(self) -> None:
        """Remove what `open_path` made, as far as it is empty."""
        with suppress(OSError):
            for path in reversed(self._made):
                self._io.rmdir(path)

    @property
    def io(self) -> Io:
        """The system calls that this directory is used through."""
        return self._io

    def check_ours(self) -> None:
        """Raise RefusedError when somebody else owns the directory or could change it."""
        _check_ours(self._io.fstat(self.fd), self.label)

    def check_ours_below(self) -> None:
        """Raise RefusedError when others own or could change what is below, or files there are also files elsewhere.

        This is for the opening, where a refusal costs nothing. What is opened later is checked for its type alone: who
        makes hard links of a store in use, or opens it to others, shall not lose snapshots by it. # I8
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
        """All that is below: its path from here, and what it is."""
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
        """Whether its file system takes no writes."""
        return bool(self._io.fstatvfs(self.fd).f_flag & os.ST_RDONLY)

    def identity(self, name: str) -> tuple[int, int] | None:
        """Device and inode of what has that name here, None when nothing has."""
        return self._io.identity(self.fd, name)

    @property
    def own_identity(self) -> tuple[int, int] | None:
        """The same of the directory itself."""
        return self._io.identity(self.fd)

    def close_to_others(self) -> None:
        """Make the directory 0700."""
        self._io.fchmod(self.fd, 0o700)

    def open(self, name: str, *, create: bool = False) -> File:
        """Open a regular file for reading and writing.

        With `create` a missing one is made, 0600; the new entry is durable after `sync` of this directory.
        Raises FileNotFoundError, or RefusedError when something else than a regular file stands there.
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
        """Open a directory below; with `create` a missing one is made, 0700, and its entry is durable on return.

        Raises FileNotFoundError, or RefusedError when something else than a directory stands there.
        """
        if create:
            self._make_directory(name)
        label = f"{self.label}/{name}"
        try:
            return type(self)(self._io, self._io.open(name, _DIRECTORY_FLAGS, dir_fd=self.fd), label)
        except NotADirectoryError as error:
            raise RefusedError(f"{label} is not a directory; the store was tampered with") from error

    def _make_directory(self, name: str) -> None:
        try:
            self._io.mkdir(name, 0o700, dir_fd=self.fd)
        except FileExistsError:
            self.sync()  # it may be from a try whose sync failed
            return
        try:
            self.sync()
        except OSError:
            with suppress(OSError):
                self.rmdir(name)  # so that the next try makes, and syncs, a new entry
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
        """Space that the file system still has for us."""
        stats = self._io.fstatvfs(self.fd)
        return stats.f_bavail * stats.f_frsize

    def filesystem_bytes(self) -> int:
        """The size of the file system."""
        stats = self._io.fstatvfs(self.fd)
        return stats.f_blocks * stats.f_frsize

    def free_inodes(self) -> int | None:
        """How many files the file system can still make for us; None where it does not count them, as btrfs."""
        stats = self._io.fstatvfs(self.fd)
        return stats.f_favail if stats.f_files else None

    def allocated(self) -> tuple[int, int]:
        """What all that is below takes on the file system: bytes, and inodes."""
        return self._io.allocated(self.fd)

    def allocated_bytes(self) -> int:
        """The bytes of that."""
        return self.allocated()[0]

    def allocated_here(self) -> int:
        """What its entries take on the file system, without what is below them."""
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


class PastCache(File):
    """A source, written to past the page cache where whole chunks are: into that a write to a disk never fails."""

    def pwrite(self, data: bytes | bytearray | memoryview, offset: int) -> None:
        """Write all of `data`."""
        if offset % _PAGE_BYTES or len(data) % _PAGE_BYTES:
            super().pwrite(data, offset)
        else:
            self._io.pwrite_direct(self.fd, bytes(data), offset)

    def pwritev(self, parts: Sequence[bytes | memoryview], offset: int) -> None:
        """Write all of `parts`, one after the other."""
        self.pwrite(b"".join(parts), offset)


def _check_ours(status: os.stat_result, label: str) -> None:
    if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise RefusedError(f"{label} can be written by others: see who did, then chown it to yourself and chmod go= it")


class SourceError(OSError):
    """What a source answered, in a sentence that names it."""


class ShrunkError(SourceError):
    """A file that is a source was cut while it was served."""


class OriginDevice(File):
    """A source: a block device, held O_EXCL, or a regular file, held by flock(2). # I7

    `size_bytes` is fixed at opening; `logical_block_bytes` is 512 or 4096 (512 for a regular file).
    """

    def __init__(
        self, io: Io, fd: int, label: str, geometry: Geometry, superblock_of: SuperblockOf = no_superblock
    ) -> None:
        super().__init__(io, fd, label)
        self._size_bytes, self.logical_block_bytes, self.is_block = geometry
        self._superblock_of = superblock_of
        self.intact_bytes = geometry.size_bytes  #: what is beyond is not what it was: the source was cut there

    @property
    def size_bytes(self) -> int:
        """The device's size when it was opened."""
        return self._size_bytes

    def _check_end(self, end: int, wanted: int) -> None:
        """Raise ShrunkError when the device ends where it did not when it was opened: that is not zeroes. # I4"""
        if end < min(wanted, self._size_bytes):
            if self.is_block:  # it refuses writes there, and may be back: a disk whose connection was lost
                raise ShrunkError(errno.EIO, f"{self.label} has no byte at offset {end} any more: it shrank")
            self._note_cut(end)
            raise self.shrunk()

    def _note_cut(self, end: int) -> None:
        """From now on every read has to pass who looks at `intact_bytes`."""
        self.intact_bytes = min(self.intact_bytes, end)
        self.pread_nowait = self.fill_nowait = self._look_first

    def _look_first(self, *_: object) -> NoReturn:
        raise BlockingIOError(errno.EAGAIN, "the source was cut")

    def shrunk(self) -> "ShrunkError":
        """The error for what is beyond `intact_bytes`."""
        return ShrunkError(
            errno.EIO,
            f"{self.label} was cut from {self._size_bytes} to {self.intact_bytes} bytes, or less, while it was served: "
            f"what is beyond cannot be read, nothing is written to it any more, and nothing of that is taken for old "
            f"bytes. Unmount, put back what it had there (not with truncate: that gives zeroes), and mount again",
        )

    def check_size(self) -> None:
        """Raise ShrunkError when the file was cut, now or before. # I4

        A write beyond its end would give it its size back, with a hole that reads like zeroes that were always there.
        Block devices refuse such writes themselves.
        """
        if not self.is_block and (size_bytes := self._io.fstat(self.fd).st_size) < self.intact_bytes:
            self._note_cut(size_bytes)
        if self.intact_bytes < self._size_bytes:
            raise self.shrunk()

    def flush_by_another(self) -> None:
        """Have the device flush its cache, for no other purpose than to see whether it does. Raises OSError."""
        self._io.flush_by_another(self.fd)

    def pread_past_cache(self, length: int, offset: int) -> bytes:
        """Read from the device itself; fewer bytes only at its end. Both figures are multiples of 4096."""
        return self._io.pread_direct(self.fd, length, offset)

    def past_cache(self) -> "PastCache":
        """The same device for writes whose errors are to be told at once."""
        return PastCache(self._io, self.fd, self.label)

    @property
    def modified_ns(self) -> int:
        """When the file system last saw a write to it."""
        return self._io.fstat(self.fd).st_mtime_ns

    def witness(self) -> Witness | None:
        """What the kernel counts of the writes to it; None where it does not. Blocks."""
        return self._io.witness(self.fd)

    def superblock(self) -> Superblock:
        """What its superblock is called. Blocks."""
        return self._superblock_of(self.fd)

    @classmethod
    def open_path(
        cls,
        path: str,
        io: Io = SYSTEM,
        *,
        read_only: bool = False,
        superblock_of: SuperblockOf = no_superblock,
    ) -> Self:
        """Open and own the source at `path`.

        Raises RefusedError when it is in use, empty, or neither a block device nor a regular file; OSError when it
        cannot be opened at all.
        """
        try:
            fd = io.open_source(path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
        except OSError as error:
            if error.errno in unwritable.REFUSALS and not read_only:
                raise unwritable.refusal(path, error) from error
            if error.errno != errno.EBUSY:
                raise
            raise RefusedError(
                f"{path} is in use: it is mounted, part of a RAID or LVM set, or served by another hcpfs; "
                f"unmount or stop that first"
            ) from error
        try:
            geometry = io.geometry(fd)
            if not geometry.is_block:  # O_EXCL holds those
                io.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            io.close(fd)
            raise RefusedError(
                f"{path} is locked by another program, perhaps another hcpfs: stop that first"
            ) from error
        if geometry.size_bytes == 0:
            io.close(fd)
            raise RefusedError(f"{path} is empty (0 bytes): there is nothing to take a snapshot of")
        if not read_only:
            try:
                io.check_writable(fd)
            except OSError as error:
                io.close(fd)
                if error.errno not in unwritable.REFUSALS:
                    raise
                raise unwritable.refusal(path, error) from error
        # After a failed sync, by us or by others before us, the cache may show what the device does not have.
        io.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        return cls(io, fd, path, geometry, superblock_of)
