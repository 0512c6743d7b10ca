"""ext4 on a loop device: on the live image, and on a file of the same tmpfs without hcpfs.

A file in it is written at random, with an fsync after every 32 writes. Each round begins with a new snapshot, so that
first overwrites are a part of it. The ceiling is the same loop device on a FUSE server in C that keeps no old bytes.
"""

import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from tests.bench.fio import Cell
from tests.bench.plan import HCPFS, LOOP, PASSTHROUGH
from tests.bench.rounds import Measured, Turn
from tests.bench.scene import Snapshots, scene

CELLS = {
    "ext4-direct": Cell("randwrite", "4k", sync_every=32),
    "ext4-buffered": Cell("randwrite", "4k", direct=False, sync_every=32),
}
FILE_PART = 4  # of the disk


def measure(measured: Measured) -> None:
    works = measured.wants(*CELLS)
    if not works:
        return
    with scene(measured) as here:
        plan = here.plan
        disk = here.sandbox.disk("ext4.img", plan.disk_bytes)
        here.sandbox.format(disk, "ext4")
        with here.on_loop(disk, "template") as root:
            shutil.move(here.disk(plan.disk_bytes // FILE_PART, "file"), root / "file")
        served = here.serve(here.copy(disk, "below.img"), "below")

        def turn(file: Path) -> Mapping[str, float]:
            return {work: CELLS[work].for_seconds(file, plan.seconds) for work in works}

        with here.on_loop(disk, "alone") as alone, here.on_loop(served.live, "above") as above, ExitStack() as more:
            snapshots = Snapshots(served, 1)

            def turn_above() -> Mapping[str, float]:
                snapshots.renew()
                return turn(above / "file")

            turns: dict[str, Turn] = {LOOP: lambda: turn(alone / "file"), HCPFS: turn_above}
            if plan.ceilings:
                here.start(disk, PASSTHROUGH)  # over a copy
            if PASSTHROUGH in here.images:
                ceiling = more.enter_context(here.on_loop(here.images[PASSTHROUGH], "ceiling"))
                turns[PASSTHROUGH] = lambda: turn(ceiling / "file")
            measured.compete(turns)
