"""The device does not answer for a while: whoever writes is told, nothing is lost, and all goes on when it is back."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from cow.disk.io import FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE, Io
from cow.errors import CowError
from cow.geometry import CHUNK_BYTES, Run
from tests.support.engine import Engine
from tests.support.failing import BadIo, BadSectors, take

SIZE = 2000 * CHUNK_BYTES
READS, WRITES, SYNCS = {"pread"}, {"pwrite"}, {"fdatasync"}
MODES = pytest.mark.parametrize("write_behind", [False, True], ids=["sync", "write-behind"])


def _gone(io: BadIo, number: int = errno.EIO, calls: frozenset[str] | set[str] = READS | WRITES | SYNCS) -> None:
    io.errno = number
    io.fails = lambda call, path: call in calls and path.endswith("disk.img")


def _back(io: BadIo) -> None:
    io.fails = lambda call, path: False


def _write_durably(engine: Engine, offset: int, data: bytes) -> None:
    engine.call(engine.store.origins[0].write, offset, data)
    engine.call(engine.store.origins[0].sync)


def _check(engine: Engine, expected: list[bytes]) -> None:
    for snapshot, content in zip(engine.store.snapshots, expected, strict=True):
        assert snapshot.row.state == "valid", snapshot.row.reason
        assert engine.call(snapshot.images[0].read, 0, SIZE) == content
        assert snapshot.images[0].view.lost() == []


@MODES
@pytest.mark.parametrize("snapshots", [1, 3])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOTCONN, errno.ENODEV, errno.ENXIO, errno.ETIMEDOUT])
def test_i1_a_device_that_is_away_for_a_while_costs_no_snapshot_a_chunk(
    start: Callable[..., Engine], io: BadIo, tmp_path: Path, write_behind: bool, snapshots: int, number: int
) -> None:
    engine = start(write_behind=write_behind)
    expected = []
    for name in range(snapshots):
        take(engine, b"%d" % name)
        expected.append((tmp_path / "disk.img").read_bytes())
        _write_durably(engine, name * CHUNK_BYTES, b"%d" % name * CHUNK_BYTES)
    _gone(io, number)
    for _ in range(3):
        with pytest.raises(OSError, match=r"disk\.img cannot be read at offset .* the device is away") as caught:
            _write_durably(engine, 1000 * CHUNK_BYTES + 100, b"new" * 100_000)
        assert caught.value.errno == number
    _back(io)
    _check(engine, expected)
    _write_durably(engine, 1000 * CHUNK_BYTES + 100, b"new" * 100_000)
    _check(engine, expected)
    assert engine.call(engine.store.origins[0].read, 1000 * CHUNK_BYTES + 100, 300_000) == b"new" * 100_000
    engine.kill()
    engine = start()
    _check(engine, expected)
    disk = (tmp_path / "disk.img").read_bytes()
    assert disk[1000 * CHUNK_BYTES + 100 :][:300_000] == b"new" * 100_000


@MODES
@pytest.mark.parametrize("calls", [READS, WRITES, READS | WRITES, SYNCS], ids=lambda calls: "+".join(sorted(calls)))
def test_i1_i3_a_device_that_does_one_thing_and_not_the_other(
    start: Callable[..., Engine], io: BadIo, tmp_path: Path, write_behind: bool, calls: set[str]
) -> None:
    """What was acknowledged and never flushed may be gone after the crash; the snapshots are as they were."""
    engine = start(write_behind=write_behind)
    take(engine, b"a")
    old = (tmp_path / "disk.img").read_bytes()
    _gone(io, errno.EIO, calls)
    with pytest.raises(OSError, match=r"disk\.img"):
        _write_durably(engine, 5 * CHUNK_BYTES, b"n" * CHUNK_BYTES)
    if calls == SYNCS:
        with pytest.raises(CowError):  # it sticks
            engine.call(engine.store.origins[0].sync)
    engine.kill()
    _back(io)
    engine = start()
    _check(engine, [old])
    assert engine.findings == []
    assert (tmp_path / "disk.img").read_bytes()[: 5 * CHUNK_BYTES] == old[: 5 * CHUNK_BYTES]


@MODES
def test_i8_one_bad_sector_is_healed_by_who_overwrites_it_at_the_price_of_that_chunk(
    start: Callable[..., Engine], io: BadIo, tmp_path: Path, write_behind: bool
) -> None:
    engine = start(write_behind=write_behind)
    image = take(engine, b"a")
    old = (tmp_path / "disk.img").read_bytes()
    BadSectors(io, {700, 705})
    _write_durably(engine, 690 * CHUNK_BYTES, b"n" * 30 * CHUNK_BYTES)
    assert image.view.lost() == [Run(700, 1), Run(705, 1)]
    assert engine.call(image.read, 690 * CHUNK_BYTES, 10 * CHUNK_BYTES) == old[690 * CHUNK_BYTES : 700 * CHUNK_BYTES]
    assert engine.call(engine.store.origins[0].read, 700 * CHUNK_BYTES, 2) == b"nn"


def test_i1_an_error_of_the_device_that_passes_costs_nothing(
    start: Callable[..., Engine], io: BadIo, tmp_path: Path
) -> None:
    engine = start()
    take(engine, b"a")
    old = (tmp_path / "disk.img").read_bytes()
    left = [1]
    io.fails = lambda call, path: call == "pread" and path.endswith("disk.img") and bool(left) and bool(left.pop())
    _write_durably(engine, 5 * CHUNK_BYTES, b"n" * CHUNK_BYTES)
    assert not left
    _check(engine, [old])


def test_what_was_acknowledged_is_read_back_while_the_device_is_away(start: Callable[..., Engine], io: BadIo) -> None:
    engine = start(write_behind=True)
    take(engine, b"a")
    origin = engine.store.origins[0]
    _gone(io)
    engine.call(origin.write, 5 * CHUNK_BYTES, b"n" * CHUNK_BYTES)
    assert engine.call(origin.read, 5 * CHUNK_BYTES + 1, 4000) == b"n" * 4000
    with pytest.raises(OSError, match=r"image disk.img \(.*disk.img\) cannot be read at offset"):
        engine.call(origin.read, 6 * CHUNK_BYTES, 1)


def test_i9_a_source_that_is_away_costs_the_others_nothing(
    start: Callable[..., Engine], io: BadIo, tmp_path: Path
) -> None:
    """Their old bytes may be in one batch with its."""
    from cow.config import Source

    (tmp_path / "other.img").write_bytes(os.urandom(SIZE))
    sources = [Source(b"disk.img", str(tmp_path / "disk.img")), Source(b"other.img", str(tmp_path / "other.img"))]
    (tmp_path / "disk.img").write_bytes(os.urandom(SIZE))
    engine = Engine(str(tmp_path / "both"), sources, io=io, write_behind=True)
    try:
        snapshot = engine.call(engine.store.create_snapshot, b"a")
        _gone(io)
        for origin in engine.store.origins:
            engine.call(origin.write, 0, b"n" * CHUNK_BYTES)
        away, other = engine.store.origins
        engine.call(other.sync)
        with pytest.raises(OSError, match="the device is away"):
            engine.call(away.sync)
        _back(io)
        engine.call(away.sync)
        assert snapshot.row.state == "valid"
        assert [image.view.lost() for image in snapshot.images] == [[], []]
    finally:
        engine.kill()


@pytest.mark.parametrize(
    ("number", "meaning"),
    [
        (errno.ENOSPC, "the file system that it is on is full"),
        (errno.EDQUOT, "the quota of the file system"),
        (errno.EFBIG, "more than a file may have"),
        (errno.EROFS, "has become read-only"),
        (errno.EIO, "see the kernel's log"),
    ],
)
@MODES
def test_an_error_of_the_source_names_image_path_and_place_and_snapshots_pay_nothing(
    start: Callable[..., Engine], io: BadIo, tmp_path: Path, number: int, meaning: str, write_behind: bool
) -> None:
    engine = start(write_behind=write_behind)
    take(engine, b"a")
    old = (tmp_path / "disk.img").read_bytes()
    _gone(io, number, WRITES)
    with pytest.raises(
        OSError, match=rf"image disk\.img \({tmp_path}/disk\.img\) cannot be written at offset 20480"
    ) as caught:
        _write_durably(engine, 5 * CHUNK_BYTES, b"n" * CHUNK_BYTES)
    assert meaning in str(caught.value)
    assert caught.value.errno == number
    _back(io)
    _check(engine, [old])


def test_the_file_system_of_a_sparse_source_is_full(start: Callable[..., Engine], io: BadIo, tmp_path: Path) -> None:
    """And the store's is not."""
    Io().fallocate(os.open(tmp_path / "disk.img", os.O_RDWR), FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE, 0, SIZE)
    engine = start()
    take(engine, b"a")
    _gone(io, errno.ENOSPC, WRITES)
    with pytest.raises(OSError, match="it is a sparse file, and the write needs room there") as caught:
        _write_durably(engine, 0, b"n" * 100 * CHUNK_BYTES)
    assert caught.value.errno == errno.ENOSPC
    _check(engine, [bytes(SIZE)])


@MODES
@pytest.mark.parametrize("place", ["in the middle", "at the end"])
def test_i4_a_file_that_is_cut_while_it_is_served_gets_no_holes_for_old_bytes(
    start: Callable[..., Engine], io: BadIo, tmp_path: Path, write_behind: bool, place: str
) -> None:
    """Not even by a write at its end, which would give it its size back."""
    engine = start(write_behind=write_behind)
    image = take(engine, b"a")
    origin, disk = engine.store.origins[0], tmp_path / "disk.img"
    old = disk.read_bytes()
    _write_durably(engine, 1500 * CHUNK_BYTES, b"k" * CHUNK_BYTES)
    os.truncate(disk, 1000 * CHUNK_BYTES)
    offset = 1200 * CHUNK_BYTES if place == "in the middle" else SIZE - CHUNK_BYTES
    for _ in range(2):
        with pytest.raises(OSError, match=r"disk.img was cut from 8192000 to 4096000 bytes"):
            _write_durably(engine, offset, b"n" * CHUNK_BYTES)
        with pytest.raises(OSError, match="was cut"):
            engine.call(image.read, 1200 * CHUNK_BYTES, 1)
        with pytest.raises(OSError, match="was cut"):
            engine.call(origin.read, 1300 * CHUNK_BYTES, 1)
    assert disk.stat().st_size == 1000 * CHUNK_BYTES
    assert image.view.lost() == []
    assert engine.call(image.read, 0, 1000 * CHUNK_BYTES) == old[: 1000 * CHUNK_BYTES]
    assert engine.call(image.read, 1500 * CHUNK_BYTES, CHUNK_BYTES) == old[1500 * CHUNK_BYTES :][:CHUNK_BYTES]
    os.truncate(disk, SIZE)  # zeroes, which are no old bytes
    with pytest.raises(OSError, match="was cut"):
        engine.call(image.read, 1200 * CHUNK_BYTES, 1)
    with pytest.raises(OSError, match="was cut"):
        _write_durably(engine, 0, b"n")


def test_i4_what_is_preserved_may_not_be_written_beyond_the_end_of_a_file_that_was_cut(
    start: Callable[..., Engine], io: BadIo, tmp_path: Path
) -> None:
    """Such a write needs no old bytes, so nothing else would look at the size."""
    engine = start(write_behind=True)
    take(engine, b"a")
    _write_durably(engine, SIZE - CHUNK_BYTES, b"k" * CHUNK_BYTES)
    os.truncate(tmp_path / "disk.img", 1000 * CHUNK_BYTES)
    with pytest.raises(OSError, match="was cut"):
        engine.call(engine.store.origins[0].write, SIZE - CHUNK_BYTES, b"n" * CHUNK_BYTES)
    assert (tmp_path / "disk.img").stat().st_size == 1000 * CHUNK_BYTES


def test_a_file_that_grew_while_it_was_served_is_refused_at_the_next_opening(
    start: Callable[..., Engine], tmp_path: Path
) -> None:
    engine = start()
    take(engine, b"a")
    old = (tmp_path / "disk.img").read_bytes()
    with (tmp_path / "disk.img").open("ab") as file:
        file.write(b"more")
    _write_durably(engine, SIZE - CHUNK_BYTES, b"n" * CHUNK_BYTES)
    assert engine.call(engine.store.snapshots[0].images[0].read, 0, SIZE) == old
    engine.close()
    with pytest.raises(CowError, match="grew from 8192000 to 8192004 bytes"):
        start()
    os.truncate(tmp_path / "disk.img", SIZE)
    _check(start(accept_unchanged=True), [old])


def test_a_fingerprint_that_could_not_be_read_is_not_recorded(
    start: Callable[..., Engine], io: BadIo, tmp_path: Path
) -> None:
    """With nothing in it, no other device would ever be noticed."""
    engine = start()
    origin = engine.store.origins[0]
    _gone(io, errno.EIO, READS)
    snapshot = engine.call(engine.store.create_snapshot, b"a")
    engine.call(engine.store.housekeeping.do_all)
    assert origin.fingerprint_of == 0
    _back(io)
    engine.call(engine.store.housekeeping.do_all)
    assert origin.fingerprint_of == snapshot.id
