"""The store: a snapshot whose taking fails half-way is not taken, and the work of an opening follows the snapshots."""

import errno
import os
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import trio.testing

import cow
from cow.config import Source
from cow.errors import LostError, StoreFullError
from cow.geometry import Run
from cow.layers.layer import Layer
from cow.store.store import Store
from tests.support.engine import Engine
from tests.support.inside import are_writes_held, give_up
from tests.support.sandbox import wait_until


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    (tmp_path / "disk.img").write_bytes(os.urandom(1 << 20))
    engine = Engine(str(tmp_path / "store"), [Source(b"disk.img", str(tmp_path / "disk.img"))])
    yield engine
    engine.close()


def _sync_that(engine: Engine, does: Callable[[], Awaitable[None]]) -> None:
    """Let something happen between the opening of the epoch and the end of create_snapshot, once."""
    origin = engine.store.origins[0]
    real = origin.sync

    async def sync() -> None:
        origin.sync = real
        await does()
        await real()

    origin.sync = sync


def test_i5_a_device_that_cannot_be_synced_leaves_no_snapshot(engine: Engine) -> None:
    async def fail() -> None:
        raise OSError(errno.EIO, "Input/output error")

    _sync_that(engine, fail)
    with pytest.raises(OSError, match="Input/output error"):
        engine.call(engine.store.create_snapshot, b"a")
    assert engine.store.snapshots == []
    engine.call(engine.store.create_snapshot, b"a")
    assert [snapshot.name for snapshot in engine.store.snapshots] == [b"a"]


def test_i5_a_snapshot_that_is_given_up_while_it_is_taken_is_not_taken(engine: Engine, tmp_path: Path) -> None:
    async def give_the_new_one_up() -> None:
        (*_, pending) = [one.id for one in engine.store.inventory.all_snapshots]
        await give_up(engine.store, [pending], "a test")

    engine.call(engine.store.create_snapshot, b"older")
    _sync_that(engine, give_the_new_one_up)
    with pytest.raises(StoreFullError, match="could not be kept: a test"):
        engine.call(engine.store.create_snapshot, b"a")
    assert [snapshot.name for snapshot in engine.store.snapshots] == [b"older"]
    origin, older = engine.store.origins[0], engine.store.snapshots[0]
    before = engine.call(origin.read, 0, 1 << 20)
    engine.call(origin.write, 0, b"x" * 8192)
    assert engine.call(older.images[0].read, 0, 1 << 20) == before


def test_i2_a_snapshot_waits_for_the_writes_under_way_and_has_them(engine: Engine) -> None:
    """Without the gate the snapshot would open its epoch first, and change when the write arrives."""
    origin = engine.store.origins[0]
    arrived, go_on = threading.Event(), threading.Event()
    real = origin.device.pwrite

    def slow(data: bytes, offset: int) -> None:
        arrived.set()
        go_on.wait()
        real(data, offset)

    origin.device.pwrite, origin.device.pwrite_nowait = slow, lambda data, offset: False
    with ThreadPoolExecutor() as threads:
        write = threads.submit(engine.call, origin.write, 100, b"under way")
        arrived.wait()
        taken = threads.submit(engine.call, engine.store.create_snapshot, b"a")
        try:
            if origin.is_in_memory:  # else it is in the buffer, which is emptied before writes are held
                wait_until(lambda: are_writes_held(engine.store) or taken.done(), what="the hold")
            engine.call(trio.testing.wait_all_tasks_blocked, 0.05)
            assert not taken.done()
        finally:
            go_on.set()
        assert write.result() == 9
        snapshot = taken.result()
    assert engine.call(snapshot.images[0].read, 100, 9) == b"under way"


@pytest.mark.parametrize("kept", [True, False], ids=["preserved", "lost"])
def test_i2_i4_a_read_that_is_overtaken_by_a_write_does_not_give_the_new_bytes(engine: Engine, kept: bool) -> None:
    """The reader was told that the device has the chunk; by the time it looks there it is overwritten."""
    snapshot = engine.call(engine.store.create_snapshot, b"a")
    origin = engine.store.origins[0]
    before = engine.call(origin.read, 0, 4096)
    wait_until(lambda: origin.fingerprint_of == snapshot.id, what="the fingerprint, which reads too")
    started, go_on = threading.Event(), threading.Event()
    real, real_into = origin.read_chunks, origin.read_chunks_into

    def read_chunks(run: Run) -> bytes:  # for the preserver
        if not kept:
            raise OSError(errno.EIO, "Input/output error")
        return real(run)

    def read_chunks_into(run: Run, into: memoryview, *, nowait: bool = False) -> None:
        if nowait:
            raise BlockingIOError
        started.set()
        go_on.wait()
        real_into(run, into)

    def pread_nowait(length: int, offset: int) -> bytes:
        raise BlockingIOError

    origin.read_chunks, origin.read_chunks_into = read_chunks, read_chunks_into
    origin.device.pread_nowait = pread_nowait
    with ThreadPoolExecutor() as threads:
        read = threads.submit(engine.call, snapshot.images[0].read, 0, 4096)
        assert started.wait(60)
        try:
            engine.call(origin.write, 0, b"x" * 4096)
            engine.call(origin.sync)
        finally:
            go_on.set()
        if kept:
            assert read.result() == before
        else:
            with pytest.raises(LostError):
                read.result()


def _steps_of_loading(engine: Engine, again: Callable[[], Engine], monkeypatch: pytest.MonkeyPatch) -> int:
    """The steps of Python's virtual machine that the engine takes to put the snapshots together.

    Others' are not counted: what is called at a garbage collection comes at any time.
    """
    engine.close()
    steps = 0
    real = Store.load
    engine_files = os.path.join(os.path.dirname(cow.__file__), "")

    def step(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal steps
        if not frame.f_code.co_filename.startswith(engine_files):
            return None
        frame.f_trace_opcodes = True
        steps += event == "opcode"
        return step

    def load(store: Store, layers: dict[int, Layer]) -> None:
        before = sys.gettrace()
        sys.settrace(step)
        try:
            real(store, layers)
        finally:
            sys.settrace(before)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "load", load)
        again().close()
    return steps


def test_the_work_of_opening_grows_with_the_snapshots_and_no_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "disk.img").write_bytes(os.urandom(1 << 20))

    def again() -> Engine:
        return Engine(str(tmp_path / "store"), [Source(b"disk.img", str(tmp_path / "disk.img"))])

    steps = []
    for count in (8, 24, 40):
        engine = again()
        for number in range(len(engine.store.snapshots), count):
            engine.call(engine.store.create_snapshot, b"%d" % number)
        steps.append(_steps_of_loading(engine, again, monkeypatch))
    few, more, most = steps
    assert most - more == pytest.approx(more - few, rel=0.02)
