"""Mounts kept aside: what is mounted in a directory of a file system that has to go lives on, and returns with it."""

import ctypes
import os

_OPEN_TREE, _MOVE_MOUNT = 428, 429  # the same number on every architecture
_AT_FDCWD, _AT_SYMLINK_NOFOLLOW, _AT_NO_AUTOMOUNT, _AT_RECURSIVE = -100, 0x100, 0x800, 0x8000
_CLONE, _CLOEXEC = 1, os.O_CLOEXEC
_FROM_EMPTY_PATH = 4
_MNT_DETACH, _UMOUNT_NOFOLLOW = 2, 8

_libc = ctypes.CDLL(None, use_errno=True)


def copy(path: str) -> int:
    """A descriptor of another mount of what is mounted at the path, or of a directory in it. Raises OSError."""
    fd = _libc.syscall(_OPEN_TREE, _AT_FDCWD, os.fsencode(path), _CLONE | _CLOEXEC | _AT_NO_AUTOMOUNT)
    if fd < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return int(fd)


def put_aside(path: str) -> int:
    """Take away the mount at `path` and all that is mounted in it. Raises OSError.

    Returns a descriptor that keeps it alive: with a tmpfs its files too.
    """
    flags = _CLONE | _CLOEXEC | _AT_RECURSIVE | _AT_SYMLINK_NOFOLLOW | _AT_NO_AUTOMOUNT
    fd = _libc.syscall(_OPEN_TREE, _AT_FDCWD, os.fsencode(path), flags)
    if fd < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    if _libc.umount2(os.fsencode(path), _MNT_DETACH | _UMOUNT_NOFOLLOW) != 0:
        number = ctypes.get_errno()
        os.close(fd)
        raise OSError(number, os.strerror(number))
    return int(fd)


def put_back(fd: int, path: str) -> None:
    """Mount at `path` what was put aside. Raises OSError. The descriptor stays open."""
    if _libc.syscall(_MOVE_MOUNT, fd, b"", _AT_FDCWD, os.fsencode(path), _FROM_EMPTY_PATH) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
