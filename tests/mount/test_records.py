"""Records of mounts that are long gone: not believed, not in the way, and not piling up."""

import json
import os
import shutil
from pathlib import Path

import pytest

from hcpfs.daemon import record
from hcpfs.recover import leftovers
from hcpfs.system import beneath, probe
from tests.support.sandbox import HCPFS, Sandbox, Served, run, wait_until

MIB = 1 << 20


def gone_mount(sandbox: Sandbox, name: str = "d", size: int = 8 * MIB) -> Served:
    """A mount that died and was unmounted lazily, and nothing of it is left but its record."""
    served = sandbox.mount(
        f"{name}={sandbox.disk('gone.img', size)}", mountpoint=sandbox.path / "gone", store=sandbox.path / "gone-store"
    )
    served.kill()
    wait_until(lambda: not os.path.ismount(served.path), what="the end of the mount")
    wait_until(lambda: os.minor(recorded(served).device) not in probe.connections(), what="the end of the file system")
    return served


def recorded(served: Served) -> record.Record:
    found = record.read(str(served.path))
    assert found is not None
    return found


def recover(path: Path, code: int = 0) -> str:
    done = run(*HCPFS, "recover", path, check=False, timeout=120)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def files_on(sandbox: Sandbox, served: Served) -> Path:
    sandbox.format(served.live, "ext4")
    return sandbox.mount_device(served.live, "fs", "-o", "loop")


@pytest.mark.parametrize("missing", ["mount point", "store", "source"])
def test_a_record_that_nobody_can_recover_with_goes_at_the_next_mount(sandbox: Sandbox, missing: str) -> None:
    gone = gone_mount(sandbox)
    assert recorded(gone).device != 0
    what = {"mount point": gone.path, "store": gone.store, "source": sandbox.path / "gone.img"}[missing]
    what.unlink() if what.is_file() else shutil.rmtree(what)
    sandbox.mount(sandbox.disk())
    assert record.read(str(gone.path)) is None


def test_a_record_that_can_be_of_use_stays(sandbox: Sandbox) -> None:
    gone = gone_mount(sandbox)
    sandbox.mount(sandbox.disk())
    assert recorded(gone).pid == gone.pid
    recover(gone.path)
    assert gone.status["last_stop"] == "not-clean"


def test_what_a_recovery_took_down_is_not_forgotten(sandbox: Sandbox) -> None:
    gone = gone_mount(sandbox)
    noted = recorded(gone)
    noted.above = {"loops": [], "mounts": [], "binds": []}
    record.write(noted)
    shutil.rmtree(gone.store)
    sandbox.mount(sandbox.disk())
    assert recorded(gone).above == noted.above


def test_a_mount_that_is_gone_keeps_nobody_from_his_loop_device(sandbox: Sandbox) -> None:
    """The same name and size, and all that it needs is still there."""
    gone = gone_mount(sandbox, size=16 * MIB)
    served = sandbox.mount(f"d={sandbox.disk(size=16 * MIB)}")
    files = files_on(sandbox, served)
    served.kill()
    assert f"mounted {files} again" in recover(served.path)
    (files / "a").write_text("a")
    run("sync", "-f", files)
    assert recorded(gone).pid == gone.pid


def test_a_mount_of_which_something_is_left_may_own_the_loop_device(sandbox: Sandbox) -> None:
    """And is told apart by the size of its images."""
    other = sandbox.mount(
        f"d={sandbox.disk('other.img', 16 * MIB)}", mountpoint=sandbox.path / "other", store=sandbox.path / "store2"
    )
    device = sandbox.loop(other.live)
    other.kill()
    assert os.minor(recorded(other).device) in probe.connections()
    served = sandbox.mount(f"d={sandbox.disk(size=24 * MIB)}")
    files = files_on(sandbox, served)
    served.kill()
    said = recover(served.path)
    assert f"mounted {files} again" in said
    assert device not in said
    said = recover(other.path)
    assert f"set up {device} again on {other.live}" in said


def test_a_record_of_an_older_version_is_read_and_believed(sandbox: Sandbox) -> None:
    gone = gone_mount(sandbox)
    file = next(path for path in Path(record.DIRECTORY).glob("*.json") if str(gone.path) in path.read_text())
    values = json.loads(file.read_text())
    for name in ("boot", "device", "source", "mounted_ns", "store", "sources", "sizes"):
        del values[name]
    values["of_a_later_version"] = 1
    file.write_text(json.dumps(values))
    assert not leftovers.is_gone(recorded(gone), beneath.all_mounts())
    recover(gone.path)
    assert leftovers.is_gone(recorded(gone), beneath.all_mounts()) is False  # alive


def test_the_number_of_a_connection_is_used_again(sandbox: Sandbox) -> None:
    gone = gone_mount(sandbox)
    one = recorded(gone)
    served = sandbox.mount(sandbox.disk())
    later = recorded(served)
    one.device = later.device  # as the kernel may have given it
    assert os.minor(one.device) in probe.connections()
    assert leftovers.is_gone(one, beneath.all_mounts())
    one.mounted_ns, one.source = later.mounted_ns + 1, later.source
    assert not leftovers.is_gone(one, beneath.all_mounts())
    one.boot = "another"
    assert leftovers.is_gone(one, beneath.all_mounts())
