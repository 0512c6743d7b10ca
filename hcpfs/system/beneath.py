"""Mounts and loop devices as the kernel tells them, and what file systems sit on which devices.

Used to find the file systems mounted from our images, to say who uses a device, and to refuse a store that sits on one
of our own images. Reads /proc and /sys, and asks loop devices with LOOP_GET_STATUS64. Calls block, and may need an
answer of our own daemon (the kernel asks it for the attributes of a loop device's file), so the daemon has the freezer
process make them while it serves.

A mount namespace is seen through a process or thread in it. For one that only a descriptor or a bind mount of its nsfs
file keeps, see hcpfs/system/namespaces.py.
"""

import fcntl
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from hcpfs.system import blocks

_LOOP_GET_STATUS64 = 0x4C05
_LOOP_INFO64_BYTES = 232
_LOOP_INFO64 = struct.Struct("QQQ 28x I")  # its beginning: device and inode of the file, device that it is, flags
_LOOP_READ_ONLY = 1
_MOST_LINKS = 40  # as in the kernel
_MOST_TRIES = 8  # processes of one namespace that may be gone before its mounts are read
FILESYSTEM_TYPE = "fuse.hcpfs"


class Mount(NamedTuple):
    """A line of mountinfo. `root` is the directory of the file system that is mounted; options are comma-separated.

    `mountpoint` is the path in the mount namespace with the inode `namespace`; `pid` is a process there, so that
    /proc/PID/root leads into it. `mounts()` leaves both 0: they are our own.
    """

    device: int
    mountpoint: str
    filesystem: str
    source: str
    id: int
    parent: int
    root: str
    options: str
    super_options: str
    namespace: int = 0
    pid: int = 0


class Loop(NamedTuple):
    """A loop device and its backing file.

    `backing_block` is the device number of the file if that is a block device, else 0; `read_only` tells how the file
    was opened.
    """

    path: str
    device: int
    backing_device: int
    backing_inode: int
    backing_block: int = 0
    read_only: bool = False


def mounts() -> list[Mount]:
    """All mounts that this process sees."""
    return parse_mounts(Path("/proc/self/mountinfo").read_bytes())


def all_mounts() -> list[Mount]:
    """The mounts of every mount namespace that has a process we may look at; those of our own come first.

    Looks at each thread once and reads one mountinfo for each namespace, preferably of a process whose root is that of
    the namespace, because mountinfo leaves out what is not below the reader's root. Processes that end meanwhile are
    skipped.
    """
    own = namespace_of(os.getpid())
    found = [mount._replace(namespace=own, pid=os.getpid()) for mount in mounts()]
    seen = {own}
    for namespace, pids in _namespaces(own).items():
        for pid in pids:
            if namespace not in seen:
                try:
                    with open(f"/proc/{pid}/mountinfo", "rb") as file:
                        lines = file.read()
                except OSError:  # it is gone, or is going (EINVAL)
                    continue
                if lines:
                    seen.add(namespace)
                    found += parse_mounts(lines, namespace, pid)
    return found


def namespace_of(pid: int) -> int:
    """The inode of a process's mount namespace; 0 when the process is gone, or we may not look at it."""
    try:
        return os.stat(f"/proc/{pid}/ns/mnt").st_ino
    except OSError:
        return 0


def _namespaces(own: int) -> dict[int, list[int]]:
    """The other mount namespaces, each with threads whose mountinfo shows it, the best first."""
    whole, parts = dict[int, list[int]](), dict[int, list[int]]()
    for process in filter(str.isdecimal, os.listdir("/proc")):
        try:
            threads = os.listdir(f"/proc/{process}/task")
        except OSError:
            continue
        for thread in map(int, threads):
            namespace = namespace_of(thread)
            if namespace in (0, own) or len(whole.get(namespace, ())) >= _MOST_TRIES:
                continue
            try:
                is_whole = os.readlink(f"/proc/{thread}/root") == "/"
            except OSError:
                continue
            places = whole if is_whole else parts
            places.setdefault(namespace, []).append(thread)
    return {one: whole.get(one, []) + parts.get(one, [])[:_MOST_TRIES] for one in whole | parts}


def parse_mounts(lines: bytes, namespace: int = 0, pid: int = 0) -> list[Mount]:
    """The mounts of a mountinfo file; `namespace` and `pid` say whose it is."""
    found = []
    for line in lines.splitlines():
        fields, _, rest = line.partition(b" - ")
        parts, kind = fields.split(), rest.split()
        major, minor = parts[2].split(b":")
        # The source may be empty, so the options are found from the end.
        source = _unescape(kind[1]) if len(kind) > 2 else ""
        device, filesystem = os.makedev(int(major), int(minor)), os.fsdecode(kind[0])
        number, parent = int(parts[0]), int(parts[1])
        root, mountpoint, options, super_options = map(_unescape, (*parts[3:6], kind[-1]))
        found.append(
            Mount(
                *(device, mountpoint, filesystem, source, number, parent),
                *(root, options, super_options, namespace, pid),
            )
        )
    return found


def _unescape(field: bytes) -> str:
    return os.fsdecode(re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), field))


def real_path(mountpoint: str) -> str:
    """The path as mountinfo shows it: absolute, without symbolic links, from the current directory.

    Unlike os.path.realpath it makes no request to what is mounted there, whose daemon may hang.
    """
    path = os.path.join(os.getcwd(), mountpoint)
    for _ in range(_MOST_LINKS):
        above, name = os.path.split(path.rstrip("/"))
        if name in ("", ".", ".."):
            return os.path.realpath(path)
        path = os.path.join(os.path.realpath(above), name)
        try:
            path = os.path.join(os.path.dirname(path), os.readlink(path))
        except OSError:  # not a link, or not there
            break
    return path


def loops() -> Iterator[Loop]:
    """All loop devices that have a backing file, except those on a file system that is dead."""
    for entry in sorted(Path("/sys/block").glob("loop*")):
        if not (entry / "loop/backing_file").exists():
            continue
        path = f"/dev/{entry.name}"
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            continue
        try:
            status = fcntl.ioctl(fd, _LOOP_GET_STATUS64, bytes(_LOOP_INFO64_BYTES))
            number = os.fstat(fd).st_rdev
        except OSError:
            continue
        finally:
            os.close(fd)
        backing_device, backing_inode, backing_block, flags = _LOOP_INFO64.unpack_from(status)
        yield Loop(path, number, backing_device, backing_inode, backing_block, bool(flags & _LOOP_READ_ONLY))


def mountpoints_of(device: int) -> list[str]:
    """Where the file systems on the device, or on devices built on it, are mounted; one place for each."""
    above = blocks.devices_above(device)
    names = set(map(blocks.node_of, above))
    found: dict[object, str] = {}
    for mount in mounts():
        # btrfs shows an anonymous device number, so its source counts too.
        if mount.device in above or mount.source in names:
            found.setdefault(mount.device, mount.mountpoint)
    return list(found.values())


def hcpfs_under(path: str) -> str | None:
    """The mount point of the hcpfs that has the file system of `path` on one of its images, at any height; None."""
    by_device = {mount.device: mount for mount in mounts()}
    backing = {loop.device: loop.backing_device for loop in loops()}

    def is_hcpfs(device: int) -> bool:
        return device in by_device and by_device[device].filesystem == FILESYSTEM_TYPE

    def below(device: int) -> Iterator[int]:
        if is_hcpfs(device):
            return
        mount = by_device.get(device)
        if mount is not None and os.major(device) == 0 and mount.source.startswith("/dev/"):
            yield os.stat(mount.source).st_rdev  # btrfs
        if device in backing:
            yield backing[device]
        yield from blocks.slaves(device)
        disk = blocks.disk_of(device)
        if disk is not None:
            yield disk

    found = filter(is_hcpfs, blocks.reached(os.stat(path).st_dev, below))
    return next((by_device[device].mountpoint for device in found), None)
