"""What fails at an opening and may pass gives up nothing; what stays costs what is there, and no more."""

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from cow.disk import passing
from cow.errors import CowError, MayPassError
from cow.geometry import CHUNK_BYTES, Run
from cow.scrub import Finding, scrub_store
from tests.support.engine import Engine
from tests.support.failing import BadIo, take, write
from tests.support.inside import forget_pauses, journal_files

PLACES = {
    "the map of a layer": ("pread", "/map"),
    "the file of the map": ("open", "/map"),
    "the directory of a layer": ("open", "/layers/0000000000000002"),
    "the journal": ("pread", "/journal.00000002"),
    "the file of the journal": ("open", "/journal.00000002"),
    "data that was being overwritten": ("pread", "/data.0000"),
    "its checksums": ("pwrite", "/sums"),
    "the file of its checksums": ("open", "/sums"),
    "a sync of the data": ("fdatasync", "/data.0000"),
    "a sync of the checksums": ("fdatasync", "/sums"),
    "a new map": ("fdatasync", "/map.new"),
}


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passing, "PAUSE_SECONDS", 0)


def _used(start: Callable[..., Engine]) -> tuple[bytes, bytes]:
    """A store that was killed: with a map, records in the journal, and a chunk that was being overwritten."""
    engine = start()
    image, origin = take(engine, b"a"), engine.store.origins[0]
    old = engine.call(origin.read, 0, CHUNK_BYTES)
    write(engine, image, 7, b"7")
    write(engine, image, 8, b"8")
    engine.call(origin.write, 0, b"n" * CHUNK_BYTES)
    engine.call(engine.store.checkpoint)
    engine.call(engine.store.housekeeping.do_all)
    assert journal_files(engine.store) == [2]
    engine.call(origin.write, CHUNK_BYTES, b"n" * CHUNK_BYTES)
    write(engine, image, 9, b"9")
    engine.call(image.write, 7 * CHUNK_BYTES, b"7" * CHUNK_BYTES)
    engine.kill()
    return old, b"789"


def _check(engine: Engine, content: tuple[bytes, bytes]) -> None:
    (snapshot,) = engine.store.snapshots
    (image,) = snapshot.images
    assert snapshot.row.state == "valid", snapshot.row.reason
    assert image.view.lost() == []
    assert engine.call(image.read, 0, CHUNK_BYTES) == content[0]
    assert engine.call(image.read, 7 * CHUNK_BYTES, 3 * CHUNK_BYTES)[::CHUNK_BYTES] == content[1]


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES, errno.ENODEV, errno.EROFS])
@pytest.mark.parametrize("place", PLACES)
def test_what_is_not_about_a_sector_refuses_the_opening_and_gives_up_nothing(
    start: Callable[..., Engine], io: BadIo, place: str, number: int
) -> None:
    content = _used(start)
    call, file = PLACES[place]
    io.errno = number
    struck: list[str] = []
    io.fails = lambda called, path: called == call and path.endswith(file) and not struck.append(path)
    with pytest.raises((CowError, OSError)) as caught:
        start()
    assert str(caught.value)
    assert struck
    assert isinstance(caught.value, MayPassError) or caught.value.errno == number
    io.fails = lambda called, path: False
    engine = start()
    assert engine.findings == []
    _check(engine, content)


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("place", PLACES)
def test_an_error_that_is_gone_a_moment_later_costs_nothing(
    start: Callable[..., Engine], io: BadIo, place: str, times: int
) -> None:
    content = _used(start)
    call, file = PLACES[place]
    if times == 2 and call == "fdatasync":
        times = 1  # it is tried again once
    left = list(range(times))
    io.fails = lambda called, path: called == call and path.endswith(file) and bool(left) and left.pop() >= 0
    try:
        engine = start()
    except OSError:  # nothing is given up by a refusal
        io.fails = lambda called, path: False
        engine = start()
    assert len(left) < times
    assert engine.findings == []
    _check(engine, content)
    engine.kill()
    _check(start(), content)


@pytest.mark.parametrize("place", ["the map of a layer", "data that was being overwritten", "a sync of the checksums"])
def test_a_bad_sector_that_stays_costs_its_layer_or_chunk_and_no_store(
    start: Callable[..., Engine], io: BadIo, place: str
) -> None:
    engine = start()
    bad, good = take(engine, b"bad"), take(engine, b"good")
    for image in (bad, good):
        write(engine, image, 7, b"7")
    engine.call(engine.store.checkpoint)
    engine.call(engine.store.housekeeping.do_all)
    for image in (bad, good):
        engine.call(image.write, 7 * CHUNK_BYTES, b"8" * CHUNK_BYTES)
    name = bad.delta.layer.name
    engine.kill()
    call, file = PLACES[place]
    io.fails = lambda called, path: called == call and path.endswith(f"{name}{file}")
    engine = start()
    assert engine.findings
    image = engine.store.find(b"good").images[0]
    assert engine.call(image.read, 7 * CHUNK_BYTES, 1) in (b"7", b"8")
    if place == "data that was being overwritten":
        assert engine.store.find(b"bad").images[0].view.lost() == [Run(7, 1)]
    else:
        assert not engine.store.find(b"bad").usable


@pytest.mark.parametrize("repair", [False, True])
@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE])
def test_verify_takes_no_error_that_passes_for_damage(
    start: Callable[..., Engine], io: BadIo, tmp_path: Path, repair: bool, number: int
) -> None:
    content = _used(start)
    io.errno = number
    left = [0, 1]
    io.fails = lambda called, path: called == "pread" and path.endswith("/data.0000") and bool(left) and left.pop() >= 0
    try:
        found = list(scrub_store(str(tmp_path / "store"), repair=repair, io=io))
        assert number == errno.EIO
        assert [one for one in found if isinstance(one, Finding)] == []
    except MayPassError:
        assert number == errno.EMFILE
    io.fails = lambda called, path: False
    _check(start(), content)


def test_many_errors_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(passing.time, "sleep", slept.append)
    forget_pauses()

    def fail() -> None:
        raise OSError(errno.EIO, "a bad sector")

    for _ in range(1000):
        with pytest.raises(OSError, match="a bad sector"):
            passing.stays(fail, "a test")
    assert len(slept) == passing.MOST_PAUSES
