"""The kernel's own witness of writes to a source: a counter that every write to it changes.

For a regular file it is the time of modification, for a loop device over a whole file that of the file, for any other
block device the sectors that were written and discarded, as counted by its `stat` in sysfs
(Documentation/block/stat.rst). The counter of a device says nothing after a reboot, and none says anything about
another file; so each has a name, and two marks can be compared only if the names are the same.
"""

import fcntl
import os
import stat
import struct
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

_LOOP_GET_STATUS64 = 0x4C05
_LOOP_INFO64_BYTES = 232
_FS_IOC_GETVERSION = 0x80087601
_SECTORS_WRITTEN, _SECTORS_DISCARDED = 6, 13  # words of `stat`
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Backing(NamedTuple):
    """What a loop device shows: its file by device and inode number, from `offset` on, `size_limit` bytes (0: all)."""

    device: int
    inode: int
    offset: int
    size_limit: int


def backing_of(fd: int) -> Backing | None:
    """What an open loop device shows; None for any other device, or without a file. Asks the file's file system."""
    try:
        information = fcntl.ioctl(fd, _LOOP_GET_STATUS64, bytes(_LOOP_INFO64_BYTES))
    except OSError:
        return None
    device, inode, _, offset, size_limit = struct.unpack_from("5Q", information)  # struct loop_info64
    return Backing(device, inode, offset, size_limit)


def backing_file_of(device: int) -> str:
    """The path of a loop device's file as sysfs shows it: perhaps not valid for this process, or another file's by now.

    Raises OSError for anything but a loop device with a file.
    """
    return os.fsdecode((_sysfs(device) / "loop/backing_file").read_bytes().removesuffix(b"\n"))


class Witness(NamedTuple):
    """`mark` is the state of the counter that is called `counter`."""

    counter: str
    mark: str

    def contradicts(self, earlier: "Witness | None") -> bool:
        """Whether something was written since the earlier one."""
        return earlier is not None and self.counter == earlier.counter and self.mark != earlier.mark


def witness_of(fd: int) -> Witness | None:
    """The witness of an open source; None where the kernel has none. Blocks."""
    try:
        status = os.fstat(fd)
        if not stat.S_ISBLK(status.st_mode):
            return _of_file(fd)
        with suppress(OSError):  # its file cannot be opened from here
            if (found := _of_loop(fd, status.st_rdev)) is not None:
                return found
        return _of_device(status.st_rdev)
    except (OSError, ValueError, IndexError):
        return None


def _of_file(fd: int) -> Witness:
    status = os.fstat(fd)
    try:
        # An inode number is reused, with another generation.
        (generation,) = struct.unpack_from("i", fcntl.ioctl(fd, _FS_IOC_GETVERSION, bytes(8)))
    except OSError:
        generation = 0  # not on every file system
    return Witness(f"file {status.st_dev} {status.st_ino} {generation}", str(status.st_mtime_ns))


def _of_loop(fd: int, device: int) -> Witness | None:
    """The witness of the file, if the device shows all of it and the file is found."""
    backing = backing_of(fd)
    if backing is None or backing.offset or backing.size_limit:
        return None
    file = os.open(backing_file_of(device), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    try:
        status = os.fstat(file)
        return _of_file(file) if (status.st_dev, status.st_ino) == backing[:2] else None
    finally:
        os.close(file)


def _of_device(device: int) -> Witness:
    entry = _sysfs(device).resolve()
    whole = entry.parent if (entry / "partition").exists() else entry
    words = (entry / "stat").read_text().split()
    sequence = (whole / "diskseq").read_text().strip()
    written = [words[place] for place in (_SECTORS_WRITTEN, _SECTORS_DISCARDED) if place < len(words)]
    return Witness(f"{_BOOT_ID.read_text().strip()} {sequence} {entry.name}", " ".join(written))


def _sysfs(device: int) -> Path:
    return Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
