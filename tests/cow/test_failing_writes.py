"""A write fails half way: what was acknowledged before is kept, and what a crash then leaves is right or an error."""

import errno
import os
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from unittest.mock import patch

import pytest

from cow.buffer import behind
from cow.config import OnFull
from cow.disk.directory import Directory
from cow.durable import commits
from cow.errors import CowError, InvalidSnapshotError, LostError, StoreFullError, SyncError
from cow.geometry import CHUNK_BYTES, Run
from cow.layers.layer import Layer
from tests.support.engine import Engine, on_a_disk
from tests.support.failing import BadIo, BadSectors, at_first, take, write
from tests.support.inside import buffer_of, give_up, journal_files
from tests.support.sandbox import wait_until


def test_i4_a_chunk_whose_intent_did_not_reach_the_journal_is_not_overwritten_in_place(
    start: Callable[..., Engine], io: BadIo
) -> None:
    engine = start()
    image = take(engine, b"a")
    write(engine, image, 0, b"A")
    io.fails = lambda call, path: "journal" in path
    with pytest.raises(OSError, match="Input/output error"):
        engine.call(image.write, 0, b"B" * CHUNK_BYTES)
    io.fails = lambda call, path: False
    engine.call(image.write, 0, b"C" * CHUNK_BYTES)
    engine.kill()
    engine = start()
    (snapshot,) = engine.store.snapshots
    assert engine.call(snapshot.images[0].read, 0, CHUNK_BYTES) in (b"A" * CHUNK_BYTES, b"C" * CHUNK_BYTES)
    assert snapshot.row.state == "valid"


def test_i4_a_failed_commit_that_is_on_the_disk_is_void_before_its_chunks_are_written_anew(
    start: Callable[..., Engine], io: BadIo
) -> None:
    engine = start()
    image = take(engine, b"a")
    engine.call(image.write, 0, b"A" * CHUNK_BYTES)
    io.fails = lambda call, path: call in ("fdatasync", "fallocate") and "journal" in path
    with pytest.raises(OSError, match="Input/output error"):
        engine.call(image.sync)
    with pytest.raises(OSError, match="Input/output error"):
        engine.call(image.write, 0, b"B" * CHUNK_BYTES)
    io.fails = lambda call, path: False
    engine.call(image.write, 0, b"C" * CHUNK_BYTES)
    engine.kill()
    engine = start()
    (snapshot,) = engine.store.snapshots
    engine.call(snapshot.images[0].read, 0, CHUNK_BYTES)  # not synced: what it has is open
    assert snapshot.row.state == "valid"


@pytest.mark.parametrize("bad", ["data of a", "checksums of a", "the disk"])
def test_i9_what_cannot_be_synced_at_the_stop_costs_no_other_snapshot_its_writes(
    start: Callable[..., Engine], io: BadIo, bad: str
) -> None:
    engine = start(write_behind=True)
    a, b = take(engine, b"a"), take(engine, b"b")
    engine.call(a.write, 0, b"A" * CHUNK_BYTES)
    engine.call(b.write, 0, b"B" * CHUNK_BYTES)
    call, file = {
        "data of a": ("fdatasync", f"{a.delta.layer.name}/data.0000"),
        "checksums of a": ("pwrite", f"{a.delta.layer.name}/sums"),
        "the disk": ("fdatasync", "disk.img"),
    }[bad]
    io.fails = lambda called, path: called == call and path.endswith(file)
    with pytest.raises(OSError, match=r"Input/output error|still in memory"):
        engine.close()
    io.fails = lambda called, path: False
    engine = start()
    assert not engine.was_clean
    assert engine.call(engine.store.find(b"b").images[0].read, 0, CHUNK_BYTES) == b"B" * CHUNK_BYTES


def test_i4_a_chunk_whose_new_checksum_could_not_be_written_is_what_it_is_now(
    start: Callable[..., Engine], io: BadIo
) -> None:
    """Also when the next attempt fails as well."""
    engine = start()
    image = take(engine, b"a")
    write(engine, image, 0, b"A")
    io.fails = at_first(2, "pwrite", f"{image.delta.layer.name}/sums")
    for _ in range(2):
        with pytest.raises(OSError, match="Input/output error"):
            engine.call(image.write, 100, b"B" * 200)
    content = engine.call(image.read, 0, CHUNK_BYTES)
    assert content == b"A" * 100 + b"B" * 200 + b"A" * (CHUNK_BYTES - 300)
    engine.call(image.sync)
    assert engine.store.snapshots[0].row.state == "valid"
    engine.kill()
    engine = start()
    assert engine.call(engine.store.snapshots[0].images[0].read, 0, CHUNK_BYTES) == content


def test_a_chunk_that_was_torn_and_cannot_be_read_is_lost_and_no_other(start: Callable[..., Engine], io: BadIo) -> None:
    engine = start()
    image = take(engine, b"a")
    write(engine, image, 0, b"A")
    write(engine, image, 1, b"A")
    io.fails = at_first(1, "pwrite", f"{image.delta.layer.name}/sums")
    with pytest.raises(OSError, match="Input/output error"):
        engine.call(image.write, 0, b"B" * CHUNK_BYTES)
    io.fails = lambda call, path: call == "pread" and path.endswith(f"{image.delta.layer.name}/data.0000")
    with pytest.raises(LostError, match="are lost"):
        write(engine, image, 5, b"C")
    io.fails = lambda call, path: False
    engine.call(image.sync)
    with pytest.raises(LostError):
        engine.call(image.read, 0, CHUNK_BYTES)
    assert engine.call(image.read, CHUNK_BYTES, 1) == b"A"
    wait_until(lambda: engine.store.snapshots[0].row.state == "damaged", what="the snapshot to be marked")
    engine.close()
    image = start().store.snapshots[0].images[0]
    assert image.view.lost() == [Run(0, 1)]


def test_what_was_acknowledged_is_read_back_where_the_device_beneath_cannot_be_read(
    start: Callable[..., Engine], io: BadIo
) -> None:
    """Bad sectors, which are good again when they have been overwritten."""
    engine = start(write_behind=True)
    image, origin = take(engine, b"a"), engine.store.origins[0]
    bad = BadSectors(io, {7, 9})
    engine.call(image.write, 7 * CHUNK_BYTES, b"i" * CHUNK_BYTES)
    assert engine.call(image.read, 7 * CHUNK_BYTES, CHUNK_BYTES) == b"i" * CHUNK_BYTES
    engine.call(origin.write, 9 * CHUNK_BYTES, b"l" * CHUNK_BYTES)
    assert engine.call(origin.read, 9 * CHUNK_BYTES, CHUNK_BYTES) == b"l" * CHUNK_BYTES
    engine.call(origin.sync)
    assert engine.call(origin.read, 9 * CHUNK_BYTES, CHUNK_BYTES) == b"l" * CHUNK_BYTES
    assert bad.chunks == {7}
    assert engine.store.snapshots[0].images[0].view.lost() == [Run(9, 1)]


@on_a_disk
def test_the_delta_of_a_snapshot_that_is_given_up_during_a_write_is_removed(
    start: Callable[..., Engine], io: BadIo, tmp_path: Path
) -> None:
    engine = start()
    image = take(engine, b"a")
    write(engine, image, 0, b"A")
    waiting, go_on = threading.Event(), threading.Event()

    def fails(call: str, path: str) -> bool:
        if call == "fdatasync" and "journal" in path:
            waiting.set()
            go_on.wait()
        return False

    io.fails = fails
    with ThreadPoolExecutor() as pool:
        writing = pool.submit(engine.call, image.write, 0, b"B" * CHUNK_BYTES)
        waiting.wait()
        engine.call(give_up, engine.store, [engine.store.snapshots[0].id], "a test")
        engine.call(engine.store.disposal.sweep)
        go_on.set()
        with suppress(InvalidSnapshotError):
            writing.result()
    delta = tmp_path / "store" / "layers" / image.delta.layer.name
    wait_until(lambda: not delta.exists(), what="the directory to be removed")
    engine.call(engine.store.disposal.sweep)
    assert not delta.exists()


def test_i6_what_waits_of_a_snapshot_that_is_given_up_is_let_go(start: Callable[..., Engine], io: BadIo) -> None:
    engine = start(write_behind=True)
    image = take(engine, b"a")
    io.fails = lambda call, path: call == "pwrite" and path.endswith(f"{image.delta.layer.name}/data.0000")
    engine.call(image.write, 0, b"A" * CHUNK_BYTES)
    with pytest.raises(OSError, match="still in memory"):
        engine.call(image.sync)
    assert engine.store.space.waiting_chunks == 1
    engine.call(give_up, engine.store, [engine.store.snapshots[0].id], "a test")
    wait_until(lambda: engine.store.space.waiting_chunks == 0, what="the buffer to be empty")


def test_i3_what_a_killed_process_made_is_synced_before_it_is_relied_on(
    start: Callable[..., Engine], io: BadIo
) -> None:
    engine = start()
    image = take(engine, b"a")
    engine.call(image.write, 0, b"A" * CHUNK_BYTES)  # its files are there, and nothing was synced
    engine.kill()
    synced = []
    io.fails = lambda call, path: call == "fsync" and bool(synced.append(Path(path).name))
    engine = start()
    write(engine, engine.store.snapshots[0].images[0], 0, b"B")
    assert {"layers", image.delta.layer.name} <= set(synced)


def test_i3_what_a_failed_sync_left_in_the_cache_is_written_once_more(start: Callable[..., Engine], io: BadIo) -> None:
    """The kernel shows it, and takes it for written; the disk may not have it."""
    engine = start()
    image = take(engine, b"a")
    write(engine, image, 0, b"A")
    data = f"{image.delta.layer.name}/data.0000"
    engine.call(image.write, 0, b"B" * CHUNK_BYTES)
    io.fails = lambda call, path: call == "fdatasync" and path.endswith(data)
    with pytest.raises(OSError, match="Input/output error"):
        engine.call(image.sync)
    engine.kill()
    calls = []
    io.fails = lambda call, path: path.endswith(data) and bool(calls.append(call))
    start()
    assert calls.index("pwrite") < calls.index("fdatasync")


def test_i6_an_image_that_cannot_be_synced_adds_no_more_intents_than_there_may_be(
    start: Callable[..., Engine], io: BadIo
) -> None:
    """Else a journal file would be full of them, and nobody's old bytes could be recorded."""
    engine = start()
    image = take(engine, b"a")
    engine.call(image.write, 0, b"A" * 100 * CHUNK_BYTES)
    engine.call(image.sync)
    io.fails = lambda call, path: call == "fdatasync" and path.endswith(f"{image.delta.layer.name}/data.0000")
    with patch.object(commits, "MOST_INTENDED_CHUNKS", 4):
        for chunk in range(100):
            with suppress(OSError, CowError):
                engine.call(image.write, chunk * CHUNK_BYTES, b"B" * CHUNK_BYTES)
    assert len(image.delta.layer.intended) == 5


def test_i8_a_file_system_that_is_full_at_the_sync_is_full(start: Callable[..., Engine], io: BadIo) -> None:
    """Thin pools and network file systems find out late. It is for the policy, and no chunk is lost."""
    engine = start(on_full=OnFull.BLOCK_WRITES)
    image, origin = take(engine, b"a"), engine.store.origins[0]
    before = engine.call(image.read, 0, CHUNK_BYTES)
    io.errno = errno.ENOSPC
    io.fails = lambda call, path: call == "fdatasync" and path.endswith(f"{origin.epochs.newest_layer.name}/data.0000")
    with pytest.raises(StoreFullError):
        engine.call(origin.write, 0, b"n" * CHUNK_BYTES)
    io.fails = lambda call, path: False
    engine.call(origin.write, 0, b"n" * CHUNK_BYTES)
    assert engine.call(image.read, 0, CHUNK_BYTES) == before
    assert engine.store.snapshots[0].row.state == "valid"


@on_a_disk
def test_i4_a_chunk_that_is_lost_while_its_snapshot_is_taken_marks_it(start: Callable[..., Engine], io: BadIo) -> None:
    engine = start()
    origin = engine.store.origins[0]
    waiting, go_on = threading.Event(), threading.Event()

    def fails(call: str, path: str) -> bool:
        if call == "fdatasync" and path.endswith("disk.img"):
            waiting.set()
            go_on.wait()
        return call == "pwrite" and path.endswith("data.0000")

    io.fails = fails
    with ThreadPoolExecutor() as pool:
        taking = pool.submit(engine.call, engine.store.create_snapshot, b"a")
        waiting.wait()
        engine.call(origin.write, 0, b"n" * CHUNK_BYTES)
        go_on.set()
        snapshot = taking.result()
    assert snapshot.row.state == "damaged"
    assert snapshot.images[0].view.lost() == [Run(0, 1)]


def test_a_chunk_that_cannot_be_written_keeps_no_other_from_it_and_no_store_from_being_opened(
    start: Callable[..., Engine], io: BadIo
) -> None:
    engine = start()
    image = take(engine, b"a")
    engine.call(image.write, 0, b"A" * 8 * CHUNK_BYTES)
    engine.call(image.sync)
    data = f"{image.delta.layer.name}/data.0000"
    real = io.pwrite

    def pwrite(fd: int, content: bytes, offset: int) -> int:
        if offset < CHUNK_BYTES and os.readlink(f"/proc/self/fd/{fd}").endswith(data):
            raise OSError(errno.EIO, "a bad sector")
        return real(fd, content, offset)

    io.pwrite = pwrite
    with pytest.raises(OSError, match="a bad sector"):
        engine.call(image.write, 0, b"B" * CHUNK_BYTES)
    write(engine, image, 5, b"C")
    with pytest.raises(OSError, match="a bad sector"):
        engine.call(image.write, 0, b"B" * CHUNK_BYTES)
    engine.kill()
    engine = start()
    assert engine.findings == []
    found = engine.call(engine.store.snapshots[0].images[0].read, 0, CHUNK_BYTES)
    assert found == b"A" * CHUNK_BYTES


def test_i1_what_was_preserved_beside_a_lost_chunk_is_kept_where_the_journal_fails_in_between(
    start: Callable[..., Engine], io: BadIo, tmp_path: Path
) -> None:
    """Both go to the new file, as the checkpoint that it brings knows of neither."""
    engine = start()
    take(engine, b"a")
    old = (tmp_path / "disk.img").read_bytes()
    origin = engine.store.origins[0]
    (journal,) = journal_files(engine.store)
    appends: list[str] = []

    def fails(call: str, path: str) -> bool:
        if call == "pwrite" and "/journal." in path:
            appends.append(path)
            return len(appends) == 2
        return False

    def read_chunks(run: Run) -> bytes:
        if 1002 in range(run.first, run.first + run.chunks):
            raise OSError(errno.EIO, "a bad sector")
        return real(run)

    real, origin.read_chunks = origin.read_chunks, read_chunks
    io.fails = fails
    engine.call(origin.write, 1000 * CHUNK_BYTES, b"N" * 4 * CHUNK_BYTES)
    wait_until(lambda: journal not in journal_files(engine.store), what="the end of the older file")
    engine.kill()
    engine = start()
    (snapshot,) = engine.store.snapshots
    assert snapshot.images[0].view.lost() == [Run(1002, 1)]
    for chunk in (1000, 1001, 1003):
        kept = engine.call(snapshot.images[0].read, chunk * CHUNK_BYTES, CHUNK_BYTES)
        assert kept == old[chunk * CHUNK_BYTES : (chunk + 1) * CHUNK_BYTES]


def test_i1_who_syncs_what_another_thread_is_syncing_waits_and_is_told_that_it_failed(tmp_path: Path) -> None:
    """Else the second one would take for durable what is on its way, and commit it."""
    io, syncing, go_on = BadIo(), threading.Event(), threading.Event()
    layer = Layer(Directory.open_path(str(tmp_path), io), 1, 100)
    layer.write(0, bytes(CHUNK_BYTES))

    def fails(call: str, path: str) -> bool:
        if call != "fdatasync":
            return False
        syncing.set()
        go_on.wait()
        return True

    io.fails = fails
    with ThreadPoolExecutor() as threads:
        first = threads.submit(layer.files.sync_data)
        syncing.wait()
        second = threads.submit(layer.files.sync_data)
        try:
            with pytest.raises(TimeoutError):
                second.result(timeout=0.2)
        finally:
            go_on.set()
        with pytest.raises(OSError, match="Input/output error"):
            first.result()
        with pytest.raises(SyncError):
            second.result()
    layer.close()


def _as_async(function: Callable[[], None]) -> Callable[[], Awaitable[None]]:
    async def call() -> None:
        function()

    return call


@pytest.mark.parametrize("way", ["a sync", "in the background"])
def test_i3_a_chunk_whose_rest_is_lost_keeps_no_other_in_memory(
    start: Callable[..., Engine], io: BadIo, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part of it was acknowledged while it could be read. It is told once, and the others are kept."""
    monkeypatch.setattr(behind, "LINGER_SECONDS", 60)  # so that nothing is taken before it is lost
    engine = start(write_behind=True)
    image, origin = take(engine, b"a"), engine.store.origins[0]
    layer = origin.epochs.newest_layer.name
    data = b"".join(bytes([chunk]) * CHUNK_BYTES for chunk in range(10))
    engine.call(image.write, 100 * CHUNK_BYTES, data)
    engine.call(image.write, 5 * CHUNK_BYTES + 512, b"B" * 512)
    io.fails = lambda call, path: call == "pwrite" and f"{layer}/data" in path
    engine.call(origin.write, 5 * CHUNK_BYTES, b"L" * CHUNK_BYTES)
    engine.call(origin.drain)
    io.fails = lambda call, path: False
    assert image.view.lost() == [Run(5, 1)]
    if way == "in the background":
        engine.call(_as_async(buffer_of(image).try_again))
        wait_until(lambda: not buffer_of(image).chunks, what="the end of the buffer")
    with pytest.raises(LostError, match="part of each of 1 chunks are lost"):
        engine.call(image.sync)
    engine.call(image.sync)
    engine.call(image.write, 200 * CHUNK_BYTES, b"D" * CHUNK_BYTES)
    engine.call(image.sync)
    engine.kill()
    engine = start()
    (image,) = engine.store.snapshots[0].images
    assert engine.call(image.read, 100 * CHUNK_BYTES, len(data)) == data
    assert engine.call(image.read, 200 * CHUNK_BYTES, CHUNK_BYTES) == b"D" * CHUNK_BYTES
    with pytest.raises(LostError):
        engine.call(image.read, 5 * CHUNK_BYTES, CHUNK_BYTES)


def test_i3_a_chunk_whose_rest_cannot_be_read_for_now_waits_and_no_other_does(
    start: Callable[..., Engine], io: BadIo
) -> None:
    engine = start(write_behind=True)
    image, origin = take(engine, b"a"), engine.store.origins[0]
    real = origin.read_chunks_into

    def read_chunks_into(*arguments: object, **options: object) -> None:
        raise OSError(errno.EIO, "a bad sector of the device")

    engine.call(image.write, 100 * CHUNK_BYTES, b"A" * CHUNK_BYTES)
    engine.call(image.write, 5 * CHUNK_BYTES + 512, b"B" * 512)
    origin.read_chunks_into = read_chunks_into
    with pytest.raises(OSError, match="a bad sector of the device"):
        engine.call(image.sync)
    assert list(image.delta.layer.held) == [100]
    origin.read_chunks_into = real
    engine.call(image.sync)
    assert engine.call(image.read, 5 * CHUNK_BYTES + 512, 512) == b"B" * 512
    assert list(image.delta.layer.held) == [5, 100]


def test_a_reader_is_told_why_it_cannot_read_and_not_why_others_cannot_be_written(
    start: Callable[..., Engine], io: BadIo
) -> None:
    engine = start(write_behind=True)
    image, origin = take(engine, b"a"), engine.store.origins[0]
    layer = origin.epochs.newest_layer.name
    engine.call(image.write, 6 * CHUNK_BYTES, b"A" * CHUNK_BYTES)
    io.fails = lambda call, path: call == "pwrite" and "/data" in path
    engine.call(origin.write, 5 * CHUNK_BYTES, b"L" * CHUNK_BYTES)
    engine.call(origin.drain)
    assert layer != image.delta.layer.name
    io.errno = errno.ENOSPC
    with pytest.raises(LostError):
        engine.call(image.read, 5 * CHUNK_BYTES, 2 * CHUNK_BYTES)
