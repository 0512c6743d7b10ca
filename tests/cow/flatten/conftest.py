"""A store whose layers are merged only where a test says so."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cow import Source, flatten
from tests.support.engine import Engine
from tests.support.flattening import SIZE, BadIo, Stop


@pytest.fixture
def io() -> BadIo:
    return BadIo()


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is merged until `merge` is called; then at once, in pieces of a few chunks."""
    monkeypatch.setattr(flatten, "MOST_LAYERS", 1000)
    monkeypatch.setattr(flatten, "PIECE_CHUNKS", 4)
    monkeypatch.setattr(flatten, "PUNCH_CHUNKS", 4)
    monkeypatch.setattr(flatten, "REST", 0)


@pytest.fixture
def start(tmp_path: Path, io: BadIo) -> Iterator[Callable[..., Engine]]:
    (tmp_path / "disk.img").write_bytes(os.urandom(SIZE))
    engines: list[Engine] = []

    def start(**options: object) -> Engine:
        source = Source(b"disk.img", str(tmp_path / "disk.img"))
        engines.append(Engine(str(tmp_path / "store"), [source], io=io, **options))
        return engines[-1]

    yield start
    for engine in engines:
        if engine.is_open:
            engine.kill()


@pytest.fixture
def stop_after(start: object, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Stop]]:
    stops: list[Stop] = []

    def stop_after(after: int, *, for_ever: bool = False) -> Stop:
        stops.append(Stop(monkeypatch, after, for_ever))
        return stops[-1]

    yield stop_after
    for stop in stops:
        stop.go_on.set()
