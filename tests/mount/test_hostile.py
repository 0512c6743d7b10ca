"""Those who should not get at a mount or its store, and a store that was tampered with, through the commands."""

import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hcpfs.daemon import record
from hcpfs.options import STORES
from tests.support.sandbox import HCPFS, Sandbox, Served, run

MIB = 1 << 20
SOMEBODY = 65534


@pytest.fixture
def served(sandbox: Sandbox) -> Served:
    served = sandbox.mount(sandbox.disk(content=os.urandom(4 * MIB)))
    (served.snaps / "a").mkdir()
    with served.live.open("r+b") as live:
        live.write(os.urandom(MIB))
        os.fsync(live.fileno())
    return served


def _replace_with_a_symlink(path: Path, canary: Path) -> None:
    path.symlink_to(canary)


def _replace_with_a_fifo(path: Path, canary: Path) -> None:
    os.mkfifo(path)


def _replace_with_a_directory(path: Path, canary: Path) -> None:
    path.mkdir()


def _replace_with_a_device(path: Path, canary: Path) -> None:
    os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 3))


@pytest.mark.parametrize("file", ["hcpfs.log", "catalog.sqlite", "lock"])
@pytest.mark.parametrize(
    "replace", [_replace_with_a_symlink, _replace_with_a_fifo, _replace_with_a_directory, _replace_with_a_device]
)
def test_what_is_not_a_file_of_the_store_is_refused_with_a_sentence(
    sandbox: Sandbox, served: Served, file: str, replace: Callable[[Path, Path], None]
) -> None:
    served.umount()
    canary = sandbox.path / "canary"
    canary.write_bytes(b"not to be touched")
    (served.store / file).unlink()
    replace(served.store / file, canary)
    told = sandbox.refusal(served.sources[0], served.path, "--store", served.store)
    assert f"{served.store}/{file} is not a regular file" in told
    if file != "hcpfs.log":
        checked = run(*HCPFS, "verify", served.store, check=False)
        assert checked.returncode == 1
        assert f"{served.store}/{file} is not a regular file" in checked.stderr
        assert "Traceback" not in checked.stderr
        assert "Traceback" not in (served.store / "hcpfs.log").read_text()
    assert canary.read_bytes() == b"not to be touched"


def _hard_link(path: Path, canary: Path) -> None:
    path.hardlink_to(canary)


def _writable_by_others(path: Path, canary: Path) -> None:
    path.write_bytes(b"")
    path.chmod(0o666)


def _of_somebody_else(path: Path, canary: Path) -> None:
    path.write_bytes(b"")
    os.chown(path, SOMEBODY, SOMEBODY)


@pytest.mark.parametrize("replace", [_hard_link, _writable_by_others, _of_somebody_else])
def test_a_log_that_is_not_only_ours_is_refused(
    sandbox: Sandbox, served: Served, replace: Callable[[Path, Path], None]
) -> None:
    served.umount()
    canary = sandbox.path / "canary"
    canary.write_bytes(b"not to be touched")
    (served.store / "hcpfs.log").unlink()
    replace(served.store / "hcpfs.log", canary)
    told = sandbox.refusal(served.sources[0], served.path, "--store", served.store)
    assert f"{served.store}/hcpfs.log" in told
    assert "another name" in told or "written by others" in told
    assert canary.read_bytes() == b"not to be touched"


def test_a_huge_log_is_put_aside(sandbox: Sandbox, served: Served) -> None:
    served.umount()
    os.truncate(served.store / "hcpfs.log", 1 << 40)
    served = served.again()
    assert (served.store / "hcpfs.log").stat().st_size < MIB
    assert (served.store / "hcpfs.log.1").stat().st_blocks * 512 < MIB


def test_a_log_that_cannot_be_put_aside_is_begun_anew(sandbox: Sandbox, served: Served) -> None:
    served.umount()
    (served.store / "hcpfs.log.1").mkdir()
    os.truncate(served.store / "hcpfs.log", 1 << 40)
    served = served.again()
    assert (served.store / "hcpfs.log").stat().st_size < MIB
    (served.store / "hcpfs.log.1").rmdir()


def _is_a_symlink(store: Path, outside: Path) -> None:
    store.symlink_to(outside)


def _is_a_symlink_to_nothing(store: Path, outside: Path) -> None:
    store.symlink_to(outside / "nothing")


def _is_a_fifo(store: Path, outside: Path) -> None:
    os.mkfifo(store)


def _is_a_file(store: Path, outside: Path) -> None:
    store.write_bytes(b"x")


def _is_of_somebody_else(store: Path, outside: Path) -> None:
    store.mkdir()
    os.chown(store, SOMEBODY, SOMEBODY)


def _has_other_things(store: Path, outside: Path) -> None:
    store.mkdir()
    store.chmod(0o755)
    (store / "letter").write_bytes(b"x")


@pytest.mark.parametrize(
    "place",
    [_is_a_symlink, _is_a_symlink_to_nothing, _is_a_fifo, _is_a_file, _is_of_somebody_else, _has_other_things],
)
def test_nothing_is_left_where_no_store_can_be(sandbox: Sandbox, place: Callable[[Path, Path], None]) -> None:
    """Neither a log, nor a lock, nor another mode: it may be somebody's directory, or the system's."""
    disk = sandbox.disk()
    outside, store, mountpoint = sandbox.path / "outside", sandbox.path / "no-store", sandbox.path / "mnt"
    outside.mkdir()
    mountpoint.mkdir()
    place(store, outside)

    def look() -> object:
        kind = store.lstat()
        inside = sorted(os.listdir(store)) if stat.S_ISDIR(kind.st_mode) else None
        return os.listdir(outside), inside, kind.st_mode, kind.st_uid, kind.st_mtime_ns

    before = look()
    told = sandbox.refusal(disk, mountpoint, "--store", store)
    assert str(store) in told
    assert "Errno" not in told
    assert look() == before
    checked = run(*HCPFS, "verify", store, check=False, timeout=20)
    assert checked.returncode == 1
    assert str(store) in checked.stderr
    assert "Traceback" not in checked.stderr
    assert look() == before


_LOOK = """
import os, sys
os.setgroups([]); os.setgid(65534); os.setuid(65534)
for path in sys.argv[1:]:
    for look in (lambda: os.listdir(path), lambda: open(path, "rb").read(1), lambda: open(path, "r+b")):
        try:
            look()
        except (PermissionError, NotADirectoryError, IsADirectoryError):
            continue
        print(path)
"""


def test_other_users_can_read_nothing(sandbox: Sandbox, served: Served) -> None:
    sandbox.path.chmod(0o711)  # so that it is not the way that stops them
    store_files = [path for path in served.store.rglob("*") if path.is_file()]
    assert len(store_files) > 5
    paths = [
        served.path, served.path / "status", served.live, served.snaps, served.image("a"), served.snaps / "a" / "info",
        served.path / ".verify", served.store, *store_files, Path(record.DIRECTORY), Path(STORES),
        *Path(record.DIRECTORY).iterdir(),
    ]  # fmt: skip
    look = [sys.executable, "-c", _LOOK, *map(str, paths), "/"]
    assert subprocess.run(look, capture_output=True, text=True, check=True).stdout == "/\n"


def test_a_store_of_somebody_else_is_refused(sandbox: Sandbox, served: Served) -> None:
    served.umount()
    os.chown(served.store, SOMEBODY, SOMEBODY)
    told = sandbox.refusal(served.sources[0], served.path, "--store", served.store)
    assert "can be written by others" in told
