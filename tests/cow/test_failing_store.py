"""The store's disk fails in one place: what follows from it, and what does not."""

import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
from pyroaring import BitMap64

from cow.config import Source
from cow.durable.reserve import OPENING_BYTES
from cow.errors import LostError, RefusedError
from cow.geometry import CHUNK_BYTES, Run
from cow.scrub import scrub_store
from tests.support.engine import Engine
from tests.support.failing import BadIo, take, write
from tests.support.inside import journal_files
from tests.support.sandbox import wait_until


def test_i8_the_origin_goes_on_where_files_of_given_up_snapshots_cannot_be_removed(
    start: Callable[..., Engine], io: BadIo, tmp_path: Path
) -> None:
    os.truncate(tmp_path / "disk.img", 36 << 20)
    engine = start(quota_bytes=32 << 20)
    snapshot = engine.call(engine.store.create_snapshot, b"a")
    origin = engine.store.origins[0]
    io.fails = lambda call, path: call == "unlink"
    for offset in range(0, 36 << 20, 1 << 20):
        engine.call(origin.write, offset, b"n" * (1 << 20))
    assert engine.call(origin.read, 0, 36 << 20) == b"n" * (36 << 20)
    assert not snapshot.usable


def test_a_bad_sector_under_what_was_being_overwritten_is_one_lost_chunk_after_the_crash(
    start: Callable[..., Engine], io: BadIo, tmp_path: Path
) -> None:
    """And not a store that cannot be opened any more."""
    engine = start()
    image = take(engine, b"a")
    write(engine, image, 0, b"1")
    write(engine, image, 5, b"5")
    engine.call(image.write, 0, b"2" * CHUNK_BYTES)
    bad = f"{image.delta.layer.name}/data.0000"
    engine.kill()
    io.fails = lambda call, path: call == "pread" and path.endswith(bad)
    engine = start()
    assert any("1 chunks" in finding and "lost" in finding for finding in engine.findings), engine.findings
    io.fails = lambda call, path: False
    image = engine.store.snapshots[0].images[0]
    assert engine.store.snapshots[0].row.state == "damaged"
    with pytest.raises(LostError):
        engine.call(image.read, 0, 1)
    assert engine.call(image.read, 5 * CHUNK_BYTES, 3) == b"555"
    engine.close()
    assert [one for one in scrub_store(str(tmp_path / "store"), repair=False) if hasattr(one, "sentence")] == []


def test_the_opening_marks_each_snapshot_that_reads_what_was_lost_and_no_other(start: Callable[..., Engine]) -> None:
    engine = start()
    for name in (b"before", b"older", b"over", b"newer"):
        take(engine, name)
        if name == b"before":
            engine.call(engine.store.origins[0].write, 4 * CHUNK_BYTES, b"kept for the first one" * 100)
            engine.call(engine.store.origins[0].sync)
    write(engine, engine.store.snapshots[2].images[0], 4, b"o")
    engine.call(engine.store.origins[0].write, 4 * CHUNK_BYTES, b"n" * CHUNK_BYTES)
    engine.call(engine.store.origins[0].sync)
    take(engine, b"after")
    engine.store.damage.mark = lambda numbers, sentence: None  # as if the power went before the catalog had it
    layer = engine.store.snapshots[3].images[0].view.layers()[1]
    assert 4 in layer.held
    engine.call(engine.store.damage.lose, layer, BitMap64([4]))
    engine.kill()
    engine = start()
    lost = {snapshot.name: snapshot.images[0].view.lost() for snapshot in engine.store.snapshots}
    assert lost == {b"before": [], b"older": [Run(4, 1)], b"over": [], b"newer": [Run(4, 1)], b"after": []}
    damaged = {snapshot.name for snapshot in engine.store.snapshots if snapshot.row.state == "damaged"}
    assert damaged == {b"older", b"newer"}


def test_i3_a_lost_chunk_that_is_written_anew_is_there_again(start: Callable[..., Engine]) -> None:
    engine = start()
    image = take(engine, b"a")
    write(engine, image, 3, b"1")
    engine.call(engine.store.damage.lose, image.delta.layer, BitMap64([3]))
    with pytest.raises(LostError):
        engine.call(image.read, 3 * CHUNK_BYTES, 1)
    engine.call(image.write, 3 * CHUNK_BYTES, b"2" * CHUNK_BYTES)
    assert engine.call(image.read, 3 * CHUNK_BYTES, 1) == b"2"
    assert image.view.lost() == []
    engine.call(engine.store.checkpoint)  # which has to say that it is lost, as long as it is not synced
    wait_until(lambda: len(journal_files(engine.store)) == 1, what="the checkpoint")
    engine.kill()
    engine = start()
    image = engine.store.snapshots[0].images[0]
    with pytest.raises(LostError):
        engine.call(image.read, 3 * CHUNK_BYTES, 1)
    write(engine, image, 3, b"3")
    engine.kill()
    engine = start()
    assert engine.call(engine.store.snapshots[0].images[0].read, 3 * CHUNK_BYTES, 1) == b"3"


def test_a_failed_sync_of_a_deltas_checksums_is_made_good_and_the_journal_stays_short(
    start: Callable[..., Engine], io: BadIo
) -> None:
    engine = start(quota_bytes=64 << 20)
    image = take(engine, b"a")
    write(engine, image, 0, b"1")
    failed = []
    io.fails = lambda call, path: call == "fdatasync" and path.endswith("/sums") and not failed and not failed.append(1)
    for number in range(12):
        write(engine, image, number, b"%x" % number)
        engine.call(engine.store.checkpoint)
    engine.call(image.write, 4 * CHUNK_BYTES, b"Z" * CHUNK_BYTES)
    wait_until(lambda: len(journal_files(engine.store)) == 1, what="the checkpoints to be saved")
    assert failed
    engine.call(image.sync)
    engine.kill()
    engine = start()
    image = engine.store.snapshots[0].images[0]
    assert engine.findings == []
    assert engine.call(image.read, 0, 12 * CHUNK_BYTES)[::CHUNK_BYTES] == b"0123Z56789ab"


def test_i6_checksums_that_can_never_be_synced_cost_their_snapshot_and_not_the_disk(
    start: Callable[..., Engine], io: BadIo
) -> None:
    engine = start(quota_bytes=96 << 20)
    other, image = take(engine, b"other"), take(engine, b"a")
    write(engine, other, 0, b"o")
    write(engine, image, 0, b"1")
    bad = f"{image.delta.layer.name}/sums"
    io.fails = lambda call, path: call == "fdatasync" and path.endswith(bad)
    deadline = time.monotonic() + 30
    while engine.store.find(b"a").usable:
        assert time.monotonic() < deadline
        write(engine, other, 1, b"x")
        engine.call(engine.store.checkpoint)
        engine.call(engine.store.space.reserve.refill)
    assert "could not be saved for long" in engine.store.find(b"a").row.reason
    wait_until(lambda: len(journal_files(engine.store)) == 1, what="the journal to be short again")
    assert engine.store.find(b"other").row.state == "valid"
    assert engine.call(other.read, 0, 1) == b"o"


def test_a_store_that_cannot_punch_holes_says_so_and_does_all_else(start: Callable[..., Engine], io: BadIo) -> None:
    io.fails = lambda call, path: call == "punch"
    io.errno = errno.EOPNOTSUPP
    engine = start()
    origin = engine.store.origins[0]
    take(engine, b"a")
    engine.call(origin.write, 0, b"1" * CHUNK_BYTES)
    take(engine, b"b")
    engine.call(origin.write, 0, b"2" * CHUNK_BYTES)
    engine.call(engine.store.delete_snapshot, b"b")
    wait_until(lambda: any("cannot punch holes" in one for one in engine.troubles), what="the sentence")
    engine.close()
    engine = start()
    assert engine.was_clean


def test_one_chore_that_fails_keeps_no_other_from_being_done(start: Callable[..., Engine], io: BadIo) -> None:
    io.fails = lambda call, path: call == "punch"
    engine = start()
    origin = engine.store.origins[0]
    take(engine, b"a")
    engine.call(origin.write, 0, b"1" * CHUNK_BYTES)
    newest = engine.call(engine.store.create_snapshot, b"b")
    engine.call(origin.write, 0, b"2" * CHUNK_BYTES)
    engine.call(engine.store.delete_snapshot, b"b")
    newest = engine.call(engine.store.create_snapshot, b"c")
    wait_until(lambda: origin.fingerprint_of == newest.id, what="the fingerprint")
    assert any("housekeeping" in one for one in engine.troubles)
    io.fails = lambda call, path: False
    engine.close()


def test_a_layer_that_cannot_be_removed_blocks_no_other_and_no_opening(
    start: Callable[..., Engine], io: BadIo, tmp_path: Path
) -> None:
    engine = start()
    images = [take(engine, name) for name in (b"a", b"b")]
    for image in images:
        write(engine, image, 0, b"1")
    stuck, free = (tmp_path / "store" / "layers" / image.delta.layer.name for image in images)
    is_stuck = threading.Event()
    is_stuck.set()
    real = io.unlink

    def unlink(name: str, *, dir_fd: int) -> None:
        if is_stuck.is_set() and os.readlink(f"/proc/self/fd/{dir_fd}").endswith(stuck.name):
            raise OSError(errno.EIO, "stuck")
        real(name, dir_fd=dir_fd)

    io.unlink = unlink
    descriptors = len(os.listdir("/proc/self/fd"))
    engine.call(engine.store.delete_snapshot, b"a")
    engine.call(engine.store.delete_snapshot, b"b")
    wait_until(lambda: not free.exists(), what="the other to be removed")
    for _ in range(20):
        with pytest.raises(OSError, match="stuck"):
            engine.call(engine.store.disposal.sweep)
    assert len(os.listdir("/proc/self/fd")) <= descriptors
    engine.kill()
    engine = start()
    assert any("cannot be removed" in finding for finding in engine.findings)
    engine.kill()
    is_stuck.clear()
    engine = start()
    assert engine.findings == []
    assert not stuck.exists()


def test_a_refused_opening_leaves_what_the_next_one_needs_on_a_full_disk(
    start: Callable[..., Engine], tmp_path: Path
) -> None:
    start().close()
    reserve = tmp_path / "store" / "reserve"
    assert reserve.stat().st_size == OPENING_BYTES
    with pytest.raises(RefusedError, match="was made for"):
        Engine(str(tmp_path / "store"), [Source(b"other", str(tmp_path / "disk.img"))])
    assert reserve.stat().st_blocks * 512 >= OPENING_BYTES


def test_a_store_whose_catalog_and_journal_are_gone_is_refused_and_keeps_its_layers(
    start: Callable[..., Engine], tmp_path: Path
) -> None:
    engine = start()
    image = take(engine, b"a")
    write(engine, image, 0, b"1")
    engine.close()
    store = tmp_path / "store"
    for path in [*store.glob("catalog.sqlite*"), *store.glob("journal.*")]:
        path.unlink()
    with pytest.raises(RefusedError, match="missing or empty"):
        start()
    assert (store / "layers" / image.delta.layer.name / "data.0000").exists()


def test_whoever_looks_at_the_catalog_does_not_cut_what_we_have_mapped(
    start: Callable[..., Engine], tmp_path: Path
) -> None:
    """SQLite's lock on its shared memory must outlive all that we do with that file: else SIGBUS is next."""
    engine = start()
    take(engine, b"a")
    look = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'r+b'), fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 128)"
    shared = tmp_path / "store" / "catalog.sqlite-shm"
    done = subprocess.run([sys.executable, "-c", look, shared], capture_output=True, text=True, check=False)
    assert "BlockingIOError" in done.stderr


@pytest.mark.parametrize("call", ["pwrite", "fdatasync"])
def test_a_layer_whose_checksums_cannot_be_restored_costs_its_snapshot_and_not_the_store(
    start: Callable[..., Engine], io: BadIo, call: str, tmp_path: Path
) -> None:
    engine = start()
    bad, good = take(engine, b"bad"), take(engine, b"good")
    write(engine, bad, 0, b"A")
    write(engine, good, 0, b"B")
    name = bad.delta.layer.name
    engine.kill()
    io.fails = lambda called, path: called == call and path.endswith(f"{name}/sums")
    engine = start()
    assert name in "".join(engine.findings)
    snapshots = {snapshot.name: snapshot for snapshot in engine.store.snapshots}
    assert engine.call(snapshots[b"good"].images[0].read, 0, CHUNK_BYTES) == b"B" * CHUNK_BYTES
    if call == "pwrite":
        assert snapshots[b"bad"].images[0].view.lost() == [Run(0, 1)]
    else:
        assert not snapshots[b"bad"].usable
    engine.kill()
    list(scrub_store(str(tmp_path / "store"), repair=True, io=io))


def test_i6_journal_files_whose_header_fails_do_not_gather(
    start: Callable[..., Engine], io: BadIo, tmp_path: Path
) -> None:
    engine = start()
    image = take(engine, b"a")
    io.fails = lambda call, path: call == "pwrite" and "/journal." in path
    for chunk in range(10):
        with pytest.raises(OSError, match="Input/output error"):
            write(engine, image, chunk, b"x")
    assert len(list((tmp_path / "store").glob("journal.*"))) == 2
    io.fails = lambda call, path: False
    write(engine, image, 3, b"y")
    engine.kill()
    engine = start()
    (snapshot,) = engine.store.snapshots
    assert snapshot.row.state == "valid"
    assert engine.call(snapshot.images[0].read, 3 * CHUNK_BYTES, CHUNK_BYTES) == b"y" * CHUNK_BYTES


def test_checkpoints_are_saved_once_by_whoever_comes_first(start: Callable[..., Engine]) -> None:
    engine = start()
    write(engine, take(engine, b"a"), 0, b"1")

    async def twice_at_once() -> None:
        await engine.store.checkpoint()
        async with trio.open_nursery() as nursery:
            for _ in range(2):
                nursery.start_soon(engine.store.housekeeping.do_all)

    engine.call(twice_at_once)
    assert len(journal_files(engine.store)) == 1
