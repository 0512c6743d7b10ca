"""Those who should not get at a mount or its store, and a store that was tampered with, through the commands."""

import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hcpfs import record
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
    assert canary.read_bytes() == b"not to be touched"


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
