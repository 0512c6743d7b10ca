"""Reaching a file system by its device alone: the one that is mounted, and never one that was not."""

import os
from pathlib import Path

import pytest

from hcpfs.quiesce import reaching
from tests.support.sandbox import Sandbox, run

SIZES = {"ext4": 16 << 20, "xfs": 320 << 20}


@pytest.mark.parametrize("kind", SIZES)
def test_what_is_not_mounted_is_not_mounted_to_reach_it(sandbox: Sandbox, kind: str) -> None:
    disk = sandbox.disk(size=SIZES[kind])
    device = sandbox.loop(disk)
    sandbox.format(device, kind)
    before = run("sha256sum", device).stdout
    assert reaching.find_mounted(device) == ""
    with pytest.raises(OSError, match=r"."):
        reaching.open_mounted(device, kind)
    assert run("sha256sum", device).stdout == before


@pytest.mark.parametrize("kind", SIZES)
def test_a_lazily_unmounted_file_system_is_reached(sandbox: Sandbox, kind: str) -> None:
    device = sandbox.loop(sandbox.disk(size=SIZES[kind]))
    sandbox.format(device, kind)
    files = sandbox.mount_device(device)
    with Path(files / "open").open("w"):
        run("umount", "-l", files)
        assert reaching.find_mounted(device) == kind
        fd = reaching.open_mounted(device, kind)
        assert os.listdir(fd).count("open") == 1
        os.close(fd)
