"""What can be seen to be wrong with a mount before anything is made or opened, so that a refusal leaves nothing."""

import os
import stat
from collections.abc import Sequence

from cow.config import Source
from cow.errors import RefusedError
from hcpfs.options import MountOptions
from hcpfs.system import beneath, ground, mountpoint


def check(options: MountOptions) -> None:
    """Raise RefusedError when the mount point, the store or a source cannot be used."""
    mountpoint.check(options.mountpoint)
    _check_store_place(options.store_path, options.mountpoint)
    _check_sources(options.sources)


def _check_store_place(store: str, mountpoint: str) -> None:
    """Refuse a store that would make the daemon wait for itself. # I10"""
    real = os.path.realpath(store)
    if os.path.commonpath([real, os.path.realpath(mountpoint)]) == os.path.realpath(mountpoint):
        raise RefusedError(f"the store {store} is below the mount point {mountpoint}: put it somewhere else")
    present = real
    while not os.path.exists(present):
        present = os.path.dirname(present)
    image_of = beneath.hcpfs_under(present)
    if image_of is not None:
        raise RefusedError(
            f"the store {store} is on a file system that sits on an image of the hcpfs at {image_of}: it would have to "
            f"wait for itself; put the store on another disk"
        )


def _check_sources(sources: Sequence[Source]) -> None:
    """Refuse a source that others write to. The engine's O_EXCL enforces it; this says who does, and where. # I7"""
    for source in sources:
        try:
            kind = os.stat(source.path)
        except OSError as error:
            raise RefusedError(f"{source.path} cannot be used as a source: {error.strerror}") from error
        if stat.S_ISBLK(kind.st_mode):
            _refuse_mounted(source.path, beneath.mountpoints_of(kind.st_rdev))
        with ground.held([source.path]):
            pass  # for a moment only; the daemon locks them while it serves
        _refuse_other_loops(source.path)
        if stat.S_ISREG(kind.st_mode) and ground.has_writer(source.path):
            raise RefusedError(
                f"{source.path} is open for writing in another program, whose writes would not be seen: end that "
                f"first, and let it use the live image instead"
            )


def _refuse_other_loops(path: str) -> None:
    """Refuse a source whose bytes can be written through another loop device."""
    own = ground.chain(path)
    extents = ground.extents(path)
    for loop in beneath.loops():
        if loop.path not in own and any(extent.meets(part) for extent in extents for part in ground.extents(loop.path)):
            raise RefusedError(
                f"{path} is in use by the loop device {loop.path}, whose writes would not be seen: "
                f"losetup -d it first, and set it up on the live image instead"
            )


def _refuse_mounted(path: str, mountpoints: list[str]) -> None:
    if mountpoints:
        raise RefusedError(
            f"{path} is mounted at {mountpoints[0]}, so its writes would not be seen: unmount it, and mount the live "
            f"image instead"
        )
