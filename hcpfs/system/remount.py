"""Mounting again: devices with mount(8), and file systems that are mounted already at another place or namespace."""

import os
import tempfile

from hcpfs.system import aside, namespaces, probe

_UNMOUNT_SECONDS = 30.0


def mounted(*words: str) -> str | None:
    """Run mount(8). None when it succeeded, else what it said."""
    code, said = probe.attempt(["mount", *words], None)
    return None if code == 0 else said or f"mount failed with {code}"


def bind(source: str, place: str, options: str) -> str | None:
    """Bind the directory `source` to `place`, with options of that mount alone. None when done, else why not."""
    return mounted("--bind", source, place) or mounted("-o", f"remount,bind,{options}", place)


def mount_elsewhere(source: str, namespace: int, mountpoint: str, options: str) -> str | None:
    """The same at a path in another mount namespace, given by its inode; nothing is done if a mount is there already.

    The namespace needs no device and no program for it: a detached mount is moved in (move_mount(2)).
    """
    survey = namespaces.survey()
    space = survey.others.get(namespace)
    if space is None:
        return "its mount namespace is gone"
    if any((one.namespace, one.mountpoint) == (namespace, mountpoint) for one in survey.mounts):
        return None  # it was propagated from another one
    place = tempfile.mkdtemp(prefix="hcpfs-", dir="/run")
    try:
        words = bind(source, place, options)
        if words is not None:
            return words
        try:
            tree = aside.copy(place)
        finally:
            probe.attempt(["umount", place], _UNMOUNT_SECONDS)
        try:
            namespaces.move_into(space, tree, mountpoint)
        finally:
            os.close(tree)
    except OSError as error:
        return str(error.strerror)
    finally:
        os.rmdir(place)  # and never what is in it
    return None
