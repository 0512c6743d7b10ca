"""First overwrites, which have to preserve: random, every chunk once, and an fsync at the end that counts.

Each round has a new snapshot, or for the peer a new overlay, so that every overwrite is a first one. Then the same
chunks are overwritten again, which is what first ones are held against.
"""

import random
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from tests.bench import peers
from tests.bench.fio import Cell
from tests.bench.plan import MANY, ONE, QEMU
from tests.bench.rounds import Measured, Turn
from tests.bench.scene import Scene, Snapshots, change_a_few, scene

CELL = Cell("randwrite", "4k", depth=16)
SNAPSHOTS = {ONE: 1, MANY: 100}


def measure(measured: Measured) -> None:
    if not measured.wants("first", "again"):
        return
    with scene(measured) as here:
        disk = here.disk(here.plan.disk_bytes)
        seeds = random.Random(1)
        turns: dict[str, Turn] = {QEMU: lambda: _on_a_new_overlay(here, disk, seeds.randrange(1 << 31))}
        for number, (server, count) in enumerate(SNAPSHOTS.items()):
            served = here.serve(here.copy(disk, f"disk{number}.img"), f"first{number}")
            turns[server] = _turn(here, Snapshots(served, count, partial(change_a_few, served.live)), seeds)
        measured.compete(turns)


def _turn(here: Scene, snapshots: Snapshots, seeds: random.Random) -> Turn:
    def turn() -> Mapping[str, float]:
        snapshots.renew()
        live, amount, seed = snapshots.served.live, here.plan.first_bytes, seeds.randrange(1 << 31)
        return {work: CELL.for_bytes(live, amount, seed) for work in ("first", "again")}

    return turn


def _on_a_new_overlay(here: Scene, below: Path, seed: int) -> Mapping[str, float]:
    with peers.qemu(here.sandbox, below) as image:
        return {"first": CELL.for_bytes(image, here.plan.first_bytes, seed)}
