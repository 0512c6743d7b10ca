"""A store whose disk fails where a test says so; and whether a store lies on a disk or in memory."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cow.disk.io import Io
from cow.geometry import CHUNK_BYTES
from tests.support.engine import Engine, engines
from tests.support.failing import BadIo

STORES = {"start", "engine", "used"}  #: the fixtures that open one


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that opens a store does so both ways, unless its mark says which (tests/support/engine.py)."""
    marks = metafunc.definition.iter_markers("parametrize")
    if STORES.intersection(metafunc.fixturenames) and all(mark.args[0] != "in_memory" for mark in marks):
        metafunc.parametrize("in_memory", [False, True], ids=["disk", "memory"], indirect=True)


@pytest.fixture(autouse=True)
def in_memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the engine takes its files for such as never wait for a disk, whatever they lie on."""
    in_memory: bool = getattr(request, "param", False)
    monkeypatch.setattr(Io, "is_in_memory", lambda self, fd: in_memory)
    return in_memory


@pytest.fixture
def io() -> BadIo:
    return BadIo()


@pytest.fixture
def start(tmp_path: Path, io: BadIo) -> Iterator[Callable[..., Engine]]:
    """Without write-behind: what a write does shall be seen when it returns."""
    with engines(tmp_path, 2000 * CHUNK_BYTES, io=io, write_behind=False) as start:
        yield start
        io.fails = lambda call, path: False
