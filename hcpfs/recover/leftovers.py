"""Records of mounts that are long gone: whether anything of such a mount can be left, and which records can be removed.

A file system exists after its unmounting as long as something uses it, a loop device for example. The kernel shows that
device's file by its path within the mount, which does not tell which mount it was. But the FUSE connection ends with
the file system, so when it is gone nothing is left. The number of a connection is used again; a later record, or what
is mounted with that number, shows it.
"""

import os
import sys

from hcpfs.daemon import record
from hcpfs.daemon.record import Record
from hcpfs.system import beneath, loops, probe

_LOOK_SECONDS = 5.0
_SOME_GONE = 9
# Run in a child, because the paths may lead through a file system that hangs. Only ENOENT and ENOTDIR mean "gone".
_LOOK = f"""import os, sys
for path in sys.argv[1:]:
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        sys.exit({_SOME_GONE})
    except OSError:
        pass
"""


def is_gone(one: Record, mounts: list[beneath.Mount]) -> bool:
    """Whether it is proved that nothing of the mount is left. `mounts`: those of all namespaces.

    False also where it cannot be told: for the record of an older version, or if the connections cannot be listed.
    """
    if one.is_alive or one.lingers:
        return False
    if one.boot and one.boot != record.boot():
        return True
    if not one.device:
        return False
    later = (other for other in record.others(one.mountpoint) if other.boot == one.boot)
    if any(other.device == one.device and other.mounted_ns > one.mounted_ns for other in later):
        return True
    shown = [mount for mount in mounts if mount.device == one.device]
    ours = beneath.FILESYSTEM_TYPE, one.source
    if shown and all((mount.filesystem, mount.source) != ours for mount in shown):
        return True
    try:
        return os.minor(one.device) not in probe.connections()
    except OSError:
        return False


def can_be_of(one: Record, state: loops.LoopState) -> bool:
    """Whether the loop device may be on an image of the mount: by its name, and its size if the record has one."""
    name = state.file.removesuffix(loops.DELETED).rpartition("/")[2]
    if name not in one.images:
        return False
    if not one.sizes or state.offset or state.size_limit or not state.size_bytes:
        return True
    return one.sizes[one.images.index(name)] // loops.SECTOR_BYTES * loops.SECTOR_BYTES == state.size_bytes


def tidy(*, but: str | None = None) -> None:
    """Remove the records that no recovery could use, except that for the mount point `but`.

    Their daemon is dead, nothing of the mount is left, no recovery has noted there what it took down, and the mount
    point, the store or a source does not exist any more. Raises OSError.
    """
    dead = [one for one in record.others(but) if not (one.is_alive or one.above) and _lacks_something(one)]
    mounts = beneath.all_mounts() if dead else []
    for one in dead:
        if is_gone(one, mounts):
            record.remove(one.mountpoint, one.pid)


def _lacks_something(one: Record) -> bool:
    paths = [one.mountpoint, *one.sources, *([one.store] if one.store else [])]
    code, _ = probe.attempt([sys.executable, "-I", "-S", "-c", _LOOK, *paths], _LOOK_SECONDS)
    return code == _SOME_GONE
