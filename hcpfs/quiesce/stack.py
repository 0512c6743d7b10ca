"""The block devices above the images: loop devices, their partitions, and what is built on those.

Each device has a level, and its writes go to devices of lower levels. So caches are flushed, file systems frozen, and
all of it written back, from the highest level down. Flushing goes through the daemon's own mount, so the daemon must
not do it itself (see hcpfs/quiesce/freezer.py).
"""

from collections.abc import Collection, Iterable, Iterator

from hcpfs.system import beneath
from hcpfs.system.blocks import entry_of, holders, node_of, partitions
from hcpfs.system.flushing import write_out


class Stack:
    """The block devices above some files. `levels` has the level of each by its number."""

    def __init__(self, file_device: int, file_inodes: Collection[int] | None, loops: Iterable[beneath.Loop]) -> None:
        """`file_inodes` are files of the file system with the device number `file_device`; None for all its files."""
        self._loops = list(loops)
        self.on_files = [
            loop
            for loop in self._loops
            if loop.backing_device == file_device and (file_inodes is None or loop.backing_inode in file_inodes)
        ]  #: the loop devices that show one of the files
        self.levels: dict[int, int] = {}
        self.partitions: dict[int, list[int]] = {}  #: of each device
        self.holders: dict[
            int, list[int]
        ] = {}  #: what device-mapper, RAID or bcache built on each: they hold it exclusively
        self.add((loop.device for loop in self.on_files if not loop.read_only), 0)
        written = set(self.levels)
        self.add((loop.device for loop in self.on_files if loop.read_only), 0)
        self.read_only = self.levels.keys() - written  #: nothing is written through these

    def add(self, devices: Iterable[int], level: int) -> None:
        """Add devices at that level, and all that is built on them at higher levels."""
        todo = [(device, level) for device in devices]
        while todo:
            device, level = todo.pop()
            if self.levels.get(device, -1) < level:
                self.levels[device] = level
                todo += [(above, level + 1) for above in self._on(device)]

    def add_files_of(self, file_device: int, level: int) -> None:
        """Add the loop devices on files of the file system with that device number, which is at that level."""
        self.add((loop.device for loop in self._loops if loop.backing_device == file_device), level + 1)

    def _on(self, device: int) -> Iterator[int]:
        self.partitions[device] = partitions(device)
        self.holders[device] = holders(device)
        yield from self.partitions[device]
        yield from self.holders[device]
        for loop in self._loops:
            # The files of a file system on the device have its number, except with btrfs.
            if device in (loop.backing_block, loop.backing_device):
                yield loop.device

    def top_down(self) -> list[int]:
        """The devices, the highest level first."""
        return sorted(self.levels, key=lambda device: (-self.levels[device], device))

    def found(self) -> Iterator[list[int]]:
        """Each device once, in batches, the highest level first; the next batch has what was added meanwhile."""
        seen = set[int]()
        while devices := [device for device in self.top_down() if device not in seen]:
            seen.update(devices)
            yield devices

    def is_decided_by_others(self, device: int, owned: Collection[int]) -> bool:
        """A disk is owned when a partition is, and a partition can have no owner when its disk has."""
        parts = self.partitions
        return not set(owned).isdisjoint(parts[device]) or any(device in parts[one] for one in owned)

    def write_back(self) -> list[str]:
        """Have the devices' page caches written to the images. Returns sentences on those that were not.

        It is not durable then: the engine makes durable what has reached it.
        """
        return [note for device in self.top_down() for note in _write_back(device)]


def _write_back(device: int) -> Iterator[str]:
    path = node_of(device)
    try:
        write_out(path)
    except OSError as error:
        if entry_of(device).exists():  # it was not just detached
            yield f"cached writes to {path} were not written back: {error.strerror}"
