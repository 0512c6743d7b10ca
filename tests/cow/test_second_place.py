"""A give-up is recorded outside of the store: with another such place it is known to be missing, and not overlooked."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cow.errors import CowError, RefusedError, SuspectError
from cow.geometry import CHUNK_BYTES
from cow.scrub import Finding, scrub_store
from tests.support.engine import Engine
from tests.support.failing import BadIo, take
from tests.support.inside import catalog_of

SIZE = 2000 * CHUNK_BYTES


def _break_store(io: BadIo, monkeypatch: pytest.MonkeyPatch, engine: Engine, number: int) -> None:
    """The store's disk takes no writes, as after a remount to read-only; what is elsewhere does."""
    io.errno = number
    io.fails = lambda call, path: call != "pread" and "/store" in path

    def refuse(*_: object) -> list[int]:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(catalog_of(engine.store), "give_up_snapshot", refuse)


def _given_up(start: Callable[..., Engine], io: BadIo, monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    """A crash after the snapshots were given up elsewhere, and their chunks overwritten."""
    engine = start(elsewhere=str(place))
    take(engine, b"a")
    take(engine, b"b")
    engine.call(engine.store.origins[0].write, 9 * CHUNK_BYTES, b"k" * CHUNK_BYTES)
    engine.call(engine.store.origins[0].sync)
    with monkeypatch.context() as patch:
        _break_store(io, patch, engine, errno.EROFS)
        engine.call(engine.store.origins[0].write, 0, b"n" * CHUNK_BYTES)
        engine.call(engine.store.origins[0].sync)
        assert not any(one.usable for one in engine.store.snapshots)
        engine.kill()
    io.fails = lambda call, path: False


def _states(engine: Engine) -> list[str]:
    return [one.row.state.value for one in engine.store.snapshots]


def test_i1_a_give_up_is_found_where_it_was_recorded(
    start: Callable[..., Engine], io: BadIo, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _given_up(start, io, monkeypatch, tmp_path / "here")
    assert _states(start(elsewhere=str(tmp_path / "here"))) == ["invalid", "invalid"]


@pytest.mark.parametrize("there", ["empty", "of another session", "not understood"])
def test_i1_i4_with_another_second_place_the_store_is_refused_and_nothing_is_changed(
    start: Callable[..., Engine], io: BadIo, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, there: str
) -> None:
    here, other = tmp_path / "here", tmp_path / "other"
    _given_up(start, io, monkeypatch, here)
    other.mkdir(mode=0o700)
    (name,) = (path.name for path in here.glob("session.*"))
    if there != "empty":
        (other / name).write_text("0" * 32 if there == "of another session" else "\xff" * 50)
    for _ in range(2):
        with pytest.raises(RefusedError, match=f"is not the one that it was used with.*{name}") as caught:
            start(elsewhere=str(other))
        assert "2 snapshots" in str(caught.value)
        assert "read_suspect" in str(caught.value)
    assert _states(start(elsewhere=str(here))) == ["invalid", "invalid"]


def test_i4_who_opens_it_all_the_same_gets_suspect_snapshots_and_right_new_ones(
    start: Callable[..., Engine], io: BadIo, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    old = (tmp_path / "disk.img").read_bytes()
    _given_up(start, io, monkeypatch, tmp_path / "here")
    engine = start(elsewhere=str(tmp_path / "other"), read_suspect=True)
    assert _states(engine) == ["suspect", "suspect"]
    assert any("was not stopped clean" in one for one in engine.findings)
    engine.kill()  # and from now on this place is the one
    engine = start(elsewhere=str(tmp_path / "other"))
    assert _states(engine) == ["suspect", "suspect"]
    image = engine.store.snapshots[0].images[0]
    with pytest.raises(SuspectError):
        engine.call(image.read, 0, 1)
    assert engine.call(image.read, 9 * CHUNK_BYTES, CHUNK_BYTES) == old[9 * CHUNK_BYTES :][:CHUNK_BYTES]
    now = (tmp_path / "disk.img").read_bytes()
    new = take(engine, b"new")
    engine.call(engine.store.origins[0].write, 0, b"m" * 20 * CHUNK_BYTES)
    engine.call(engine.store.origins[0].sync)
    assert engine.call(new.read, 0, SIZE) == now
    with pytest.raises(SuspectError):
        engine.call(image.read, 0, 1)


@pytest.mark.parametrize("repair", [False, True])
def test_verify_says_what_was_given_up(
    start: Callable[..., Engine], io: BadIo, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, repair: bool
) -> None:
    here = str(tmp_path / "here")
    _given_up(start, io, monkeypatch, tmp_path / "here")
    found = [
        one for one in scrub_store(str(tmp_path / "store"), repair=repair, elsewhere=here) if isinstance(one, Finding)
    ]
    assert any("given up" in one.sentence and one.repaired == repair for one in found), found
    assert _states(start(elsewhere=here)) == ["invalid", "invalid"]


def test_the_records_can_be_brought_over(
    start: Callable[..., Engine], io: BadIo, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _given_up(start, io, monkeypatch, tmp_path / "here")
    shutil.copytree(tmp_path / "here", tmp_path / "other")
    assert _states(start(elsewhere=str(tmp_path / "other"))) == ["invalid", "invalid"]


def test_i1_a_default_store_is_known_from_a_rescue_system_by_what_is_beside_it(
    start: Callable[..., Engine], io: BadIo, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What is recorded there is taken over."""
    tmp_path.chmod(0o700)
    _given_up(start, io, monkeypatch, tmp_path)
    assert _states(start(elsewhere=str(tmp_path / "rescue"))) == ["invalid", "invalid"]


def test_i1_a_directory_beside_the_store_that_others_can_write_proves_nothing(
    start: Callable[..., Engine], io: BadIo, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tmp_path.chmod(0o700)
    _given_up(start, io, monkeypatch, tmp_path)
    tmp_path.chmod(0o777)
    with pytest.raises(RefusedError, match="is not the one that it was used with"):
        start(elsewhere=str(tmp_path / "rescue"))
    tmp_path.chmod(0o700)


@pytest.mark.parametrize("why", ["a clean stop", "no snapshots", "made by an older version", "the same place"])
def test_what_is_known_is_not_refused(start: Callable[..., Engine], tmp_path: Path, why: str) -> None:
    engine = start(elsewhere=str(tmp_path / "here"))
    if why != "no snapshots":
        take(engine, b"a")
    if why == "made by an older version":
        engine.call(_as_older, engine)
    engine.close() if why == "a clean stop" else engine.kill()
    for _ in range(3):
        engine = start(elsewhere=str(tmp_path / ("here" if why == "the same place" else "other")))
        assert all(state == "valid" for state in _states(engine))
        engine.kill()
        if why != "the same place":
            assert (tmp_path / "other").exists()


async def _as_older(engine: Engine) -> None:
    catalog_of(engine.store).set_setting("session", "")


def test_nothing_is_left_in_the_second_place_by_clean_stops(start: Callable[..., Engine], tmp_path: Path) -> None:
    for _ in range(3):
        engine = start(elsewhere=str(tmp_path / "here"))
        engine.kill()
    engine = start(elsewhere=str(tmp_path / "here"))
    engine.close()
    assert list((tmp_path / "here").iterdir()) == []
    engine = start(elsewhere=str(tmp_path / "there"))
    engine.close()
    assert not list((tmp_path / "there").glob("*"))


@pytest.mark.parametrize("before", ["clean", "killed"])
def test_i8_a_second_place_that_is_full_keeps_no_store_from_being_opened(
    start: Callable[..., Engine], io: BadIo, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, before: str
) -> None:
    """When the store fails as well, nothing is overwritten whose loss is recorded nowhere."""
    engine = start(elsewhere=str(tmp_path / "here"))
    take(engine, b"a")
    engine.close() if before == "clean" else engine.kill()
    io.errno = errno.ENOSPC
    io.fails = lambda call, path: call == "pwrite" and "/here/" in path
    engine = start(elsewhere=str(tmp_path / "here"))
    assert any("takes no writes" in one for one in engine.findings) == (before == "clean")
    old = (tmp_path / "disk.img").read_bytes()
    _break_store(io, monkeypatch, engine, errno.EROFS)
    store_fails = io.fails
    io.fails = lambda call, path: store_fails(call, path) or (call == "pwrite" and "/here/" in path)
    with pytest.raises(CowError, match="could not be preserved"):
        engine.call(engine.store.origins[0].write, 0, b"n" * CHUNK_BYTES)
    assert (tmp_path / "disk.img").read_bytes() == old
    engine.kill()
