"""Where a source lies: on which disk or image file, which part of it, and what parts it has itself. # I12

Two paths may lead to the same bytes: a disk and its partition, an image file and a loop device over it, a link. The
kernel knows of these; of others (two cables to one disk) it may not. Calls block.
"""

import fcntl
import os
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from cow.disk.witness import backing_file_of, backing_of
from cow.errors import RefusedError
from hcpfs.system import beneath
from hcpfs.system.blocks import disk_of, entry_of, node_of, reached, size_of, slaves

_PARTX_SECONDS = 5.0
# File systems on which one file may have two device numbers, or two files' numbers may mean nothing.
_ALIASING = ("fuse", "nfs", "cifs", "smb", "9p", "virtiofs", "overlay", "ceph", "afs")


class Extent(NamedTuple):
    """A part of a file or a whole disk, in bytes. `base` is what it is, device number and inode number (0: a disk)."""

    base: tuple[int, int]
    offset: int
    length: int
    is_exact: bool = True  #: False: somewhere within that extent, as a logical volume is on its disk

    def meets(self, other: "Extent") -> bool:
        """Whether they have bytes in common. Two at unknown places of one disk, as two logical volumes, have none."""
        overlap = min(self.offset + self.length, other.offset + other.length) - max(self.offset, other.offset)
        return self.base == other.base and overlap > 0 and (self.is_exact or other.is_exact)


class View(NamedTuple):
    """An extent of what can be opened at `path`: a source, what it is a part of, or a part of it."""

    path: str
    offset: int
    length: int
    relation: str  #: "", "below" or "part"


def extents(path: str) -> list[Extent]:
    """The parts of disks or image files that a source lies on. Raises OSError."""
    status = os.stat(path)
    if not stat.S_ISBLK(status.st_mode):
        return [Extent((status.st_dev, status.st_ino), 0, status.st_size)]
    return list(_below(status.st_rdev, 0, size_of(path)))


def _below(device: int, offset: int, length: int) -> Iterator[Extent]:
    entry = entry_of(device).resolve()
    disk = disk_of(device)
    if disk is not None:
        start = int((entry / "start").read_text()) * 512
        yield from _below(disk, offset + start, length)
        return
    file = _loop_file(entry, device)
    if file is not None:
        yield Extent(file.base, file.offset + offset, length)
        return
    yield Extent((device, 0), offset, length)
    for slave in slaves(device):  # which part of it is not known
        for extent in _below(slave, 0, int((entry_of(slave) / "size").read_text()) * 512):
            yield extent._replace(is_exact=False)


def _loop_file(entry: Path, device: int) -> Extent | None:
    if not (entry / "loop/backing_file").exists():
        return None
    fd = os.open(f"/dev/{entry.name}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        found = backing_of(fd) if os.fstat(fd).st_rdev == device else None
    finally:
        os.close(fd)
    return None if found is None else Extent((found.device, found.inode), found.offset, found.size_limit)


def chain(path: str) -> set[str]:
    """The paths of the block devices from a source down to whole disks, such as those of loop0p1 and loop0.

    None for a file. Raises OSError.
    """
    status = os.stat(path)
    if not stat.S_ISBLK(status.st_mode):
        return set()

    def below(device: int) -> Iterator[int]:
        yield from slaves(device)
        disk = disk_of(device)
        if disk is not None:
            yield disk

    return set(map(node_of, reached(status.st_rdev, below)))


def meet(one: str, other: str) -> bool:
    """Whether two sources are known to have bytes in common. Raises OSError."""
    others = extents(other)
    return any(extent.meets(another) for extent in extents(one) for another in others)


def are_apart(one: str, other: str) -> bool:
    """Whether it is proved that two sources are different ones, whatever is on them. Raises OSError."""
    first, second = extents(one), extents(other)
    return all(_are_apart(extent, another) for extent in first for another in second)


def _are_apart(one: Extent, other: Extent) -> bool:
    if one.base == other.base:
        return not one.meets(other)
    if one.base[1] and other.base[1]:
        if one.base[0] == other.base[0]:
            return True
        return not any(_kind_of(extent.base[0]).startswith(_ALIASING) for extent in (one, other))
    if one.base[1] or other.base[1]:
        return False
    names = [_world_wide_name(extent.base[0]) for extent in (one, other)]
    return all(names) and names[0] != names[1]


def _kind_of(device: int) -> str:
    return next((mount.filesystem for mount in beneath.mounts() if mount.device == device), _ALIASING[0])


def _world_wide_name(device: int) -> str:
    """What a disk is called by its maker; empty when the kernel has no such name."""
    for name in ("dm/uuid", "wwid", "device/wwid", "serial", "device/serial"):
        with suppress(OSError):
            return (entry_of(device) / name).read_text().strip()
    return ""


def is_on_an_image(path: str) -> bool:
    """Whether the source lies on an image of an hcpfs: what is written to it goes through that one. Raises OSError."""
    served = {mount.device for mount in beneath.mounts() if mount.filesystem == beneath.FILESYSTEM_TYPE}
    return any(extent.base[1] and extent.base[0] in served for extent in extents(path))


def has_writer(path: str) -> bool:
    """Whether a process in any namespace has the file open for writing, or mapped so, and has not locked it.

    The kernel grants no read lease then (fcntl(2)). False also where it cannot be told because the file system has no
    leases, as some network file systems. Raises OSError when the file cannot be opened.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return False
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(fd)
    return False


def views(path: str) -> list[View]:
    """The source; the disks and files below it, whole; its partitions. Raises OSError."""
    length = size_of(path)
    found = [View(path, 0, length, "")]
    status = os.stat(path)
    if stat.S_ISBLK(status.st_mode):
        found += _whole_below(status.st_rdev)
    found += [View(path, offset, part, "part") for offset, part in _partitions(path, length)]
    return found


def _whole_below(device: int) -> Iterator[View]:
    entry = entry_of(device).resolve()
    disk = disk_of(device)
    if disk is not None:
        below = node_of(disk)
        yield View(below, 0, size_of(below), "below")
        yield from _whole_below(disk)
    elif (file := _loop_file(entry, device)) is not None:
        path = backing_file_of(device)
        with suppress(OSError):  # it may be another namespace's
            status = os.stat(path)
            if (status.st_dev, status.st_ino) == file.base:
                yield View(path, 0, status.st_size, "below")


def _partitions(path: str, length: int) -> Iterator[tuple[int, int]]:
    """Offset and length of each partition in the table that is on it."""
    command = ["partx", "--show", "--noheadings", "--output", "START,SECTORS", path]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_PARTX_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return
    for line in done.stdout.decode(errors="replace").splitlines():
        words = line.split()
        if len(words) == 2 and all(word.isdecimal() for word in words):
            offset, part = (int(word) * 512 for word in words)
            if part and offset + part <= length:
                yield offset, part


@contextmanager
def held(paths: list[str]) -> Iterator[None]:
    """Lock the image files below loop devices, so that no other hcpfs serves such a file, or a part of it. # I7

    Raises RefusedError when another process has one locked.
    """
    descriptors = []
    try:
        for path in paths:
            for view in views_below(path):
                fd = os.open(view.path, os.O_RDONLY | os.O_CLOEXEC)
                descriptors.append(fd)
                try:
                    fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    raise RefusedError(
                        f"{path} lies on {view.path}, which is locked by another program, perhaps another hcpfs that "
                        f"serves it: stop that first"
                    ) from error
        yield
    finally:
        for fd in descriptors:
            os.close(fd)


def views_below(path: str) -> list[View]:
    """The image files below a source that is a loop device or a partition of one."""
    status = os.stat(path)
    below = _whole_below(status.st_rdev) if stat.S_ISBLK(status.st_mode) else ()
    return [view for view in below if stat.S_ISREG(os.stat(view.path).st_mode)]
