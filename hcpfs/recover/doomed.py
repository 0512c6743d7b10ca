"""What a recovery cannot put back, in words: files that programs have open on the dead mount, and overlays."""

import time
from collections.abc import Collection

from hcpfs.daemon import record
from hcpfs.system import beneath, users

_PATIENCE_SECONDS = 1.0  # for programs that end by themselves once they get an error
_POLL_SECONDS = 0.05
_OVERLAY_DIRECTORIES = ("lowerdir", "upperdir", "workdir", "lowerdir+", "datadir+")


def programs(devices: Collection[int]) -> list[str]:
    """The programs that after a moment still use one of the file systems or block devices with these numbers."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while (found := users.of_any(devices)) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    return [f"{user.words}{_remedy(user.pid)}" for user in found]


def _remedy(pid: int) -> str:
    for one in record.others(None):
        if one.pid == pid and one.is_alive:
            return f", the daemon of the hcpfs at {one.mountpoint}: unmount that, and mount it again"
    return ""


def overlays(mounts: list[beneath.Mount], victims: Collection[int]) -> list[beneath.Mount]:
    """The overlay mounts with a layer on one of the mounts with these ids; they keep the dead file system."""
    found = []
    for mount in mounts:
        if mount.filesystem != "overlay":
            continue
        there = [one for one in mounts if one.namespace == mount.namespace]
        owners = [owner_of(there, path) for path in _layers(mount)]
        if any(owner is not None and owner.id in victims for owner in owners):
            found.append(mount)
    return found


def _layers(overlay: beneath.Mount) -> list[str]:
    pairs = (option.partition("=") for option in overlay.super_options.split(","))
    return [path for key, _, value in pairs if key in _OVERLAY_DIRECTORIES for path in value.split(":") if path]


def owner_of(mounts: list[beneath.Mount], path: str) -> beneath.Mount | None:
    """The mount that a path is on, told by the names alone; None when no mount has it."""
    fitting = [mount for mount in mounts if f"{path}/".startswith(f"{mount.mountpoint.rstrip('/')}/")]
    return max(reversed(fitting), key=lambda mount: len(mount.mountpoint), default=None)
