"""The freezer: a small process that freezes file systems, and thaws them whatever happens.

A freeze (FIFREEZE) outlives the process that asked for it, and processes that write meanwhile cannot even be killed. So
this helper freezes and not the daemon. Its memory is locked. It holds the file descriptors, and thaws when it is told
to, when the time is over, and when its pipe to the daemon breaks. A file system that somebody else froze (EBUSY) stays
frozen.

It also does everything else that goes through the daemon's own mount. A thread of the daemon that waits for an answer
of the daemon cannot be killed and keeps /dev/fuse open, so after a kill -9 the mount would hang for ever. This process
gets ENOTCONN then.

One request a line on standard input, one answer a line on standard output, both JSON. IMAGES are the inodes of the live
images by their paths below the mount point; a TARGET is a hcpfs.quiesce.reaching.Target:

    {"write_back": IMAGES, "mountpoint": PATH}  ->  {"notes": [SENTENCE, ...]}
        have cached writes to the images, and to the block devices on them, written back
    {"look": IMAGES, "mountpoint": PATH, "writable": {IMAGE: COUNT}}  ->  a hcpfs.quiesce.usage.Usage
    {"freeze": [TARGET, ...], "seconds": N, "wanted": WANTED}
            ->  {"frozen": {NAME: PLACE, ...}, "refused": {NAME: REASON, ...}}
        freeze them in this order; and look for the programs that have WANTED open, a hcpfs.quiesce.writers.Wanted,
        or null for none
    {"rescue": [TARGET, ...]}  ->  {"thawed": N}
        thaw what an earlier freezer had frozen when it was killed
    {"thaw": true}  ->  {"thawed": N, "late": BOOL, "writers": [SENTENCE, ...], "unseen": [SENTENCE, ...]}
        late: the time was over before; the sentences are those of hcpfs.quiesce.writers.Found
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

from hcpfs.quiesce import usage
from hcpfs.quiesce.reaching import Target, open_target
from hcpfs.quiesce.writers import Found, Search, Wanted
from hcpfs.system.flushing import fsync, sync_file_system
from hcpfs.system.memory import lock_memory

_FIFREEZE = 0xC0045877
_FITHAW = 0xC0045878


class _Frozen:
    """The file systems that are frozen now, by descriptor."""

    def __init__(self) -> None:
        self.descriptors: list[int] = []

    def freeze(self, targets: list[Target]) -> dict[str, Any]:
        frozen, refused = {}, {}
        for target in targets:
            try:
                fd, place = open_target(target)
            except OSError as error:
                refused[target.name] = str(error.strerror)
                continue
            try:
                fcntl.ioctl(fd, _FIFREEZE, 0)
            except OSError as error:
                refused[target.name] = "somebody else froze it" if error.errno == errno.EBUSY else _synced(fd, error)
                os.close(fd)
                continue
            self.descriptors.append(fd)
            frozen[target.name] = place
        return {"frozen": frozen, "refused": refused}

    def thaw(self) -> int:
        thawed = 0
        while self.descriptors:
            fd = self.descriptors.pop()  # the last one first: it is on the others, if anything
            try:
                fcntl.ioctl(fd, _FITHAW, 0)
                thawed += 1
            except OSError:
                pass  # thawed by somebody else meanwhile; there is nothing left to undo
            finally:
                os.close(fd)
        return thawed


def _synced(fd: int, refusal: OSError) -> str:
    """Why a file system was not frozen, such as vfat, which cannot be; what was written before is synced instead."""
    try:
        sync_file_system(fd)
    except OSError as error:
        return f"{refusal.strerror}; nor was it synced: {error.strerror}"
    return f"{refusal.strerror}; it was synced before"


def _rescue(targets: list[Target]) -> int:
    """Thaw what a freezer had frozen that was killed, because the freeze outlives it."""
    thawed = 0
    for target in reversed(targets):
        try:
            fd, _ = open_target(target)
            try:
                fcntl.ioctl(fd, _FITHAW, 0)
                thawed += 1
            finally:
                os.close(fd)
        except OSError:
            continue  # it was not frozen, or is not mounted any more
    return thawed


def _write_back(mountpoint: str, inodes: dict[str, int]) -> dict[str, Any]:
    mount = usage.own_mount(mountpoint)
    if mount is None:
        return {"notes": []}  # `look` says it
    notes = usage.stack_on(mount, inodes).write_back()
    for path in inodes:
        try:
            fsync(os.path.join(mountpoint, path))
        except OSError as error:
            notes.append(f"cached writes to {path} were not written back: {error.strerror}")
    return {"notes": notes}


def _lines(deadline: float | None) -> str | None:
    """The next line from the daemon; "" when the pipe is broken, None when the time is over."""
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


def _targets(values: list[Any]) -> list[Target]:
    return [Target.from_json(value) for value in values]


def main() -> None:
    """Serve until the pipe breaks or a SIGTERM comes; then nothing is left frozen."""
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    lock_memory()
    frozen = _Frozen()
    search: Search | None = None
    deadline: float | None = None
    late = False
    try:
        while (line := _lines(deadline)) != "":
            if line is None:
                frozen.thaw()
                deadline, late = None, True
                continue
            request = json.loads(line)
            if "write_back" in request:
                _answer(_write_back(request["mountpoint"], request["write_back"]))
            elif "look" in request:
                _answer(vars(usage.look(request["mountpoint"], request["look"], request["writable"])))
            elif "rescue" in request:
                _answer({"thawed": _rescue(_targets(request["rescue"]))})
            elif "freeze" in request:
                late = False
                deadline = time.monotonic() + request["seconds"]
                search = Search(Wanted(*request["wanted"])) if request["wanted"] else None
                reply = frozen.freeze(_targets(request["freeze"]))
                if time.monotonic() >= deadline:
                    frozen.thaw()
                    deadline, late = None, True
                _answer(reply)
            else:
                thawed = frozen.thaw()
                deadline = None
                found = search.found() if search else Found([], [])
                _answer({"thawed": thawed, "late": late, **found._asdict()})
                search = None
    finally:
        frozen.thaw()


if __name__ == "__main__":
    main()
