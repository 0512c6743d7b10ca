"""A source: the block device or the file that snapshots are taken of, locked for as long as it is served. # I7"""

import errno
import fcntl
import os
from collections.abc import Sequence
from typing import NoReturn, Self

from cow.disk import unwritable
from cow.disk.file import File
from cow.disk.io import SYSTEM, Geometry, Io
from cow.disk.superblock import Superblock, SuperblockOf, no_superblock
from cow.disk.witness import Witness
from cow.errors import RefusedError

_PAGE_BYTES = 4096  # an alignment that O_DIRECT accepts everywhere


class PastCache(File):
    """A source whose writes of whole chunks bypass the page cache, where a write to a failing disk never fails."""

    def pwrite(self, data: bytes | bytearray | memoryview, offset: int) -> None:
        """Write all of `data`."""
        if offset % _PAGE_BYTES or len(data) % _PAGE_BYTES:
            super().pwrite(data, offset)
        else:
            self._io.pwrite_direct(self.fd, bytes(data), offset)

    def pwritev(self, parts: Sequence[bytes | memoryview], offset: int) -> None:
        """Write all of `parts`, one after the other."""
        self.pwrite(b"".join(parts), offset)


class SourceError(OSError):
    """An error of a source, in a sentence that names it."""


class ShrunkError(SourceError):
    """A source shrank, or was truncated, while it was served."""


class OriginDevice(File):
    """A source: a block device, locked by O_EXCL, or a regular file, locked by flock(2). # I7

    `size_bytes` is fixed at opening; `logical_block_bytes` is 512 or 4096 (512 for a regular file).
    """

    def __init__(
        self,
        io: Io,
        fd: int,
        label: str,
        geometry: Geometry,
        superblock_of: SuperblockOf = no_superblock,
        *,
        is_read_only: bool = False,
    ) -> None:
        super().__init__(io, fd, label)
        self._size_bytes, self.logical_block_bytes, self.is_block = geometry
        self.is_read_only = is_read_only  #: it was opened so
        self._superblock_of = superblock_of
        self.intact_bytes = geometry.size_bytes  #: what is beyond is not what it was: the source was truncated

    @property
    def size_bytes(self) -> int:
        """The device's size when it was opened."""
        return self._size_bytes

    def _check_end(self, end: int, wanted: int) -> None:
        """Raise ShrunkError when the device ends earlier than when it was opened: that is not zeroes. # I4"""
        if end < min(wanted, self._size_bytes):
            if self.is_block:  # it refuses writes there, and may be back: a disk that lost its connection
                raise ShrunkError(errno.EIO, f"{self.label} has no byte at offset {end} any more: it shrank")
            self._note_cut(end)
            raise self.shrunk()

    def _note_cut(self, end: int) -> None:
        """Have every read wait from now on, so that it passes the code that checks `intact_bytes`."""
        self.intact_bytes = min(self.intact_bytes, end)
        self.pread_nowait = self.fill_nowait = self._look_first

    def _look_first(self, *_: object) -> NoReturn:
        raise BlockingIOError(errno.EAGAIN, "the source was cut")

    def shrunk(self) -> "ShrunkError":
        """The error for an access beyond `intact_bytes`."""
        return ShrunkError(
            errno.EIO,
            f"{self.label} was cut from {self._size_bytes} to {self.intact_bytes} bytes, or less, while it was served: "
            f"what is beyond cannot be read, nothing is written to it any more, and nothing of that is taken for old "
            f"bytes. Unmount, put back what it had there (not with truncate: that gives zeroes), and mount again",
        )

    def check_size(self) -> None:
        """Raise ShrunkError if the file is truncated now, or was found so before. # I4

        A write beyond its end would extend it again, with a hole that reads like zeroes that were always there.
        Block devices refuse such writes themselves.
        """
        if not self.is_block and (size_bytes := self._io.fstat(self.fd).st_size) < self.intact_bytes:
            self._note_cut(size_bytes)
        if self.intact_bytes < self._size_bytes:
            raise self.shrunk()

    def flush_by_another(self) -> None:
        """Have the device flush its cache, only to see whether that works. Raises OSError."""
        self._io.flush_by_another(self.fd)

    def pread_past_cache(self, length: int, offset: int) -> bytes:
        """Read from the device itself; fewer bytes only at its end. Both numbers are multiples of 4096."""
        return self._io.pread_direct(self.fd, length, offset)

    def past_cache(self) -> "PastCache":
        """The same device, for writes whose errors must be reported at once."""
        return PastCache(self._io, self.fd, self.label)

    @property
    def modified_ns(self) -> int:
        """When the file system last saw a write to it (mtime), in ns since 1970."""
        return self._io.fstat(self.fd).st_mtime_ns

    def witness(self) -> Witness | None:
        """The kernel's counter of writes to it (witness.py); None where there is none. Blocks."""
        return self._io.witness(self.fd)

    def superblock(self) -> Superblock:
        """The kind and UUID of its superblock. Blocks."""
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
        """Open the source at `path` and lock it.

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
            if not geometry.is_block:  # O_EXCL locks block devices
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
        return cls(io, fd, path, geometry, superblock_of, is_read_only=read_only)
