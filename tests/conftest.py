"""Fixtures, and the check that the whole run leaves nothing behind."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from xdist.scheduler import LoadScopeScheduling

from hcpfs.daemon import record
from hcpfs.system import beneath
from tests.support.sandbox import MARK, RUN, Sandbox, wait_until

RUN_VARIABLE = "HCPFS_TEST_RUN"
ANYWHERE = {  # they mount, and nothing else
    *("tests/mount/test_attributes.py", "tests/mount/test_basics.py", "tests/mount/test_caches.py"),
    "tests/mount/test_hostile.py",
    *("tests/mount/test_model.py", "tests/mount/test_policies.py", "tests/mount/test_suspect.py"),
    "tests/mount/test_verify.py",
    "tests/mount/test_whole_tree.py",
}


class _OneForTheMachine(LoadScopeScheduling):
    """One process has the tests that need the machine for themselves: the numbers of its loop devices, lazy unmounts.

    The others may run beside them, file by file, and those of the engine one by one.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        if file.startswith(("tests/cow/", "tests/crash/")):
            return nodeid
        return file if file in ANYWHERE else "machine"


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> LoadScopeScheduling:
    return _OneForTheMachine(config, log)


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    sandbox = Sandbox()
    try:
        yield sandbox
    finally:
        sandbox.close()


def _processes() -> set[str]:
    """Processes of hcpfs that this run started: they have its mark in their environment."""
    found = set()
    for entry in Path("/proc").iterdir():
        try:
            if not entry.name.isdecimal() or b"hcpfs" not in (entry / "cmdline").read_bytes().split(b"\0"):
                continue
            if f"{RUN_VARIABLE}={RUN}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.add(f"process {entry.name}")
        except OSError:
            continue  # gone meanwhile
    return found


def _records() -> Iterator[str]:
    with suppress(FileNotFoundError):
        for path in Path(record.DIRECTORY).iterdir():
            with suppress(FileNotFoundError):  # of another run, gone meanwhile
                yield f"{path}: {path.read_text()}"


def _leftovers() -> set[str]:
    """What there is of this run: others may be under way on the same machine."""
    mounts = {mount.mountpoint for mount in beneath.mounts()}
    loops = {f"{path}: {path.read_text()}" for path in Path("/sys/block").glob("loop*/loop/backing_file")}
    files = {str(path) for path in Path("/dev/shm").iterdir()}
    ours = {what for what in mounts | loops | files | set(_records()) if MARK in what}
    unmounted = {what for what in loops if ": /live/" in what or ": /snaps/" in what}  # they lost the mark
    return ours | unmounted | _processes()


@pytest.fixture(scope="session", autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    """No mount, loop device, process or file of ours outlives the run."""
    os.environ[RUN_VARIABLE] = RUN
    before = _leftovers()
    yield
    wait_until(lambda: _leftovers() <= before, what=f"the end of {_leftovers() - before}")
