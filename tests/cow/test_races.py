"""Calls that overlap: what one of them ends must not be lost, undone or misreported by another."""

import errno
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import trio
import trio.testing

from cow.disk.io import Io
from cow.durable import commits, space
from cow.errors import DamagedError
from cow.geometry import CHUNK_BYTES
from cow.images import delta, image
from cow.images.image import Image
from cow.records import journal
from cow.scrub import Finding, OpenScrub
from cow.store.store import Evidence
from tests.support.engine import Engine, engines
from tests.support.inside import catalog_of, commit_lock

SIZE = 1 << 20


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Engine]]:
    with engines(tmp_path, SIZE) as start:
        yield start


def _take(engine: Engine, name: bytes) -> Image:
    return engine.call(engine.store.create_snapshot, name).images[0]


def _damage(engine: Engine, of: Image) -> None:
    path = Path(engine.store.path) / "layers" / of.delta.layer.name / "data.0000"
    with path.open("r+b") as file:
        file.write(b"another byte or two")


class _TellsOnce(Io):
    """fdatasync as the kernel does it: all who wait for a write that is lost wait, and one of them is told."""

    def __init__(self) -> None:
        self.lost = False
        self._told = threading.Lock()
        self._together = threading.Barrier(2)

    def fdatasync(self, fd: int) -> None:
        if self.lost:
            with suppress(threading.BrokenBarrierError):  # when alone: the other one waits for us
                self._together.wait(0.5)
            with self._told:
                if self.lost:
                    self.lost = False
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
        os.fdatasync(fd)


def test_i3_of_two_syncs_that_overlap_none_says_that_a_lost_write_is_durable(start: Callable[..., Engine]) -> None:
    io = _TellsOnce()
    engine = start(io=io)
    origin = engine.store.origins[0]
    told: list[Exception | None] = []

    async def sync() -> None:
        try:
            await origin.sync()
            told.append(None)
        except Exception as error:
            told.append(error)

    async def both() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(sync)
            nursery.start_soon(sync)

    engine.call(origin.write, 0, b"lost")
    io.lost = True
    engine.call(both)
    assert len(told) == 2
    assert None not in told


def test_i3_a_sync_that_overlaps_a_repair_is_not_undone_by_it(start: Callable[..., Engine]) -> None:
    """What a scrub found damaged is written anew, and synced, before the scrub records it as lost."""
    engine = start()
    one = _take(engine, b"a")
    engine.call(one.write, 0, b"1" * CHUNK_BYTES)
    engine.call(one.sync)
    _damage(engine, one)

    async def race() -> None:
        async def write() -> None:
            await one.write(0, b"2" * CHUNK_BYTES)
            await one.sync()

        scrub = OpenScrub(engine.store, repair=True)
        await scrub.step()  # of the catalog
        lock = commit_lock(engine.store)  # as if somebody else's commit were under way
        async with trio.open_nursery() as nursery, lock:
            nursery.start_soon(scrub.step)
            await trio.testing.wait_all_tasks_blocked(0.05)
            nursery.start_soon(write)
            await trio.testing.wait_all_tasks_blocked(0.05)

    engine.call(race)
    assert engine.call(one.read, 0, 1) == b"2"
    assert engine.store.snapshots[0].row.state == "damaged"  # it was, and the repair has said so


def test_a_snapshot_that_is_removed_during_a_scrub_is_not_reported_as_damaged(start: Callable[..., Engine]) -> None:
    engine = start()
    one = _take(engine, b"a")
    engine.call(one.write, 0, b"1" * CHUNK_BYTES)
    engine.call(one.sync)

    async def scrub() -> list[object]:
        found: list[object] = []
        scrub = OpenScrub(engine.store, repair=True)
        await engine.store.delete_snapshot(b"a")
        await engine.store.disposal.sweep()
        while step := await scrub.step():
            found += step
        return found

    found = engine.call(scrub)
    assert found
    assert not [one for one in found if isinstance(one, Finding)]


def test_two_snapshots_that_are_found_damaged_at_once_are_both_recorded(start: Callable[..., Engine]) -> None:
    engine = start()
    images = [_take(engine, b"a"), _take(engine, b"b")]
    for one in images:
        engine.call(one.write, 0, b"1" * CHUNK_BYTES)
        engine.call(one.sync)
        _damage(engine, one)
    catalog = catalog_of(engine.store)
    real = catalog.set_state
    both = threading.Event()

    def slow(*arguments: object) -> None:
        real(*arguments)
        both.wait(5)

    catalog.set_state = slow

    async def read() -> None:
        async def one_of_them(one: Image) -> None:
            with pytest.raises(DamagedError):
                await one.read(0, 1)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(one_of_them, images[0])
            await trio.testing.wait_all_tasks_blocked(0.05)
            nursery.start_soon(one_of_them, images[1])
            await trio.testing.wait_all_tasks_blocked(0.05)
            both.set()

    engine.call(read)
    engine.kill()
    assert [str(one.row.state) for one in start().store.snapshots] == ["damaged", "damaged"]


def test_a_look_at_the_space_that_overlaps_a_removal_leaves_no_descriptor_open(start: Callable[..., Engine]) -> None:
    engine = start()
    _take(engine, b"base")

    async def look_and_remove() -> None:
        snapshot = await engine.store.create_snapshot(b"a")
        one = snapshot.images[0]
        await one.write(0, b"1" * CHUNK_BYTES)

        async def look() -> None:
            for _ in range(20):
                await one.allocated_bytes()

        async with trio.open_nursery() as nursery:
            for _ in range(6):
                nursery.start_soon(look)
            nursery.start_soon(engine.store.delete_snapshot, b"a")
        await engine.store.disposal.sweep()

    for _ in range(60):
        engine.call(look_and_remove)
    descriptors = Path("/proc/self/fd").iterdir()
    gone = [path for path in (_target(one) for one in descriptors) if path.startswith(engine.store.path)]
    assert not [path for path in gone if path.endswith("(deleted)")]


def _target(descriptor: Path) -> str:
    try:
        return os.readlink(descriptor)
    except FileNotFoundError:  # that of the listing itself
        return ""


def test_i5_a_snapshot_whose_thaw_fails_is_not_taken_and_leaves_nothing(start: Callable[..., Engine]) -> None:
    engine = start()

    @asynccontextmanager
    async def fails_at_the_end() -> AsyncIterator[Evidence]:
        yield {}
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with pytest.raises(OSError, match="Too many open files"):
        engine.call(engine.store.create_snapshot, b"a", fails_at_the_end)
    assert engine.store.snapshots == []
    assert _take(engine, b"a").view.is_usable


def test_i3_what_many_images_overwrite_at_once_still_fits_into_a_journal_file(
    start: Callable[..., Engine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it has to be carried over into each new file. Here everything is 64 times smaller."""
    scale = 64
    file_bytes = journal.FILE_BYTES // scale
    for module in (journal, space):
        monkeypatch.setattr(module, "FILE_BYTES", file_bytes)
    monkeypatch.setattr(delta, "MOST_UNCOMMITTED_CHUNKS", delta.MOST_UNCOMMITTED_CHUNKS // scale)
    monkeypatch.setattr(image, "MOST_WAITING_CHUNKS", image.MOST_WAITING_CHUNKS // scale)
    monkeypatch.setattr(commits, "MOST_INTENDED_CHUNKS", commits.MOST_INTENDED_CHUNKS // scale)
    chunks = 1100
    (tmp_path / "disk.img").write_bytes(bytes(chunks * CHUNK_BYTES))
    engine = start()
    images = [_take(engine, b"%d" % number) for number in range(10)]

    async def overwrite() -> None:
        for byte in (b"1", b"2"):
            for one in images:
                for chunk in range(0, chunks, 2):
                    await one.write(chunk * CHUNK_BYTES, byte * CHUNK_BYTES)
                if byte == b"1":
                    await one.sync()
        await engine.store.checkpoint()
        for one in images:
            await one.sync()
        await images[-1].write(CHUNK_BYTES, b"3" * CHUNK_BYTES)
        await images[-1].sync()

    engine.call(overwrite)
    engine.kill()
    engine = start()
    assert engine.findings == []
    for snapshot in engine.store.snapshots:
        content = engine.call(snapshot.images[0].read, 0, chunks * CHUNK_BYTES)
        assert content[:: 2 * CHUNK_BYTES] == b"2" * (chunks // 2)
    assert content[CHUNK_BYTES] == ord("3")
