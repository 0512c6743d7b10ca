"""cp of a whole image to tmpfs: cold, with nothing of it in the kernel's cache, and again right after that."""

import os
import time
from collections.abc import Mapping
from pathlib import Path

from tests.bench.fio import TIMEOUT_SECONDS
from tests.bench.plan import IMAGE, MIB, PEERS, REFLINK
from tests.bench.rounds import Measured, Turn
from tests.bench.scene import Scene, scatter, scene, warm
from tests.support.sandbox import run

WRITTEN_PART = 64  # one in so many chunks was written before


def measure(measured: Measured) -> None:
    if not measured.wants("cp-cold", "cp-cached"):
        return
    with scene(measured) as here:
        disk = here.disk(here.plan.copy_bytes)  # one for all: nobody writes to it
        served = here.serve(disk, "copied")
        (served.snaps / "s").mkdir()
        here.start(disk, *PEERS, *([REFLINK] if here.plan.ceilings else []))
        images = {IMAGE: served.image("s"), **here.images}
        for image in images.values():
            scatter(image, WRITTEN_PART, seed=3)
        measured.compete({server: _turn(here, image) for server, image in images.items()})


def _turn(here: Scene, image: Path) -> Turn:
    def turn() -> Mapping[str, float]:
        _forget(image)
        warm(2 * here.plan.copy_bytes)  # for the copy and the kernel's cache: their memory is not what is compared
        reached = {work: _copy(image, here.sandbox.path / "copy") for work in ("cp-cold", "cp-cached")}
        _forget(image)  # the next one may need the memory
        return reached

    return turn


def _copy(image: Path, to: Path) -> float:
    """MiB a second."""
    began = time.perf_counter()
    run("cp", image, to, timeout=TIMEOUT_SECONDS)
    seconds = time.perf_counter() - began
    to.unlink()
    return image.stat().st_size / MIB / seconds


def _forget(image: Path) -> None:
    """Have the kernel drop what it has of the file in its cache."""
    descriptor = os.open(image, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
