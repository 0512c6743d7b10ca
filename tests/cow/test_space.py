"""What the store takes and may take: promises, measurements, and how many layers are looked at for them."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from cow.config import Source
from cow.disk.directory import Directory
from cow.durable import space as space_module
from cow.durable.reserve import OPENING_BYTES
from cow.durable.space import Space
from cow.errors import QuotaError
from cow.events import Filling, nobody
from cow.geometry import CHUNK_BYTES
from tests.support.engine import Engine
from tests.support.inside import file_system_has, journal_files, layers_directory
from tests.support.sandbox import wait_until

CHUNKS = 256


def _space(path: Path, quota_bytes: int | None) -> Space:
    directory = Directory.open_path(str(path))
    return Space(directory, directory.subdirectory("layers", create=True), quota_bytes, nobody)


def test_i6_promises_count_until_they_are_measured_and_once(tmp_path: Path) -> None:
    """Counts that overlap each other, and writes that overlap them, must not make the store look emptier than it is."""

    async def main() -> None:
        space = _space(tmp_path, 64 << 20)
        before = space.used_bytes
        async with space.room(10 << 20):
            await space.measure()
            assert space.used_bytes == before + (10 << 20)  # about to be written
        assert space.used_bytes == before + (10 << 20)
        (tmp_path / "layers" / "data").write_bytes(bytes(10 << 20))
        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(space.measure)
        assert space.used_bytes == before + (10 << 20)
        with pytest.raises(QuotaError):
            async with space.room(51 << 20):
                raise AssertionError("there was room")

    trio.run(main)


def test_i6_plenty_of_room_is_looked_for_again_once_others_may_have_taken_it(tmp_path: Path) -> None:
    free = 0

    async def main() -> None:
        nonlocal free
        space = _space(tmp_path, None)
        file_system_has(space, lambda: free)
        for way in ("others write", "it is measured"):
            free = 10 << 30
            assert space.is_roomy(1)
            free = 0
            assert space.is_roomy(1), "it is not looked for each time"
            if way == "others write":
                async with space.keeping(64 << 20):
                    pass
            else:
                await space.measure()
            assert not space.is_roomy(1)
        free = 10 << 30
        assert space.is_roomy(1)

    trio.run(main)


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """A store whose layers are never measured for the sake of time alone."""
    monkeypatch.setattr(space_module, "MEASURE_SECONDS", math.inf)
    (tmp_path / "disk.img").write_bytes(os.urandom(CHUNKS * CHUNK_BYTES))
    engine = Engine(str(tmp_path / "store"), [Source(b"disk.img", str(tmp_path / "disk.img"))], quota_bytes=32 << 20)
    yield engine
    engine.close()


def _counted(engine: Engine) -> list[str]:
    """Grows by one each time the layers are measured."""
    found: list[str] = []
    layers = layers_directory(engine.store.space)
    real = layers.allocated

    def allocated() -> tuple[int, int]:
        found.append("measured")
        return real()

    layers.allocated = allocated
    return found


def _taken(tmp_path: Path) -> int:
    return sum(path.lstat().st_blocks * 512 for path in (tmp_path / "store").rglob("*"))


def _take(engine: Engine, name: bytes) -> None:
    """Take a snapshot, and see the housekeeping through that follows."""
    engine.call(engine.store.create_snapshot, name)
    engine.call(engine.store.housekeeping.do_all)


def test_snapshots_are_taken_without_a_look_at_all_layers(engine: Engine, tmp_path: Path) -> None:
    counted = _counted(engine)
    for number in range(20):
        _take(engine, b"%d" % number)
        engine.call(engine.store.origins[0].write, number * CHUNK_BYTES, os.urandom(CHUNK_BYTES))
    engine.call(engine.store.origins[0].drain)
    engine.call(engine.store.housekeeping.do_all)
    assert counted == []
    assert engine.store.space.used_bytes >= _taken(tmp_path), "what is written is promised, the catalog is counted"


def test_i6_what_a_snapshot_took_is_measured_once_it_is_gone(engine: Engine, tmp_path: Path) -> None:
    _take(engine, b"a")
    engine.call(engine.store.origins[0].write, 0, os.urandom(CHUNKS * CHUNK_BYTES))
    engine.call(engine.store.origins[0].drain)
    before = engine.store.space.used_bytes
    counted = _counted(engine)
    engine.call(engine.store.delete_snapshot, b"a")
    wait_until(lambda: engine.store.space.used_bytes == _taken(tmp_path), what="the space to be counted")
    assert counted
    assert engine.store.space.used_bytes < before - CHUNKS * CHUNK_BYTES // 2


def test_i6_layers_are_measured_after_their_maps_are_saved_and_chunks_punched_out(engine: Engine) -> None:
    _take(engine, b"a")
    _take(engine, b"b")
    engine.call(engine.store.origins[0].write, 0, os.urandom(CHUNK_BYTES))
    engine.call(engine.store.origins[0].drain)
    counted = _counted(engine)
    engine.call(engine.store.checkpoint)
    wait_until(lambda: len(journal_files(engine.store)) == 1 and counted, what="the checkpoint")
    engine.call(engine.store.housekeeping.do_all)
    counted.clear()

    async def punch() -> None:
        layer = engine.store.origins[0].epochs.newest_layer
        engine.store.disposal.punch_later([(layer, layer.held)])
        await engine.store.housekeeping.do_all()

    engine.call(punch)
    assert counted


def test_i6_scarce_space_is_measured_each_time(engine: Engine) -> None:
    space = engine.store.space
    counted = _counted(engine)

    async def promise(count: int) -> None:
        async with space.keeping(count):
            pass

    engine.call(promise, space.available_bytes // 2)
    _take(engine, b"a")
    assert counted == []
    engine.call(promise, space.available_bytes * 3 // 4)
    _take(engine, b"b")
    assert counted, "what was promised is not there, and that is seen before anybody is warned"
    assert space.used_percent < space_module.WARNING_PERCENTS[0]
    assert not any(isinstance(one, Filling) for one in engine.events)


def test_i6_a_count_that_failed_is_made_again(engine: Engine) -> None:
    layers = layers_directory(engine.store.space)
    real = layers.allocated

    def fail() -> int:
        raise OSError("a disk that cannot be read")

    layers.allocated = fail
    with pytest.raises(OSError, match="cannot be read"):
        engine.call(engine.store.space.measure)
    layers.allocated = real
    counted = _counted(engine)
    engine.call(engine.store.housekeeping.do_all)
    assert len(counted) == 1


def test_i6_the_reserve_counts_while_it_is_let_go_too(tmp_path: Path) -> None:
    """What others keep meanwhile must leave room for it under the quota."""

    async def main() -> None:
        space = _space(tmp_path, None)
        assert space.reserve.fill()
        await space.measure()
        before = space.used_bytes
        with space.reserve.in_need() as let_go:
            let_go()
            assert space.reserve.fill(), "later"
            await space.keep_up()
            assert os.stat(tmp_path / "reserve").st_blocks * 512 == OPENING_BYTES
            assert space.used_bytes == before
        assert space.reserve.fill()
        await space.keep_up()
        assert space.used_bytes == before

    trio.run(main)
