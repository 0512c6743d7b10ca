"""Reading and writing for a while: the image and the live image of hcpfs against the peers' images and the ceilings.

For the reads, a part of the chunks was written, so that every server has something to look up. For the writes, every
chunk was written once, so that nothing is a first write any more.
"""

from collections.abc import Mapping
from pathlib import Path

from tests.bench.fio import Cell
from tests.bench.plan import IMAGE, KEPT, PASSTHROUGH, PEERS, PLAIN, REFLINK
from tests.bench.rounds import Measured, Turn
from tests.bench.scene import Scene, overwrite, scatter, scene

CELLS = {
    "read-qd1": Cell("randread", "4k"),
    "read-qd16": Cell("randread", "4k", depth=16),
    "seq-read": Cell("read", "1M"),
    "write-qd1": Cell("randwrite", "4k"),
    "write-qd16": Cell("randwrite", "4k", depth=16),
    "seq-write": Cell("write", "1M"),
}
READS = ("read-qd1", "read-qd16", "seq-read")
WRITES = ("write-qd1", "write-qd16", "seq-write")
WRITTEN_PART = 16  # one in so many chunks was written before the reads


def measure(measured: Measured) -> None:
    reads, writes = measured.wants(*READS), measured.wants(*WRITES)
    if not reads and not writes:
        return
    with scene(measured) as here:
        plan = here.plan
        disk = here.disk(plan.disk_bytes)
        plain = here.serve(here.copy(disk, "plain.img"), "plain")
        kept = here.serve(here.copy(disk, "kept.img"), "kept")
        (kept.snaps / "s").mkdir()
        here.start(disk, *PEERS)
        if plan.ceilings or "read-qd1" in reads or "read-qd16" in reads:
            here.start(disk, PASSTHROUGH)
        if plan.ceilings:
            here.start(disk, REFLINK)
        ours = {IMAGE: kept.image("s"), PLAIN: plain.live, KEPT: kept.live}
        if reads:
            for image in (*ours.values(), *here.images.values()):
                scatter(image, WRITTEN_PART, seed=2)
            random_reads = [work for work in reads if work != "seq-read"]
            _compete(here, random_reads, {IMAGE: ours[IMAGE], **here.images})
            _compete(here, [work for work in reads if work == "seq-read"], {**ours, **here.images})
        if writes:
            images = {**ours, **_where_written(here)}
            for image in images.values():
                overwrite(image)
            for work in writes:
                _compete(here, [work], images)


def _where_written(here: Scene) -> dict[str, Path]:
    """The others that write: without the ceilings in a quick run."""
    return {server: image for server, image in here.images.items() if here.plan.ceilings or server in PEERS}


def _compete(here: Scene, works: list[str], images: Mapping[str, Path]) -> None:
    def turn(image: Path) -> Turn:
        return lambda: {work: CELLS[work].for_seconds(image, here.plan.seconds) for work in works}

    if works:
        here.measured.compete({server: turn(image) for server, image in images.items()})
