"""Reaching the file system that is on a device, and no other: a descriptor of it, to freeze it.

By one of its mounts, of whatever mount namespace, when what is found there is that mount: another file system may hide
it. Else by a mount of its own that is attached nowhere: mounting a device again gives the file system that is mounted
already (fsopen(2), fsmount(2)). That must never mount what was not mounted, so it is asked for with an option that
fails every first mount before anything is written, and that means nothing when there is a file system already.

In the freezer process: the paths may lead through the daemon's own mount.
"""

import errno
import fcntl
import os
import stat
from typing import Any, NamedTuple

from hcpfs.system import aside

_ATTRIBUTES = 2 | 4 | 8 | 0x10  # of a mount: nosuid, nodev, noexec, noatime
_BTRFS_FS_INFO = 0x8400941F
_BTRFS_FS_INFO_BYTES = 1024
_FSID_AT = 16

# No first mount can succeed with these: a superblock beyond the end of the device; a log on no device; and what btrfs
# takes of a read-only mount alone (so it is asked for read-write only).
_IMPOSSIBLE = {
    "ext4": ("sb", "2147483647"),
    "ext3": ("sb", "2147483647"),
    "ext2": ("sb", "2147483647"),
    "xfs": ("logdev", "/dev/null/none"),
    "btrfs": ("rescue", "ignorebadroots"),
}


class Place(NamedTuple):
    """A mount of the file system: its id, a process that sees it (0: ourselves), the path there, and that in words."""

    id: int
    pid: int
    path: str
    words: str


class Target(NamedTuple):
    """A file system on a device. `name` is the device's path, `fsid` is set for btrfs, whose numbers are anonymous."""

    name: str
    device: int
    filesystem: str
    fsid: str
    places: list[Place]

    @classmethod
    def from_json(cls, values: list[Any]) -> "Target":
        """Back from the list that JSON makes of it."""
        name, device, filesystem, fsid, places = values
        return cls(name, device, filesystem, fsid, [Place(*place) for place in places])

    @property
    def words(self) -> str:
        """Where it is mounted, or what it is."""
        return self.places[0].words if self.places else f"{self.filesystem} on {self.name}, mounted nowhere any more"


def open_target(target: Target) -> tuple[int, str]:
    """A descriptor of something in the file system, and where it is mounted, in words. Raises OSError."""
    for place in target.places:
        fd = _open_place(target, place)
        if fd is not None:
            return fd, place.words
    fd = open_mounted(target.name, target.filesystem)
    if not is_on(fd, target):  # the device was detached, and set up anew, meanwhile
        os.close(fd)
        raise OSError(errno.ENODEV, "it is not there any more")
    return fd, f"{target.words} (hidden by another mount)" if target.places else target.words


def _open_place(target: Target, place: Place) -> int | None:
    path = f"/proc/{place.pid}/root{place.path}" if place.pid else place.path
    try:
        found = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return None  # gone, or not to be reached
    try:
        # Other files, when one is mounted there, would do something at an open.
        kind = os.fstat(found).st_mode
        if _mount_id(found) != place.id or not (stat.S_ISDIR(kind) or stat.S_ISREG(kind)):
            return None
        fd = os.open(f"/proc/self/fd/{found}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    finally:
        os.close(found)
    if is_on(fd, target):
        return fd
    os.close(fd)
    return None


def _mount_id(fd: int) -> int:
    with open(f"/proc/self/fdinfo/{fd}", "rb") as file:
        return int(next(line.split()[1] for line in file if line.startswith(b"mnt_id:")))


def is_on(fd: int, target: Target) -> bool:
    """Whether what is open is in the file system on the device."""
    if target.fsid:
        return fsid_of(fd) == target.fsid
    return os.fstat(fd).st_dev == target.device


def fsid_of(fd: int) -> str:
    """The UUID of a btrfs as in /sys/fs/btrfs; "" of anything else."""
    try:
        info = fcntl.ioctl(fd, _BTRFS_FS_INFO, bytes(_BTRFS_FS_INFO_BYTES))
    except OSError:
        return ""
    digits = info[_FSID_AT : _FSID_AT + 16].hex()
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def open_mounted(device: str, filesystem: str) -> int:
    """A descriptor of the root of the file system, of that type, that is mounted from the device somewhere.

    Raises OSError: when none is, when it is of another type, or where the kernel or this type does not allow it.
    """
    if filesystem not in _IMPOSSIBLE:
        raise OSError(errno.EOPNOTSUPP, f"{filesystem} can only be reached where it is mounted")
    settings: list[tuple[str, str | None]] = [("source", device), _IMPOSSIBLE[filesystem]]
    try:
        return aside.mount(filesystem, settings, _ATTRIBUTES)
    except OSError:
        return aside.mount(filesystem, [*settings, *(() if filesystem == "btrfs" else (("ro", None),))], _ATTRIBUTES)


def find_mounted(device: str) -> str:
    """The type of the file system that is mounted from the device somewhere; "" when none is found."""
    for filesystem in _IMPOSSIBLE:
        try:
            os.close(open_mounted(device, filesystem))
        except OSError:
            continue
        return filesystem
    return ""
