"""What sits on a dead mount: loop devices on its images, file systems on those, loop devices on files there, and so on.

Found without a request to any of them: mountinfo and sysfs answer also when the file systems themselves never would.
"""

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from hcpfs.recover.doomed import owner_of
from hcpfs.system import beneath, blocks, loops, users


@dataclass
class LoopAbove:
    """A loop device. On level 0 it is on an image, on level 1 on a file of a file system that is on level 0."""

    level: int
    state: loops.LoopState


@dataclass
class MountAbove:
    """A mount of the device `source`, named as in /dev. `depth` counts the mounts above it in the tree of mounts."""

    level: int
    depth: int
    id: int
    parent: int
    source: str
    mountpoint: str
    filesystem: str
    root: str
    options: str
    super_options: str
    namespace: int = 0  #: the mount namespace, if it is not ours

    @property
    def read_only(self) -> bool:
        """Whether the mount is read-only. A file system that fails makes itself read-only, not its mounts."""
        return "ro" in self.options.split(",")


@dataclass
class SwapAbove:
    """Swap space on the device `source`, named as in /dev, or, with no source, on the file `path` of a file system."""

    source: str
    path: str
    priority: int


@dataclass
class Above:
    """All that sits on the mount, and its other mounts: bind mounts, and copies in other namespaces."""

    loops: list[LoopAbove] = field(default_factory=list)
    mounts: list[MountAbove] = field(default_factory=list)
    binds: list[MountAbove] = field(default_factory=list)
    swaps: list[SwapAbove] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The fields as plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Above":
        """From plain values. Raises TypeError or KeyError for what `to_json` did not make."""
        if not values:
            return cls()
        return cls(
            [LoopAbove(one["level"], loops.LoopState(*one["state"])) for one in values["loops"]],
            [MountAbove(**one) for one in values["mounts"]],
            [MountAbove(**one) for one in values["binds"]],
            [SwapAbove(**one) for one in values.get("swaps", ())],
        )

    def add(self, older: "Above") -> None:
        """Add what an earlier recovery took down and did not put back."""
        names = {loop.state.name for loop in self.loops}
        self.loops += [loop for loop in older.loops if loop.state.name not in names]
        for mine, others in ((self.mounts, older.mounts), (self.binds, older.binds)):
            places = {(mount.mountpoint, mount.source, mount.namespace) for mount in mine}
            mine += [mount for mount in others if (mount.mountpoint, mount.source, mount.namespace) not in places]
        paths = {swap.path for swap in self.swaps}
        self.swaps += [swap for swap in older.swaps if swap.path not in paths]


def find(mounts: list[beneath.Mount], image_of: Callable[[loops.LoopState], str | None]) -> Above:
    """What sits on the images. `image_of` gives the path of a loop device's image, or None if it is on none.

    `mounts` are those of all namespaces, our own with the number 0. The dead mount's other mounts are not included (see
    `binds_of`).
    """
    found = Above()
    states = loops.states()
    here = [mount for mount in mounts if not mount.namespace]
    current = [state._replace(file=image) for state in states if (image := image_of(state)) is not None]
    level = 0
    while current:
        known = {loop.state.name for loop in found.loops}
        current = [state for state in current if state.name not in known]
        found.loops += [LoopAbove(level, state) for state in current]
        mounted = [
            _above(mounts, mount, source, level) for state in current for mount, source in _mounts_of(mounts, state)
        ]
        ids = {mount.id for mount in found.mounts}
        mounted = list({mount.id: mount for mount in mounted if mount.id not in ids}.values())
        found.mounts += mounted
        ids = {mount.id for mount in mounted}
        current = [state for state in states if (owner := owner_of(here, state.file)) and owner.id in ids]
        level += 1
    devices = {number for loop in found.loops for number in blocks.devices_above(loop.state.device)}
    ids = {mount.id for mount in found.mounts}
    for swap in users.swaps():
        if swap.device in devices:
            found.swaps.append(SwapAbove(blocks.name_of(swap.device), swap.path, swap.priority))
        elif not swap.device and (owner := owner_of(here, swap.path)) and owner.id in ids:
            found.swaps.append(SwapAbove("", swap.path, swap.priority))
    return found


def _mounts_of(mounts: list[beneath.Mount], state: loops.LoopState) -> Iterable[tuple[beneath.Mount, str]]:
    names = {device: blocks.name_of(device) for device in blocks.devices_above(state.device)}
    for mount in users.mounts_from(mounts, state.device):
        # btrfs shows an anonymous device number.
        yield mount, names.get(mount.device) or mount.source.removeprefix("/dev/")


def _above(mounts: list[beneath.Mount], mount: beneath.Mount, source: str, level: int) -> MountAbove:
    by_id = {one.id: one for one in mounts}
    depth, seen = 0, mount
    while seen.parent in by_id and seen.parent != seen.id:
        seen = by_id[seen.parent]
        depth += 1
    return MountAbove(
        level, depth, mount.id, mount.parent, source, mount.mountpoint, mount.filesystem, mount.root,
        mount.options, mount.super_options, mount.namespace,
    )  # fmt: skip


def binds_of(mounts: list[beneath.Mount], dead: beneath.Mount) -> list[MountAbove]:
    """The other mounts of the dead mount's file system; their `source` is empty."""
    return [_above(mounts, mount, "", 0) for mount in mounts if mount.device == dead.device and mount.id != dead.id]


def images_on(mounts: list[beneath.Mount], dead: beneath.Mount) -> Callable[[str], str | None]:
    """For a dead mount that is still there: the image for the path of a loop device's file as sysfs shows it."""

    def image_of(shown: str) -> str | None:
        path = shown.removesuffix(loops.DELETED)
        owner = owner_of(mounts, path)
        if owner is None or owner.device != dead.device:
            return None
        # Through a bind mount the path does not begin with the mount point.
        inside = os.path.relpath(path, owner.mountpoint)
        return os.path.normpath(os.path.join(dead.mountpoint, owner.root.lstrip("/"), inside))

    return image_of


def images_of_detached(mountpoint: str, names: Iterable[str]) -> Callable[[str], str | None]:
    """The same for a lazily unmounted mount: the kernel shows the paths of its files from its root on."""
    pattern = re.compile(rf"/(live|snaps/[^/]+)/({'|'.join(map(re.escape, names))})")

    def image_of(shown: str) -> str | None:
        path = shown.removesuffix(loops.DELETED)
        return mountpoint + path if pattern.fullmatch(path) else None

    return image_of
