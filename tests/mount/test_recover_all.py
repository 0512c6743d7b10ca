"""`hcpfs recover` exits with 0 only when all is back, whatever sat on the mount; what stays dead is named."""

import os
import subprocess
from pathlib import Path

import pytest

from hcpfs.system import users
from tests.mount.test_recover import recover
from tests.support.sandbox import HCPFS, Sandbox, Served, run, status_of, wait_until

MIB = 1 << 20


@pytest.fixture
def served(sandbox: Sandbox) -> Served:
    return sandbox.mount(f"all={sandbox.disk(size=64 * MIB)}")


def elsewhere(sandbox: Sandbox, script: str, *words: object) -> int:
    """A process in a mount namespace of its own that has done what the script says; its id."""
    ready = sandbox.path / f"ready{len(sandbox.processes)}"
    process = sandbox.spawn("unshare", "-m", "sh", "-c", f'{script}; touch "$0"; exec sleep 1000', ready, *words)
    wait_until(ready.exists, what="the other namespace")
    return process.pid


def read_in(pid: int, path: Path) -> str:
    return run("nsenter", "-t", pid, "-m", "cat", path).stdout


def test_a_file_system_that_is_mounted_in_another_namespace_alone(sandbox: Sandbox, served: Served) -> None:
    device = sandbox.loop(served.live)
    sandbox.format(device, "ext4")
    place = sandbox.mkdir("place")
    script = 'mount -o noatime "$1" "$2"; echo a > "$2/a"; sync -f "$2/a"'
    pid = elsewhere(sandbox, script, device, place)
    served.die()
    said = recover(served.path)
    where = f"{place} in the mount namespace of sleep (process {pid})"
    assert f"unmounted {where} (ext4 on {device})" in said
    assert f"mounted {where} again" in said
    assert read_in(pid, place / "a") == "a\n"
    assert "noatime" in run("nsenter", "-t", pid, "-m", "findmnt", "-n", "-o", "OPTIONS", place).stdout
    assert not os.path.ismount(place)


def test_a_copy_of_the_mount_in_another_namespace(sandbox: Sandbox, served: Served) -> None:
    pid = elsewhere(sandbox, ":")
    served.die()
    recover(served.path)
    assert f"pid {served.status['pid']}\n" in read_in(pid, served.path / "status")


def test_a_file_system_in_use_in_another_namespace(sandbox: Sandbox, served: Served) -> None:
    device = sandbox.loop(served.live)
    sandbox.format(device, "ext4")
    place = sandbox.mkdir("place")
    pid = elsewhere(sandbox, 'mount "$1" "$2"; cd "$2"', device, place)
    served.die()
    said = recover(served.path, code=2)
    assert f"in use by sleep (process {pid}, in another mount namespace)" in said


def test_a_program_with_an_image_open_stays_dead_and_is_named(sandbox: Sandbox, served: Served) -> None:
    with served.live.open("r+b") as image:
        program = sandbox.spawn("sleep", "1000", stdin=image)
    served.die()
    assert f"sleep (process {program.pid}) has files of the dead mount open" in recover(served.path, code=2)
    assert status_of(served.path)["last_stop"] == "not-clean"


def test_a_program_with_the_image_of_a_lazily_unmounted_mount_open(sandbox: Sandbox, served: Served) -> None:
    with served.live.open("r+b") as image:
        program = sandbox.spawn("sleep", "1000", stdin=image)
    served.kill()
    assert f"sleep (process {program.pid}) has files of the dead mount open" in recover(served.path, code=2)


def test_a_program_with_the_loop_device_open_keeps_it(sandbox: Sandbox, served: Served) -> None:
    device = sandbox.loop(served.live)
    with open(device, "r+b") as opened:
        program = sandbox.spawn("sleep", "1000", stdin=opened)
    served.die()
    said = recover(served.path, code=2)
    assert f"{device} was not detached, as sleep (process {program.pid}) uses it" in said
    assert "as its old number is in use" in said


def test_a_lazily_unmounted_file_system_in_use(sandbox: Sandbox, served: Served) -> None:
    device = sandbox.loop(served.live)
    sandbox.format(device, "ext4")
    files = sandbox.mount_device(device)
    program = sandbox.spawn("sleep", "1000", cwd=files)
    run("umount", "-l", files)
    served.die()
    said = recover(served.path, code=2)
    assert f"{device} was not detached, as sleep (process {program.pid}) uses it" in said
    program.kill()
    program.wait()


def test_a_nested_hcpfs_stays_dead_and_is_named(sandbox: Sandbox, served: Served) -> None:
    inner = sandbox.mount(f"inner={served.live}", mountpoint=sandbox.path / "inner", store=sandbox.path / "inner-store")
    served.die()
    said = recover(served.path, code=2)
    assert f"(process {inner.pid}), the daemon of the hcpfs at {inner.path}: unmount that, and mount it again" in said


def test_an_overlay_on_a_file_system_stays_dead_and_is_named(sandbox: Sandbox, served: Served) -> None:
    device = sandbox.loop(served.live)
    sandbox.format(device, "ext4")
    files = sandbox.mount_device(device)
    place, upper, work = (sandbox.mkdir(name) for name in ("place", "upper", "work"))
    run("mount", "-t", "overlay", "-o", f"lowerdir={files},upperdir={upper},workdir={work}", "overlay", place)
    served.die()
    assert f"the overlay at {place} has a layer that is dead" in recover(served.path, code=2)
    run("umount", place)


def test_swap_is_on_again(sandbox: Sandbox, served: Served) -> None:
    device = sandbox.loop(served.live)
    run("mkswap", device)
    run("swapon", "--priority", "7", device)
    try:
        (before,) = [swap for swap in users.swaps() if swap.path == device]
        done = run(*HCPFS, "umount", served.path, check=False)
        assert f"{device} on {served.live} (swap on {device})" in done.stderr
        served.die()
        said = recover(served.path)
        assert f"turned off the swap on {device}" in said
        assert f"turned on the swap on {device} again" in said
        assert before in users.swaps()
    finally:
        run("swapoff", device, check=False)


def test_a_program_that_ends_by_itself_is_no_loss(sandbox: Sandbox, served: Served) -> None:
    reader = sandbox.spawn(
        "sh", "-c", f"exec 3< {served.live}; while dd if=/dev/fd/3 count=1 status=none; do sleep 0.05; done",
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    wait_until(lambda: any(user.pid == reader.pid for user in users.of_file_system(os.stat(served.path).st_dev)))
    served.die()
    recover(served.path)
