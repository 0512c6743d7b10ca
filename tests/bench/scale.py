"""What a store with very much in it costs: a sparse disk of 64 TiB, many snapshots, chunks preserved all over it.

The daemon's memory at its peak, and how long the mount takes after a clean umount and after kill -9. Before the kill,
first overwrites that nobody has flushed are on their way.
"""

import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

from tests.bench.fio import Cell
from tests.bench.latency import LARGE_BYTES
from tests.bench.plan import GIB, LARGE
from tests.bench.rounds import Measured, say
from tests.bench.scene import Scene, scene
from tests.support.sandbox import Served

CHUNK = 4096
CELL = Cell("randwrite", "4k", depth=16)
ANYWHERE = ("--norandommap", f"--size={LARGE_BYTES}")  # a map of the places would take 2 GiB; hardly two are the same
BYTES_A_CHUNK = 18 << 10  # of tmpfs: the chunk, its old bytes, a page of checksums, and the tree over each
SPARE_BYTES = 2 * GIB
CHUNKS_BEFORE_KILL = 2000


def measure(measured: Measured) -> None:
    if not measured.wants("memory", "mount-clean", "mount-killed"):
        return
    with scene(measured) as here:
        served = here.serve(here.sandbox.disk("large.img", LARGE_BYTES), "large")
        _fill(here, served)
        measured.compete({LARGE: _Remounts(served).turn})


def _fill(here: Scene, served: Served) -> None:
    """Take snapshot after snapshot, and preserve a share of the chunks in each."""
    plan, began = here.plan, time.monotonic()
    room = min(_kibibytes(Path("/proc/meminfo"), "MemAvailable") << 10, shutil.disk_usage(served.path.parent).free)
    most = max((room - SPARE_BYTES) // BYTES_A_CHUNK, plan.scale_snapshots)
    share = min(plan.scale_chunks, most) // plan.scale_snapshots
    for number in range(plan.scale_snapshots):
        (served.snaps / f"s{number}").mkdir()
        CELL.for_bytes(served.live, share * CHUNK, number + 1, *ANYWHERE)
    seconds = time.monotonic() - began
    chunks = share * plan.scale_snapshots
    text = f"64 TiB: {chunks:,} chunks preserved in {plan.scale_snapshots} snapshots, in {seconds:.0f} s"
    here.measured.notes.append(text)
    say(text)


class _Remounts:
    """The mount, again and again."""

    def __init__(self, served: Served) -> None:
        self._served = served
        self._peaks: list[float] = []

    def turn(self) -> Mapping[str, float]:
        self._note_peak()
        self._served.umount()
        clean = self._mount_again()
        seed = 1_000_000 + len(self._peaks)
        CELL.for_bytes(self._served.live, CHUNKS_BEFORE_KILL * CHUNK, seed, *ANYWHERE, "--end_fsync=0")
        self._note_peak()
        self._served.kill()
        killed = self._mount_again()
        return {"memory": max(self._peaks), "mount-clean": clean, "mount-killed": killed}

    def _mount_again(self) -> float:
        """Seconds until the mount is usable."""
        began = time.perf_counter()
        self._served = self._served.again()
        return time.perf_counter() - began

    def _note_peak(self) -> None:
        """In MiB."""
        self._peaks.append(_kibibytes(Path(f"/proc/{self._served.pid}/status"), "VmHWM") / 1024)


def _kibibytes(path: Path, name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", path.read_text(), re.MULTILINE)
    assert found is not None, f"{path} says no {name}"
    return int(found[1])
