"""The store's disk fails in one place: what follows from it, and what does not."""

import errno
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pyroaring import BitMap64

from cow import Source
from cow.device import FALLOC_PUNCH_HOLE, Io
from cow.errors import LostError
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
