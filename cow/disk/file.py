"""An open file or block device. Each method says what it makes durable; nothing else is durable."""

import errno
import os
import resource
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress

from cow.disk.io import FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE, Io
from cow.disk.limits import raise_limit
from cow.errors import SyncError


class File:
    """An open file or block device. Safe to use from several threads.

    `label` names it in errors.
    """

    def __init__(self, io: Io, fd: int, label: str) -> None:
        self.fd = fd
        self.label = label
        self._io = io
        self._sync_failure: OSError | None = None
        self._syncing = threading.Lock()  #: one sync at a time: the kernel reports a lost write once
        self.is_in_memory = io.is_in_memory(fd)  #: it never waits for a disk; such file systems refuse RWF_NOWAIT
        #: (length, offset): reads without waiting for a disk; raises BlockingIOError if that cannot be done in full
        self.pread_nowait: Callable[[int, int], bytes] = self._pread_memory if self.is_in_memory else self._pread_cached
        #: (into, offset): the same for `fill`
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
        """Called when the file has nothing at `end`, and a read wanted the bytes up to `wanted`."""

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
        """Write without waiting for a disk; False when that could not be done in full, and `pwrite` has to do it."""
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

    def will_read(self, offset: int, length: int) -> None:
        """Have the kernel begin to read an extent into its cache: advice, without an error."""
        with suppress(OSError):
            self._io.posix_fadvise(self.fd, offset, length, os.POSIX_FADV_WILLNEED)

    def sync(self) -> None:
        """Make all earlier writes durable.

        Raises OSError when the kernel does, and SyncError ever after: the kernel reports a lost write once and then
        marks the pages clean (fsyncgate), so success on a retry would be a lie. # I3
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
        """Let later syncs succeed again. What the failed one covered must be written anew, or durably given up."""
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
        """Punch a hole: the extent's space is freed, and it reads as zeroes. Not durable by itself."""
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
        """The bytes that the file takes on its file system."""
        return self._io.fstat(self.fd).st_blocks * 512

    def close(self) -> None:
        """Close the descriptor. Nothing is synced."""
        self._io.close(self.fd)


def _raise_file_limit(error: OSError) -> None:
    """Raise the error, unless it comes from RLIMIT_FSIZE, which was lowered since and could be raised again."""
    if error.errno != errno.EFBIG or not raise_limit(resource.RLIMIT_FSIZE):
        raise error
