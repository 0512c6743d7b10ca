"""Block devices by number, as sysfs shows them: names, sizes, partitions, what is built on them and what they are on.

Reads /sys only, so no file system and no daemon is asked.
"""

import errno
import fcntl
import os
import stat
import struct
from collections.abc import Callable, Iterable
from pathlib import Path

_BLKGETSIZE64 = 0x80081272


def entry_of(device: int) -> Path:
    """The device's directory in sysfs, as a link. That of a partition is within that of its disk."""
    return Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")


def number_of(entry: Path) -> int | None:
    """The number of the device whose directory in sysfs this is; None when it is gone."""
    try:
        major, minor = (entry / "dev").read_text().split(":")
    except (OSError, ValueError):
        return None
    return os.makedev(int(major), int(minor))


def numbers_in(directory: Path, pattern: str = "*") -> list[int]:
    """The numbers of the devices whose directories are there."""
    return [number for number in map(number_of, directory.glob(pattern)) if number is not None]


def name_of(device: int) -> str:
    """The name of a device below /dev, such as loop0p1."""
    return os.path.basename(os.path.realpath(entry_of(device))).replace("!", "/")


def node_of(device: int) -> str:
    """The path below /dev that the kernel gives the device."""
    return f"/dev/{name_of(device)}"


def size_of(path: str) -> int:
    """The size of a file or a block device, in bytes. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        status = os.fstat(fd)
        if not stat.S_ISBLK(status.st_mode):
            return status.st_size
        return int(struct.unpack("Q", fcntl.ioctl(fd, _BLKGETSIZE64, bytes(8)))[0])
    finally:
        os.close(fd)


def is_held(path: str) -> bool:
    """Whether the block device is open exclusively: by a mount, swap, RAID, ZFS, or a program with O_EXCL."""
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC | os.O_NONBLOCK))
    except OSError as error:
        return error.errno == errno.EBUSY
    return False


def disk_of(device: int) -> int | None:
    """The disk that the device is a partition of, or None."""
    entry = Path(os.path.realpath(entry_of(device)))
    return number_of(entry.parent) if (entry / "partition").exists() else None


def partitions(device: int) -> list[int]:
    """The partitions of a disk. Their directories lie in that of the disk, and are named after it."""
    entry = Path(os.path.realpath(entry_of(device)))
    return [] if (entry / "partition").exists() else numbers_in(entry, f"{entry.name}*")


def holders(device: int) -> list[int]:
    """What device-mapper or RAID built on the device."""
    return numbers_in(entry_of(device) / "holders")


def slaves(device: int) -> list[int]:
    """What a device of device-mapper or RAID is built on."""
    return numbers_in(entry_of(device) / "slaves")


def reached(device: int, onward: Callable[[int], Iterable[int]]) -> set[int]:
    """The device and all that are reached from it: `onward` gives the next ones of each."""
    found: set[int] = set()
    todo = [device]
    while todo:
        one = todo.pop()
        if one not in found:
            found.add(one)
            todo += onward(one)
    return found


def devices_above(device: int) -> set[int]:
    """The device, its partitions, and the device-mapper and RAID devices built on any of them, at any height."""
    return reached(device, lambda one: [*holders(one), *partitions(one)])


def lower_disks(device: int) -> set[int]:
    """The devices at the bottom of a device of device-mapper or RAID: those that are built on no others."""
    return {one for one in reached(device, slaves) if not slaves(one)}
