"""Writing back what sits on the images, before the daemon ends: a process of its own, which ends with the daemon.

All of it goes through the daemon's own mount, so the daemon cannot do it itself (see hcpfs/quiesce/freezer.py), and the
freezer may be busy, stopped, or ended by the signal that ends the daemon. What is found is in levels: on level 0 the
file systems of loop devices on the images, on level 1 those of loop devices on files of level 0, and so on; another
hcpfs that has its source there counts as a file system. The innermost level is written back first. Everything on a
level is written back at the same time; what does not finish delays the rest by half of the time left, at most.

One request on standard input, a line for each thing on standard output, all of them JSON:

    {"mountpoint": PATH, "device": NUMBER, "images": [PATH, ...], "seconds": N}
    ->  {"begun": [WHAT, ...]}    that a level has these
        {"done": WHAT}   {"failed": WHAT, "reason": SENTENCE}
        {"end": true}
"""

import ctypes
import errno
import json
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from hcpfs.daemon import record
from hcpfs.system import beneath

IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)  #: they may go to the whole group

_libc = ctypes.CDLL(None, use_errno=True)


class Step(NamedTuple):
    """One thing to be written back: its name for people, and how."""

    what: str
    write_back: Callable[[], None]


@dataclass
class _Level:
    """What sits on the files of the level below: from the top to the bottom."""

    file_systems: list[Step] = field(default_factory=list)
    devices: list[Step] = field(default_factory=list)  #: built on loop devices: partitions, RAID and so on
    loops: list[Step] = field(default_factory=list)

    def rounds(self) -> Iterable[list[Step]]:
        return filter(None, (self.file_systems, self.devices, self.loops))


def _levels(device: int, own: str) -> list[_Level]:
    """What sits on the files of the file system with that device number, the innermost last."""
    found: list[_Level] = []
    loops = list(beneath.loops())
    file_systems = _file_systems()
    nested = list(_nested(own))
    below, seen = {device}, {device}
    while here := [loop for loop in loops if loop.backing_device in below]:
        level = _Level(loops=[Step(loop.path, _flusher(loop.path)) for loop in here])
        numbers = {loop.device for loop in here}
        built = set().union(*(beneath.devices_above(number) for number in numbers))
        level.devices = [Step(name, _flusher(name)) for name in map(_name, sorted(built - numbers))]
        names = {_name(number): number for number in built}
        above: set[int] = set()
        explained: set[int] = set()
        for number, mounts in file_systems.items():
            mount = mounts[0]
            on = number if number in built else names.get(mount.source)  # btrfs shows an anonymous device number
            if on is not None:
                what = f"{mount.mountpoint} ({mount.filesystem} on {mount.source})"
                level.file_systems.append(Step(what, _syncer(mounts)))
                above.add(number)
                explained.add(on)
        for other in nested:
            if other.sources & (built | above) and other.device not in seen:
                level.file_systems.append(Step(f"{other.mountpoint} (hcpfs)", other.write_back))
                above.add(other.device)
                explained |= other.sources
        hidden = [name for name, number in names.items() if number not in explained and _is_held(name)]
        if hidden and not explained & built:  # as a partition holds its disk
            level.file_systems.append(Step(f"what holds {' '.join(sorted(hidden))}", os.sync))
        found.append(level)
        below = above - seen
        seen |= above
    return found


def _file_systems() -> dict[int, list[beneath.Mount]]:
    """The mounts of block devices by device number, in all mount namespaces."""
    found: dict[int, list[beneath.Mount]] = {}
    for mount in beneath.all_mounts():
        if mount.source.startswith("/dev/"):
            found.setdefault(mount.device, []).append(mount)
    return found


def _is_held(device: str) -> bool:
    """Whether something has the block device for itself: a file system, swap, RAID."""
    try:
        os.close(os.open(device, os.O_RDONLY | os.O_EXCL | os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError as error:
        return error.errno == errno.EBUSY
    return False


class _Nested(NamedTuple):
    """Another hcpfs. `sources` has the device number of each, and that of its file system if it is a file."""

    mountpoint: str
    device: int
    sources: set[int]
    images: list[str]

    def write_back(self) -> None:
        for image in self.images:
            _fsync(os.path.join(self.mountpoint, "live", image))


def _nested(own: str) -> Iterable[_Nested]:
    shown = {
        mount.mountpoint: mount.device for mount in beneath.mounts() if mount.filesystem == beneath.FILESYSTEM_TYPE
    }
    for other in record.others(own):
        if not other.is_alive or other.mountpoint not in shown:
            continue
        words = other.arguments[1 : other.arguments.index(other.mountpoint)]
        sources = set()
        for path in (word if word.startswith("/") else word.partition("=")[2] for word in words):
            with suppress(OSError):
                kind = os.stat(path)
                sources |= {kind.st_rdev, kind.st_dev} - {0}
        yield _Nested(other.mountpoint, shown[other.mountpoint], sources, other.images)


def _name(device: int) -> str:
    return f"/dev/{beneath.name_of(device)}"


def _fsync(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _flusher(path: str) -> Callable[[], None]:
    """For a block device: its page cache, then the caches of what it is on."""
    return lambda: _fsync(path)


def _syncer(mounts: list[beneath.Mount]) -> Callable[[], None]:
    """For a file system: syncfs(2) at the first mount that is not hidden by another one, else sync(2)."""

    def write_back() -> None:
        for mount in mounts:
            try:
                fd = os.open(f"/proc/{mount.pid}/root{mount.mountpoint}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            except OSError:
                continue
            try:
                if f"mnt_id:\t{mount.id}\n" in Path(f"/proc/self/fdinfo/{fd}").read_text():
                    if _libc.syncfs(fd) != 0:
                        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
                    return
            finally:
                os.close(fd)
        os.sync()

    return write_back


class _Reporter:
    """Tells the daemon, and ends this process when there is none any more."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def tell(self, **values: Any) -> None:
        with self._lock:
            try:
                print(json.dumps(values), flush=True)
            except BrokenPipeError:
                os._exit(0)


def do_all(steps: list[Step], seconds: float, tell: Callable[..., None]) -> None:
    """Do all of it at the same time; returns when all has ended, or after so long."""
    ended: queue.SimpleQueue[None] = queue.SimpleQueue()

    def do(step: Step) -> None:
        try:
            step.write_back()
            tell(done=step.what)
        except OSError as error:
            tell(failed=step.what, reason=error.strerror or str(error))
        finally:
            ended.put(None)

    tell(begun=[step.what for step in steps])
    for step in steps:
        threading.Thread(target=do, args=(step,), daemon=True).start()
    deadline = time.monotonic() + seconds
    for _ in steps:
        try:
            ended.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            return


def main() -> None:
    """Write back, and say of each thing what became of it."""
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    request = json.loads(sys.stdin.readline())
    tell = _Reporter().tell
    deadline = time.monotonic() + request["seconds"]
    levels = _levels(request["device"], request["mountpoint"])
    for level in reversed(levels):
        for steps in level.rounds():
            do_all(steps, (deadline - time.monotonic()) / 2, tell)
    images = [os.path.join(request["mountpoint"], image) for image in request["images"]]
    do_all([Step(image, _flusher(image)) for image in images], deadline - time.monotonic(), tell)
    tell(end=True)
    sys.stdout.flush()
    os._exit(0)  # a thread that waits in the kernel must not hold the exit up


if __name__ == "__main__":
    main()
