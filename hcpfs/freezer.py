"""The freezer: a small process that freezes file systems and is sure to thaw them.

FIFREEZE outlives the process that asked for it, and whoever writes meanwhile cannot even be killed. So it is not the
daemon that freezes but this helper, its memory locked: it holds the file descriptors and thaws when told, when the
time is over, and when its pipe to the daemon breaks. A file system that somebody else froze (EBUSY) stays frozen.

It also does whatever else goes through the daemon's own mount. A thread of the daemon that waits for an answer of the
daemon cannot be killed and keeps /dev/fuse open, so after a kill -9 the mount would hang for ever; here the wait ends
with ENOTCONN.

One request a line on standard input, one answer a line on standard output, both JSON:

    {"find": {IMAGE: INODE, ...}, "mountpoint": PATH}  ->  {"mounted": [PATH, ...], "notes": [SENTENCE, ...]}
        has cached writes to the images (paths below the mount point) written back, and finds the file systems that are
        mounted from loop devices on them
    {"freeze": [PATH, ...], "seconds": N}  ->  {"frozen": [PATH, ...], "refused": {PATH: REASON, ...}}
    {"rescue": [PATH, ...]}                ->  {"thawed": N, "late": false}    after the death of a freezer before
    {"thaw": true}                         ->  {"thawed": N, "late": BOOL}     late: the time was over before
"""

import errno
import fcntl
import json
import os
import select
import signal
import sys
import time
from types import FrameType
from typing import Any

from hcpfs import beneath
from hcpfs.process import lock_memory

_FIFREEZE = 0xC0045877
_FITHAW = 0xC0045878


class _Frozen:
    """The file systems that are frozen now, by descriptor."""

    def __init__(self) -> None:
        self.descriptors: list[int] = []

    def freeze(self, paths: list[str]) -> dict[str, Any]:
        frozen, refused = [], {}
        for path in paths:
            try:
                fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except OSError as error:
                refused[path] = str(error.strerror)
                continue
            try:
                fcntl.ioctl(fd, _FIFREEZE, 0)
            except OSError as error:
                os.close(fd)
                refused[path] = "somebody else froze it" if error.errno == errno.EBUSY else str(error.strerror)
                continue
            self.descriptors.append(fd)
            frozen.append(path)
        return {"frozen": frozen, "refused": refused}

    def thaw(self) -> int:
        thawed = 0
        while self.descriptors:
            fd = self.descriptors.pop()
            try:
                fcntl.ioctl(fd, _FITHAW, 0)
                thawed += 1
            except OSError:
                pass  # thawed by somebody else meanwhile; there is nothing left to undo
            finally:
                os.close(fd)
        return thawed


def _rescue(paths: list[str]) -> int:
    """Thaw what a freezer froze that died of a SIGKILL: the freeze outlives it."""
    thawed = 0
    for path in paths:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fcntl.ioctl(fd, _FITHAW, 0)
                thawed += 1
            finally:
                os.close(fd)
        except OSError:
            continue  # it was not frozen, or is not mounted any more
    return thawed


def _find(mountpoint: str, inodes: dict[str, int]) -> dict[str, Any]:
    own = [mount for mount in beneath.mounts() if mount.mountpoint == mountpoint]
    if not own or own[-1].filesystem != beneath.FILESYSTEM_TYPE:
        return {"mounted": [], "notes": [f"{mountpoint} does not show this mount any more"]}
    notes = []
    for path in inodes:
        try:
            fd = os.open(os.path.join(mountpoint, path), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        except OSError as error:
            notes.append(f"cached writes to {path} were not written back: {error.strerror}")
    mounted: list[str] = []
    for loop in beneath.loops_on(own[-1].device, set(inodes.values())):
        mounted += [path for path in beneath.mountpoints_of(loop.device) if path not in mounted]
    return {"mounted": mounted, "notes": notes}


def _lines(deadline: float | None) -> str | None:
    """The next line from the daemon; "" when the pipe broke, None when the time is over."""
    remaining = None if deadline is None else max(0.0, deadline - time.monotonic())
    ready, _, _ = select.select([sys.stdin], [], [], remaining)
    return sys.stdin.readline() if ready else None


def _answer(reply: dict[str, Any]) -> None:
    try:
        print(json.dumps(reply), flush=True)
    except BrokenPipeError:  # the daemon is gone, so nobody asks any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left is flushed at the exit
        raise SystemExit(0) from None


def _stop(signal_number: int, frame: FrameType | None) -> None:
    raise SystemExit(0)


def main() -> None:
    """Serve until the pipe breaks or a SIGTERM comes; nothing stays frozen."""
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    lock_memory()
    frozen = _Frozen()
    deadline: float | None = None
    late = False
    try:
        while (line := _lines(deadline)) != "":
            if line is None:
                frozen.thaw()
                deadline, late = None, True
                continue
            request = json.loads(line)
            if "find" in request:
                _answer(_find(request["mountpoint"], request["find"]))
            elif "rescue" in request:
                _answer({"thawed": _rescue(request["rescue"]), "late": False})
            elif "freeze" in request:
                late = False
                deadline = time.monotonic() + request["seconds"]
                reply = frozen.freeze(request["freeze"])
                if time.monotonic() >= deadline:
                    frozen.thaw()
                    deadline, late = None, True
                _answer(reply)
            else:
                _answer({"thawed": frozen.thaw(), "late": late})
                deadline = None
    finally:
        frozen.thaw()


if __name__ == "__main__":
    main()
