"""What sits on what: mounts, loop devices, partitions and holders, as the kernel tells them.

Used to find the file systems mounted from our images, to say who uses a device, and to refuse a store that sits on one
of our own images. Reads /proc and /sys only, plus LOOP_GET_STATUS64. Calls block, and may come back to our own daemon
(the kernel asks it for the attributes of a loop device's file), so once it serves they are made in the freezer process.
"""

import fcntl
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_LOOP_GET_STATUS64 = 0x4C05
_LOOP_INFO64_BYTES = 232
_MOST_LINKS = 40  # as in the kernel
FILESYSTEM_TYPE = "fuse.hcpfs"


class Mount(NamedTuple):
    """A line of mountinfo. `root` is the directory of the file system that is shown; options are comma-separated."""

    device: int
    mountpoint: str
    filesystem: str
    source: str
    id: int
    parent: int
    root: str
    options: str
    super_options: str


class Loop(NamedTuple):
    """A loop device and the file it shows."""

    path: str
    device: int
    backing_device: int
    backing_inode: int


def mounts(process: str = "self") -> list[Mount]:
    """All mounts that this process sees, or another one, by its number. Raises OSError when that is gone."""
    found = []
    for line in Path(f"/proc/{process}/mountinfo").read_bytes().splitlines():
        fields, _, rest = line.partition(b" - ")
        parts, kind = fields.split(), rest.split()
        major, minor = parts[2].split(b":")
        # The source may be empty, so the options are found from the end.
        source = _unescape(kind[1]) if len(kind) > 2 else ""
        device, filesystem = os.makedev(int(major), int(minor)), os.fsdecode(kind[0])
        number, parent = int(parts[0]), int(parts[1])
        root, mountpoint, options, super_options = map(_unescape, (*parts[3:6], kind[-1]))
        found.append(Mount(device, mountpoint, filesystem, source, number, parent, root, options, super_options))
    return found


def _unescape(field: bytes) -> str:
    return os.fsdecode(re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), field))


def real_path(mountpoint: str) -> str:
    """The path as the kernel tells it of a mount: absolute, and without symbolic links.

    What is mounted there is asked nothing, as os.path.realpath would: its daemon may hang. Relative to the current
    directory.
    """
    path = os.path.join(os.getcwd(), mountpoint)
    for _ in range(_MOST_LINKS):
        above, name = os.path.split(path.rstrip("/"))
        if name in ("", ".", ".."):
            return os.path.realpath(path)
        path = os.path.join(os.path.realpath(above), name)
        try:
            path = os.path.join(os.path.dirname(path), os.readlink(path))
        except OSError:  # it is no link, or is not there
            break
    return path


def loops() -> Iterator[Loop]:
    """All loop devices that have a file, save those whose file system is dead."""
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
        backing_device, backing_inode = struct.unpack_from("QQ", status)
        yield Loop(path, number, backing_device, backing_inode)


def _sysfs(device: int) -> Path:
    return Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")


def _number(entry: Path) -> int | None:
    try:
        major, minor = (entry / "dev").read_text().strip().split(":")
    except (OSError, ValueError):
        return None
    return os.makedev(int(major), int(minor))


def devices_above(device: int) -> set[int]:
    """The device itself, its partitions, and what device-mapper or RAID built on any of them."""
    found: set[int] = set()
    todo = [device]
    while todo:
        one = todo.pop()
        if one in found:
            continue
        found.add(one)
        entry = _sysfs(one)
        above = [*entry.glob("holders/*"), *(part.parent for part in entry.glob("*/partition"))]
        todo += [number for number in map(_number, above) if number is not None]
    return found


def mountpoints_of(device: int) -> list[str]:
    """Where file systems from the device, or from what sits on it, are mounted; each file system once."""
    above = devices_above(device)
    names = {f"/dev/{_sysfs(one).resolve().name}" for one in above}
    found: dict[object, str] = {}
    for mount in mounts():
        # btrfs shows an anonymous device number, so its source counts too.
        if mount.device in above or mount.source in names:
            found.setdefault(mount.device, mount.mountpoint)
    return list(found.values())


def loops_on(file_device: int, file_inodes: set[int]) -> list[Loop]:
    """The loop devices that show one of the files."""
    return [loop for loop in loops() if loop.backing_device == file_device and loop.backing_inode in file_inodes]


def hcpfs_under(path: str) -> str | None:
    """The mount point of the hcpfs whose image carries the file system of `path`, through any number of layers."""
    by_device = {mount.device: mount for mount in mounts()}
    backing = {loop.device: loop.backing_device for loop in loops()}
    todo, seen = [os.stat(path).st_dev], set[int]()
    while todo:
        device = todo.pop()
        if device in seen:
            continue
        seen.add(device)
        mount = by_device.get(device)
        if mount is not None and mount.filesystem == FILESYSTEM_TYPE:
            return mount.mountpoint
        if mount is not None and os.major(device) == 0 and mount.source.startswith("/dev/"):
            todo.append(os.stat(mount.source).st_rdev)  # btrfs
        if device in backing:
            todo.append(backing[device])
        entry = _sysfs(device)
        below = [*entry.glob("slaves/*")] + ([entry.resolve().parent] if (entry / "partition").exists() else [])
        todo += [number for number in map(_number, below) if number is not None]
    return None
