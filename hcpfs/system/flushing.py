"""Having the kernel write back what it caches: of a file, a block device or a file system. Calls block."""

import os

from hcpfs.system.libc import checked, libc

_WAIT_WRITE_WAIT = 7  # the flags of sync_file_range(2) for "on return all that was dirty is written"


def fsync(path: str) -> None:
    """Make what is cached of a file durable; of a block device also what the devices below it cache. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_out(path: str) -> None:
    """Have what is cached of a block device written, not made durable. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        checked(libc.sync_file_range(fd, 0, 0, _WAIT_WRITE_WAIT))
    finally:
        os.close(fd)


def sync_file_system(fd: int) -> None:
    """Make all that is cached of the file system of an open file durable: syncfs(2). Raises OSError."""
    checked(libc.syncfs(fd))
