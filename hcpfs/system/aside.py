"""Mounts that are attached nowhere: copied, taken away, or made anew; each is kept alive by a descriptor.

So what is mounted in a directory of a file system that has to go lives on, and returns with it.
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
    """A descriptor of another mount of what is mounted at the path, or of a directory in it. Raises OSError."""
    return syscall(_OPEN_TREE, _AT_FDCWD, os.fsencode(path), _CLONE | _CLOEXEC | _AT_NO_AUTOMOUNT)


def put_aside(path: str) -> int:
    """Take away the mount at `path` and all that is mounted in it. Raises OSError.

    Returns a descriptor that keeps it alive: with a tmpfs its files too.
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
    """Mount at `path` what was put aside. Raises OSError. The descriptor stays open."""
    syscall(_MOVE_MOUNT, fd, b"", _AT_FDCWD, os.fsencode(path), _FROM_EMPTY_PATH)


def mount(filesystem: str, settings: Iterable[tuple[str, str | None]] = (), attributes: int = 0) -> int:
    """Mount a file system for ourselves alone, where nobody can hide or unmount it. Raises OSError.

    `settings` are names with values, or with None for one without; `attributes` are those of the mount (fsmount(2)).
    Returns a descriptor of its root; the mount goes with the last descriptor of something in it.
    """
    context = syscall(_FSOPEN, filesystem.encode(), _CLOEXEC_CONTEXT)
    try:
        for name, value in settings:
            kind = _SET_FLAG if value is None else _SET_STRING
            syscall(_FSCONFIG, context, kind, name.encode(), None if value is None else os.fsencode(value), 0)
        syscall(_FSCONFIG, context, _CREATE, None, None, 0)
        tree = syscall(_FSMOUNT, context, _CLOEXEC_CONTEXT, attributes)  # which can only be walked from
    finally:
        os.close(context)
    try:
        return os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=tree)
    finally:
        os.close(tree)
