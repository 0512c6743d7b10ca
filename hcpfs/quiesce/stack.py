"""What is built on the images: loop devices, their partitions, and what stands on those.

Each device has a level: its writes go to devices of lower levels. So caches are flushed, file systems frozen, and all
of it written back, from the highest level down. It flushes through the daemon's own mount, so not in the daemon (see
hcpfs/quiesce/freezer.py).
"""

from collections.abc import Collection, Iterable, Iterator

from hcpfs.system import beneath
from hcpfs.system.blocks import entry_of, holders, node_of, partitions
from hcpfs.system.flushing import write_out


class Stack:
    """The block devices above some files. `levels` has the level of each by its number."""

    def __init__(self, file_device: int, file_inodes: Collection[int] | None, loops: Iterable[beneath.Loop]) -> None:
        """The files are those of the file system with the number `file_device` that have these inodes, or all of it."""
        self._loops = list(loops)
        self.on_files = [
            loop
            for loop in self._loops
            if loop.backing_device == file_device and (file_inodes is None or loop.backing_inode in file_inodes)
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
        self.partitions[device] = partitions(device)
        self.holders[device] = holders(device)
        yield from self.partitions[device]
        yield from self.holders[device]
        for loop in self._loops:
            # The files of a file system on the device have its number, save with btrfs.
            if device in (loop.backing_block, loop.backing_device):
                yield loop.device

    def top_down(self) -> list[int]:
        """The devices, the highest level first."""
        return sorted(self.levels, key=lambda device: (-self.levels[device], device))

    def found(self) -> Iterator[list[int]]:
        """The devices, the highest level first; then those that were added meanwhile, and so on: each device once."""
        seen = set[int]()
        while devices := [device for device in self.top_down() if device not in seen]:
            seen.update(devices)
            yield devices

    def is_decided_by_others(self, device: int, owned: Collection[int]) -> bool:
        """A disk is owned when a partition is, and a partition can have no owner when its disk has."""
        parts = self.partitions
        return not set(owned).isdisjoint(parts[device]) or any(device in parts[one] for one in owned)

    def write_back(self) -> list[str]:
        """Have what programs wrote to the devices themselves reach the images; sentences on what did not.

        Not made durable: the engine does that for all that reached it.
        """
        return [note for device in self.top_down() for note in _write_back(device)]


def _write_back(device: int) -> Iterator[str]:
    path = node_of(device)
    try:
        write_out(path)
    except OSError as error:
        if entry_of(device).exists():  # it was not just detached
            yield f"cached writes to {path} were not written back: {error.strerror}"
