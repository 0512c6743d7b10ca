"""A store whose layers are merged only where a test says so."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cow.store import flatten
from tests.support.engine import Engine, engines
from tests.support.failing import BadIo
from tests.support.flattening import SIZE, Stop


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is merged until `merge` is called; then at once, in pieces of a few chunks."""
    monkeypatch.setattr(flatten, "MOST_LAYERS", 1000)
    monkeypatch.setattr(flatten, "PIECE_CHUNKS", 4)
    monkeypatch.setattr(flatten, "PUNCH_CHUNKS", 4)
    monkeypatch.setattr(flatten, "REST", 0)


@pytest.fixture
def start(tmp_path: Path, io: BadIo) -> Iterator[Callable[..., Engine]]:
    with engines(tmp_path, SIZE, io=io) as start:
        yield start


@pytest.fixture
def stop_after(start: object, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Stop]]:
    stops: list[Stop] = []

    def stop_after(after: int, *, for_ever: bool = False) -> Stop:
        stops.append(Stop(monkeypatch, after, for_ever))
        return stops[-1]

    yield stop_after
    for stop in stops:
        stop.go_on.set()
