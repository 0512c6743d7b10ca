"""The store fails and its snapshots are given up: another system that opens the store knows, or says so."""

import fcntl
import os
import struct
from pathlib import Path

import pytest

from tests.support.sandbox import HCPFS, Sandbox, run

MIB = 1 << 20
SHUTDOWN_IOCTL, NO_LOG_FLUSH = 0x8004587D, 2  # of ext4 and XFS: no writes any more


def _given_up(sandbox: Sandbox) -> tuple[Path, Path, str]:
    """The disk, the directory of a store that failed, and the loop device that its file system is on."""
    with (sandbox.path / "fs.img").open("wb") as file:
        file.truncate(128 * MIB)
    device = sandbox.loop(sandbox.path / "fs.img")
    sandbox.format(device, "ext4")
    place = sandbox.mount_device(device)
    disk = sandbox.disk(content=os.urandom(16 * MIB))
    served = sandbox.mount(disk, store=place / "store")
    (served.snaps / "x").mkdir()
    root = os.open(place, os.O_RDONLY)
    fcntl.ioctl(root, SHUTDOWN_IOCTL, struct.pack("I", NO_LOG_FLUSH))
    os.close(root)
    with served.live.open("r+b", buffering=0) as live:
        live.write(b"n" * MIB)
        os.fsync(live.fileno())
    assert served.info("x")["state"] == "invalid"
    served.kill()
    sandbox.unmount(place)
    sandbox.mount_device(device)
    return disk, served.store, device


def _elsewhere(*words: object) -> str:
    """What a mount says in a container that has a /var/lib/hcpfs of its own."""
    command = 'mount -t tmpfs -o mode=700 none /var/lib/hcpfs && exec "$@"'
    done = run("unshare", "-m", "sh", "-c", command, "sh", *HCPFS, *words, check=False)
    assert "Traceback" not in done.stderr
    return f"{done.returncode} {done.stdout}{done.stderr}"


def test_i1_i4_a_store_whose_snapshots_were_given_up_is_not_believed_in_a_container(sandbox: Sandbox) -> None:
    disk, store, _ = _given_up(sandbox)
    said = _elsewhere("mount", disk, sandbox.path / "mnt", "--store", store)
    assert said.startswith("1 ")
    assert "is not the one that it was used with" in said, said
    assert "read_suspect" in said
    done = run(*HCPFS, "verify", store, check=False)
    assert done.returncode == 3
    assert "1 snapshots were given up when the store took no writes" in done.stdout
    served = sandbox.mount(disk, store=store)
    assert served.info("x")["state"] == "invalid"
    with pytest.raises(OSError, match="Input/output error"):
        served.image("x").read_bytes()
    (served.snaps / "y").mkdir()
    served.umount()
    said = _elsewhere("verify", store)
    assert "given up when the store took no writes" not in said  # the catalog has it


def test_i1_i4_where_there_can_be_no_second_place_the_doubt_is_refused_or_recorded(sandbox: Sandbox) -> None:
    disk, store, _ = _given_up(sandbox)
    mountpoint = sandbox.path / "mnt"
    words = " ".join(map(str, HCPFS))
    mount = f"{words} mount {disk} {mountpoint} --store {store}"
    script = (
        f"mount -t tmpfs -o ro none /var/lib && ! {mount} && {mount} -o read_suspect && cat {mountpoint}/snaps/x/info"
    )
    done = run("unshare", "-m", "sh", "-c", f"{script} && {words} umount {mountpoint}")
    assert "which cannot be opened (Read-only file system). Nothing was changed" in done.stderr
    assert "state suspect" in done.stdout


def test_after_a_clean_stop_any_container_may_serve_the_store(sandbox: Sandbox) -> None:
    disk = sandbox.disk(content=os.urandom(8 * MIB))
    served = sandbox.mount(disk)
    (served.snaps / "x").mkdir()
    served.umount()
    mountpoint = sandbox.path / "mnt"
    words = " ".join(map(str, HCPFS))
    script = f"{words} mount {disk} {mountpoint} --store {served.store} && cat {mountpoint}/snaps/x/info"
    script += f" && cmp {disk} {mountpoint}/snaps/x/disk.img && {words} umount {mountpoint} && ls -A /var/lib/hcpfs"
    said = run("unshare", "-m", "sh", "-c", f"mount -t tmpfs -o mode=700 none /var/lib/hcpfs && {script}").stdout
    assert "state valid" in said
    assert "session" not in said
