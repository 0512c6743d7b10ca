"""`hcpfs umount`: who is in the way is named, nothing is unmounted then, and no wait is silent."""

import array
import os
import socket
from collections.abc import Sequence
from pathlib import Path

import pytest

from hcpfs.system import beneath, users
from tests.support.sandbox import HCPFS, Sandbox, Served, alive, run, wait_until

MIB = 1 << 20


@pytest.fixture
def served(sandbox: Sandbox) -> Served:
    return sandbox.mount(sandbox.disk(size=16 * MIB))


def umount(served: Served, *words: str, code: int = 0) -> str:
    done = run(*HCPFS, "umount", served.path, *words, check=False, timeout=60)
    assert "Traceback" not in done.stderr
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def refusal(served: Served) -> str:
    """What it says when it unmounts nothing."""
    said = umount(served, code=1)
    assert f"{served.path} is in use, and nothing was unmounted" in said
    assert os.path.ismount(served.path)
    assert alive(served.pid)
    return said


def elsewhere(sandbox: Sandbox, script: str, *words: object, by: Sequence[object] = ()) -> int:
    """A process in a mount namespace of its own that has done what the script says; its id. `by` starts it."""
    ready = sandbox.path / f"ready{len(sandbox.processes)}"
    process = sandbox.spawn(*by, "unshare", "-m", "sh", "-c", f'{script}; touch "$0"; exec sleep 1000', ready, *words)
    wait_until(ready.exists, what="the other namespace")
    return process.pid


def ended(served: Served) -> bool:
    return not alive(served.pid) and not os.path.ismount(served.path)


def test_a_copy_in_another_namespace_goes_too(sandbox: Sandbox, served: Served) -> None:
    pid = elsewhere(sandbox, ":")
    said = umount(served)
    assert f"unmounted its copy at {served.path} in the mount namespace of sleep (process {pid})" in said
    assert ended(served)


def test_a_copy_that_propagation_takes_along_is_no_trouble(sandbox: Sandbox) -> None:
    outer = sandbox.mkdir("outer")
    run("mount", "-t", "tmpfs", "hcpfs-test", outer)
    run("mount", "--make-shared", outer)
    served = sandbox.mount(sandbox.disk(), mountpoint=outer / "mnt")
    ready = sandbox.path / "ready"
    for kind in ("shared", "slave"):
        sandbox.spawn("unshare", "-m", "--propagation", kind, "sh", "-c", f"touch {ready}-{kind}; exec sleep 1000")
        wait_until(Path(f"{ready}-{kind}").exists, what="the other namespace")
    umount(served)
    assert ended(served)


def test_a_copy_in_use_there_is_refused_before_anything_is_unmounted(sandbox: Sandbox, served: Served) -> None:
    pid = elsewhere(sandbox, 'cd "$1"', served.path)
    said = refusal(served)
    assert f"sleep (process {pid}, in another mount namespace), whose current directory it is" in said
    assert "the copy" not in said


def test_a_bind_mount_is_named_here_and_elsewhere(sandbox: Sandbox, served: Served) -> None:
    place = sandbox.mkdir("place")
    pid = elsewhere(sandbox, 'mount --bind "$1" "$2"', served.path / "live", place)
    assert f"another mount of it at {place} in the mount namespace of sleep (process {pid})" in refusal(served)
    run("mount", "--bind", served.path / "live", place)
    assert f"In the way: another mount of it at {place}, another" in refusal(served)
    run("umount", place)


def test_a_program_with_an_image_open_is_named(sandbox: Sandbox, served: Served) -> None:
    with served.live.open("r+b") as image:
        writer = sandbox.spawn("sleep", "1000", stdin=image)
    mapping = sandbox.spawn(
        "python3", "-c",
        "import mmap, os, sys, time\nfd = os.open(sys.argv[1], os.O_RDONLY)\n"
        "kept = mmap.mmap(fd, 4096, prot=mmap.PROT_READ, flags=mmap.MAP_PRIVATE)\n"
        "os.closerange(3, 100)\ntime.sleep(1000)", served.live,
    )  # fmt: skip
    device = next(mount.device for mount in beneath.mounts() if mount.mountpoint == str(served.path))
    wait_until(
        lambda: (
            {(user.pid, user.how) for user in users.of_file_system(device)}
            == {(writer.pid, "writing"), (mapping.pid, "mapping")}
        ),
        what="both users",
    )
    said = refusal(served)
    assert f"sleep (process {writer.pid}), which has a file open for writing" in said
    assert f"(process {mapping.pid}), which has a file mapped" in said
    assert users.of_file_system(device, {1}) == []


def test_what_sits_on_a_loop_device_is_named(sandbox: Sandbox, served: Served) -> None:
    """The file system on it is mounted in another namespace alone."""
    device = sandbox.loop(served.live)
    assert f"{device} on {served.live} (itself not in use)" in refusal(served)
    sandbox.format(device, "ext4")
    place = sandbox.mkdir("place")
    pid = elsewhere(sandbox, 'mount "$1" "$2"', device, place)
    there = f"ext4 mounted at {place} in the mount namespace of sleep (process {pid})"
    assert f"{device} on {served.live} ({there})" in refusal(served)
    with open(device, "rb") as opened:
        program = sandbox.spawn("sleep", "1000", stdin=opened)
    assert f", sleep (process {program.pid}))" in refusal(served)


def _keep_in(sandbox: Sandbox, file: Path) -> None:
    """Have a file keep the namespace of a new process.

    Only one with a higher number than ours can be bound in ours, and each processor numbers those that it makes by
    itself (Linux 6.18): the one that made ours goes on from there.
    """
    for processor in sorted(os.sched_getaffinity(0)):
        pid = elsewhere(sandbox, ":", by=["taskset", "--cpu-list", processor])
        if run("mount", "--bind", f"/proc/{pid}/ns/mnt", file, check=False).returncode == 0:
            return
    raise AssertionError("no namespace can be bound")


@pytest.mark.parametrize("keeper", ["file", "descriptor"])
def test_a_namespace_without_a_process(sandbox: Sandbox, served: Served, keeper: str) -> None:
    fd = -1
    if keeper == "file":
        run("mount", "-t", "tmpfs", "hcpfs-test", sandbox.mkdir("kept"))
        run("mount", "--make-private", sandbox.path / "kept")
        (sandbox.path / "kept" / "ns").touch()
        _keep_in(sandbox, sandbox.path / "kept" / "ns")
        words = f"kept by the file {sandbox.path / 'kept' / 'ns'}"
    else:
        fd = os.open(f"/proc/{elsewhere(sandbox, ':')}/ns/mnt", os.O_RDONLY)
        words = f"kept by a descriptor of {users.program_of(os.getpid())} (process {os.getpid()})"
    process = sandbox.processes.pop()
    process.kill()
    process.wait()
    said = umount(served)
    assert f"unmounted its copy at {served.path} in a mount namespace without a process, {words}" in said
    assert ended(served)
    if fd >= 0:
        os.close(fd)


def test_a_lazily_unmounted_copy_in_use_is_seen(sandbox: Sandbox, served: Served) -> None:
    place = sandbox.mkdir("place")
    run("mount", "--bind", served.path, place)
    user = sandbox.spawn("sleep", "1000", cwd=place)
    run("umount", "-l", place)
    assert f"sleep (process {user.pid}), whose current directory it is" in refusal(served)
    user.kill()
    user.wait()
    umount(served)
    assert ended(served)


def test_what_does_not_show_is_waited_for_aloud_and_not_for_ever(sandbox: Sandbox, served: Served) -> None:
    """A file on its way between processes is in nobody's table of descriptors."""
    place = sandbox.mkdir("place")
    run("mount", "--bind", served.path, place)
    ends = socket.socketpair()
    fd = os.open(place / "status", os.O_RDONLY)
    ends[0].sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))])
    os.close(fd)
    run("umount", "-l", place)
    said = umount(served, "--timeout", "3", code=2)
    assert "waiting, 2 s so far: the file system is still in use by something that does not show" in said
    assert f"{served.path} is unmounted, but after 3 s" in said
    assert alive(served.pid)
    for end in ends:
        end.close()
    wait_until(lambda: not alive(served.pid), what="the end of the daemon")
