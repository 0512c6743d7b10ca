"""What the file system of a store can do, tried on an unnamed file before anything is created there.

These are raw system calls, like those of io.py, whose `Io` has them as methods.
"""

import ctypes
import errno
import mmap
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

NAME = "trial"  #: of the file, for a moment, if the file system has no O_TMPFILE
_HOLE_BYTES = 1 << 20
_PAGE_BYTES = 4096
_KEEP_SIZE, _PUNCH_HOLE = 1, 2  # <linux/falloc.h>
_NO_UNNAMED = {errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL, errno.ENOSYS}

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Trial:
    """The errno of each step; 0 if it was done, or not tried because of an earlier one."""

    make: int = 0  #: creating a file and writing to it
    allocate: int = 0  #: reserving room for it
    punch: int = 0  #: freeing that room by a hole
    map: int = 0  #: mapping it into memory, shared
    grow: int = 0  #: extending it to the size asked for, by a hole
    keeps_holes: bool = True  #: whether parts that were never written take no room


def try_out(directory: int, size_bytes: int) -> Trial:
    """Try all steps in the directory of that descriptor, and leave nothing there. Blocks; never raises OSError."""
    try:
        fd = _unnamed(directory)
    except OSError as error:
        return Trial(make=error.errno or errno.EIO)
    try:
        os.pwrite(fd, bytes(_PAGE_BYTES), _HOLE_BYTES - _PAGE_BYTES)
        keeps_holes = os.fstat(fd).st_blocks * 512 < _HOLE_BYTES // 2
        return Trial(
            allocate=_fallocate(fd, 0),
            punch=_fallocate(fd, _PUNCH_HOLE | _KEEP_SIZE),
            map=_map(fd),
            grow=_grow(fd, size_bytes) if keeps_holes else 0,
            keeps_holes=keeps_holes,
        )
    except OSError as error:
        return Trial(make=error.errno or errno.EIO)
    finally:
        os.close(fd)


def _unnamed(directory: int) -> int:
    flags = os.O_RDWR | os.O_CLOEXEC
    try:
        return os.open(".", flags | os.O_TMPFILE, 0o600, dir_fd=directory)
    except OSError as error:
        if error.errno not in _NO_UNNAMED:
            raise
    fd = os.open(NAME, flags | os.O_CREAT | os.O_NOFOLLOW, 0o600, dir_fd=directory)
    try:
        os.unlink(NAME, dir_fd=directory)
    except OSError:
        os.close(fd)
        raise
    return fd


def _fallocate(fd: int, mode: int) -> int:
    done = _libc.fallocate(fd, mode, ctypes.c_int64(0), ctypes.c_int64(16 * _PAGE_BYTES))
    return 0 if done == 0 else ctypes.get_errno()


def _map(fd: int) -> int:
    try:
        mmap.mmap(fd, _PAGE_BYTES).close()
    except OSError as error:
        return error.errno or errno.EIO
    return 0


def _grow(fd: int, size_bytes: int) -> int:
    try:
        os.ftruncate(fd, size_bytes)
    except OSError as error:
        return error.errno or errno.EIO
    return 0


def file_system(fd: int) -> str:
    """The type of the file system that a descriptor is on, and where it is mounted, as far as that can be told."""
    with suppress(OSError, ValueError, IndexError):
        numbers = dict(line.split(None, 1) for line in Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines())
        for line in Path("/proc/self/mountinfo").read_text(errors="backslashreplace").splitlines():
            fields, _, rest = line.partition(" - ")
            if fields.split()[0] == numbers["mnt_id:"].strip():
                return f"{rest.split()[0]} at {fields.split()[4]}"
    return "an unknown one"
