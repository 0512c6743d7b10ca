"""kill -9 of the daemon in the middle of writes and of snapshots, many times over on the same store."""

import errno
import os
import random
import signal
import subprocess
import threading
from pathlib import Path

import pytest

from tests.support.model import CHUNK, ModelImage
from tests.support.sandbox import Sandbox, Served, status_of, wait_until

CHUNKS = 512
ROUNDS = 30
MOST_SNAPSHOTS = 6
DEAD = {errno.ENOTCONN, errno.ECONNABORTED, errno.EIO}  # what a call gets when the daemon dies


class History:
    """What was done, as far as the system calls returned, and the one thing that was under way."""

    def __init__(self, content: bytes) -> None:
        self.live = ModelImage(content)
        self.snapshots: dict[str, ModelImage] = {}
        self.being_made: tuple[str, bytes] | None = None
        self.being_dropped: str | None = None
        self.made = 0


def _do_something(served: Served, history: History, random_: random.Random) -> None:
    choice = random_.random()
    if choice < 0.08 and len(history.snapshots) < MOST_SNAPSHOTS:
        history.made += 1
        name = f"s{history.made}"
        history.being_made = (name, bytes(history.live.content))
        (served.snaps / name).mkdir()
        history.snapshots[name] = ModelImage(history.being_made[1])
        history.being_made = None
        history.live.flush()  # a snapshot has all that was acknowledged
    elif choice < 0.12 and len(history.snapshots) > 2:
        name = history.being_dropped = random_.choice(sorted(history.snapshots))
        (served.snaps / name).rmdir()
        del history.snapshots[name]
        history.being_dropped = None
    elif choice < 0.4 and history.snapshots:
        name = random_.choice(sorted(history.snapshots))
        _write(served.image(name), history.snapshots[name], random_)
    else:
        _write(served.path / "live/disk.img", history.live, random_)


def _write(path: Path, model: ModelImage, random_: random.Random) -> None:
    offset = random_.randrange(CHUNKS) * CHUNK + random_.choice([0, 0, 512, 1000])
    data = random_.randbytes(random_.choice([CHUNK, CHUNK, 3 * CHUNK, 64 * CHUNK, 512]))
    data = data[: CHUNKS * CHUNK - offset]
    fd = os.open(path, os.O_RDWR)
    try:
        model.write(offset, data)  # before the call: it may arrive although the call does not return
        os.pwrite(fd, data, offset)
        if random_.random() < 0.3:
            os.fsync(fd)
            model.flush()
    finally:
        os.close(fd)


def _until_killed(served: Served, history: History, random_: random.Random) -> None:
    """Work until the daemon is gone. It is killed by another thread, so in the middle of anything."""
    killer = threading.Timer(random_.uniform(0.01, 0.25), os.kill, (served.pid, signal.SIGKILL))
    killer.start()
    try:
        while True:
            _do_something(served, history, random_)
    except OSError as error:
        if error.errno not in DEAD:
            raise
    finally:
        killer.join()


def _check(served: Served, history: History) -> None:
    names = set(os.listdir(served.snaps))
    if history.being_made is not None:
        name, content = history.being_made
        if name in names:  # all or nothing
            history.snapshots[name] = ModelImage(content)
    if history.being_dropped is not None and history.being_dropped not in names:
        del history.snapshots[history.being_dropped]
    history.being_made = history.being_dropped = None
    assert names == set(history.snapshots)
    for name, model in history.snapshots.items():
        assert served.info(name)["state"] == "valid"
        model.settle_after_kill(served.image(name).read_bytes())


@pytest.mark.parametrize("seed", [1, 2])
def test_i3_i4_i5_i8_killed_in_the_middle_of_anything(sandbox: Sandbox, seed: int) -> None:
    random_ = random.Random(seed)
    content = random_.randbytes(CHUNKS * CHUNK)
    disk = sandbox.disk(content=content)
    history = History(content)
    served = sandbox.mount(disk)
    for _ in range(ROUNDS // 2):
        _until_killed(served, history, random_)
        served.kill()
        history.live.settle_after_kill(disk.read_bytes())
        served = served.again()
        assert status_of(served.path)["last_stop"] == "not-clean"
        _check(served, history)
    served.umount()
    assert disk.read_bytes() == history.live.content
    assert history.made > ROUNDS // 2


def test_a_killed_daemon_leaves_no_file_system_frozen(sandbox: Sandbox) -> None:
    """The daemon dies while its freezer holds a file system frozen: the broken pipe thaws it."""
    served = sandbox.mount(sandbox.disk(size=32 << 20))
    device = sandbox.loop(served.live)
    sandbox.format(device, "ext4")
    files = sandbox.mount_device(device)
    for attempt in range(5):
        taker = threading.Thread(target=_mkdir_or_die, args=(served.snaps / f"s{attempt}",))
        taker.start()
        killer = threading.Timer(0.005 * attempt, os.kill, (served.pid, signal.SIGKILL))
        killer.start()
        taker.join()
        killer.join()
        served.kill()
        probe = sandbox.spawn("sh", "-c", f"echo x 2>&1 > {files}/probe | :", stderr=subprocess.DEVNULL)
        wait_until(lambda probe=probe: probe.poll() is not None, what="the end of a write, so the thaw,")
        sandbox.unmount(files)
        sandbox.unloop(device)
        served = served.again()
        device = sandbox.loop(served.live)
        files = sandbox.mount_device(device)
    sandbox.unmount(files)


def _mkdir_or_die(path: Path) -> None:
    try:
        path.mkdir()
    except OSError as error:
        if error.errno not in DEAD:
            raise
