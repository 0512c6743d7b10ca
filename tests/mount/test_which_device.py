"""A device is known by what is on it: a wrong or a changed one is refused, before anything is recorded."""

import mmap
import os
import shutil
from pathlib import Path

import pytest

from tests.support.sandbox import Sandbox, Served, run

MIB = 1 << 20
UNSAMPLED = 5 * MIB + 3 * 4096


def _write(path: Path | str, offset: int, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY)
    os.pwrite(fd, data, offset)
    os.fsync(fd)
    os.close(fd)


def _with_a_snapshot(sandbox: Sandbox, source: object, store: Path | None = None) -> tuple[Served, bytes]:
    """A clean store with the snapshot `a`, and what that reads."""
    served = sandbox.mount(source, store=store)
    (served.snaps / "a").mkdir()
    content = served.image("a").read_bytes()
    served.umount()
    return served, content


def _is_as_it_was(served: Served, content: bytes) -> None:
    served = served.again()
    assert served.info("a")["state"] == "valid"
    assert "found" not in served.status
    assert served.image("a").read_bytes() == content
    served.umount()


def test_i12_the_wrong_disk_is_refused_and_costs_nothing(sandbox: Sandbox) -> None:
    """Same size, made by the same mkfs, so that some of the sample is the same; then the right one is back."""
    disks = [sandbox.disk(name, 64 * MIB) for name in ("a.img", "b.img")]
    for disk in disks:
        run("mkfs.ext4", "-q", disk)
    device = sandbox.loop(disks[0])
    served, content = _with_a_snapshot(sandbox, f"d={device}")
    sandbox.unloop(device)
    run("losetup", device, disks[1])
    sandbox.devices.append(device)
    sentence = sandbox.refusal(f"d={device}", served.path, "--store", served.store)
    uuids = [run("blkid", "-p", "-s", "UUID", "-o", "value", disk).stdout.strip() for disk in disks]
    assert all(uuid in sentence for uuid in uuids)
    assert "--accept changed" in sentence
    assert "it differs at 0+" in sentence
    sandbox.unloop(device)
    run("losetup", device, disks[0])
    sandbox.devices.append(device)
    _is_as_it_was(served, content)


@pytest.mark.parametrize("through", ["file", "loop"])
def test_i12_a_write_that_no_sample_meets_is_noticed_by_the_kernels_count(sandbox: Sandbox, through: str) -> None:
    disk = sandbox.disk(content=os.urandom(8 * MIB))
    source = disk if through == "file" else sandbox.loop(disk)
    served, _ = _with_a_snapshot(sandbox, source)
    _write(source, UNSAMPLED, b"behind our back")
    sentence = sandbox.refusal(source, served.path, "--store", served.store)
    assert "the kernel says that it was written to" in sentence
    served = sandbox.mount(source, options=["--accept", "changed"])
    assert served.info("a")["state"] == "suspect"


def test_i12_writes_to_a_disk_without_a_file_are_counted_as_long_as_the_machine_runs(sandbox: Sandbox) -> None:
    """A partition: no file that would have a time."""
    disk = sandbox.disk(size=32 * MIB)
    run("sfdisk", "-q", disk, input="label: gpt\nstart=2048, size=16MiB\n")
    device = sandbox.loop(disk)
    run("partx", "--add", device)
    _write(f"{device}p1", 0, os.urandom(MIB))
    served, content = _with_a_snapshot(sandbox, f"{device}p1")
    _is_as_it_was(served, content)
    _write(f"{device}p1", UNSAMPLED, b"behind our back")
    assert "the kernel says that it was written to" in sandbox.refusal(
        f"{device}p1", served.path, "--store", served.store
    )


def test_i12_what_was_only_read_is_not_written_to(sandbox: Sandbox) -> None:
    disk = sandbox.disk(size=16 * MIB)
    sandbox.format(disk, "ext4")
    served, content = _with_a_snapshot(sandbox, disk)
    device = sandbox.loop(disk, "--read-only")
    sandbox.unmount(sandbox.mount_device(device, "fs", "-o", "ro,noload"))
    run("fsck.ext4", "-fn", device)
    sandbox.unloop(device)
    _is_as_it_was(served, content)


def test_i12_a_disk_that_moved_is_the_same_disk(sandbox: Sandbox) -> None:
    """Another path, another inode, another time: with the store that knows it, it is recognised."""
    disk = sandbox.disk(content=os.urandom(8 * MIB))
    served, content = _with_a_snapshot(sandbox, f"d={disk}")
    moved = sandbox.path / "moved.img"
    shutil.copyfile(disk, moved)
    disk.unlink()
    served = sandbox.mount(f"d={moved}")
    assert served.info("a")["state"] == "valid"
    assert served.image("a").read_bytes() == content


def test_i12_exchanged_sources_are_refused_by_name(sandbox: Sandbox) -> None:
    disks = [sandbox.disk(name, 16 * MIB) for name in ("one.img", "two.img")]
    run("mkfs.ext4", "-q", disks[0])
    run("mkfs.xfs", "-q", "-f", sandbox.disk("big.img", 400 * MIB))
    with disks[1].open("r+b") as file:
        file.write((sandbox.path / "big.img").read_bytes()[: 8 * MIB])
    served = sandbox.mount(f"one={disks[0]}", f"two={disks[1]}")
    (served.snaps / "a").mkdir()
    served.umount()
    sentence = sandbox.refusal(f"one={disks[1]}", f"two={disks[0]}", served.path, "--store", served.store)
    assert "it is the one that the store knows as two" in sentence


def test_i12_status_names_the_disk_by_its_uuid(sandbox: Sandbox) -> None:
    disk = sandbox.disk(size=16 * MIB)
    served = sandbox.mount(f"d={disk}")
    assert served.status["d.uuid"] == "-"
    run("mkfs.ext4", "-q", "-E", "nodiscard", "-U", "11111111-2222-3333-4444-555555555555", served.live)
    served = served.remount()
    assert served.status["d.uuid"] == "11111111-2222-3333-4444-555555555555"
    assert served.status["d.filesystem"] == "ext4"


def test_i7_a_file_and_a_loop_device_over_it_are_one_disk(sandbox: Sandbox) -> None:
    """Also a loop device over a part of it, and in whatever order they come."""
    disk = sandbox.disk(size=16 * MIB)
    (sandbox.path / "other").mkdir()
    other = [sandbox.path / "other", "--store", sandbox.path / "other-store"]
    served = sandbox.mount(disk)
    whole, part = sandbox.loop(disk), sandbox.loop(disk, "--offset", str(MIB), "--sizelimit", str(4 * MIB))
    for device in (whole, part):
        sentence = sandbox.refusal(device, *other)
        assert "locked by another program" in sentence or "is in use by the loop device" in sentence
    sandbox.unloop(part)
    assert f"{whole} lies on {disk}, which is locked" in sandbox.refusal(whole, *other)
    served.umount()
    served = sandbox.mount(f"disk.img={whole}", store=sandbox.path / "second")
    assert f"is in use by the loop device {whole}" in sandbox.refusal(disk, *other)
    assert not (sandbox.path / "other-store").exists()


def test_i7_two_parts_of_a_disk_that_have_nothing_in_common_are_two_disks(sandbox: Sandbox) -> None:
    disk = sandbox.disk(size=16 * MIB)
    first = sandbox.loop(disk, "--sizelimit", str(4 * MIB))
    second = sandbox.loop(disk, "--offset", str(8 * MIB))
    sandbox.mount(first)
    sandbox.mount(second, mountpoint=sandbox.path / "mnt2", store=sandbox.path / "store2")


@pytest.mark.parametrize("is_mapped", [False, True])
def test_i7_an_image_that_a_program_writes_to_is_refused(sandbox: Sandbox, is_mapped: bool) -> None:
    disk = sandbox.disk()
    (sandbox.path / "other").mkdir()
    fd = os.open(disk, os.O_RDWR)
    mapping = mmap.mmap(fd, 4096)
    if is_mapped:
        os.close(fd)
    assert "is open for writing in another program" in sandbox.refusal(
        disk, sandbox.path / "other", "--store", sandbox.path / "other-store"
    )
    mapping.close()
    if not is_mapped:
        os.close(fd)
    sandbox.mount(disk)
