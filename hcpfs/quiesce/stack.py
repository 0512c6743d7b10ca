"""What is built on the live images: loop devices, their partitions, and what stands on those.

A level for each device: the writes of a device of one level go to devices of lower ones. So caches are flushed, and
file systems frozen, from the highest level down. Reads /sys only, and flushes through the devices: freezer process.
"""

import ctypes
import os
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from hcpfs.system import beneath

_WAIT_WRITE_WAIT = 7  # the flags of sync_file_range(2) for "on return all that was dirty is written"

_libc = ctypes.CDLL(None, use_errno=True)
_libc.sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)


class Stack:
    """The block devices above some files. `levels` has the level of each by its number."""

    def __init__(self, file_device: int, file_inodes: Collection[int], loops: Iterable[beneath.Loop]) -> None:
        self._loops = list(loops)
        self.on_files = [
            loop for loop in self._loops if loop.backing_device == file_device and loop.backing_inode in file_inodes
        ]  #: the loop devices that show one of the files
        self.levels: dict[int, int] = {}
        self.partitions: dict[int, list[int]] = {}  #: of each device
        self.holders: dict[int, list[int]] = {}  #: what device-mapper, RAID or bcache built on each: it is theirs alone
        self.add((loop.device for loop in self.on_files if not loop.read_only), 0)
        written = set(self.levels)
        self.add((loop.device for loop in self.on_files if loop.read_only), 0)
        self.read_only = self.levels.keys() - written  #: nothing comes through those

    def add(self, devices: Iterable[int], level: int) -> None:
        """Take in devices at that level, and all that is built on them."""
        todo = [(device, level) for device in devices]
        while todo:
            device, level = todo.pop()
            if self.levels.get(device, -1) < level:
                self.levels[device] = level
                todo += [(above, level + 1) for above in self._on(device)]

    def add_files_of(self, file_device: int, level: int) -> None:
        """Take in the loop devices on files with that device number: of a file system at that level."""
        self.add((loop.device for loop in self._loops if loop.backing_device == file_device), level + 1)

    def _on(self, device: int) -> Iterator[int]:
        self.partitions[device] = _partitions(device)
        self.holders[device] = _numbers(_entry(device) / "holders")
        yield from self.partitions[device]
        yield from self.holders[device]
        for loop in self._loops:
            # The files of a file system on the device have its number, save with btrfs.
            if device in (loop.backing_block, loop.backing_device):
                yield loop.device

    def top_down(self) -> list[int]:
        """The devices, the highest level first."""
        return sorted(self.levels, key=lambda device: (-self.levels[device], device))

    def write_back(self) -> list[str]:
        """Have what programs wrote to the devices themselves reach the images; sentences on what did not.

        Not made durable: the engine does that for all that reached it.
        """
        return [note for device in self.top_down() for note in _write_back(device)]


def _write_back(device: int) -> Iterator[str]:
    path = node_of(device)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            if _libc.sync_file_range(fd, 0, 0, _WAIT_WRITE_WAIT) != 0:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        finally:
            os.close(fd)
    except OSError as error:
        if _entry(device).exists():  # it was not just detached
            yield f"cached writes to {path} were not written back: {error.strerror}"


def _entry(device: int) -> Path:
    return Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")


def node_of(device: int) -> str:
    """The path below /dev that the kernel gives the device."""
    name = os.path.basename(os.path.realpath(_entry(device)))
    return f"/dev/{name.replace('!', '/')}"


def _numbers(directory: Path, pattern: str = "*") -> list[int]:
    found = []
    for entry in directory.glob(pattern):
        try:
            major, minor = (entry / "dev").read_text().split(":")
        except (OSError, ValueError):
            continue  # gone meanwhile
        found.append(os.makedev(int(major), int(minor)))
    return found


def _partitions(device: int) -> list[int]:
    # Their directories lie in that of the disk, and are named after it.
    entry = Path(os.path.realpath(_entry(device)))
    return [] if (entry / "partition").exists() else _numbers(entry, f"{entry.name}*")


def lower_disks(device: int) -> set[int]:
    """What a device of device-mapper or RAID is built on, at the end: devices that stand on no others."""
    found, todo, seen = set(), [device], set[int]()
    while todo:
        one = todo.pop()
        if one in seen:
            continue
        seen.add(one)
        slaves = _numbers(_entry(one) / "slaves")
        todo += slaves
        if not slaves:
            found.add(one)
    return found
