"""A store in which something else stands where a file or directory of ours should: right bytes, or a sentence."""

import os
import shutil
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cow import Source
from cow.errors import CowError
from cow.scrub import scrub_store
from tests.support.engine import Engine

SIZE = 1 << 20
CANARY = b"not of the store, and not to be touched\n" * 200
FILES = [
    "lock", "catalog.sqlite", "catalog.sqlite-wal", "catalog.sqlite-shm", "journal.{newest}", "layers", "layers/{kept}",
    "layers/{kept}/data.0000", "layers/{kept}/sums", "layers/{kept}/map", "layers/{kept}/map.new", "layers/{own}",
    "layers/{own}/data.0000", "reserve",
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


KINDS = [
    _symlink, _symlink_to_nothing, _symlink_to_a_directory, _fifo, _socket, _device, _directory, _plain_file,
    _huge_file,
]  # fmt: skip


@pytest.fixture
def place(used: Path, tmp_path: Path) -> Iterator[Path]:
    shutil.copytree(used, tmp_path / "place", symlinks=True)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "canary").write_bytes(CANARY)
    yield tmp_path / "place"
    assert os.listdir(tmp_path / "outside") == ["canary"]
    assert (tmp_path / "outside" / "canary").read_bytes() == CANARY


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("file", FILES)
def test_i4_what_is_not_of_the_store_is_neither_followed_nor_believed(
    place: Path, file: str, kind: Callable[[Path, Path], None]
) -> None:
    store = place / "store"
    layers = sorted((store / "layers").iterdir())
    newest = max(path.name for path in store.glob("journal.*")).removeprefix("journal.")
    path = store / file.format(newest=newest, kept=layers[0].name, own=layers[-1].name)
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    kind(path, place.parent / "outside" / "canary")
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
