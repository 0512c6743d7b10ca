"""Layers that deleted snapshots left behind become few, and nobody sees anything of it."""

import errno
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import patch

import pytest
import trio.testing
from hypothesis import HealthCheck, settings
from pyroaring import BitMap64

from cow import Source, flatten, housekeeping
from cow.catalog import State
from cow.device import Io
from cow.errors import DamagedError, LostError, StoreFullError
from cow.geometry import CHUNK_BYTES, Run
from cow.image import Image
from cow.layer import Layer, pinned
from cow.preserver import OnFull
from cow.scrub import Finding, scrub_store
from tests.cow.test_model import EngineDriver
from tests.support.engine import Engine
from tests.support.model import Machine
from tests.support.sandbox import wait_until

CHUNKS = 256
SIZE = CHUNKS * CHUNK_BYTES
MOST = 3
FOR_EVER = 1e12


class BadIo(Io):
    """The system's calls, of which syncs fail where `fails` says so of the path."""

    def __init__(self) -> None:
        self.fails: Callable[[str], bool] = lambda path: False

    def fdatasync(self, fd: int) -> None:
        if self.fails(os.readlink(f"/proc/self/fd/{fd}")):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        os.fdatasync(fd)


@pytest.fixture
def io() -> BadIo:
    return BadIo()


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is merged until `_flatten` is called; then at once, in pieces of a few chunks."""
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


def _write(engine: Engine, first: int, chunks: int) -> None:
    origin = engine.store.origins[0]
    engine.call(origin.write, first * CHUNK_BYTES, os.urandom(chunks * CHUNK_BYTES))
    engine.call(origin.sync)


def _chain(engine: Engine, count: int = 8, *, delete: bool = True) -> None:
    """Snapshots `old`, `base` and `last`, and, with `delete`, `base` has the layers of `count` deleted ones."""
    for name in (b"old", b"base"):
        engine.call(engine.store.create_snapshot, name)
        _write(engine, 3, 3)
        for number in range(count) if name == b"old" else ():  # what `base` has only until it is deleted
            _write(engine, 20 * number + 12, 1)
    for number in range(count):
        engine.call(engine.store.create_snapshot, b"%d" % number)
        _write(engine, 20 * number, 30)
    engine.call(engine.store.create_snapshot, b"last")
    _write(engine, 0, 5)
    for number in range(count) if delete else ():
        engine.call(engine.store.delete_snapshot, b"%d" % number)


def _image(engine: Engine, name: bytes) -> Image:
    found = engine.store.find(name)
    assert found is not None
    return found.images[0]


def _contents(engine: Engine) -> dict[bytes, bytes]:
    return {one.name: engine.call(one.images[0].read, 0, SIZE) for one in engine.store.snapshots}


def _layers(engine: Engine, name: bytes) -> list[Layer]:
    return engine.store.origins[0].group_of(_image(engine, name)._snapshot).layers


def _flatten(engine: Engine, most: int = MOST) -> None:
    flatten.MOST_LAYERS = most
    engine.call(_wake, engine)


async def _wake(engine: Engine) -> None:
    engine.store._flattener.wake()


def _first_pair(engine: Engine) -> tuple[Layer, Layer]:
    with patch.object(flatten, "MOST_LAYERS", MOST):
        found = engine.store._flattener._pair(engine.store.origins[0], set())
    assert found is not None
    _, source, target = found
    return source, target


def _wait_until_flat(engine: Engine, name: bytes = b"base") -> None:
    wait_until(lambda: len(_layers(engine, name)) <= MOST, what="the merging")


def _findings(tmp_path: Path) -> list[str]:
    return [one.sentence for one in scrub_store(str(tmp_path / "store"), repair=False) if isinstance(one, Finding)]


def _directories(tmp_path: Path) -> set[str]:
    return set(os.listdir(tmp_path / "store" / "layers"))


def _rows(tmp_path: Path) -> int:
    with sqlite3.connect(tmp_path / "store" / "catalog.sqlite") as catalog:
        return int(catalog.execute("SELECT count(*) FROM layers WHERE role = 'preserved'").fetchone()[0])


class Stop:
    """Has the copying stop after a few pieces, for ever, or until `go_on`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, after: int, for_ever: bool) -> None:
        self.reached, self.go_on = threading.Event(), threading.Event()
        self.layers: tuple[Layer, Layer]
        count = 0
        real = flatten._copy

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

        monkeypatch.setattr(flatten, "_copy", copy)


@pytest.fixture
def stop_after(start: object, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Stop]]:
    stops: list[Stop] = []

    def stop_after(after: int, *, for_ever: bool = False) -> Stop:
        stops.append(Stop(monkeypatch, after, for_ever))
        return stops[-1]

    yield stop_after
    for stop in stops:
        stop.go_on.set()


def _wait_until_punched(engine: Engine) -> None:
    wait_until(lambda: not engine.store.housekeeping._punches, what="the punching")


def _save(engine: Engine) -> None:
    engine.call(engine.store.checkpoint)
    wait_until(lambda: len(engine.store._commits._journal.numbers) == 1, what="the checkpoint")


def test_what_was_in_use_is_punched_out_later_without_anybody_asking(
    start: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(housekeeping, "RETRY_SECONDS", 0.01)
    engine = start()
    _chain(engine)
    layer = engine.store.origins[0].groups[0].layers[0]

    async def punch_while_it_is_in_use() -> None:
        chores = engine.store.housekeeping
        with pinned([layer]):
            chores.punch_later([(layer, BitMap64([0]))])
            await trio.testing.wait_all_tasks_blocked(0.005)
            assert chores._punches

    engine.call(punch_while_it_is_in_use)
    _wait_until_punched(engine)
    engine.close()


def test_a_snapshot_that_goes_before_a_piece_is_moved_is_no_trouble(start: Callable[..., Engine]) -> None:
    """The piece waits for its turn, and what it would have moved is punched out meanwhile."""
    engine = start()
    _chain(engine)
    before = _contents(engine)
    del before[b"base"]
    go_on, held = trio.Event(), threading.Event()

    async def hold() -> None:
        async with engine.store._flattener.moving:
            held.set()
            await go_on.wait()

    async def start_to_hold() -> None:
        trio.lowlevel.spawn_system_task(hold)

    engine.call(start_to_hold)
    held.wait()
    _flatten(engine)
    engine.call(trio.testing.wait_all_tasks_blocked, 0.01)
    engine.call(engine.store.delete_snapshot, b"base")
    _wait_until_punched(engine)

    async def let_go() -> None:
        go_on.set()

    engine.call(let_go)
    _wait_until_flat(engine, b"old")
    assert _contents(engine) == before
    assert engine.troubles == []
    engine.close()


def test_i2_a_long_chain_becomes_short_and_no_snapshot_changes(start: Callable[..., Engine], tmp_path: Path) -> None:
    engine = start()
    _chain(engine)
    before = _contents(engine)
    names = {layer.name for layer in _layers(engine, b"base")}
    _flatten(engine)
    _wait_until_flat(engine)
    assert _contents(engine) == before
    left = {layer.name for layer in _layers(engine, b"base")}
    wait_until(lambda: not (names - left) & _directories(tmp_path), what="the end of the needless directories")
    _write(engine, 0, CHUNKS)
    assert _contents(engine) == before
    assert engine.troubles == []
    engine.close()
    assert _rows(tmp_path) == len(left) + 2
    assert _findings(tmp_path) == []
    engine = start()
    assert _contents(engine) == before


def test_the_smallest_are_merged_first_and_a_chunk_moves_a_few_times(
    start: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start()
    _chain(engine, 11)
    held = sum(len(layer.held) for layer in _layers(engine, b"base"))
    moved = 0
    real = flatten._copy

    def copy(source: Layer, target: Layer, runs: list[Run]) -> bytes:
        nonlocal moved
        moved += sum(run.chunks for run in runs)
        return real(source, target, runs)

    monkeypatch.setattr(flatten, "_copy", copy)
    _flatten(engine)
    _wait_until_flat(engine)
    assert sum(len(layer.held) for layer in _layers(engine, b"base")) == held
    assert moved <= 2 * held


def test_the_layer_where_old_bytes_go_is_left_alone(start: Callable[..., Engine]) -> None:
    engine = start()
    _chain(engine)
    origin = engine.store.origins[0]
    newest = origin.newest_layer
    engine.call(engine.store.delete_snapshot, b"last")
    before = _contents(engine)
    _flatten(engine, 1)
    wait_until(lambda: len(_layers(engine, b"base")) == 2, what="the merging")
    assert origin.newest_layer is newest
    _write(engine, 0, CHUNKS)
    assert _contents(engine) == before


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
    _chain(engine)
    before = _contents(engine)
    stop = stop_after(after, for_ever=True)
    _flatten(engine)
    stop.reached.wait()
    if clean:
        engine.close()
        assert _findings(tmp_path) == []
    else:
        wait_until(lambda: not engine.store._flattener.moving.locked(), what="the commit")
        _wait_until_punched(engine)
        if after % 2:
            _save(engine)
        engine.kill()
        assert _findings(tmp_path) == []  # of what an old map has, and was punched out, neither
    monkeypatch.setattr(flatten, "REST", 0)
    engine = start()
    assert _contents(engine) == before
    _wait_until_flat(engine)
    assert _contents(engine) == before
    assert engine.troubles == []
    assert {one.row.state for one in engine.store.snapshots} == {State.VALID}
    engine.close()
    assert _findings(tmp_path) == []


@pytest.mark.parametrize("after", [1, 2, 5])
def test_i2_a_snapshot_that_is_deleted_in_the_middle_leaves_the_older_one_as_it_is(
    start: Callable[..., Engine], stop_after: Callable[..., Stop], after: int
) -> None:
    """What is being moved is needless then where the older one has it: it must not come between."""
    engine = start()
    _chain(engine)
    before = _contents(engine)
    del before[b"base"]
    stop = stop_after(after)
    _flatten(engine)
    stop.reached.wait()
    engine.call(engine.store.delete_snapshot, b"base")
    stop.go_on.set()
    _wait_until_flat(engine, b"old")
    assert _contents(engine) == before
    layers = _layers(engine, b"old")
    assert sum(len(layer.held) for layer in layers) == len(BitMap64.union(*(layer.held for layer in layers)))
    engine.kill()
    engine = start()
    assert _contents(engine) == before
    assert engine.troubles == []


def test_the_last_snapshot_is_deleted_in_the_middle(
    start: Callable[..., Engine], stop_after: Callable[..., Stop], tmp_path: Path
) -> None:
    engine = start()
    _chain(engine)
    engine.call(engine.store.delete_snapshot, b"old")
    stop = stop_after(2)
    _flatten(engine)
    stop.reached.wait()
    engine.call(engine.store.delete_snapshot, b"base")
    engine.call(engine.store.delete_snapshot, b"last")
    stop.go_on.set()
    wait_until(lambda: _directories(tmp_path) == set(), what="the end of all layers")
    assert engine.troubles == []


def test_i8_room_is_made_only_once_no_files_are_in_use(
    start: Callable[..., Engine], stop_after: Callable[..., Stop], tmp_path: Path
) -> None:
    """Else what was given up would seem to free nothing, and the next snapshot would be given up too."""
    engine = start()
    _chain(engine)
    engine.call(engine.store.delete_snapshot, b"old")
    stop = stop_after(2)
    _flatten(engine)
    stop.reached.wait()
    names = {layer.name for layer in stop.layers}
    with ThreadPoolExecutor() as threads:
        made = threads.submit(engine.call, engine.store._removal.make_room)
        wait_until(lambda: not _image(engine, b"base").is_usable, what="the end of the snapshot")
        assert not made.done()
        stop.go_on.set()
        assert made.result()
    assert not names & _directories(tmp_path)


@pytest.mark.parametrize("whole", [True, False], ids=["the layer is gone", "it is punched out"])
def test_i2_a_read_under_way_goes_on_in_the_old_place(
    start: Callable[..., Engine], stop_after: Callable[..., Stop], tmp_path: Path, whole: bool
) -> None:
    engine = start()
    _chain(engine)
    source, _ = _first_pair(engine)
    first = source.held.min()
    before = engine.call(_image(engine, b"base").read, first * CHUNK_BYTES, CHUNK_BYTES)
    started, go_on = threading.Event(), threading.Event()
    told: list[bytes | Exception] = []
    real = source.read

    def read(run: Run, *, nowait: bool = False) -> bytes:
        if nowait:
            raise BlockingIOError
        if not started.is_set():
            started.set()
            go_on.wait()
            try:
                told.append(real(run))
            except DamagedError as error:
                told.append(error)
        return real(run)

    source.read, source.read_chunk_nowait = read, lambda chunk: None
    if not whole:
        stop = stop_after(2, for_ever=True)
    with ThreadPoolExecutor() as threads:
        reading = threads.submit(engine.call, _image(engine, b"base").read, first * CHUNK_BYTES, CHUNK_BYTES)
        assert started.wait(60)
        try:
            _flatten(engine)
            if whole:
                _wait_until_flat(engine)
                assert source not in _layers(engine, b"base")
            else:
                stop.reached.wait()
                wait_until(lambda: not engine.store._flattener.moving.locked(), what="the commit")
                assert first not in source.held
            engine.call(engine.store.housekeeping.sweep)
            punches = engine.store.housekeeping._punches
            wait_until(lambda: all(layer is source for layer, _ in list(punches)), what="the punching of others")
            engine.call(engine.store.housekeeping._punch)
        finally:
            go_on.set()
        assert reading.result() == before
    assert told == [before]
    engine.call(engine.store.housekeeping.sweep)
    if whole:
        assert source.name not in _directories(tmp_path)
    assert engine.call(_image(engine, b"base").read, first * CHUNK_BYTES, CHUNK_BYTES) == before
    assert engine.store.find(b"base").row.state is State.VALID


def test_i4_a_damaged_chunk_stays_where_it_is_and_is_named_by_who_reads_it(
    start: Callable[..., Engine], tmp_path: Path
) -> None:
    engine = start()
    _chain(engine)
    before = engine.call(_image(engine, b"base").read, 0, SIZE)
    damaged = _layers(engine, b"base")[4]
    chunk = damaged.held.max()
    with (tmp_path / "store" / "layers" / damaged.name / "data.0000").open("r+b") as file:
        file.seek(chunk * CHUNK_BYTES)
        file.write(b"another byte or two")
    _flatten(engine, 1)
    wait_until(lambda: engine.troubles, what="the sentence")
    for _ in range(3):
        engine.call(_wake, engine)
        engine.call(trio.testing.wait_all_tasks_blocked, 0.01)
    assert len(engine.troubles) == 1
    assert f"chunk {chunk} (offset {chunk * CHUNK_BYTES}) of layer {damaged.name}" in engine.troubles[0]
    assert chunk in damaged.held
    assert len(_layers(engine, b"base")) < 5
    with pytest.raises(DamagedError, match=f"chunk {chunk} "):
        engine.call(_image(engine, b"base").read, chunk * CHUNK_BYTES, 1)
    assert engine.call(_image(engine, b"base").read, 0, chunk * CHUNK_BYTES) == before[: chunk * CHUNK_BYTES]
    rest = (chunk + 1) * CHUNK_BYTES
    assert engine.call(_image(engine, b"base").read, rest, SIZE) == before[rest:]


def test_i4_lost_chunks_stay_lost(start: Callable[..., Engine]) -> None:
    engine = start()
    _chain(engine)
    layers = _layers(engine, b"base")
    chunks = BitMap64([layers[3].held.max(), layers[6].held.max()])
    for layer in (layers[3], layers[6]):
        engine.call(engine.store.damage.lose, layer, layer.held & chunks)
    lost = _image(engine, b"base").lost()
    assert sum(run.chunks for run in lost) == 2
    _flatten(engine, 1)
    wait_until(lambda: len(_layers(engine, b"base")) == 1, what="the merging")
    for attempt in range(2):
        assert _image(engine, b"base").lost() == lost
        for chunk in chunks:
            with pytest.raises(LostError):
                engine.call(_image(engine, b"base").read, chunk * CHUNK_BYTES, 1)
        if attempt == 0:
            engine.kill()
            engine = start()


def test_i3_a_layer_that_cannot_be_synced_is_left_as_it_is(start: Callable[..., Engine], io: BadIo) -> None:
    engine = start()
    _chain(engine)
    before = _contents(engine)
    _, bad = _first_pair(engine)
    io.fails = lambda path: path.endswith(f"{bad.name}/data.0000")
    _flatten(engine)
    _wait_until_flat(engine)
    assert len(engine.troubles) == 1
    assert bad.name in engine.troubles[0]
    assert _contents(engine) == before
    io.fails = lambda path: False
    engine.kill()
    engine = start()
    assert _contents(engine) == before


def test_i6_a_full_store_is_left_as_it_is_without_a_word(start: Callable[..., Engine], tmp_path: Path) -> None:
    os.truncate(tmp_path / "disk.img", 36 << 20)
    engine = start(quota_bytes=32 << 20, on_full=OnFull.BLOCK_WRITES)
    _chain(engine)

    def fill() -> None:
        for first in range(CHUNKS, (36 << 20) // CHUNK_BYTES, 16):
            _write(engine, first, 16)

    with pytest.raises(StoreFullError):
        fill()
    before = _contents(engine)
    troubles, layers = list(engine.troubles), list(_layers(engine, b"base"))
    _flatten(engine)
    engine.call(trio.testing.wait_all_tasks_blocked, 0.05)
    assert _layers(engine, b"base") == layers
    assert engine.troubles == troubles
    engine.close()
    engine = start(quota_bytes=64 << 20)
    _wait_until_flat(engine)
    assert _contents(engine) == before


def test_nothing_is_merged_read_only(start: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = start()
    _chain(engine)
    before = _contents(engine)
    count = len(_layers(engine, b"base"))
    engine.close()
    monkeypatch.setattr(flatten, "MOST_LAYERS", MOST)
    engine = start(read_only=True)
    engine.call(trio.testing.wait_all_tasks_blocked, 0.05)
    assert len(_layers(engine, b"base")) == count
    assert _contents(engine) == before


def test_nothing_is_merged_while_a_snapshot_is_suspect(start: Callable[..., Engine]) -> None:
    """It believes layers by their age."""
    engine = start()
    _chain(engine)
    engine.store.find(b"old").row.state = State.SUSPECT
    count = len(_layers(engine, b"base"))
    _flatten(engine)
    engine.call(trio.testing.wait_all_tasks_blocked, 0.05)
    assert len(_layers(engine, b"base")) == count
    engine.call(engine.store.delete_snapshot, b"old")
    _wait_until_flat(engine)


def test_i2_what_was_being_preserved_when_its_snapshot_went_does_not_replace_what_is_older(
    start: Callable[..., Engine],
) -> None:
    """It comes into the newest layer, although the older snapshot, who has that by then, has the chunk already."""
    engine = start()
    origin = engine.store.origins[0]
    engine.call(engine.store.create_snapshot, b"old")
    _write(engine, 0, 2)
    engine.call(engine.store.create_snapshot, b"going")
    before = engine.call(_image(engine, b"old").read, 0, SIZE)
    arrived, go_on = threading.Event(), threading.Event()
    real = origin.newest_layer.write_data

    def write_data(first: int, data: bytes) -> bytes:
        arrived.set()
        go_on.wait()
        return real(first, data)

    going = origin.newest_layer
    going.write_data = write_data
    with ThreadPoolExecutor() as threads:
        write = threads.submit(_write, engine, 1, 2)
        arrived.wait()
        try:
            engine.call(engine.store.delete_snapshot, b"going")
        finally:
            go_on.set()
        write.result()
    assert list(going.held) == [1, 2]
    engine.call(engine.store.create_snapshot, b"last")
    _flatten(engine, 1)
    wait_until(lambda: len(_layers(engine, b"old")) == 1, what="the merging")
    assert engine.call(_image(engine, b"old").read, 0, SIZE) == before


def test_a_snapshot_is_taken_and_another_deleted_while_a_piece_is_copied(
    start: Callable[..., Engine], stop_after: Callable[..., Stop]
) -> None:
    engine = start()
    _chain(engine)
    stop = stop_after(2)
    _flatten(engine)
    stop.reached.wait()
    engine.call(engine.store.create_snapshot, b"new")
    engine.call(engine.store.delete_snapshot, b"last")
    before = _contents(engine)
    stop.go_on.set()
    _wait_until_flat(engine)
    assert _contents(engine) == before


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


FlatAgainstModel.TestCase.settings = settings(
    max_examples=40,
    stateful_step_count=80,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
test_i2_i9_the_engine_that_merges_at_once_equals_the_model = FlatAgainstModel.TestCase
