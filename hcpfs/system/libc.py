"""The system calls that Python does not have, by way of libc."""

import ctypes
import os

libc = ctypes.CDLL(None, use_errno=True)
libc.sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)

_MNT_DETACH, _UMOUNT_NOFOLLOW = 2, 8


def checked(result: int) -> int:
    """The result of a call of libc. Raises the OSError for errno when it is negative."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def syscall(number: int, *arguments: bytes | int | None) -> int:
    """Make a system call by its number. Raises OSError."""
    return checked(libc.syscall(number, *arguments))


def enter(namespace: int, kind: int) -> None:
    """Enter the namespace of that kind (CLONE_NEW...) that a descriptor leads to. Raises OSError."""
    checked(libc.setns(namespace, kind))


def unmount(path: str, *, lazily: bool = False) -> None:
    """Unmount the topmost mount at the path, without following a symbolic link. Raises OSError."""
    checked(libc.umount2(os.fsencode(path), _UMOUNT_NOFOLLOW | (_MNT_DETACH if lazily else 0)))
