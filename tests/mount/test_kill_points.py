"""The daemon dies at each named point of the engine; the next one finds nothing lost and nothing false."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.killpoints import POINTS, Phase
from tests.support.model import CHUNK
from tests.support.sandbox import Sandbox, Served, wait_until
from tests.support.workload import CHUNKS, DEAD, History, check, do_something

ROOT = Path(__file__).parents[2]
MOST_OPERATIONS = 2000
MOST_SECONDS = 20


def doomed(sandbox: Sandbox, served: Served, point: str, count: int, *words: str) -> tuple[subprocess.Popen, Path]:
    """A daemon that will die at the point, and the file that it makes then."""
    marker = sandbox.path / "died"
    marker.unlink(missing_ok=True)
    arguments = ["mount", *served.sources, served.path, "--store", served.store, "--foreground", *words]
    command = [sys.executable, "-m", "tests.support.killpoints", point, count, marker, *arguments]
    process = sandbox.spawn(*command, cwd=ROOT, stderr=subprocess.DEVNULL)
    wait_until(lambda: process.poll() is not None or os.path.ismount(served.path), what="the mount, or the death")
    return process, marker


def _work(served: Served, history: History, random_: random.Random, process: subprocess.Popen) -> None:
    try:
        for _ in range(MOST_OPERATIONS):
            if process.poll() is not None:
                return
            do_something(served, history, random_)
    except OSError as error:
        if error.errno not in DEAD:
            raise


# All that lie after a step, and those before the steps that matter most; scripts/soak goes through all of them.
CHOSEN = [point for point in sorted(POINTS) if point.startswith("after")] + [
    "before append",
    "before overwrite",
    "before recovery",
    "before clean stop",
]


@pytest.mark.parametrize("point", CHOSEN)
def test_i1_i3_i4_i5_killed_at(sandbox: Sandbox, point: str) -> None:
    killed_at(sandbox, point, seed=1)


def killed_at(sandbox: Sandbox, point: str, seed: int) -> None:
    """One death at the point, on a store that was used before; `seed` says when, and what is done."""
    random_ = random.Random(f"{point} {seed}")
    content = random_.randbytes(CHUNKS * CHUNK)
    disk = sandbox.disk(content=content)
    history = History(content)
    served = sandbox.mount(disk)
    operations = 0
    while operations < 40 or not history.snapshots:  # without one some points are never met
        do_something(served, history, random_)
        operations += 1
    phase, call = POINTS[point].phase, POINTS[point].call
    if phase is Phase.START:
        served.kill()
    else:
        served.umount()
    history.live.settle_after_kill(disk.read_bytes())

    process, marker = doomed(sandbox, served, point, call + (seed - 1) * (phase is Phase.WORK))
    if phase is Phase.STOP:
        for _ in range(20):
            do_something(served, history, random_)
        sandbox.unmount(served.path)
    elif phase is Phase.WORK:
        _work(served, history, random_, process)
    assert process.wait(MOST_SECONDS) == -signal.SIGKILL
    assert marker.exists(), "it died of something else"
    served.kill()
    history.live.settle_after_kill(disk.read_bytes())
    served = served.again()
    check(served, history)
    served.umount()
    assert disk.read_bytes() == history.live.content
