"""The directory to mount on: whether a file system can be mounted there, and what to do when not.

What is mounted there now may hang, so it is looked at in a thread that can be abandoned.
"""

import errno
import os
import stat
import threading

from cow.errors import RefusedError
from hcpfs.system import beneath

_LOOK_SECONDS = 5.0
_ADVICE = {
    errno.ENOENT: "make the directory first: mkdir -p {0}",
    errno.ENOTDIR: "a part of the path is a file and no directory: correct the path",
    errno.EACCES: "you may not go there: choose a directory of your own, or be root",
    errno.EPERM: "you may not go there: choose a directory of your own, or be root",
    errno.ELOOP: "the symbolic links in it lead in a circle: name the directory itself",
    errno.ENAMETOOLONG: "a name in it has more than 255 bytes, or the path more than 4095: choose a shorter one",
    errno.ENOTCONN: "hcpfs recover {0} gets it going again",
    errno.ECONNABORTED: "hcpfs recover {0} gets it going again",
    errno.ESTALE: "what is mounted there is gone from its server: umount -l {0}",
    errno.EIO: "the file system or the disk that it is on has failed: look at the kernel's log (dmesg)",
}
_OTHERWISE = "choose another directory"
_NOT_OURS = "what is mounted there is dead, and is no hcpfs: umount -l {0}"


def check(path: str) -> None:
    """Raise RefusedError unless a file system can be mounted at `path`."""
    try:
        is_directory = _look(path)
    except OSError as error:
        number = error.errno or errno.EIO
        advice = _ADVICE.get(number, _OTHERWISE)
        if number in (errno.ENOTCONN, errno.ECONNABORTED) and not is_served(path):
            advice = _NOT_OURS
        raise RefusedError(
            f"the mount point {path} cannot be used ({error.strerror}): {advice.format(path)}"
        ) from error
    if not is_directory:
        raise RefusedError(f"the mount point {path} is not a directory: name a directory")
    if is_served(path):
        raise RefusedError(f"an hcpfs is mounted at {path} already: unmount it first, or choose another directory")


def is_served(path: str) -> bool:
    """Whether an hcpfs is mounted there, dead or alive."""
    return any(mount.mountpoint == path and mount.filesystem == beneath.FILESYSTEM_TYPE for mount in beneath.mounts())


def _look(path: str) -> bool:
    """Whether it is a directory. Raises OSError, and RefusedError when it does not answer."""
    found: list[bool | OSError] = []

    def look() -> None:
        try:
            is_directory = stat.S_ISDIR(os.stat(path).st_mode)
            if is_directory:
                os.listdir(path)  # stat(2) may still succeed on the mount of a dead daemon
            found.append(is_directory)
        except OSError as error:
            found.append(error)

    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    looking.join(_LOOK_SECONDS)
    if not found:
        raise RefusedError(
            f"the mount point {path} does not answer within {_LOOK_SECONDS:g} s: what is mounted there hangs; "
            f"{'hcpfs recover --force' if is_served(path) else 'umount -l'} {path} takes it away"
        )
    if isinstance(found[0], OSError):
        raise found[0]
    return found[0]
