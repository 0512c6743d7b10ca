"""What commands ask a mount: its `status`."""

import errno
from pathlib import Path

from hcpfs.commands.saying import Sentence
from hcpfs.system import beneath
from hcpfs.tree.lines import pairs


def status_at(path: str) -> dict[str, str]:
    """The values in `status` of the hcpfs at `path`. Raises Sentence when none is there, or it is dead."""
    try:
        kinds = [mount.filesystem for mount in beneath.mounts() if mount.mountpoint == path]
        if kinds and kinds[-1] == beneath.FILESYSTEM_TYPE:
            return pairs(Path(path, "status").read_bytes())
    except OSError as error:
        if error.errno == errno.ENOTCONN:
            raise dead(path) from error
        raise Sentence(f"{path} cannot be read: {error.strerror}") from error
    raise Sentence(f"no hcpfs is mounted at {path}")


def dead(path: str) -> Sentence:
    """To be raised when the daemon of a mount is dead."""
    return Sentence(f"the daemon of {path} is dead: hcpfs recover {path} gets it going again")
