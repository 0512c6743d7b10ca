"""Writing back what sits on the images before the daemon ends: a process of its own, which ends with the daemon.

All of it goes through the daemon's own mount, so the daemon cannot do it itself (see hcpfs/quiesce/freezer.py), and the
freezer may be busy, stopped, or ended by the signal that ends the daemon. What sits there are devices in levels (see
hcpfs/quiesce/stack.py) and file systems on them; another hcpfs that has its source there counts as a file system. The
highest level is written back first: its file systems, then its devices. What is independent is written back at the same
time; what does not finish delays the rest by half of the time that is left, at most.

One request on standard input, a line for each thing on standard output, all of them JSON:

    {"mountpoint": PATH, "device": NUMBER, "images": [PATH, ...], "seconds": N}
    ->  {"begun": [WHAT, ...]}
        {"done": WHAT}   {"failed": WHAT, "reason": SENTENCE}
        {"end": true}
"""

import json
import os
import queue
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from hcpfs.daemon import record
from hcpfs.quiesce.stack import Stack
from hcpfs.system import beneath, blocks, users
from hcpfs.system.flushing import fsync, sync_file_system

IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)  #: they may go to the whole group


class Step(NamedTuple):
    """One thing to be written back: its name for people, and how."""

    what: str
    write_back: Callable[[], None]


class _FileSystem(NamedTuple):
    """A file system, or another hcpfs, and the devices that it is on."""

    devices: set[int]
    step: Step


def _rounds(device: int, own: str) -> list[list[Step]]:
    """What sits on the files of the file system with that device number, in the order in which it is written back.

    The steps of a round do not depend on each other.
    """
    stack = Stack(device, None, beneath.loops())
    found = _file_systems(stack, own)
    rounds: list[list[Step]] = []
    for level in sorted(set(stack.levels.values()), reverse=True):
        rounds.append([one.step for one in found if max(stack.levels[device] for device in one.devices) == level])
        paths = [blocks.node_of(device) for device in stack.top_down() if stack.levels[device] == level]
        rounds.append([Step(path, partial(fsync, path)) for path in paths])
    if rounds:
        rounds[0] += _hidden(stack, found)
    return [steps for steps in rounds if steps]


def _file_systems(stack: Stack, own: str) -> list[_FileSystem]:
    """The file systems on the devices of the stack, into which the loop devices on their files are taken."""
    mounts, nested = beneath.all_mounts(), list(_nested(own))
    found: dict[int, _FileSystem] = {}  #: by device number

    def add(number: int, device: int, step: Step) -> None:
        found.setdefault(number, _FileSystem(set(), step)).devices.add(device)
        stack.add_files_of(number, stack.levels[device])

    for device in (device for devices in stack.found() for device in devices):
        there: dict[int, list[beneath.Mount]] = {}
        for mount in users.mounts_on(mounts, {device}):
            there.setdefault(mount.device, []).append(mount)
        for number, shown in there.items():
            what = f"{shown[0].mountpoint} ({shown[0].filesystem} on {shown[0].source})"
            add(number, device, Step(what, partial(_sync, shown)))
        for other in nested:
            if other.sources & {device, *there}:
                add(other.device, device, Step(f"{other.mountpoint} (hcpfs)", other.write_back))
    return list(found.values())


def _hidden(stack: Stack, found: list[_FileSystem]) -> list[Step]:
    """Owners of devices that do not show. For them all that the kernel caches is written back: sync(2)."""
    owned = {device for one in found for device in one.devices}
    owned |= {device for device in stack.levels if stack.holders[device]}
    others = [one for one in stack.top_down() if one not in owned and not stack.is_decided_by_others(one, owned)]
    paths = sorted(path for path in map(blocks.node_of, others) if blocks.is_held(path))
    return [Step(f"what holds {' '.join(paths)}", os.sync)] if paths else []


class _Nested(NamedTuple):
    """Another hcpfs. `sources`: the device number of each source, or of its file system if it is a file."""

    mountpoint: str
    device: int
    sources: set[int]
    images: list[str]

    def write_back(self) -> None:
        for image in self.images:
            fsync(os.path.join(self.mountpoint, "live", image))


def _nested(own: str) -> Iterator[_Nested]:
    shown = {
        mount.mountpoint: mount.device for mount in beneath.mounts() if mount.filesystem == beneath.FILESYSTEM_TYPE
    }
    for other in record.others(own):
        if not other.is_alive or other.mountpoint not in shown:
            continue
        sources = set()
        for path in other.sources:
            with suppress(OSError):
                kind = os.stat(path)
                sources.add(kind.st_rdev if stat.S_ISBLK(kind.st_mode) else kind.st_dev)
        yield _Nested(other.mountpoint, shown[other.mountpoint], sources, other.images)


def _sync(mounts: list[beneath.Mount]) -> None:
    """Sync a file system at the first of its mounts that is not hidden by another one, else all of them."""
    for mount in mounts:
        try:
            fd = os.open(f"/proc/{mount.pid}/root{mount.mountpoint}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            if f"mnt_id:\t{mount.id}\n" in Path(f"/proc/self/fdinfo/{fd}").read_text():
                sync_file_system(fd)
                return
        finally:
            os.close(fd)
    os.sync()


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
    """Do all steps at the same time. Returns when all have ended, or after `seconds`."""
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
    """Write back, and report on each thing."""
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    request = json.loads(sys.stdin.readline())
    tell = _Reporter().tell
    deadline = time.monotonic() + request["seconds"]
    for steps in _rounds(request["device"], request["mountpoint"]):
        do_all(steps, (deadline - time.monotonic()) / 2, tell)
    images = [os.path.join(request["mountpoint"], image) for image in request["images"]]
    do_all([Step(image, partial(fsync, image)) for image in images], deadline - time.monotonic(), tell)
    tell(end=True)
    sys.stdout.flush()
    os._exit(0)  # a thread that waits in the kernel must not hold the exit up


if __name__ == "__main__":
    main()
