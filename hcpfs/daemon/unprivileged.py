"""What a user other than root may not do, said before anything is made, and what does not work for him."""

import os
import re
import shutil
from pathlib import Path

from cow.errors import RefusedError
from hcpfs.options import MountOptions

_FUSE, _FUSERMOUNT, _CONFIGURATION = "/dev/fuse", "fusermount3", "/etc/fuse.conf"
NOTE = (
    "not root: mkdir does not freeze a file system that is mounted on an image; loop devices on the images, and "
    "mounting them, are root's to set up, who cannot see them without allow_other"
)


def check(options: MountOptions) -> None:
    """Raise RefusedError for what is not permitted to this user. Root may do everything."""
    if os.geteuid() == 0:
        return
    if not os.access(_FUSE, os.R_OK | os.W_OK):
        raise RefusedError(f"you may not open {_FUSE}: have root load fuse (modprobe fuse), or chmod 0666 it")
    if shutil.which(_FUSERMOUNT) is None:
        raise RefusedError(f"without {_FUSERMOUNT} only root can mount: install the package fuse3")
    if not os.access(options.mountpoint, os.W_OK):
        raise RefusedError(
            f"you may not write to the mount point {options.mountpoint}, so that {_FUSERMOUNT} refuses it: choose a "
            f"directory of your own"
        )
    if options.allow_other and not _others_are_allowed():
        raise RefusedError(f"allow_other needs the line user_allow_other in {_CONFIGURATION}: ask root, or go without")
    if options.access._replace(mode=0) != (os.geteuid(), os.getegid(), 0) and not options.allow_other:
        raise RefusedError("uid= and gid= of others are of no use without allow_other, as only you may use the mount")
    for source in options.sources:
        _check_source(source.path, read_only=options.read_only)


def _check_source(path: str, *, read_only: bool) -> None:
    if not os.path.exists(path):
        return  # that is refused elsewhere
    wanted, words = (os.R_OK, "read") if read_only else (os.R_OK | os.W_OK, "read and write")
    if not os.access(path, wanted):
        raise RefusedError(f"you may not {words} {path}: be root, or have root give you the right to it")


def _others_are_allowed() -> bool:
    try:
        return re.search(r"^\s*user_allow_other\b", Path(_CONFIGURATION).read_text(), re.MULTILINE) is not None
    except OSError:
        return False
