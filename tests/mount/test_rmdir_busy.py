"""rmdir of a snapshot in use says who uses it: loop device, mount point and namespace, program and process."""

import errno
from pathlib import Path

import pytest

from tests.support.sandbox import Sandbox, Served, run, wait_until

MIB = 1 << 20


@pytest.fixture
def served(sandbox: Sandbox) -> Served:
    served = sandbox.mount(sandbox.disk(size=16 * MIB))
    sandbox.format(served.live, "ext4")
    (served.snaps / "monday").mkdir()
    return served


def refusal(served: Served) -> str:
    with pytest.raises(OSError, match="busy") as caught:
        (served.snaps / "monday").rmdir()
    assert caught.value.errno == errno.EBUSY
    assert served.status["last_error_errno"] == "EBUSY"
    return served.status["last_error"]


def test_a_program_is_named_and_another_snapshot_s_is_not(sandbox: Sandbox, served: Served) -> None:
    (served.snaps / "tuesday").mkdir()
    with served.image("monday").open("rb") as image, served.image("tuesday").open("rb") as other:
        meant = sandbox.spawn("sleep", "1000", stdin=image)
        sandbox.spawn("sleep", "1000", stdin=other)
    assert refusal(served).endswith(f"and try again. In use by: sleep (process {meant.pid})")
    meant.kill()
    meant.wait()
    (served.snaps / "monday").rmdir()


def test_what_is_on_a_loop_device_is_named(sandbox: Sandbox, served: Served) -> None:
    device = sandbox.loop(served.image("monday"))
    words = f"In use by: {device} on {served.image('monday')} "
    assert refusal(served).endswith(f"{words}(itself not in use)")
    files = sandbox.mount_device(device)
    assert refusal(served).endswith(f"{words}(ext4 mounted at {files})")


def test_what_is_mounted_in_another_namespace_alone_is_named(sandbox: Sandbox, served: Served) -> None:
    device = sandbox.loop(served.image("monday"))
    place, ready = sandbox.mkdir("place"), sandbox.path / "ready"
    script = 'mount "$1" "$2"; touch "$0"; exec sleep 1000'
    other = sandbox.spawn("unshare", "-m", "sh", "-c", script, ready, device, place)
    wait_until(ready.exists, what="the mount")
    there = f"ext4 mounted at {place} in the mount namespace of sleep (process {other.pid})"
    assert refusal(served).endswith(f"{device} on {served.image('monday')} ({there})")


def test_a_detached_loop_device_in_use_is_seen(sandbox: Sandbox, served: Served) -> None:
    """A file system that was unmounted lazily is in no list of mounts; who has it in use is told by its device."""
    device = sandbox.loop(served.image("monday"))
    files = sandbox.mount_device(device)
    user = sandbox.spawn("sleep", "1000", cwd=Path(files))
    run("umount", "-l", files)
    assert refusal(served).endswith(f"{device} on {served.image('monday')} (sleep (process {user.pid}))")
    user.kill()
    user.wait()
