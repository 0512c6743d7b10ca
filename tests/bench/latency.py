"""How long mkdir of a snapshot takes, on a small disk and on a sparse one of 64 TiB, with nothing else going on."""

import math
import time
from collections.abc import Mapping
from statistics import median

from tests.bench.plan import LARGE, SMALL, TIB
from tests.bench.rounds import Measured, Turn
from tests.bench.scene import Scene, change_a_few, scene
from tests.support.sandbox import Served

LARGE_BYTES = 64 * TIB


def measure(measured: Measured) -> None:
    if not measured.wants("mkdir-median", "mkdir-p99"):
        return
    with scene(measured) as here:
        small = here.serve(here.disk(here.plan.disk_bytes), "small")
        large = here.serve(here.sandbox.disk("large.img", LARGE_BYTES), "large")
        measured.compete({SMALL: _turn(here, small), LARGE: _turn(here, large)})


def _turn(here: Scene, served: Served) -> Turn:
    def turn() -> Mapping[str, float]:
        snapshots = [served.snaps / f"s{number}" for number in range(here.plan.mkdirs)]
        taken = []
        for snapshot in snapshots:
            change_a_few(served.live)
            began = time.perf_counter()
            snapshot.mkdir()
            taken.append(1000 * (time.perf_counter() - began))
        for snapshot in snapshots:
            snapshot.rmdir()
        return {"mkdir-median": median(taken), "mkdir-p99": sorted(taken)[math.ceil(0.99 * len(taken)) - 1]}

    return turn
