"""Who uses the live images, as far as the kernel tells: what is to be frozen, what cannot be, and what is not known.

A block device has one owner at a time: a file system, swap, device-mapper or RAID, a program with O_EXCL. A device that
can be opened with O_EXCL has no owner. Where it has one that our own mount namespace does not show, the other
namespaces are searched, and then the device itself is asked for its file system, which may be lazily unmounted.

Programs that merely have a device open are found by a look at all processes. Where every device has a file system to
freeze, that is left until they are frozen. In the freezer process.
"""

import os
from dataclasses import dataclass, field
from typing import Any

from hcpfs.quiesce import reaching
from hcpfs.quiesce.reaching import Place, Target
from hcpfs.quiesce.stack import Stack
from hcpfs.quiesce.writers import Search, Wanted
from hcpfs.system import beneath, blocks, users
from hcpfs.system.blocks import lower_disks, node_of

_BTRFS = "btrfs"
_WITHOUT_RECOVERY = {"norecovery", "noload", "rescue=nologreplay", "rescue=all"}


@dataclass
class Usage:
    """What was found. `targets` are to be frozen, in this order.

    In sentences: `writers` that cannot be frozen, what is `unknown`, and `notes` that change nothing. `handles` counts
    the open handles of each image that belong to loop devices. `idle` are the paths of devices without an owner.
    """

    targets: list[Target] = field(default_factory=list)
    writers: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    handles: dict[str, int] = field(default_factory=dict)
    idle: list[str] = field(default_factory=list)
    wanted: Wanted | None = None  #: what is still to be looked for among the open files of processes

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Usage":
        """From what JSON makes of the fields."""
        wanted = values["wanted"]
        targets = [Target.from_json(target) for target in values["targets"]]
        return cls(**values | {"targets": targets, "wanted": Wanted(*wanted) if wanted else None})


def own_mount(mountpoint: str) -> beneath.Mount | None:
    """The mount of the hcpfs at the path; None when another mount hides it, or there is none."""
    own = [mount for mount in beneath.mounts() if mount.mountpoint == mountpoint]
    return own[-1] if own and own[-1].filesystem == beneath.FILESYSTEM_TYPE else None


def stack_on(mount: beneath.Mount, inodes: dict[str, int]) -> Stack:
    """The block devices above the live images."""
    return Stack(mount.device, set(inodes.values()), beneath.loops())


def look(mountpoint: str, inodes: dict[str, int], writable: dict[str, int]) -> Usage:
    """Who uses the images. `writable` has how many handles can write to each, as the daemon counts them."""
    mount = own_mount(mountpoint)
    if mount is None:
        return Usage(unknown=[f"{mountpoint} does not show this mount any more, so its users are not known"])
    stack = stack_on(mount, inodes)
    by_inode = {inode: path for path, inode in inodes.items()}
    found = Usage(handles=dict.fromkeys(inodes, 0))
    for loop in stack.on_files:
        found.handles[by_inode[loop.backing_inode]] += not loop.read_only
    if stack.levels:
        _Owners(stack, found).find()
    wanted = Wanted([(mount.device, inode) for inode in inodes.values()], list(stack.levels))
    more = any(count > found.handles[path] for path, count in writable.items())
    if found.idle or found.unknown or more:
        search = Search(wanted, mappings=True).found()
        found.writers += search.writers
        if stack.levels:  # without a device the count of handles says it all
            found.unknown += search.unseen
    elif found.targets:
        found.wanted = wanted
    return found


class _Owners:
    """The search for the owners of the devices of the stack."""

    def __init__(self, stack: Stack, found: Usage) -> None:
        self._stack = stack
        self._found = found
        self._mounts = beneath.mounts()
        self._everywhere: list[beneath.Mount] | None = None
        self._members = {
            fsid: devices for fsid, devices in users.btrfs_members().items() if devices & stack.levels.keys()
        }
        self._owned: set[int] = set()
        self._levels: dict[str, int] = {}  #: of the targets, by name

    def find(self) -> None:
        for devices in self._stack.found():
            self._owned |= {device for device in devices if self._has_known_owner(device)}
            for device in devices:
                if device in self._owned | self._stack.read_only:
                    continue
                if not self._stack.is_decided_by_others(device, self._owned):
                    self._probe(device)
        self._found.targets.sort(key=lambda target: -self._levels[target.name])

    def _has_known_owner(self, device: int) -> bool:
        if any(mount.device == device for mount in self._mounts):
            self._add_mounted(device, self._mounts)
        elif any(device in members for members in self._members.values()):
            self._add_btrfs(device)
        elif any(swap.device == device for swap in users.swaps()):
            self._found.writers.append(f"{node_of(device)} is in use as swap space")
        else:
            return bool(self._stack.holders[device])
        return True

    def _probe(self, device: int) -> None:
        path = node_of(device)
        if not blocks.is_held(path):
            self._found.idle.append(path)
            return
        self._owned.add(device)
        mounts = self._mounts_everywhere()
        if any(mount.device == device for mount in mounts):
            self._add_mounted(device, mounts)
        elif filesystem := reaching.find_mounted(path):
            self._add(Target(path, device, filesystem, "", []), device)
        else:
            self._found.unknown.append(f"{path} has an owner that does not show (ZFS, a program with O_EXCL, a log)")

    def _mounts_everywhere(self) -> list[beneath.Mount]:
        if self._everywhere is None:
            self._everywhere = beneath.all_mounts()
        return self._everywhere

    def _add_mounted(self, device: int, mounts: list[beneath.Mount]) -> None:
        fitting = [mount for mount in mounts if mount.device == device]
        target = Target(node_of(device), device, fitting[0].filesystem, "", _places(fitting))
        self._add(target, device)
        self._note_recovery(fitting[0], target)

    def _add_btrfs(self, device: int) -> None:
        fsid = next(fsid for fsid, members in self._members.items() if device in members)
        if any(target.fsid == fsid for target in self._found.targets):
            return
        fitting = self._btrfs_from(self._members[fsid], self._mounts)
        if not fitting:
            fitting = self._btrfs_from(self._members[fsid], self._mounts_everywhere())
        target = Target(node_of(device), device, _BTRFS, fsid, _places(fitting))
        self._add(target, device)
        if fitting:
            self._note_recovery(fitting[0], target)

    def _add(self, target: Target, device: int) -> None:
        level = self._stack.levels[device]
        below = {device}
        if target.fsid:
            below = set(self._members[target.fsid])
            level = max(self._stack.levels.get(member, 0) for member in below)
            # A file there has the number of its subvolume. (Files of other subvolumes are not found.)
            for number in _file_device_of(target):
                self._stack.add_files_of(number, level)
        self._levels[target.name] = level
        self._found.targets.append(target)
        others = {disk for one in below for disk in lower_disks(one)} - self._stack.levels.keys()
        if others:
            names = " and ".join(sorted(map(node_of, others)))
            self._found.notes.append(f"{target.words} is partly on {names}, which the snapshot does not have")

    def _note_recovery(self, mount: beneath.Mount, target: Target) -> None:
        if _WITHOUT_RECOVERY & set(mount.super_options.split(",")):
            self._found.unknown.append(f"{target.words} was mounted without recovery, so it may be that it needs it")

    def _btrfs_from(self, members: set[int], mounts: list[beneath.Mount]) -> list[beneath.Mount]:
        return [mount for mount in mounts if mount.filesystem == _BTRFS and _device_at(mount.source) in members]


def _device_at(path: str) -> int:
    try:
        return os.stat(path).st_rdev if path.startswith("/dev/") else 0
    except OSError:
        return 0


def _places(mounts: list[beneath.Mount]) -> list[Place]:
    own = os.getpid()
    return [
        Place(mount.id, 0 if mount.pid == own else mount.pid, mount.mountpoint, users.mount_words(mount))
        for mount in mounts
    ]


def _file_device_of(target: Target) -> list[int]:
    try:
        fd, _ = reaching.open_target(target)
    except OSError:
        return []
    try:
        return [os.fstat(fd).st_dev]
    finally:
        os.close(fd)
