"""Fixtures, which process does which test, and the check that the whole run leaves nothing behind.

With pytest-xdist each process tests in a mount namespace of its own, with loop devices of its own; with -n0 the tests
are done in that of the machine. A test that takes too long is ended by pytest-timeout, which raises in it; where that
does not help, because it waits for a thread that never ends, faulthandler ends its process a while later, and what it
left is removed. Both name the test.
"""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from xdist.scheduler import LoadScopeScheduling
from xdist.workermanage import WorkerController

from hcpfs.daemon import record
from hcpfs.system import beneath
from tests.support import apart
from tests.support.sandbox import MARK, WORKER, Sandbox, clear_away, processes_of, wait_until

#: The order of the tests: what takes longest comes first, and what is short fills the processes evenly at the end.
ORDER = ("tests/crash/", "tests/mount/", "tests/hcpfs/", "tests/cow/")
#: Files whose tests are handed out one by one. The others are handed out whole, because their tests give images the
#: same name, which is all that tells whose an image was once its mount is gone.
ONE_BY_ONE = ("tests/crash/", "tests/cow/", "tests/mount/test_kill_points.py")


class _Scheduling(LoadScopeScheduling):
    def _split_scope(self, nodeid: str) -> str:
        return nodeid if nodeid.startswith(ONE_BY_ONE) else nodeid.partition("::")[0]

    def remove_node(self, node: WorkerController) -> str | None:
        """Hand out again what a process that died had yet to do, without the test that it died of."""
        units = self.assigned_work[node]
        left = [(scope, nodeid) for scope, unit in units.items() for nodeid, is_done in unit.items() if not is_done]
        for scope, nodeid in left[:1]:
            units[scope][nodeid] = True
        self.assigned_work[node] = {scope: unit for scope, unit in units.items() if not all(unit.values())}
        super().remove_node(node)
        return left[0][1] if left else None


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> LoadScopeScheduling:
    return _Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: next((at for at, one in enumerate(ORDER) if item.nodeid.startswith(one)), len(ORDER)))


def pytest_configure(config: pytest.Config) -> None:
    if WORKER:
        apart.enter_own_namespace()


def pytest_testnodedown(node: WorkerController, error: object | None) -> None:
    if error is not None:
        clear_away(node.gateway.id)


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    sandbox = Sandbox()
    try:
        yield sandbox
    finally:
        sandbox.close()


def _records() -> Iterator[str]:
    with suppress(FileNotFoundError):
        for path in Path(record.DIRECTORY).iterdir():
            with suppress(FileNotFoundError):  # of another run, gone meanwhile
                yield f"{path}: {path.read_text()}"


def _leftovers() -> set[str]:
    """What there is of this process: others may be under way on the same machine."""
    mounts = {mount.mountpoint for mount in beneath.mounts()}
    files = {str(path) for path in Path("/dev/shm").iterdir()}
    ours = {what for what in mounts | files | set(_records()) if MARK in what}
    loops = {f"/dev/loop{number}" for number in apart.loop_numbers() if apart.is_bound(number)}
    return ours | loops | {f"process {pid}" for pid in processes_of(WORKER) if not _ends_with_us(pid)}


def _ends_with_us(pid: int) -> bool:
    """Whether it is the process that multiprocessing starts beside the first other one, which ends with this one."""
    try:
        return b"multiprocessing.resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # gone
        return True


@pytest.fixture(scope="session", autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    """No mount, loop device, process or file of ours outlives the run."""
    before = _leftovers()
    yield
    wait_until(lambda: _leftovers() <= before, what=f"the end of {_leftovers() - before}")
