"""A loss is taken back where the write that it was recorded for never reached the device, and nowhere else."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from cow.buffer.contents import contents_of
from cow.durable.rescue import MOST_CHUNKS, Losses
from cow.errors import LostError
from cow.events import Rescued
from cow.geometry import CHUNK_BYTES, Run
from cow.images import origin as origin_module
from tests.support.engine import Engine
from tests.support.failing import BadIo, BadSectors, take
from tests.support.inside import rescue_reads
from tests.support.sandbox import wait_until

SIZE = 2000 * CHUNK_BYTES
MODES = pytest.mark.parametrize("write_behind", [False, True], ids=["sync", "write-behind"])
RANGE = range(700, 720)


@pytest.fixture(autouse=True)
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(origin_module, "RESCUE_SECONDS", 3600)  # not in the background, unless a test wants it


def _write(engine: Engine, chunk: int, data: bytes) -> None:
    engine.call(engine.store.origins[0].write, chunk * CHUNK_BYTES, data)
    engine.call(engine.store.origins[0].sync)


def _lose(engine: Engine, io: BadIo, data: bytes = b"n" * len(RANGE) * CHUNK_BYTES) -> BadSectors:
    """A range can be neither read nor written; its chunks are lost, and the write fails."""
    bad = BadSectors(io, set(RANGE), are_for_good=True)
    with pytest.raises(OSError, match="cannot be written"):
        _write(engine, RANGE.start, data)
    return bad


@MODES
@pytest.mark.parametrize("snapshots", [1, 3])
def test_i1_a_range_that_is_away_for_a_while_is_lost_to_no_snapshot(
    start: Callable[..., Engine], io: BadIo, tmp_path: Path, write_behind: bool, snapshots: int
) -> None:
    engine = start(write_behind=write_behind)
    old = (tmp_path / "disk.img").read_bytes()
    images = [take(engine, b"%d" % number) for number in range(snapshots)]
    bad = _lose(engine, io)
    assert images[0].view.lost() == [Run(RANGE.start, len(RANGE))]
    wait_until(lambda: engine.store.snapshots[0].row.state == "damaged", what="the mark")
    bad.chunks = set()
    _write(engine, RANGE.start, b"n" * len(RANGE) * CHUNK_BYTES)
    for _ in range(2):
        for snapshot in engine.store.snapshots:
            assert snapshot.row.state == "valid"
            assert snapshot.images[0].view.lost() == []
            assert engine.call(snapshot.images[0].read, 0, SIZE) == old
        assert engine.call(engine.store.origins[0].read, RANGE.start * CHUNK_BYTES, 3) == b"nnn"
        engine.call(engine.store.damage.record)
        engine.kill()
        engine = start()


def test_i1_it_is_looked_for_in_the_background_too(
    start: Callable[..., Engine], io: BadIo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer may have given up."""
    monkeypatch.setattr(origin_module, "RESCUE_SECONDS", 0.01)
    monkeypatch.setattr(origin_module, "MOST_RESCUE_SECONDS", 0.01)
    engine = start()
    old = (tmp_path / "disk.img").read_bytes()
    image = take(engine, b"a")
    bad = _lose(engine, io)
    bad.chunks = set()
    wait_until(lambda: image.view.lost() == [], what="the rescue")
    assert engine.call(image.read, 0, SIZE) == old
    wait_until(lambda: Rescued(b"a") in engine.events, what="the event")


@MODES
def test_i4_a_sector_that_the_write_reached_leaves_the_chunk_lost(
    start: Callable[..., Engine], io: BadIo, tmp_path: Path, write_behind: bool
) -> None:
    """It was torn: it failed, and some of it is there."""
    engine = start(write_behind=write_behind)
    image = take(engine, b"a")
    bad = _lose(engine, io)
    with (tmp_path / "disk.img").open("r+b") as disk:
        disk.seek(705 * CHUNK_BYTES + 1024)
        disk.write(b"n" * 512)
    bad.chunks = set()
    _write(engine, RANGE.start, b"n" * len(RANGE) * CHUNK_BYTES)
    assert image.view.lost() == [Run(705, 1)]
    with pytest.raises(LostError):
        engine.call(image.read, 705 * CHUNK_BYTES, 1)
    wait_until(lambda: engine.store.snapshots[0].row.state == "damaged", what="the mark")


def test_i4_any_write_since_counts_and_not_the_last_one_alone(
    start: Callable[..., Engine], io: BadIo, tmp_path: Path
) -> None:
    engine = start()
    image = take(engine, b"a")
    bad = _lose(engine, io, b"1" * len(RANGE) * CHUNK_BYTES)
    with pytest.raises(OSError, match="cannot be written"):
        _write(engine, 703, b"2" * CHUNK_BYTES)
    with (tmp_path / "disk.img").open("r+b") as disk:
        disk.seek(703 * CHUNK_BYTES)
        disk.write(b"1" * CHUNK_BYTES)  # the first one, late
    bad.chunks = set()
    _write(engine, 702, b"3" * 3 * CHUNK_BYTES)
    assert image.view.lost() == [Run(700, 2), Run(703, 1), Run(705, 15)]


def test_i4_a_loss_that_was_overwritten_by_another_writer_stays(
    start: Callable[..., Engine], io: BadIo, tmp_path: Path
) -> None:
    engine = start()
    image = take(engine, b"a")
    bad = _lose(engine, io)
    bad.chunks = set(RANGE) - {701}

    def not_yet(chunk: int) -> bytes:
        raise OSError(errno.EIO, "cannot be read")

    rescue_reads(engine.store.origins[0], not_yet)
    _write(engine, 701, b"x" * CHUNK_BYTES)
    rescue_reads(engine.store.origins[0], None)
    bad.chunks = set()
    _write(engine, RANGE.start, b"y" * len(RANGE) * CHUNK_BYTES)
    assert image.view.lost() == [Run(701, 1)]


def test_a_loss_stays_after_a_crash_in_between(start: Callable[..., Engine], io: BadIo, tmp_path: Path) -> None:
    """What was written, and might be there, is not known any more."""
    engine = start()
    take(engine, b"a")
    bad = _lose(engine, io)
    engine.kill()
    bad.chunks = set()
    engine = start()
    _write(engine, RANGE.start, b"n" * len(RANGE) * CHUNK_BYTES)
    assert engine.store.snapshots[0].images[0].view.lost() == [Run(RANGE.start, len(RANGE))]


def test_i4_the_layer_of_a_snapshot_that_is_gone_is_left_alone(start: Callable[..., Engine], io: BadIo) -> None:
    engine = start()
    image = take(engine, b"a")
    bad = _lose(engine, io)
    layer = image.view.layers()[1]
    engine.call(engine.store.delete_snapshot, b"a")
    bad.chunks = set()
    newer = take(engine, b"b")
    now = engine.call(newer.read, 0, SIZE)
    _write(engine, RANGE.start, b"m" * len(RANGE) * CHUNK_BYTES)
    assert not layer.held
    assert engine.call(newer.read, 0, SIZE) == now


def test_i6_no_more_is_remembered_than_there_may_be() -> None:
    from pyroaring import BitMap64

    class FakeLayer:
        lost = BitMap64(range(2 * MOST_CHUNKS))

    losses = Losses()
    losses.add(FakeLayer(), FakeLayer.lost)
    assert len(losses.chunks) == MOST_CHUNKS
    for _ in range(6):
        losses.begin(contents_of(0, os.urandom(CHUNK_BYTES)))
    assert 0 not in losses.chunks
    losses.forget(losses.chunks.copy())
    assert not losses.arrived.is_set()
