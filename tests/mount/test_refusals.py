"""Every refusal of a mount: its sentence, and nothing left behind."""

import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from hcpfs.system import beneath
from tests.support.sandbox import Sandbox, run

MIB = 1 << 20


@pytest.fixture
def where(sandbox: Sandbox) -> list[object]:
    """Mount point and store, as arguments."""
    (sandbox.path / "other").mkdir()
    return [sandbox.path / "other", "--store", sandbox.path / "other-store"]


@pytest.fixture(autouse=True)
def no_mount_is_left(sandbox: Sandbox):
    yield
    assert not [mount for mount in beneath.mounts() if mount.mountpoint == str(sandbox.path / "other")]


def _used_store(sandbox: Sandbox, disk: Path) -> Path:
    served = sandbox.mount(disk)
    (served.snaps / "a").mkdir()
    served.umount()
    return served.store


def test_i7_a_mounted_device(sandbox: Sandbox, where: list[object]) -> None:
    device = sandbox.loop(sandbox.disk())
    sandbox.format(device, "ext4")
    files = sandbox.mount_device(device)
    assert f"{device} is mounted at {files}" in sandbox.refusal(device, *where)
    sandbox.unmount(files)


def test_i7_a_device_that_somebody_holds(sandbox: Sandbox, where: list[object]) -> None:
    device = sandbox.loop(sandbox.disk())
    fd = os.open(device, os.O_RDONLY | os.O_EXCL)
    assert f"{device} is in use" in sandbox.refusal(device, *where)
    os.close(fd)


def test_i7_a_second_daemon_on_the_device(sandbox: Sandbox, where: list[object]) -> None:
    disk, device = sandbox.disk(), sandbox.loop(sandbox.disk("second.img"))
    sandbox.mount(disk, device)
    assert "locked by another program" in sandbox.refusal(disk, *where)
    assert f"{device} is in use" in sandbox.refusal(device, *where)


def test_i7_nobody_can_mount_the_device_behind_our_back(sandbox: Sandbox) -> None:
    device = sandbox.loop(sandbox.disk(size=16 * MIB))
    sandbox.format(device, "ext4")
    served = sandbox.mount(device)
    done = run("mount", device, sandbox.path / "mnt" / "live", check=False)
    assert done.returncode != 0
    served.umount()


def test_i7_a_second_daemon_on_the_store(sandbox: Sandbox, where: list[object]) -> None:
    served = sandbox.mount(sandbox.disk())
    sentence = sandbox.refusal(sandbox.disk("other.img"), where[0], "--store", served.store)
    assert "in use by another hcpfs" in sentence


def test_i10_a_store_below_the_mount_point(sandbox: Sandbox, where: list[object]) -> None:
    sentence = sandbox.refusal(sandbox.disk(), where[0], "--store", where[0] / "store")
    assert "is below the mount point" in sentence
    assert os.listdir(where[0]) == []


def test_i10_a_store_on_one_of_our_own_images(sandbox: Sandbox, where: list[object]) -> None:
    served = sandbox.mount(sandbox.disk(size=64 * MIB))
    outer = sandbox.loop(served.live)
    sandbox.format(outer, "ext4")
    files = sandbox.mount_device(outer)
    for store in (files / "store", files / "deep" / "er"):
        sentence = sandbox.refusal(sandbox.disk("other.img"), where[0], "--store", store)
        assert f"sits on an image of the hcpfs at {served.path}" in sentence
    inner_disk = files / "inner.img"
    with inner_disk.open("wb") as file:
        file.truncate(32 * MIB)
    inner = sandbox.loop(inner_disk)
    sandbox.format(inner, "ext4")
    nested = sandbox.mount_device(inner, "nested")
    sentence = sandbox.refusal(sandbox.path / "other.img", where[0], "--store", nested / "store")
    assert f"sits on an image of the hcpfs at {served.path}" in sentence
    sandbox.unmount(nested)
    sandbox.unloop(inner)
    sandbox.unmount(files)


def test_i7_a_file_that_a_loop_device_shows(sandbox: Sandbox, where: list[object]) -> None:
    disk = sandbox.disk()
    device = sandbox.loop(disk)
    assert f"{disk} is in use by the loop device {device}" in sandbox.refusal(disk, *where)


@pytest.mark.parametrize(("change", "word"), [(4096, "grew"), (-4096, "shrank")])
def test_a_source_of_another_size(sandbox: Sandbox, where: list[object], change: int, word: str) -> None:
    disk = sandbox.disk()
    store = _used_store(sandbox, disk)
    os.truncate(disk, disk.stat().st_size + change)
    assert f"{disk} {word} from" in sandbox.refusal(disk, where[0], "--store", store)
    os.truncate(disk, disk.stat().st_size - change)
    sandbox.mount(disk, options=["--accept", "unchanged"])


def test_a_store_made_for_another_device(sandbox: Sandbox, where: list[object]) -> None:
    store = _used_store(sandbox, sandbox.disk(content=os.urandom(8 * MIB)))
    other = sandbox.disk("elsewhere.img", content=os.urandom(8 * MIB))
    sentence = sandbox.refusal(f"disk.img={other}", where[0], "--store", store)
    assert "is not the device that the store" in sentence


def test_a_store_made_for_other_names(sandbox: Sandbox, where: list[object]) -> None:
    disk = sandbox.disk()
    store = _used_store(sandbox, disk)
    sentence = sandbox.refusal(f"name={disk}", where[0], "--store", store)
    assert "was made for disk.img, and you name name" in sentence


def test_a_store_of_another_format(sandbox: Sandbox, where: list[object]) -> None:
    disk = sandbox.disk()
    store = _used_store(sandbox, disk)
    with sqlite3.connect(store / "catalog.sqlite") as catalog:
        catalog.execute("UPDATE store SET value = 99 WHERE key = 'format'")
    catalog.close()
    assert "has format 99, and this hcpfs knows 3 only" in sandbox.refusal(disk, where[0], "--store", store)


def test_a_catalog_of_random_bytes(sandbox: Sandbox, where: list[object]) -> None:
    disk = sandbox.disk()
    store = _used_store(sandbox, disk)
    for rest in store.glob("catalog.sqlite*"):
        rest.unlink()
    (store / "catalog.sqlite").write_bytes(os.urandom(40960))
    assert "is not a catalog of hcpfs, or is damaged" in sandbox.refusal(disk, where[0], "--store", store)


def test_a_store_that_others_can_write(sandbox: Sandbox, where: list[object]) -> None:
    store = sandbox.path / "open"
    store.mkdir()
    store.chmod(0o777)
    assert "can be written by others" in sandbox.refusal(sandbox.disk(), where[0], "--store", store)


def test_a_directory_with_other_things_in_it(sandbox: Sandbox, where: list[object]) -> None:
    store = sandbox.path / "home"
    store.mkdir(mode=0o700)
    (store / "letter.txt").write_text("dear")
    assert "other things than a store (letter.txt)" in sandbox.refusal(sandbox.disk(), where[0], "--store", store)
    assert (store / "letter.txt").read_text() == "dear"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("missing", "No such file"),
        ("directory", "neither a block device nor a regular file"),
        ("empty", "is empty (0 bytes)"),
    ],
)
def test_a_source_that_is_none(sandbox: Sandbox, where: list[object], source: str, words: str) -> None:
    (sandbox.path / "directory").mkdir()
    sandbox.disk("empty", content=b"")
    assert words in sandbox.refusal(sandbox.path / source, *where)


def test_a_mount_point_that_is_none(sandbox: Sandbox) -> None:
    disk, store = sandbox.disk(), sandbox.path / "other-store"
    assert "make the directory first" in sandbox.refusal(disk, sandbox.path / "missing", "--store", store)
    assert "is not a directory" in sandbox.refusal(disk, disk, "--store", store)
    assert not store.exists()


def test_a_mount_point_in_use(sandbox: Sandbox) -> None:
    served = sandbox.mount(sandbox.disk())
    sentence = sandbox.refusal(sandbox.disk("other.img"), served.path, "--store", sandbox.path / "other-store")
    assert f"an hcpfs is mounted at {served.path} already" in sentence


def test_a_mount_point_with_a_dead_daemon(sandbox: Sandbox) -> None:
    served = sandbox.mount(sandbox.disk())
    fd = os.open(served.live, os.O_RDONLY)
    run("kill", "-9", served.pid)
    sentence = sandbox.refusal(sandbox.path / "disk.img", served.path, "--store", served.store)
    with pytest.raises(OSError, match="not connected"):
        os.close(fd)  # which is a request since O_TRUNC is known
    assert f"hcpfs recover {served.path}" in sentence
    served.kill()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--quota", "1M"], "a quota of 1048576 bytes is too small: give at least 32M"),
        (["--quota", "many"], "'many' is not a size"),
        (["-o", "quota=4Q"], "'4Q' is not a size"),
        (["-o", "frobnicate"], "the mount option 'frobnicate' is not known"),
        (["-o", "store="], "the option store needs a value"),
        (["-o", "mode=rw"], "mode=rw is not a number"),
        (["-o", "uid=-5"], "uid=-5 is out of range"),
        (["-o", "gid=99999999999999999999"], "gid=99999999999999999999 is out of range"),
        (["-o", "freeze=nan"], "freeze=nan makes no sense"),
        (["--store", ""], "the store is empty: an unset variable"),
    ],
)
def test_nonsense(sandbox: Sandbox, where: list[object], words: list[str], sentence: str) -> None:
    assert sentence in sandbox.refusal(sandbox.disk(), *where, *words)


def test_two_sources_of_one_name(sandbox: Sandbox, where: list[object]) -> None:
    sentence = sandbox.refusal(f"x={sandbox.disk()}", f"x={sandbox.disk('other.img')}", *where)
    assert "two sources are called x" in sentence


def test_no_source_at_all(sandbox: Sandbox) -> None:
    assert "name at least one SOURCE and the MOUNTPOINT" in sandbox.refusal(sandbox.path / "mnt")


def test_a_source_twice(sandbox: Sandbox, where: list[object]) -> None:
    disk = sandbox.disk()
    assert "locked by another program" in sandbox.refusal(f"a={disk}", f"b={disk}", *where)


def test_a_refused_start_in_the_foreground_says_so_too(sandbox: Sandbox, where: list[object]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hcpfs", "mount", "--foreground", str(sandbox.path / "missing"), *map(str, where)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "cannot be used as a source: No such file" in done.stderr
    assert "Traceback" not in done.stderr
