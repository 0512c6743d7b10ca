"""Backup programs over the whole mount point: exit code 0, and what they restore is equal; also while it is written."""

import os
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.sandbox import Sandbox, Served, run, wait_until

SIZE = 2 << 20
PIECE = 64 << 10


@pytest.fixture
def served(sandbox: Sandbox) -> Served:
    """Three disks: random bytes, a few in a hole, none; two snapshots, one of them written to."""
    few = sandbox.disk("few.img", size=SIZE)
    with few.open("r+b") as file:
        file.seek(SIZE // 2)
        file.write(random.Random(1).randbytes(5000))
    full = sandbox.disk("full.img", content=random.Random(2).randbytes(SIZE))
    served = sandbox.mount(f"full={full}", f"few={few}", f"none={sandbox.disk('none.img', size=SIZE)}")
    (served.snaps / "fresh").mkdir()
    (served.snaps / "written").mkdir()
    for image, offset in (("fresh/few", 300_000), ("written/none", 0), ("written/full", SIZE - 9000)):
        with (served.snaps / image).open("r+b") as file:
            file.seek(offset)
            file.write(random.Random(offset).randbytes(9000))
    return served


@pytest.fixture
def target(sandbox: Sandbox) -> Path:
    path = sandbox.path / "restored"
    path.mkdir()
    return path


def _tar(*options: str) -> Callable[[Path, Path, Path], Path]:
    def copy(source: Path, target: Path, scratch: Path) -> Path:
        run("tar", "-C", source, *options, "-cf", scratch / "archive.tar", ".")
        run("tar", "-C", target, "-xf", scratch / "archive.tar")
        return target

    return copy


def _bsdtar(*options: str) -> Callable[[Path, Path, Path], Path]:
    def copy(source: Path, target: Path, scratch: Path) -> Path:
        run("bsdtar", "-C", source, *options, "-cf", scratch / "archive.tar", ".")
        run("bsdtar", "-C", target, "-xpSf", scratch / "archive.tar")
        return target

    return copy


def _command(*words: str) -> Callable[[Path, Path, Path], Path]:
    def copy(source: Path, target: Path, _scratch: Path) -> Path:
        run(*words, f"{source}/.", f"{target}/")
        return target

    return copy


def _incremental(source: Path, target: Path, scratch: Path) -> Path:
    for number in range(2):
        archive = scratch / f"{number}.tar"
        run("tar", "-C", source, "-g", scratch / "listed", "-Scf", archive, ".")
        run("tar", "-C", target, "-g", "/dev/null", "-xf", archive)
    return target


def _busybox(source: Path, target: Path, scratch: Path) -> Path:
    run("busybox", "tar", "-C", source, "-cf", scratch / "archive.tar", ".")
    run("busybox", "tar", "-C", target, "-xf", scratch / "archive.tar")
    return target


def _restic(source: Path, target: Path, scratch: Path) -> Path:
    words = {"RESTIC_PASSWORD": "x", "RESTIC_REPOSITORY": f"{scratch}/repo", "RESTIC_CACHE_DIR": f"{scratch}/cache"}
    environment = {**os.environ, **words}
    if not (scratch / "repo").exists():
        run("restic", "init", "-q", env=environment)
    run("restic", "backup", "-q", source, env=environment)
    run("restic", "restore", "-q", "latest", "--target", target, env=environment)
    return target / source.relative_to("/")


def _borg(*sparse: str, without: tuple[str, ...] = ()) -> Callable[[Path, Path, Path], Path]:
    def copy(source: Path, target: Path, scratch: Path) -> Path:
        environment = {**os.environ, "BORG_REPO": f"{scratch}/repo", "BORG_BASE_DIR": f"{scratch}/base"}
        if not (scratch / "repo").exists():
            run("borg", "init", "-e", "none", env=environment)
        number = len(run("borg", "list", "--short", env=environment).stdout.split())
        run("borg", "create", *sparse, *without, f"::{number}", source, env=environment)
        run("borg", "extract", *sparse, f"::{number}", env=environment, cwd=target)
        return target / source.relative_to("/")

    return copy


WAYS = {
    "tar": _tar(),
    "tar -S": _tar("-S"),
    "tar -S gnu": _tar("-S", "--format=gnu"),
    "tar -S raw": _tar("-S", "--format=posix", "--hole-detection=raw"),
    "tar -S 0.0": _tar("-S", "--format=posix", "--sparse-version=0.0", "--atime-preserve=replace"),
    "tar -g": _incremental,
    "bsdtar": _bsdtar("--format=pax"),
    "bsdtar -S": _bsdtar("--read-sparse", "--format=pax"),
    "busybox tar": _busybox,
    "rsync": _command("rsync", "-a"),
    "rsync -S": _command("rsync", "-aS"),
    "rsync --inplace": _command("rsync", "-a", "--inplace", "--sparse"),
    "cp": _command("cp", "-a"),
    "cp sparse": _command("cp", "-a", "--sparse=always", "--reflink=auto"),
    "busybox cp": _command("busybox", "cp", "-a"),
    "restic": _restic,
    "borg": _borg(),
    "borg sparse": _borg("--sparse"),
}
KEPT = ("restic", "borg", "rsync --inplace", "tar -g")  # those that skip what they have


def _files(place: Path) -> dict[str, bytes]:
    return {str(path.relative_to(place)): path.read_bytes() for path in sorted(place.rglob("*")) if path.is_file()}


def _empty(place: Path) -> None:
    shutil.rmtree(place)
    place.mkdir()


def test_a_backup_of_the_whole_mount_is_equal(sandbox: Sandbox, served: Served, target: Path) -> None:
    for number, (name, way) in enumerate(WAYS.items()):
        scratch = sandbox.path / f"scratch{number}"
        scratch.mkdir()
        restored = _files(way(served.path, target, scratch))
        expected = _files(served.path)
        assert restored.keys() == expected.keys(), name
        assert [path for path in expected if restored[path] != expected[path] and path != "status"] == [], name
        # Of status only the room that others have left may have changed since.
        assert restored["status"].startswith(b"version "), name
        _empty(target)
    assert "last_error" not in served.status


def test_a_second_backup_has_what_changed_since_the_first(sandbox: Sandbox, served: Served, target: Path) -> None:
    """None skips an image, or an info, that changed; also over a remount, which keeps inode numbers and times."""
    scratch = {name: sandbox.path / f"scratch{number}" for number, name in enumerate(KEPT)}
    places = {name: target / str(number) for number, name in enumerate(KEPT)}
    for place in (*scratch.values(), *places.values()):
        place.mkdir()
    for number, change in enumerate(("none", "live", "remount", "image", "snapshot")):
        if change == "remount":
            served = served.remount()
        elif change == "snapshot":
            (served.snaps / "fresh").rmdir()
            (served.snaps / "fresh").mkdir()
        elif change != "none":
            path = served.path / "live" / "full" if change == "live" else served.snaps / "written" / "few"
            second = path.stat().st_mtime_ns // 10**9  # rsync compares whole ones
            with path.open("r+b", buffering=0) as file:

                def written(file=file, path=path, second=second, number=number) -> bool:
                    os.pwrite(file.fileno(), random.Random(number).randbytes(PIECE), 4096)
                    return path.stat().st_mtime_ns // 10**9 > second

                wait_until(written, what="a write in the next second")
        expected = _files(served.path)
        for name in KEPT:
            restored = _files(WAYS[name](served.path, places[name], scratch[name]))
            differing = [path for path in expected if restored.get(path) != expected[path] and path != "status"]
            assert differing == [], (name, change)


@pytest.fixture
def writer(served: Served) -> Iterator[None]:
    """Somebody overwrites one of the live images until the end of the test."""
    stop, writes = threading.Event(), 0

    def write() -> None:
        nonlocal writes
        numbers = random.Random(5)
        with (served.path / "live" / "full").open("r+b", buffering=0) as live:
            while not stop.is_set():
                os.pwrite(live.fileno(), numbers.randbytes(PIECE), numbers.randrange(SIZE // PIECE) * PIECE)
                writes += 1

    thread = threading.Thread(target=write)
    thread.start()
    yield
    stop.set()
    thread.join()
    assert writes > 10


def test_while_the_disk_is_written_only_its_live_image_differs(
    sandbox: Sandbox, served: Served, target: Path, writer: None
) -> None:
    """Tar and borg say so of that image, with exit code 1, so it is left out for them; and of nothing else."""
    expected = {
        path: content for path, content in _files(served.path).items() if path.endswith(("full", "few", "none"))
    }
    for number, (name, way) in enumerate(WAYS.items()):
        scratch = sandbox.path / f"scratch{number}"
        scratch.mkdir()
        if "tar" in name:
            way = _tar("--exclude=./live/full", *(["-S"] if "S" in name else []))
        elif "borg" in name:
            sparse = ("--sparse",) if "sparse" in name else ()
            way = _borg(*sparse, without=("--exclude", f"{served.path}/live/full"))
        restored = _files(way(served.path, target, scratch))
        differing = [path for path, content in expected.items() if restored.get(path) != content]
        assert set(differing) <= {"live/full"}, name
        for path in ("status", "snaps/fresh/info", "snaps/written/info"):
            assert restored[path].endswith(b"\n"), name
            assert restored[path].count(b"\nversion") == 0, name
        _empty(target)
