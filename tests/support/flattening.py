"""Merging layers when a test wants it: a long chain, a look at its layers, a stop among the pieces."""

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from cow.geometry import CHUNK_BYTES, Run
from cow.images.image import Image
from cow.layers.layer import Layer
from cow.scrub import Finding, scrub_store
from cow.store import flatten
from tests.support.engine import Engine
from tests.support.inside import copying
from tests.support.sandbox import wait_until

CHUNKS = 256
SIZE = CHUNKS * CHUNK_BYTES
MOST = 3  #: layers that `merge` leaves
FOR_EVER = 1e12


def write(engine: Engine, first: int, chunks: int) -> None:
    origin = engine.store.origins[0]
    engine.call(origin.write, first * CHUNK_BYTES, os.urandom(chunks * CHUNK_BYTES))
    engine.call(origin.sync)


def chain(engine: Engine, count: int = 8) -> None:
    """Snapshots `old`, `base` and `last`, and `base` has the layers of `count` deleted ones."""
    for name in (b"old", b"base"):
        engine.call(engine.store.create_snapshot, name)
        write(engine, 3, 3)
        for number in range(count) if name == b"old" else ():  # what `base` has only until it is deleted
            write(engine, 20 * number + 12, 1)
    for number in range(count):
        engine.call(engine.store.create_snapshot, b"%d" % number)
        write(engine, 20 * number, 30)
    engine.call(engine.store.create_snapshot, b"last")
    write(engine, 0, 5)
    for number in range(count):
        engine.call(engine.store.delete_snapshot, b"%d" % number)


def image_of(engine: Engine, name: bytes) -> Image:
    found = engine.store.find(name)
    assert found is not None
    return found.images[0]


def contents_of(engine: Engine) -> dict[bytes, bytes]:
    return {one.name: engine.call(one.images[0].read, 0, SIZE) for one in engine.store.snapshots}


def layers_of(engine: Engine, name: bytes) -> list[Layer]:
    return engine.store.origins[0].epochs.group_of(image_of(engine, name).view.snapshot).layers


def merge(engine: Engine, most: int = MOST) -> None:
    flatten.MOST_LAYERS = most
    engine.call(wake, engine)


async def wake(engine: Engine) -> None:
    engine.store.inventory.changed.ring()


def wait_until_flat(engine: Engine, name: bytes = b"base") -> None:
    wait_until(lambda: len(layers_of(engine, name)) <= MOST, what="the merging")


def wait_until_punched(engine: Engine) -> None:
    wait_until(lambda: not engine.store.disposal.is_punching_due, what="the punching")


def findings(tmp_path: Path) -> list[str]:
    return [one.sentence for one in scrub_store(str(tmp_path / "store"), repair=False) if isinstance(one, Finding)]


def directories(tmp_path: Path) -> set[str]:
    return set(os.listdir(tmp_path / "store" / "layers"))


class Stop:
    """Has the copying stop after a few pieces, for ever, or until `go_on`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, after: int, for_ever: bool) -> None:
        self.reached, self.go_on = threading.Event(), threading.Event()
        self.layers: tuple[Layer, Layer]
        count = 0

        def around(real: Callable[..., bytes]) -> Callable[..., bytes]:
            def copy(source: Layer, target: Layer, runs: list[Run]) -> bytes:
                nonlocal count
                count += 1
                self.layers = source, target
                sums = real(source, target, runs)
                if count == after:
                    if for_ever:
                        flatten.REST = FOR_EVER
                    self.reached.set()
                    if not for_ever:
                        self.go_on.wait()
                return sums

            return copy

        copying(monkeypatch, around)
