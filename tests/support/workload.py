"""Random work on a mounted hcpfs with the model beside it, until the daemon dies in the middle of anything."""

import errno
import os
import random
import threading
from collections.abc import Callable
from pathlib import Path

from tests.support.model import CHUNK, ModelImage
from tests.support.sandbox import Served

CHUNKS = 512
MOST_SNAPSHOTS = 6
DEAD = {errno.ENOTCONN, errno.ECONNABORTED, errno.EIO}  # what a call gets when the daemon or its store dies


class History:
    """What was done, as far as the system calls returned, and the one thing that was under way."""

    def __init__(self, content: bytes) -> None:
        self.live = ModelImage(content)
        self.snapshots: dict[str, ModelImage] = {}
        self.being_made: tuple[str, bytes] | None = None
        self.being_dropped: str | None = None
        self.made = 0


def do_something(served: Served, history: History, random_: random.Random) -> None:
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
        if os.pwrite(fd, data, offset) != len(data):
            raise OSError(errno.EIO, "the kernel sent it in parts, and one of them failed")
        if random_.random() < 0.3:
            os.fsync(fd)
            model.flush()
    finally:
        os.close(fd)


def work_until(stroke: Callable[[], None], served: Served, history: History, random_: random.Random) -> None:
    """Work while another thread deals the stroke, so in the middle of anything, and on until a call fails of it."""
    timer = threading.Timer(random_.uniform(0.01, 0.25), stroke)
    timer.start()
    try:
        while True:
            do_something(served, history, random_)
    except OSError as error:
        if error.errno not in DEAD:
            raise
    finally:
        timer.join()


def check(served: Served, history: History) -> None:
    """After a remount: every snapshot whose mkdir returned is there and right, all or nothing of the one under way."""
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
