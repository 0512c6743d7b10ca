"""A store in which something else stands where a file or directory of ours should: right bytes, or a sentence."""

import os
import re
import shutil
import signal
import socket
import sqlite3
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest

from cow.config import Source
from cow.disk.io import Io
from cow.errors import CowError, RefusedError
from cow.scrub import scrub_store
from tests.support.engine import Engine

SIZE = 1 << 20
CANARY = b"not of the store, and not to be touched\n" * 200
SOMEBODY = 65534
MOST_SECONDS = 10
MOST_MEMORY_KIB = 64 << 10
MOST_STORE_BYTES = 64 << 20
FILES = [
    "lock", "catalog.sqlite", "catalog.sqlite-wal", "catalog.sqlite-shm", "catalog.sqlite-journal", "journal.{newest}",
    "journal.{next}", "layers", "layers/{kept}", "layers/{kept}/data.0000", "layers/{kept}/sums", "layers/{kept}/map",
    "layers/{kept}/map.new", "layers/{own}", "layers/{own}/data.0000", "layers/{own}/sums", "reserve",
]  # fmt: skip


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that was killed, with a snapshot that has kept and own chunks; the device; and what must be read."""
    place = tmp_path_factory.mktemp("used")
    (place / "disk.img").write_bytes(os.urandom(SIZE))
    for _ in range(2):  # so that there are maps, too
        engine = _open(place)
        if not engine.store.snapshots:
            engine.call(engine.store.create_snapshot, b"a")
        image = engine.store.snapshots[0].images[0]
        engine.call(engine.store.origins[0].write, 0, os.urandom(64 << 10))
        engine.call(image.write, SIZE // 2, os.urandom(64 << 10))
        engine.call(image.sync)
        engine.call(engine.store.origins[0].sync)
        (place / "expected").write_bytes(engine.call(image.read, 0, SIZE))
        engine.kill()
    return place


def _open(place: Path) -> Engine:
    return Engine(str(place / "store"), [Source(b"disk.img", str(place / "disk.img"))])


def _symlink(path: Path, canary: Path) -> None:
    path.symlink_to(canary)


def _symlink_to_nothing(path: Path, canary: Path) -> None:
    path.symlink_to(canary.parent / "nothing")


def _symlink_to_a_directory(path: Path, canary: Path) -> None:
    path.symlink_to(canary.parent)


def _fifo(path: Path, canary: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path, canary: Path) -> None:
    directory = os.open(path.parent, os.O_RDONLY)  # for the path of a socket is short
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"/proc/self/fd/{directory}/{path.name}")
    os.close(directory)


def _device(path: Path, canary: Path) -> None:
    os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 3))


def _directory(path: Path, canary: Path) -> None:
    path.mkdir()
    (path / "within").write_bytes(b"x")


def _plain_file(path: Path, canary: Path) -> None:
    path.write_bytes(b"x")


def _huge_file(path: Path, canary: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


def _hard_link(path: Path, canary: Path) -> None:
    path.hardlink_to(canary)


def _writable_by_others(path: Path, canary: Path) -> None:
    path.chmod(path.stat().st_mode | 0o066)


def _of_somebody_else(path: Path, canary: Path) -> None:
    os.chown(path, SOMEBODY, SOMEBODY)


def _grown(path: Path, canary: Path) -> None:
    if path.is_file():
        os.truncate(path, 1 << 40)


REPLACED = [
    _symlink, _symlink_to_nothing, _symlink_to_a_directory, _fifo, _socket, _device, _directory, _plain_file,
    _huge_file, _hard_link,
]  # fmt: skip
CHANGED = [_writable_by_others, _of_somebody_else, _grown]


@pytest.fixture
def place(used: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of the used store; what is outside of it stays as it is, and nothing takes long or much memory."""
    shutil.copytree(used, tmp_path / "place", symlinks=True)
    (tmp_path / "outside").mkdir()
    canary = tmp_path / "outside" / "canary"
    canary.write_bytes(CANARY)
    before = canary.stat()
    Path("/proc/self/clear_refs").write_text("5")  # the peak of memory counts from here
    memory = _peak_kib()
    signal.signal(signal.SIGALRM, _too_late)
    signal.alarm(MOST_SECONDS)
    try:
        yield tmp_path / "place"
    finally:
        signal.alarm(0)
    assert _peak_kib() - memory < MOST_MEMORY_KIB
    assert os.listdir(tmp_path / "outside") == ["canary"]
    assert canary.read_bytes() == CANARY
    after = canary.stat()
    assert (after.st_mode, after.st_uid, after.st_mtime_ns) == (before.st_mode, before.st_uid, before.st_mtime_ns)


def _too_late(number: int, frame: FrameType | None) -> None:
    raise AssertionError(f"it hangs: not done within {MOST_SECONDS} s")


def _peak_kib() -> int:
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1])


def _path_of(place: Path, file: str) -> Path:
    store = place / "store"
    layers = sorted(path.name for path in (store / "layers").iterdir())
    newest = max(path.name for path in store.glob("journal.*")).removeprefix("journal.")
    return store / file.format(newest=newest, next=f"{int(newest) + 1:08d}", kept=layers[0], own=layers[-1])


def _hurt(path: Path, kind: Callable[[Path, Path], None], canary: Path) -> None:
    """Put something else in the place of what is there, or change that."""
    if kind in CHANGED:
        if not path.exists():
            path.touch()
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    kind(path, canary)


@pytest.mark.parametrize("kind", REPLACED + CHANGED)
@pytest.mark.parametrize("file", FILES)
def test_i4_what_is_not_of_the_store_is_neither_followed_nor_believed(
    place: Path, file: str, kind: Callable[[Path, Path], None]
) -> None:
    store = place / "store"
    _hurt(_path_of(place, file), kind, place.parent / "outside" / "canary")
    expected = (place / "expected").read_bytes()
    device = (place / "disk.img").read_bytes()
    for _ in range(2):
        _says_something_or_all_is_well(lambda: list(scrub_store(str(store), repair=False)))
        try:
            engine = _open(place)
        except (CowError, OSError) as error:
            _has_a_sentence(error)
            continue
        try:
            for snapshot in engine.store.snapshots:
                _read_right(engine, snapshot.images[0].read, expected)
            assert engine.call(engine.store.origins[0].read, 0, SIZE) == device
        finally:
            try:
                engine.close()
            except (CowError, OSError) as error:
                _has_a_sentence(error)
    assert (place / "disk.img").read_bytes() == device
    assert sum(path.lstat().st_blocks * 512 for path in store.rglob("*")) < MOST_STORE_BYTES


@pytest.mark.parametrize("kind", [_hard_link, _writable_by_others, _of_somebody_else])
@pytest.mark.parametrize(
    "file", ["lock", "catalog.sqlite", "catalog.sqlite-wal", "journal.{newest}", "reserve", "layers"]
)
def test_what_others_could_change_or_see_changed_is_refused(
    place: Path, file: str, kind: Callable[[Path, Path], None]
) -> None:
    path = _path_of(place, file)
    if kind is _hard_link and path.is_dir():
        kind = _symlink
    _hurt(path, kind, place.parent / "outside" / "canary")
    with pytest.raises(CowError) as caught:
        _open(place).kill()
    assert str(path) in str(caught.value)
    assert any(words in str(caught.value) for words in ("another name", "written by others", "is not a directory"))


@pytest.mark.parametrize(
    "command",
    ["cp -al store copy", "chmod -R g+w,o+w store", f"chown -R {SOMEBODY} store"],
    ids=["cp", "chmod", "chown"],
)
def test_i8_a_store_in_use_survives_what_is_refused_at_the_next_start(place: Path, command: str) -> None:
    """Whoever makes hard links of a store in use, or opens it to others, loses no snapshot by it."""
    engine = _open(place)
    subprocess.run(command.split(), cwd=place, check=True)
    old = (place / "expected").read_bytes()
    engine.call(engine.store.origins[0].write, SIZE // 4, os.urandom(64 << 10))
    engine.call(engine.store.origins[0].sync)
    image = engine.store.snapshots[0].images[0]
    assert engine.call(image.read, 0, SIZE) == old
    assert engine.store.snapshots[0].row.state == "valid"
    engine.close()
    assert engine.troubles == []
    with pytest.raises(RefusedError):
        _open(place).kill()
    shutil.rmtree(place / "copy", ignore_errors=True)
    subprocess.run("chown -R 0 store && chmod -R go= store", shell=True, cwd=place, check=True)
    engine = _open(place)
    assert engine.was_clean
    assert engine.call(engine.store.snapshots[0].images[0].read, 0, SIZE) == old
    engine.close()


def test_a_second_place_that_others_can_write_is_refused(place: Path) -> None:
    """Who writes there gives up snapshots, or hides that some were."""
    elsewhere = place / "elsewhere"
    elsewhere.mkdir()
    elsewhere.chmod(0o777)
    sources = [Source(b"disk.img", str(place / "disk.img"))]
    with pytest.raises(RefusedError, match=f"{elsewhere} can be written by others"):
        Engine(str(place / "store"), sources, elsewhere=str(elsewhere)).kill()


def test_a_store_that_is_moved_while_it_is_opened_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite goes by the path, which leads somewhere else then."""
    store, moved = place / "store", place / "moved"

    def connect(io: Io, path: str) -> sqlite3.Connection:
        store.rename(moved)
        shutil.copytree(moved, store)
        return real(io, path)

    real = Io.connect
    monkeypatch.setattr(Io, "connect", connect)
    with pytest.raises(RefusedError, match="was moved while it was opened"):
        _open(place).kill()


@pytest.mark.parametrize("kind", [*REPLACED, _writable_by_others, _of_somebody_else])
def test_what_stands_in_the_place_of_the_store_is_refused_and_left_alone(
    place: Path, kind: Callable[[Path, Path], None]
) -> None:
    store = place / "store"
    _hurt(store, kind, place.parent / "outside" / "canary")
    before = store.lstat()
    for look in (lambda: _open(place).kill(), lambda: list(scrub_store(str(store), repair=False))):
        with pytest.raises(CowError) as caught:
            look()
        assert str(store) in str(caught.value)
    after = store.lstat()
    assert (after.st_mode, after.st_uid, after.st_mtime_ns) == (before.st_mode, before.st_uid, before.st_mtime_ns)


def _read_right(engine: Engine, read: Callable[..., object], expected: bytes) -> None:
    for offset in range(0, SIZE, 64 << 10):
        try:
            found = engine.call(read, offset, 64 << 10)
        except (CowError, OSError) as error:
            _has_a_sentence(error)
        else:
            assert found == expected[offset : offset + (64 << 10)]


def _says_something_or_all_is_well(check: Callable[[], object]) -> None:
    try:
        check()
    except (CowError, OSError) as error:
        _has_a_sentence(error)


def _has_a_sentence(error: Exception) -> None:
    assert str(error)
