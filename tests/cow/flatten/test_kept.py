"""Layers that deleted snapshots left behind become few, and nobody sees anything of it."""

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from unittest.mock import patch

import pytest
import trio.testing
from pyroaring import BitMap64

from cow.errors import DamagedError, LostError
from cow.geometry import CHUNK_BYTES, Run
from cow.layers.layer import Layer
from cow.records.rows import State
from cow.store import flatten
from tests.cow.test_model import EngineDriver
from tests.support.engine import Engine
from tests.support.flattening import (
    CHUNKS,
    MOST,
    SIZE,
    chain,
    contents_of,
    directories,
    findings,
    image_of,
    layers_of,
    merge,
    wait_until_flat,
    wake,
    write,
)
from tests.support.inside import copying
from tests.support.model import Machine, machine_settings
from tests.support.sandbox import wait_until


def _rows(tmp_path: Path) -> int:
    with closing(sqlite3.connect(tmp_path / "store" / "catalog.sqlite")) as catalog:
        return int(catalog.execute("SELECT count(*) FROM layers WHERE role = 'preserved'").fetchone()[0])


def test_i2_a_long_chain_becomes_short_and_no_snapshot_changes(start: Callable[..., Engine], tmp_path: Path) -> None:
    engine = start()
    chain(engine)
    before = contents_of(engine)
    names = {layer.name for layer in layers_of(engine, b"base")}
    merge(engine)
    wait_until_flat(engine)
    assert contents_of(engine) == before
    left = {layer.name for layer in layers_of(engine, b"base")}
    wait_until(lambda: not (names - left) & directories(tmp_path), what="the end of the needless directories")
    write(engine, 0, CHUNKS)
    assert contents_of(engine) == before
    assert engine.troubles == []
    engine.close()
    assert _rows(tmp_path) == len(left) + 2
    assert findings(tmp_path) == []
    engine = start()
    assert contents_of(engine) == before


def test_the_smallest_are_merged_first_and_a_chunk_moves_a_few_times(
    start: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start()
    chain(engine, 11)
    held = sum(len(layer.held) for layer in layers_of(engine, b"base"))
    moved = 0

    def around(real: Callable[..., bytes]) -> Callable[..., bytes]:
        def copy(source: Layer, target: Layer, runs: list[Run]) -> bytes:
            nonlocal moved
            moved += sum(run.chunks for run in runs)
            return real(source, target, runs)

        return copy

    copying(monkeypatch, around)
    merge(engine)
    wait_until_flat(engine)
    assert sum(len(layer.held) for layer in layers_of(engine, b"base")) == held
    assert moved <= 2 * held


def test_the_layer_where_old_bytes_go_is_left_alone(start: Callable[..., Engine]) -> None:
    engine = start()
    chain(engine)
    origin = engine.store.origins[0]
    newest = origin.epochs.newest_layer
    engine.call(engine.store.delete_snapshot, b"last")
    before = contents_of(engine)
    merge(engine, 1)
    wait_until(lambda: len(layers_of(engine, b"base")) == 2, what="the merging")
    assert origin.epochs.newest_layer is newest
    write(engine, 0, CHUNKS)
    assert contents_of(engine) == before


def test_i4_a_damaged_chunk_stays_where_it_is_and_is_named_by_who_reads_it(
    start: Callable[..., Engine], tmp_path: Path
) -> None:
    engine = start()
    chain(engine)
    before = engine.call(image_of(engine, b"base").read, 0, SIZE)
    damaged = layers_of(engine, b"base")[4]
    chunk = damaged.held.max()
    with (tmp_path / "store" / "layers" / damaged.name / "data.0000").open("r+b") as file:
        file.seek(chunk * CHUNK_BYTES)
        file.write(b"another byte or two")
    merge(engine, 1)
    wait_until(lambda: engine.troubles and len(layers_of(engine, b"base")) < 5, what="the sentence, and the merging")
    for _ in range(3):
        engine.call(wake, engine)
        engine.call(trio.testing.wait_all_tasks_blocked, 0.01)
    assert len(engine.troubles) == 1
    assert f"chunk {chunk} (offset {chunk * CHUNK_BYTES}) of layer {damaged.name}" in engine.troubles[0]
    assert chunk in damaged.held
    with pytest.raises(DamagedError, match=f"chunk {chunk} "):
        engine.call(image_of(engine, b"base").read, chunk * CHUNK_BYTES, 1)
    assert engine.call(image_of(engine, b"base").read, 0, chunk * CHUNK_BYTES) == before[: chunk * CHUNK_BYTES]
    rest = (chunk + 1) * CHUNK_BYTES
    assert engine.call(image_of(engine, b"base").read, rest, SIZE) == before[rest:]


def test_i4_lost_chunks_stay_lost(start: Callable[..., Engine]) -> None:
    engine = start()
    chain(engine)
    layers = layers_of(engine, b"base")
    chunks = BitMap64([layers[3].held.max(), layers[6].held.max()])
    for layer in (layers[3], layers[6]):
        engine.call(engine.store.damage.lose, layer, layer.held & chunks)
    lost = image_of(engine, b"base").view.lost()
    assert sum(run.chunks for run in lost) == 2
    merge(engine, 1)
    wait_until(lambda: len(layers_of(engine, b"base")) == 1, what="the merging")
    for attempt in range(2):
        assert image_of(engine, b"base").view.lost() == lost
        for chunk in chunks:
            with pytest.raises(LostError):
                engine.call(image_of(engine, b"base").read, chunk * CHUNK_BYTES, 1)
        if attempt == 0:
            engine.kill()
            engine = start()


def test_nothing_is_merged_read_only(start: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = start()
    chain(engine)
    before = contents_of(engine)
    count = len(layers_of(engine, b"base"))
    engine.close()
    monkeypatch.setattr(flatten, "MOST_LAYERS", MOST)
    engine = start(read_only=True)
    engine.call(trio.testing.wait_all_tasks_blocked, 0.05)
    assert len(layers_of(engine, b"base")) == count
    assert contents_of(engine) == before


def test_nothing_is_merged_while_a_snapshot_is_suspect(start: Callable[..., Engine]) -> None:
    """It believes layers by their age."""
    engine = start()
    chain(engine)
    engine.store.find(b"old").row.state = State.SUSPECT
    count = len(layers_of(engine, b"base"))
    merge(engine)
    engine.call(trio.testing.wait_all_tasks_blocked, 0.05)
    assert len(layers_of(engine, b"base")) == count
    engine.call(engine.store.delete_snapshot, b"old")
    wait_until_flat(engine)


class FlatDriver(EngineDriver):
    """The engine with layers merged as soon as there are two."""

    def open(self) -> None:
        self._small = patch.multiple(flatten, MOST_LAYERS=1, PIECE_CHUNKS=1, PUNCH_CHUNKS=2, REST=0)
        self._small.start()
        super().open()

    def stop(self) -> bytes:
        try:
            return super().stop()
        finally:
            self._small.stop()

    def kill(self) -> None:
        super().kill()
        self._small.stop()

    def end(self) -> None:
        super().end()
        self._small.stop()


class FlatAgainstModel(Machine):
    def make_driver(self, content: bytes) -> EngineDriver:
        return FlatDriver(content)


FlatAgainstModel.TestCase.settings = machine_settings(40)
test_i2_i9_the_engine_that_merges_at_once_equals_the_model = FlatAgainstModel.TestCase
