"""Fixtures, and the check that the whole run leaves nothing behind."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from hcpfs import beneath, record
from tests.support.sandbox import Sandbox, wait_until


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    sandbox = Sandbox()
    try:
        yield sandbox
    finally:
        sandbox.close()


def _processes() -> set[int]:
    found = set()
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and b"hcpfs" in (entry / "cmdline").read_bytes().split(b"\0"):
                found.add(int(entry.name))
        except OSError:
            continue  # gone meanwhile
    return found


def _leftovers() -> set[str]:
    mounts = {mount.mountpoint for mount in beneath.mounts() if mount.filesystem == beneath.FILESYSTEM_TYPE}
    loops = {path.parent.parent.name for path in Path("/sys/block").glob("loop*/loop/backing_file")}
    files = {f"/dev/shm/{name}" for name in os.listdir("/dev/shm") if name.startswith("hcpfs-")}
    with suppress(FileNotFoundError):
        files |= {f"{record.DIRECTORY}/{name}" for name in os.listdir(record.DIRECTORY)}
    return mounts | loops | files | {f"process {pid}" for pid in _processes()}


@pytest.fixture(scope="session", autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    """No mount, loop device, process or file of ours outlives the run."""
    before = _leftovers()
    yield
    wait_until(lambda: _leftovers() <= before, what=f"the end of {_leftovers() - before}")
