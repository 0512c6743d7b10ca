"""The file system at a mount point, as the freezer wants to be told of it."""

from pathlib import Path

from hcpfs.quiesce.reaching import Place, Target
from hcpfs.system import beneath
from hcpfs.system.blocks import node_of


def target_at(files: Path) -> Target:
    """The file system that is mounted there."""
    mount = next(one for one in beneath.mounts() if one.mountpoint == str(files))
    place = Place(mount.id, 0, mount.mountpoint, mount.mountpoint)
    return Target(node_of(mount.device), mount.device, mount.filesystem, "", [place])


def name_at(files: Path) -> str:
    """Its device."""
    return target_at(files).name
