"""What comes between the pieces of a merge: crashes, failures, readers, snapshots that come and go."""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import patch

import pytest
import trio.testing
from pyroaring import BitMap64

from cow.config import OnFull
from cow.errors import DamagedError, StoreFullError
from cow.geometry import CHUNK_BYTES, Run
from cow.layers.layer import Layer, pinned
from cow.records.rows import State
from cow.store import flatten, housekeeping
from tests.support.engine import Engine, on_a_disk
from tests.support.failing import BadIo
from tests.support.flattening import (
    CHUNKS,
    MOST,
    SIZE,
    Stop,
    chain,
    contents_of,
    directories,
    findings,
    image_of,
    layers_of,
    merge,
    wait_until_flat,
    wait_until_punched,
    write,
)
from tests.support.inside import journal_files, make_room, pair_to_merge, punches
from tests.support.sandbox import wait_until


def _first_pair(engine: Engine) -> tuple[Layer, Layer]:
    with patch.object(flatten, "MOST_LAYERS", MOST):
        found = pair_to_merge(engine.store, engine.store.origins[0].epochs)
    assert found is not None
    _, source, target = found
    return source, target


def _save(engine: Engine) -> None:
    engine.call(engine.store.checkpoint)
    wait_until(lambda: len(journal_files(engine.store)) == 1, what="the checkpoint")


def test_what_was_in_use_is_punched_out_later_without_anybody_asking(
    start: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(housekeeping, "RETRY_SECONDS", 0.01)
    engine = start()
    chain(engine)
    layer = engine.store.origins[0].epochs.groups[0].layers[0]

    async def punch_while_it_is_in_use() -> None:
        disposal = engine.store.disposal
        with pinned([layer]):
            disposal.punch_later([(layer, BitMap64([0]))])
            await trio.testing.wait_all_tasks_blocked(0.005)
            assert disposal.is_punching_due

    engine.call(punch_while_it_is_in_use)
    wait_until_punched(engine)
    engine.close()


def test_a_snapshot_that_goes_before_a_piece_is_moved_is_no_trouble(start: Callable[..., Engine]) -> None:
    """The piece waits for its turn, and what it would have moved is punched out meanwhile."""
    engine = start()
    chain(engine)
    before = contents_of(engine)
    del before[b"base"]
    go_on, held = trio.Event(), threading.Event()

    async def hold() -> None:
        async with engine.store.disposal.moving:
            held.set()
            await go_on.wait()

    async def start_to_hold() -> None:
        trio.lowlevel.spawn_system_task(hold)

    engine.call(start_to_hold)
    held.wait()
    merge(engine)
    engine.call(trio.testing.wait_all_tasks_blocked, 0.01)
    engine.call(engine.store.delete_snapshot, b"base")
    wait_until_punched(engine)

    async def let_go() -> None:
        go_on.set()

    engine.call(let_go)
    wait_until_flat(engine, b"old")
    assert contents_of(engine) == before
    assert engine.troubles == []
    engine.close()


@pytest.mark.parametrize("clean", [True, False], ids=["stopped", "killed"])
@pytest.mark.parametrize("after", range(1, 9))
def test_i2_i4_a_stop_in_the_middle_loses_nothing_and_it_goes_on(
    start: Callable[..., Engine],
    stop_after: Callable[..., Stop],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    after: int,
    clean: bool,
) -> None:
    engine = start()
    chain(engine)
    before = contents_of(engine)
    stop = stop_after(after, for_ever=True)
    merge(engine)
    stop.reached.wait()
    if clean:
        engine.close()
        assert findings(tmp_path) == []
    else:
        wait_until(lambda: not engine.store.disposal.moving.locked(), what="the commit")
        wait_until_punched(engine)
        if after % 2:
            _save(engine)
        engine.kill()
        assert findings(tmp_path) == []  # of what an old map has, and was punched out, neither
    monkeypatch.setattr(flatten, "REST", 0)
    engine = start()
    assert contents_of(engine) == before
    wait_until_flat(engine)
    assert contents_of(engine) == before
    assert engine.troubles == []
    assert {one.row.state for one in engine.store.snapshots} == {State.VALID}
    engine.close()
    assert findings(tmp_path) == []


@pytest.mark.parametrize("after", [1, 2, 5])
def test_i2_a_snapshot_that_is_deleted_in_the_middle_leaves_the_older_one_as_it_is(
    start: Callable[..., Engine], stop_after: Callable[..., Stop], after: int
) -> None:
    """What is being moved is needless then where the older one has it: it must not come between."""
    engine = start()
    chain(engine)
    before = contents_of(engine)
    del before[b"base"]
    stop = stop_after(after)
    merge(engine)
    stop.reached.wait()
    engine.call(engine.store.delete_snapshot, b"base")
    stop.go_on.set()
    wait_until_flat(engine, b"old")
    assert contents_of(engine) == before
    layers = layers_of(engine, b"old")
    assert sum(len(layer.held) for layer in layers) == len(BitMap64.union(*(layer.held for layer in layers)))
    engine.kill()
    engine = start()
    assert contents_of(engine) == before
    assert engine.troubles == []


def _amid_the_oldest(start: Callable[..., Engine], stop_after: Callable[..., Stop]) -> tuple[Engine, Stop]:
    """An engine that stopped among the pieces of `base`, with no older snapshot that could inherit."""
    engine = start()
    chain(engine)
    engine.call(engine.store.delete_snapshot, b"old")
    stop = stop_after(2)
    merge(engine)
    stop.reached.wait()
    return engine, stop


def test_the_last_snapshot_is_deleted_in_the_middle(
    start: Callable[..., Engine], stop_after: Callable[..., Stop], tmp_path: Path
) -> None:
    engine, stop = _amid_the_oldest(start, stop_after)
    engine.call(engine.store.delete_snapshot, b"base")
    engine.call(engine.store.delete_snapshot, b"last")
    stop.go_on.set()
    wait_until(lambda: directories(tmp_path) == set(), what="the end of all layers")
    assert engine.troubles == []


def test_i8_room_is_made_only_once_no_files_are_in_use(
    start: Callable[..., Engine], stop_after: Callable[..., Stop], tmp_path: Path
) -> None:
    """Else what was given up would seem to free nothing, and the next snapshot would be given up too."""
    engine, stop = _amid_the_oldest(start, stop_after)
    names = {layer.name for layer in stop.layers}
    with ThreadPoolExecutor() as threads:
        made = threads.submit(engine.call, make_room, engine.store)
        wait_until(lambda: not image_of(engine, b"base").view.is_usable, what="the end of the snapshot")
        assert not made.done()
        stop.go_on.set()
        assert made.result()
    assert not names & directories(tmp_path)


@pytest.mark.parametrize("whole", [True, False], ids=["the layer is gone", "it is punched out"])
def test_i2_a_read_under_way_goes_on_in_the_old_place(
    start: Callable[..., Engine], stop_after: Callable[..., Stop], tmp_path: Path, whole: bool
) -> None:
    engine = start()
    chain(engine)
    source, _ = _first_pair(engine)
    first = source.held.min()
    before = engine.call(image_of(engine, b"base").read, first * CHUNK_BYTES, CHUNK_BYTES)
    started, go_on = threading.Event(), threading.Event()
    told: list[bytes | Exception] = []
    real = source.fill

    def fill(runs: list[Run], first: int, into: memoryview, *, nowait: bool = False) -> None:
        if nowait:
            raise BlockingIOError
        if not started.is_set():
            started.set()
            go_on.wait()
            try:
                real(runs, first, into)
                told.append(bytes(into))
            except DamagedError as error:
                told.append(error)
        real(runs, first, into)

    source.fill, source.read_chunk_nowait = fill, lambda chunk: None
    if not whole:
        stop = stop_after(2, for_ever=True)
    with ThreadPoolExecutor() as threads:
        reading = threads.submit(engine.call, image_of(engine, b"base").read, first * CHUNK_BYTES, CHUNK_BYTES)
        assert started.wait(60)
        try:
            merge(engine)
            if whole:
                wait_until_flat(engine)
                assert source not in layers_of(engine, b"base")
            else:
                stop.reached.wait()
                wait_until(lambda: not engine.store.disposal.moving.locked(), what="the commit")
                assert first not in source.held
            engine.call(engine.store.disposal.sweep)
            left = punches(engine.store)
            wait_until(lambda: all(layer is source for layer, _ in list(left)), what="the punching of others")
            engine.call(engine.store.disposal.punch)
        finally:
            go_on.set()
        assert reading.result() == before
    assert told == [before]
    engine.call(engine.store.disposal.sweep)
    if whole:
        assert source.name not in directories(tmp_path)
    assert engine.call(image_of(engine, b"base").read, first * CHUNK_BYTES, CHUNK_BYTES) == before
    assert engine.store.find(b"base").row.state is State.VALID


def test_i3_a_layer_that_cannot_be_synced_is_left_as_it_is(start: Callable[..., Engine], io: BadIo) -> None:
    engine = start()
    chain(engine)
    before = contents_of(engine)
    _, bad = _first_pair(engine)
    io.fails = lambda call, path: call == "fdatasync" and path.endswith(f"{bad.name}/data.0000")
    merge(engine)
    wait_until_flat(engine)
    assert len(engine.troubles) == 1
    assert bad.name in engine.troubles[0]
    assert contents_of(engine) == before
    io.fails = lambda call, path: False
    engine.kill()
    engine = start()
    assert contents_of(engine) == before


def test_i6_a_full_store_is_left_as_it_is_without_a_word(start: Callable[..., Engine], tmp_path: Path) -> None:
    os.truncate(tmp_path / "disk.img", 36 << 20)
    engine = start(quota_bytes=32 << 20, on_full=OnFull.BLOCK_WRITES)
    chain(engine)

    def fill() -> None:
        for first in range(CHUNKS, (36 << 20) // CHUNK_BYTES, 16):
            write(engine, first, 16)

    with pytest.raises(StoreFullError):
        fill()
    before = contents_of(engine)
    troubles, layers = list(engine.troubles), list(layers_of(engine, b"base"))
    merge(engine)
    engine.call(trio.testing.wait_all_tasks_blocked, 0.05)
    assert layers_of(engine, b"base") == layers
    assert engine.troubles == troubles
    engine.close()
    engine = start(quota_bytes=64 << 20)
    wait_until_flat(engine)
    assert contents_of(engine) == before


@on_a_disk
def test_i2_what_was_being_preserved_when_its_snapshot_went_does_not_replace_what_is_older(
    start: Callable[..., Engine],
) -> None:
    """It comes into the newest layer, although the older snapshot, who has that by then, has the chunk already."""
    engine = start()
    origin = engine.store.origins[0]
    engine.call(engine.store.create_snapshot, b"old")
    write(engine, 0, 2)
    engine.call(engine.store.create_snapshot, b"going")
    before = engine.call(image_of(engine, b"old").read, 0, SIZE)
    arrived, go_on = threading.Event(), threading.Event()
    real = origin.epochs.newest_layer.write_data

    def write_data(first: int, data: bytes) -> bytes:
        arrived.set()
        go_on.wait()
        return real(first, data)

    going = origin.epochs.newest_layer
    going.write_data = write_data
    with ThreadPoolExecutor() as threads:
        writing = threads.submit(write, engine, 1, 2)
        arrived.wait()
        try:
            engine.call(engine.store.delete_snapshot, b"going")
        finally:
            go_on.set()
        writing.result()
    assert list(going.held) == [1, 2]
    engine.call(engine.store.create_snapshot, b"last")
    merge(engine, 1)
    wait_until(lambda: len(layers_of(engine, b"old")) == 1, what="the merging")
    assert engine.call(image_of(engine, b"old").read, 0, SIZE) == before


def test_a_snapshot_is_taken_and_another_deleted_while_a_piece_is_copied(
    start: Callable[..., Engine], stop_after: Callable[..., Stop]
) -> None:
    engine = start()
    chain(engine)
    stop = stop_after(2)
    merge(engine)
    stop.reached.wait()
    engine.call(engine.store.create_snapshot, b"new")
    engine.call(engine.store.delete_snapshot, b"last")
    before = contents_of(engine)
    stop.go_on.set()
    wait_until_flat(engine)
    assert contents_of(engine) == before
