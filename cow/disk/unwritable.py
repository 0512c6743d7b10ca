"""Why a source cannot be written to, in words: the device, the file, or the file system that it is on."""

import errno
import fcntl
import os
import stat
import struct
from contextlib import suppress

from cow.errors import RefusedError

REFUSALS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ETXTBSY}  # of open(2) and write(2)
_FS_IOC_GETFLAGS = 0x80086601
_IMMUTABLE, _APPEND = 0x10, 0x20  # <linux/fs.h>
_READ_ONLY = "mount it with -o ro to look at its snapshots, or make it writable"


def check_writable(fd: int) -> None:
    """Raise OSError when a source takes no writes although it is open for writing. Nothing is written."""
    os.pwrite(fd, b"", 0)  # the kernel checks a device's read-only flag, and for swap, before it looks at the length


def refusal(path: str, error: OSError) -> RefusedError:
    """The sentence for a source that could not be opened for writing, or takes no writes."""
    why, remedy = _cause(path, error.errno or errno.EIO)
    return RefusedError(f"{path} cannot be written to: {why}; {remedy or _READ_ONLY}")


def _cause(path: str, number: int) -> tuple[str, str]:
    kind = os.stat(path)
    if stat.S_ISBLK(kind.st_mode):
        if number == errno.EACCES:
            return "you have no right to write this device", f"do it as root, or {_READ_ONLY}"
        return (
            "the device is read-only (blockdev --setro, a write-protected medium, or a loop device set up with -r)",
            f"{_READ_ONLY} (blockdev --setrw)",
        )
    if number == errno.ETXTBSY:
        return "it is a program that runs, or swap that is in use", "stop that first"
    flags = _flags(path)
    if number == errno.EPERM and flags & (_IMMUTABLE | _APPEND):
        what = "immutable" if flags & _IMMUTABLE else "append-only"
        return f"the file is {what} (lsattr)", f"{_READ_ONLY} (chattr -i -a)"
    if number == errno.EROFS or os.statvfs(path).f_flag & os.ST_RDONLY:
        return "the file system that it is on is mounted read-only, there or as a whole", _READ_ONLY
    return f"you have no right to write it ({os.strerror(number)}, mode {stat.S_IMODE(kind.st_mode):04o})", ""


def _flags(path: str) -> int:
    with suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            return int(struct.unpack_from("i", fcntl.ioctl(fd, _FS_IOC_GETFLAGS, bytes(8)))[0])
        finally:
            os.close(fd)
    return 0
