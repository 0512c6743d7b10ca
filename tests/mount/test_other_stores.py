"""No default store is made for a disk whose snapshots are in another one, under whatever name the disk comes. # I12"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cow.errors import RefusedError
from hcpfs.daemon import stores
from hcpfs.options import MountOptions, parse_source
from tests.support.sandbox import Sandbox, run

MIB = 1 << 20
Ask = Callable[..., list[str]]


@pytest.fixture
def ask(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> Ask:
    """What a mount of the sources is told, with the sandbox's `stores` as the place of default stores."""
    place = sandbox.path / "stores"
    place.mkdir()
    monkeypatch.setattr(stores, "STORES", str(place))
    monkeypatch.setattr("hcpfs.options.STORES", str(place))

    def asked(*sources: object, store: str | None = None) -> list[str]:
        words = [parse_source(str(source)) for source in sources]
        return stores.check_no_other(MountOptions(sources=words, mountpoint="/mnt/x", store=store))

    return asked


def _take(sandbox: Sandbox, source: object, name: str = "one") -> None:
    """A store below the place of default stores, with a snapshot of the source, stopped clean."""
    served = sandbox.mount(source, store=sandbox.path / "stores" / name)
    (served.snaps / "a").mkdir()
    served.umount()


def _disk(sandbox: Sandbox, name: str = "disk.img") -> Path:
    return sandbox.disk(name, content=os.urandom(32 * MIB))


def _partitioned(sandbox: Sandbox) -> tuple[Path, str]:
    """A disk with a partition from 1 MiB on, of 16 MiB, and its loop device."""
    disk = _disk(sandbox)
    run("sfdisk", "-q", disk, input="label: gpt\nstart=2048, size=16MiB\n")
    device = sandbox.loop(disk)
    run("partx", "--add", device)
    return disk, device


def test_another_kernel_name(sandbox: Sandbox, ask: Ask) -> None:
    disk = _disk(sandbox)
    first = sandbox.loop(disk)
    _take(sandbox, first)
    second = sandbox.loop(disk)
    with pytest.raises(RefusedError, match=f"hcpfs mount {first[5:]}.img={second} /mnt/x --store "):
        ask(second)
    sandbox.unloop(first)
    run("losetup", first, sandbox.disk("other.img", 4 * MIB))
    sandbox.devices.append(first)
    with pytest.raises(RefusedError, match=f"{second} has on it what was on the disk"):
        ask(second)
    assert ask(first) == []


def test_a_partition_of_the_disk_and_the_disk_of_a_partition(sandbox: Sandbox, ask: Ask) -> None:
    disk, device = _partitioned(sandbox)
    _take(sandbox, device, "whole")
    with pytest.raises(RefusedError, match="has bytes in common with the disk"):
        ask(f"{device}p1")
    part = sandbox.loop(disk, "--offset", str(MIB), "--sizelimit", str(16 * MIB))
    with pytest.raises(RefusedError, match="has bytes in common with the disk"):
        ask(part)
    sandbox.unloop(part)
    shutil.rmtree(sandbox.path / "stores" / "whole")
    _take(sandbox, f"{device}p1", "part")
    part = sandbox.loop(disk, "--offset", str(MIB), "--sizelimit", str(16 * MIB))
    for source in (device, disk, part):
        with pytest.raises(RefusedError, match="the disk of which the store"):
            ask(source)
    run("partx", "--delete", device)
    moved = sandbox.path / "moved.img"
    disk.rename(moved)  # the kernel knows of no partition now, but there is a table on it
    with pytest.raises(RefusedError, match="holds the disk"):
        ask(moved)


def test_another_partition_of_the_same_disk_has_nothing_to_do_with_it(sandbox: Sandbox, ask: Ask) -> None:
    disk = _disk(sandbox)
    run("sfdisk", "-q", disk, input="label: gpt\nstart=2048, size=8MiB\nstart=20480, size=8MiB\n")
    device = sandbox.loop(disk)
    run("partx", "--add", device)
    _take(sandbox, f"{device}p1")
    assert ask(f"{device}p2") == []


@pytest.mark.parametrize("way", ["moved", "hard link", "symbolic link", "bind mount", "copied, and the first removed"])
def test_an_image_file_under_another_path(sandbox: Sandbox, ask: Ask, way: str) -> None:
    disk, other = _disk(sandbox), sandbox.path / "under-another.img"
    _take(sandbox, disk)
    match way:
        case "moved":
            disk.rename(other)
        case "hard link":
            other.hardlink_to(disk)
        case "symbolic link":
            other.symlink_to(disk)
        case "bind mount":
            other.touch()
            run("mount", "--bind", disk, other)
        case _:
            shutil.copyfile(disk, other)
            disk.unlink()
    with pytest.raises(RefusedError, match="of which the store"):
        ask(other)
    with pytest.raises(RefusedError, match="of which the store"):
        ask(f"data={sandbox.loop(other)}")


def test_a_copy_beside_the_disk_is_another_disk(sandbox: Sandbox, ask: Ask) -> None:
    """As the images are that were made of one template."""
    disk, copy = _disk(sandbox), sandbox.path / "copy.img"
    _take(sandbox, disk)
    shutil.copyfile(disk, copy)
    assert ask(copy) == []
    served = sandbox.mount(disk, store=sandbox.path / "stores" / "one")
    with served.live.open("r+b") as live:
        live.write(os.urandom(20 * MIB))  # of what the store knows there is less on the disk than on the copy now
    assert ask(copy) == []


def test_two_new_file_systems_of_one_size_are_two_disks(sandbox: Sandbox, ask: Ask) -> None:
    disks = [sandbox.disk(name, 64 * MIB) for name in ("a.img", "b.img")]
    for disk in disks:
        run("mkfs.ext4", "-q", disk)
    _take(sandbox, disks[0])
    disks[0].unlink()
    assert ask(disks[1]) == []


def test_an_image_of_the_snapshot_is_not_the_disk(sandbox: Sandbox, ask: Ask) -> None:
    """What is written to an image goes through the hcpfs that serves it, so that one in another is safe."""
    served = sandbox.mount(_disk(sandbox), store=sandbox.path / "stores" / "one")
    (served.snaps / "a").mkdir()
    assert ask(served.image("a")) == []
    assert ask(served.live) == []
    assert ask(sandbox.loop(served.image("a"))) == []


@pytest.mark.parametrize("name", ["st#ore", "st?ore", "st%41ore", "st ore", "st\udcffore"])
def test_a_store_of_any_name_is_asked(sandbox: Sandbox, ask: Ask, name: str) -> None:
    disk = _disk(sandbox)
    _take(sandbox, disk, name)
    assert stores.stopped_clean(str(sandbox.path / "stores" / name))
    with pytest.raises(RefusedError, match="is the disk"):
        ask(f"other={disk}")
    assert sorted(os.listdir(sandbox.path / "stores")) == [name]


@pytest.mark.parametrize("fault", ["garbage", "no catalog", "no table", "not to be opened"])
def test_a_default_store_that_cannot_be_read_is_a_refusal(sandbox: Sandbox, ask: Ask, fault: str) -> None:
    disk = _disk(sandbox)
    _take(sandbox, disk)
    catalog = sandbox.path / "stores" / "one" / "catalog.sqlite"
    match fault:
        case "garbage":
            catalog.write_bytes(os.urandom(8192))
        case "no catalog":
            catalog.unlink()
        case "no table":
            run("python3", "-c", f"import sqlite3; sqlite3.connect({str(catalog)!r}).execute('DROP TABLE origins')")
        case _:
            catalog.unlink()
            catalog.mkdir()
    with pytest.raises(RefusedError, match="may have snapshots of this disk, and cannot be read"):
        ask(sandbox.disk("unknown.img"))
    assert ask(sandbox.disk("unknown.img"), store="/elsewhere") == []


def test_a_store_that_was_named_is_asked_too(sandbox: Sandbox, ask: Ask) -> None:
    disk = _disk(sandbox)
    named, gone = sandbox.path / "chosen" / "store", sandbox.path / "removed" / "store"
    for store in (named, gone):
        store.parent.mkdir()
    served = sandbox.mount(disk, store=named)
    (served.snaps / "a").mkdir()
    served.umount()
    for store in (gone, named):
        stores.remember(str(store))
    with pytest.raises(RefusedError, match=f"of which the store {named} has 1 snapshot"):
        ask(disk)
    shutil.rmtree(named)
    shutil.rmtree(gone.parent)
    assert ask(disk) == []
    stores.remember(str(named))
    assert len([name for name in os.listdir(stores.STORES) if name.startswith("store.")]) == 1


def test_what_is_no_store_is_passed_over(sandbox: Sandbox, ask: Ask) -> None:
    (sandbox.path / "stores" / "empty").mkdir()
    (sandbox.path / "stores" / "given-up.0123").write_text("7")
    assert ask(_disk(sandbox)) == []


def test_who_names_a_store_is_told_what_it_costs(sandbox: Sandbox, ask: Ask) -> None:
    disk = _disk(sandbox)
    _take(sandbox, disk)
    (note,) = ask(disk, store=str(sandbox.path / "chosen"))
    assert "has 1 snapshot" in note
    assert "they read wrong bytes" in note
