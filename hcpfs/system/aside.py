"""Mounts that are attached nowhere: copied, taken away, or made anew; each is kept alive by a descriptor.

A file system that is mounted in a directory of one that has to be unmounted is kept in this way, and put back later.
"""

import os
from collections.abc import Iterable

from hcpfs.system.libc import syscall, unmount

_OPEN_TREE, _MOVE_MOUNT, _FSOPEN, _FSCONFIG, _FSMOUNT = range(428, 433)  # the same numbers on every architecture
_AT_FDCWD, _AT_SYMLINK_NOFOLLOW, _AT_NO_AUTOMOUNT, _AT_RECURSIVE = -100, 0x100, 0x800, 0x8000
_CLONE, _CLOEXEC = 1, os.O_CLOEXEC
_FROM_EMPTY_PATH = 4
_SET_FLAG, _SET_STRING, _CREATE = 0, 1, 6
_CLOEXEC_CONTEXT = 1  # FSOPEN_CLOEXEC and FSMOUNT_CLOEXEC


def copy(path: str) -> int:
    """Another mount, attached nowhere, of the file or directory at the path: its descriptor. Raises OSError."""
    return syscall(_OPEN_TREE, _AT_FDCWD, os.fsencode(path), _CLONE | _CLOEXEC | _AT_NO_AUTOMOUNT)


def put_aside(path: str) -> int:
    """Detach the mount at `path` and all mounts in it.

    Returns a descriptor that keeps them alive, with the files where it is a tmpfs. Raises OSError, with nothing
    detached.
    """
    flags = _CLONE | _CLOEXEC | _AT_RECURSIVE | _AT_SYMLINK_NOFOLLOW | _AT_NO_AUTOMOUNT
    fd = syscall(_OPEN_TREE, _AT_FDCWD, os.fsencode(path), flags)
    try:
        unmount(path, lazily=True)
    except OSError:
        os.close(fd)
        raise
    return fd


def put_back(fd: int, path: str) -> None:
    """Attach at `path` what was put aside. The descriptor stays open. Raises OSError."""
    syscall(_MOVE_MOUNT, fd, b"", _AT_FDCWD, os.fsencode(path), _FROM_EMPTY_PATH)


def mount(filesystem: str, settings: Iterable[tuple[str, str | None]] = (), attributes: int = 0) -> int:
    """Mount a file system that no path leads to, so that nobody can hide or unmount it.

    `settings` are its options with their values, None for one without a value; `attributes` those of fsmount(2).
    Returns a descriptor of its root. It is unmounted when the last descriptor of something in it is closed. Raises
    OSError.
    """
    context = syscall(_FSOPEN, filesystem.encode(), _CLOEXEC_CONTEXT)
    try:
        for name, value in settings:
            kind = _SET_FLAG if value is None else _SET_STRING
            syscall(_FSCONFIG, context, kind, name.encode(), None if value is None else os.fsencode(value), 0)
        syscall(_FSCONFIG, context, _CREATE, None, None, 0)
        tree = syscall(_FSMOUNT, context, _CLOEXEC_CONTEXT, attributes)  # an O_PATH descriptor
    finally:
        os.close(context)
    try:
        return os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=tree)
    finally:
        os.close(tree)
