"""Opening the file system that is mounted from a device, and no other, to freeze it.

Through one of its mounts, in any mount namespace, if that mount is what is found at the path: another one may hide it.
Else through a new mount that is attached nowhere, because mounting a device again gives the file system that is mounted
already (fsopen(2), fsmount(2)). It must never mount one that was not mounted, so an option is added with which every
first mount fails before anything is written, and which has no effect on a file system that is mounted already.

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

# No first mount can succeed with these: a superblock beyond the end of the device; a log that is no device; and what
# btrfs accepts for a read-only mount only (so it is mounted read-write).
_IMPOSSIBLE = {
    "ext4": ("sb", "2147483647"),
    "ext3": ("sb", "2147483647"),
    "ext2": ("sb", "2147483647"),
    "xfs": ("logdev", "/dev/null/none"),
    "btrfs": ("rescue", "ignorebadroots"),
}


class Place(NamedTuple):
    """A mount of the file system: its id, a process in its namespace (0: ours), its path there, and that in words."""

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
        """The target from the list that JSON makes of one."""
        name, device, filesystem, fsid, places = values
        return cls(name, device, filesystem, fsid, [Place(*place) for place in places])

    @property
    def words(self) -> str:
        """Where it is mounted, or what it is."""
        return self.places[0].words if self.places else f"{self.filesystem} on {self.name}, mounted nowhere any more"


def open_target(target: Target) -> tuple[int, str]:
    """A descriptor of a file or directory in the file system, and where it is mounted, in words. Raises OSError."""
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
        # To open another kind of file may have an effect.
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
    """Whether an open file is in the file system on the device."""
    if target.fsid:
        return fsid_of(fd) == target.fsid
    return os.fstat(fd).st_dev == target.device


def fsid_of(fd: int) -> str:
    """The UUID of the btrfs that an open file is in, as in /sys/fs/btrfs; "" for other file systems."""
    try:
        info = fcntl.ioctl(fd, _BTRFS_FS_INFO, bytes(_BTRFS_FS_INFO_BYTES))
    except OSError:
        return ""
    digits = info[_FSID_AT : _FSID_AT + 16].hex()
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def open_mounted(device: str, filesystem: str) -> int:
    """A descriptor of the root of the file system of that type that is mounted somewhere from the device.

    Raises OSError when there is none, when it is of another type, or where the kernel or the type does not allow it.
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
