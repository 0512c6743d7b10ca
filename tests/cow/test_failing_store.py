"""The store's disk fails in one place: what follows from it, and what does not."""

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from pyroaring import BitMap64

from cow import Source
from cow.device import FALLOC_PUNCH_HOLE, Io
from cow.errors import InvalidSnapshotError, LostError
from cow.geometry import CHUNK_BYTES, Run
from cow.scrub import scrub_store
from tests.support.engine import Engine
from tests.support.sandbox import wait_until

CHUNKS = 2000


class BadIo(Io):
    """The system's calls, of which those that `fails` picks by name and path fail."""

    def __init__(self) -> None:
        self.fails: Callable[[str, str], bool] = lambda call, path: False
        self.errno = errno.EIO

    def _check(self, call: str, path: str) -> None:
        if self.fails(call, path):
            raise OSError(self.errno, os.strerror(self.errno))

    def pread(self, fd: int, length: int, offset: int) -> bytes:
        self._check("pread", os.readlink(f"/proc/self/fd/{fd}"))
        return os.pread(fd, length, offset)

    def preadv(self, fd: int, into: list[memoryview], offset: int, flags: int = 0) -> int:
        self._check("pread", os.readlink(f"/proc/self/fd/{fd}"))
        return os.preadv(fd, into, offset, flags)

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        self._check("pwrite", os.readlink(f"/proc/self/fd/{fd}"))
        return os.pwrite(fd, data, offset)

    def pwritev(self, fd: int, parts: list[bytes], offset: int, flags: int = 0) -> int:
        self._check("pwrite", os.readlink(f"/proc/self/fd/{fd}"))
        return os.pwritev(fd, parts, offset, flags)

    def fdatasync(self, fd: int) -> None:
        self._check("fdatasync", os.readlink(f"/proc/self/fd/{fd}"))
        os.fdatasync(fd)

    def unlink(self, name: str, *, dir_fd: int) -> None:
        self._check("unlink", name)
        os.unlink(name, dir_fd=dir_fd)

    def fallocate(self, fd: int, mode: int, offset: int, length: int) -> None:
        self._check("punch" if mode & FALLOC_PUNCH_HOLE else "fallocate", os.readlink(f"/proc/self/fd/{fd}"))
        super().fallocate(fd, mode, offset, length)


@pytest.fixture
def io() -> BadIo:
    return BadIo()


@pytest.fixture
def start(tmp_path: Path, io: BadIo) -> Iterator[Callable[..., Engine]]:
    """Opens the store; what is still open at the end is killed."""
    (tmp_path / "disk.img").write_bytes(os.urandom(CHUNKS * CHUNK_BYTES))
    engines: list[Engine] = []

    def start(**options: object) -> Engine:
        source = Source(b"disk.img", str(tmp_path / "disk.img"))
        # What a write does shall be seen when it returns.
        engines.append(Engine(str(tmp_path / "store"), [source], io=io, **{"write_behind": False, **options}))
        return engines[-1]

    yield start
    io.fails = lambda call, path: False
    for engine in engines:
        if engine.is_open:
            engine.kill()


def _take(engine: Engine, name: bytes) -> object:
    return engine.call(engine.store.create_snapshot, name).images[0]


def _write(engine: Engine, image: object, chunk: int, byte: bytes) -> None:
    engine.call(image.write, chunk * CHUNK_BYTES, byte * CHUNK_BYTES)
    engine.call(image.sync)


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
    image = _take(engine, b"a")
    _write(engine, image, 0, b"1")
    _write(engine, image, 5, b"5")
    engine.call(image.write, 0, b"2" * CHUNK_BYTES)
    bad = f"{image.delta.name}/data.0000"
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
        _take(engine, name)
        if name == b"before":
            engine.call(engine.store.origins[0].write, 4 * CHUNK_BYTES, b"kept for the first one" * 100)
            engine.call(engine.store.origins[0].sync)
    _write(engine, engine.store.snapshots[2].images[0], 4, b"o")
    engine.call(engine.store.origins[0].write, 4 * CHUNK_BYTES, b"n" * CHUNK_BYTES)
    engine.call(engine.store.origins[0].sync)
    _take(engine, b"after")
    engine.store.damage.mark = lambda numbers, sentence: None  # as if the power went before the catalog had it
    layer = engine.store.snapshots[3].images[0].layers()[1]
    assert 4 in layer.held
    engine.call(engine.store.damage.lose, layer, BitMap64([4]))
    engine.kill()
    engine = start()
    lost = {snapshot.name: snapshot.images[0].lost() for snapshot in engine.store.snapshots}
    assert lost == {b"before": [], b"older": [Run(4, 1)], b"over": [], b"newer": [Run(4, 1)], b"after": []}
    damaged = {snapshot.name for snapshot in engine.store.snapshots if snapshot.row.state == "damaged"}
    assert damaged == {b"older", b"newer"}


def test_i3_a_lost_chunk_that_is_written_anew_is_there_again(start: Callable[..., Engine]) -> None:
    engine = start()
    image = _take(engine, b"a")
    _write(engine, image, 3, b"1")
    engine.call(engine.store.damage.lose, image.delta, BitMap64([3]))
    with pytest.raises(LostError):
        engine.call(image.read, 3 * CHUNK_BYTES, 1)
    engine.call(image.write, 3 * CHUNK_BYTES, b"2" * CHUNK_BYTES)
    assert engine.call(image.read, 3 * CHUNK_BYTES, 1) == b"2"
    assert image.lost() == []
    engine.call(engine.store.checkpoint)  # which has to say that it is lost, as long as it is not synced
    wait_until(lambda: len(engine.store._commits._journal.numbers) == 1, what="the checkpoint")
    engine.kill()
    engine = start()
    image = engine.store.snapshots[0].images[0]
    with pytest.raises(LostError):
        engine.call(image.read, 3 * CHUNK_BYTES, 1)
    _write(engine, image, 3, b"3")
    engine.kill()
    engine = start()
    assert engine.call(engine.store.snapshots[0].images[0].read, 3 * CHUNK_BYTES, 1) == b"3"


def test_a_failed_sync_of_a_deltas_checksums_is_made_good_and_the_journal_stays_short(
    start: Callable[..., Engine], io: BadIo
) -> None:
    engine = start(quota_bytes=64 << 20)
    image = _take(engine, b"a")
    _write(engine, image, 0, b"1")
    failed = []
    io.fails = lambda call, path: call == "fdatasync" and path.endswith("/sums") and not failed and not failed.append(1)
    for number in range(12):
        _write(engine, image, number, b"%x" % number)
        engine.call(engine.store.checkpoint)
    engine.call(image.write, 4 * CHUNK_BYTES, b"Z" * CHUNK_BYTES)
    wait_until(lambda: len(engine.store._commits._journal.numbers) == 1, what="the checkpoints to be saved")
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
    other, image = _take(engine, b"other"), _take(engine, b"a")
    _write(engine, other, 0, b"o")
    _write(engine, image, 0, b"1")
    bad = f"{image.delta.name}/sums"
    io.fails = lambda call, path: call == "fdatasync" and path.endswith(bad)
    deadline = time.monotonic() + 30
    while engine.store.find(b"a").usable:
        assert time.monotonic() < deadline
        _write(engine, other, 1, b"x")
        engine.call(engine.store.checkpoint)
        engine.call(engine.store.housekeeping.hold_back)
    assert "could not be saved for long" in engine.store.find(b"a").row.reason
    wait_until(lambda: len(engine.store._commits._journal.numbers) == 1, what="the journal to be short again")
    assert engine.store.find(b"other").row.state == "valid"
    assert engine.call(other.read, 0, 1) == b"o"


def test_a_store_that_cannot_punch_holes_says_so_and_does_all_else(start: Callable[..., Engine], io: BadIo) -> None:
    io.fails = lambda call, path: call == "punch"
    io.errno = errno.EOPNOTSUPP
    engine = start()
    origin = engine.store.origins[0]
    _take(engine, b"a")
    engine.call(origin.write, 0, b"1" * CHUNK_BYTES)
    _take(engine, b"b")
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
    _take(engine, b"a")
    engine.call(origin.write, 0, b"1" * CHUNK_BYTES)
    newest = engine.call(engine.store.create_snapshot, b"b")
    engine.call(origin.write, 0, b"2" * CHUNK_BYTES)
    engine.call(engine.store.delete_snapshot, b"b")
    newest = engine.call(engine.store.create_snapshot, b"c")
    wait_until(lambda: origin.fingerprint_of == newest.id, what="the fingerprint")
    assert any("housekeeping" in one for one in engine.troubles)
    io.fails = lambda call, path: False
    engine.close()


def _at_first(count: int, call: str, file: str) -> Callable[[str, str], bool]:
    """Calls to a file fail so many times, and then no more."""
    left = list(range(count))
    return lambda called, path: called == call and path.endswith(file) and bool(left) and left.pop() >= 0


def test_i4_a_chunk_whose_intent_did_not_reach_the_journal_is_not_overwritten_in_place(
    start: Callable[..., Engine], io: BadIo
) -> None:
    engine = start()
    image = _take(engine, b"a")
    _write(engine, image, 0, b"A")
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
    image = _take(engine, b"a")
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
    a, b = _take(engine, b"a"), _take(engine, b"b")
    engine.call(a.write, 0, b"A" * CHUNK_BYTES)
    engine.call(b.write, 0, b"B" * CHUNK_BYTES)
    call, file = {
        "data of a": ("fdatasync", f"{a.delta.name}/data.0000"),
        "checksums of a": ("pwrite", f"{a.delta.name}/sums"),
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
    image = _take(engine, b"a")
    _write(engine, image, 0, b"A")
    io.fails = _at_first(2, "pwrite", f"{image.delta.name}/sums")
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
    image = _take(engine, b"a")
    _write(engine, image, 0, b"A")
    _write(engine, image, 1, b"A")
    io.fails = _at_first(1, "pwrite", f"{image.delta.name}/sums")
    with pytest.raises(OSError, match="Input/output error"):
        engine.call(image.write, 0, b"B" * CHUNK_BYTES)
    io.fails = lambda call, path: call == "pread" and path.endswith(f"{image.delta.name}/data.0000")
    with pytest.raises(LostError, match="are lost"):
        _write(engine, image, 5, b"C")
    io.fails = lambda call, path: False
    engine.call(image.sync)
    with pytest.raises(LostError):
        engine.call(image.read, 0, CHUNK_BYTES)
    assert engine.call(image.read, CHUNK_BYTES, 1) == b"A"
    wait_until(lambda: engine.store.snapshots[0].row.state == "damaged", what="the snapshot to be marked")
    engine.close()
    image = start().store.snapshots[0].images[0]
    assert image.lost() == [Run(0, 1)]


def test_what_was_acknowledged_is_read_back_where_the_device_beneath_cannot_be_read(
    start: Callable[..., Engine], io: BadIo
) -> None:
    engine = start(write_behind=True)
    image, origin = _take(engine, b"a"), engine.store.origins[0]
    overwritten = threading.Event()

    def fails(call: str, path: str) -> bool:
        if path.endswith("disk.img") and call == "pwrite":
            overwritten.set()
        return path.endswith("disk.img") and call == "pread" and not overwritten.is_set()

    io.fails = fails
    engine.call(image.write, 7 * CHUNK_BYTES, b"i" * CHUNK_BYTES)
    assert engine.call(image.read, 7 * CHUNK_BYTES, CHUNK_BYTES) == b"i" * CHUNK_BYTES
    engine.call(origin.write, 9 * CHUNK_BYTES, b"l" * CHUNK_BYTES)
    assert engine.call(origin.read, 9 * CHUNK_BYTES, CHUNK_BYTES) == b"l" * CHUNK_BYTES


def test_the_delta_of_a_snapshot_that_is_given_up_during_a_write_is_removed(
    start: Callable[..., Engine], io: BadIo, tmp_path: Path
) -> None:
    engine = start()
    image = _take(engine, b"a")
    _write(engine, image, 0, b"A")
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
        engine.call(engine.store._removal.give_up, [engine.store.snapshots[0].id], "a test")
        engine.call(engine.store.housekeeping.sweep)
        go_on.set()
        with suppress(InvalidSnapshotError):
            writing.result()
    delta = tmp_path / "store" / "layers" / image.delta.name
    wait_until(lambda: not delta.exists(), what="the directory to be removed")
    engine.call(engine.store.housekeeping.sweep)
    assert not delta.exists()


def test_i6_what_waits_of_a_snapshot_that_is_given_up_is_let_go(start: Callable[..., Engine], io: BadIo) -> None:
    engine = start(write_behind=True)
    image = _take(engine, b"a")
    io.fails = lambda call, path: call == "pwrite" and path.endswith(f"{image.delta.name}/data.0000")
    engine.call(image.write, 0, b"A" * CHUNK_BYTES)
    with pytest.raises(OSError, match="still in memory"):
        engine.call(image.sync)
    assert engine.store.space.waiting_chunks == 1
    engine.call(engine.store._removal.give_up, [engine.store.snapshots[0].id], "a test")
    wait_until(lambda: engine.store.space.waiting_chunks == 0, what="the buffer to be empty")
