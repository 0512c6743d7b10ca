"""A store whose disk fails where a test says so."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cow.geometry import CHUNK_BYTES
from tests.support.engine import Engine, engines
from tests.support.failing import BadIo


@pytest.fixture
def io() -> BadIo:
    return BadIo()


@pytest.fixture
def start(tmp_path: Path, io: BadIo) -> Iterator[Callable[..., Engine]]:
    """Without write-behind: what a write does shall be seen when it returns."""
    with engines(tmp_path, 2000 * CHUNK_BYTES, io=io, write_behind=False) as start:
        yield start
        io.fails = lambda call, path: False
