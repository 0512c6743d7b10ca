"""Getting out of trouble: after the daemon's death everything comes back, with real mounts and loop devices."""

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hcpfs.daemon import record
from hcpfs.recover import above
from hcpfs.system import beneath, loops, probe
from tests.support.sandbox import HCPFS, Sandbox, Served, alive, run, status_of, wait_until

MIB = 1 << 20
REFERENCE = Path(__file__).parents[2] / "hcpfs" / "REFERENCE.md"
DISK_BYTES = {"ext4": 64 * MIB, "xfs": 320 * MIB}
OLD_OPTIONS = {"ext4": "ro,noload", "xfs": "ro,norecovery,nouuid"}


def recover(path: Path, *words: str, code: int = 0) -> str:
    """Run `hcpfs recover`; its sentences."""
    done = run(*HCPFS, "recover", path, *words, check=False, timeout=120)
    assert "Traceback" not in done.stderr
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def loops_of(sandbox: Sandbox) -> set[loops.LoopState]:
    return {state for state in loops.states() if state.file.startswith(f"{sandbox.path}/")}


def mounts_of(sandbox: Sandbox) -> list[tuple[str, ...]]:
    """What is mounted, without the numbers that change."""
    return sorted(
        (mount.mountpoint, mount.filesystem, mount.source, mount.root, mount.options, mount.super_options)
        for mount in beneath.mounts()
        if mount.mountpoint.startswith(f"{sandbox.path}/")
    )


def write_durably(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@pytest.fixture
def served(sandbox: Sandbox) -> Served:
    return sandbox.mount(sandbox.disk(size=DISK_BYTES["ext4"]), options=["--quota", "1G"])


@pytest.fixture
def files(sandbox: Sandbox, served: Served) -> Path:
    """A file system on a loop device on the live image."""
    device = sandbox.loop(served.live)
    sandbox.format(device, "ext4")
    return sandbox.mount_device(device)


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_everything_is_back(sandbox: Sandbox, kind: str) -> None:
    served = sandbox.mount(sandbox.disk(size=DISK_BYTES[kind]), options=["--quota", "1G", "-o", "mode=640,freeze=5"])
    device = sandbox.loop(served.live)
    sandbox.format(device, kind)
    files = sandbox.mount_device(device, "fs", "-o", "noatime,nodev")
    write_durably(files / "before", "before")
    (served.snaps / "monday").mkdir()
    write_durably(files / "after", "after")
    (files / "folder").mkdir()
    run("sync", "-f", files)
    (sandbox.path / "bind").mkdir()
    run("mount", "--bind", "-o", "ro", files / "folder", sandbox.path / "bind")
    (sandbox.path / "live").mkdir()
    run("mount", "--bind", served.path / "live", sandbox.path / "live")
    old = sandbox.loop(served.image("monday"), "--read-only", "--direct-io=on", "--partscan")
    sandbox.mount_device(old, "old", "-o", OLD_OPTIONS[kind])
    before = loops_of(sandbox), mounts_of(sandbox)
    assert len(before[0]) == 2
    assert len(before[1]) == 5

    served.die()
    assert f"hcpfs recover {served.path}" in run(*HCPFS, "umount", served.path, check=False).stderr
    assert f"hcpfs recover {served.path}" in run(*HCPFS, "ls", served.path, check=False).stderr
    said = recover(served.path)

    for sentence in (
        f"unmounted {files} ({kind} on {device})",
        f"detached {device} ({served.live})",
        f"unmounted the dead hcpfs at {served.path}",
        f"serving {served.path} again",
        f"set up {device} again on {served.live}",
        f"mounted {files} again ({kind} on {device})",
    ):
        assert sentence in said
    assert (loops_of(sandbox), mounts_of(sandbox)) == before
    assert [(files / name).read_text() for name in ("before", "after")] == ["before", "after"]
    assert os.listdir(sandbox.path / "live") == ["disk.img"]
    assert (sandbox.path / "old" / "before").read_text() == "before"
    assert not (sandbox.path / "old" / "after").exists()
    assert (served.status["quota_bytes"], served.status["last_stop"]) == (str(1 << 30), "not-clean")
    assert served.live.stat().st_mode & 0o777 == 0o640
    write_durably(files / "again", "again")
    assert "is alive and answers: nothing to recover" in recover(served.path, code=1)


def test_what_died_read_only_comes_back_writable(sandbox: Sandbox, served: Served) -> None:
    device = sandbox.loop(served.live)
    sandbox.format(device, "ext4")
    files = sandbox.mount_device(device, "fs", "-o", "errors=remount-ro")
    served.die()
    for number in range(3):  # until the file system has noticed
        run("sh", "-c", f"echo x > {files}/{number}; sync -f {files}", check=False)
    recover(served.path)
    write_durably(files / "new", "new")


def test_a_mount_with_o_loop_stays_one(sandbox: Sandbox, served: Served) -> None:
    sandbox.format(served.live, "ext4")
    files = sandbox.mount_device(served.live, "fs", "-o", "loop")
    write_durably(files / "a", "a")
    before = loops_of(sandbox)
    assert [state.autoclear for state in before] == [True]
    served.die()
    recover(served.path)
    assert loops_of(sandbox) == before
    assert (files / "a").read_text() == "a"
    sandbox.unmount(files)
    wait_until(lambda: not loops_of(sandbox), what="the end of the loop device")


def test_what_sits_on_files_there_and_what_is_mounted_there(sandbox: Sandbox, served: Served, files: Path) -> None:
    inner_disk = files / "inner.img"
    inner_disk.write_bytes(bytes(16 * MIB))
    sandbox.format(inner_disk, "ext4")
    inner = sandbox.mount_device(inner_disk, "inner", "-o", "loop")
    write_durably(inner / "a", "inner")
    (files / "memory").mkdir()
    run("sync", "-f", files)
    run("mount", "-t", "tmpfs", "hcpfs-test", files / "memory")
    (files / "memory" / "a").write_text("kept")
    before = loops_of(sandbox), mounts_of(sandbox)
    served.die()
    recover(served.path)
    assert (loops_of(sandbox), mounts_of(sandbox)) == before
    assert (inner / "a").read_text() == "inner"
    assert (files / "memory" / "a").read_text() == "kept"


def test_partitions_and_parts(sandbox: Sandbox) -> None:
    served = sandbox.mount(sandbox.disk(size=32 * MIB))
    device = sandbox.loop(served.live)
    run("sfdisk", "--quiet", "--no-reread", device, input=f"start=2048, size={24 * MIB // 512}\n")
    run("partx", "--add", device)  # as the kernel does for a partition table
    sandbox.format(f"{device}p1", "ext4")
    files = sandbox.mount_device(f"{device}p1")
    write_durably(files / "a", "a")
    part = sandbox.loop(served.live, "--offset", str(MIB), "--sizelimit", str(24 * MIB), "--read-only")
    before = loops_of(sandbox), mounts_of(sandbox)
    served.die()
    said = recover(served.path)
    assert f"mounted {files} again (ext4 on {device}p1)" in said
    assert (loops_of(sandbox), mounts_of(sandbox)) == before
    assert (files / "a").read_text() == "a"
    assert run("blkid", "-p", "-o", "value", "-s", "TYPE", part).stdout == "ext4\n"


def test_a_busy_file_system_is_unmounted_lazily(sandbox: Sandbox, served: Served, files: Path) -> None:
    write_durably(files / "a", "a")
    user = sandbox.spawn("sleep", "1000", cwd=files)
    served.die()
    said = recover(served.path, code=2)  # what the program has open stays dead
    assert f"lazily, as it is in use by sleep (process {user.pid}): what they have open there stays dead" in said
    assert "as its old number is in use" in said
    assert (files / "a").read_text() == "a"
    user.kill()
    user.wait()
    wait_until(lambda: len(loops_of(sandbox)) == 1, what="the end of the old loop device")


def test_no_mount(sandbox: Sandbox, served: Served, files: Path) -> None:
    before = loops_of(sandbox)
    served.die()
    recover(served.path, "--no-mount")
    assert loops_of(sandbox) == before
    assert not os.path.ismount(files)


def test_something_that_cannot_come_back(sandbox: Sandbox, served: Served, files: Path) -> None:
    """The mount point is in a file system that goes meanwhile."""
    outer = sandbox.path / "outer"
    outer.mkdir()
    run("mount", "-t", "tmpfs", "hcpfs-test", outer)
    (outer / "place").mkdir()
    run("mount", "--bind", files, outer / "place")
    served.die()
    disk = sandbox.path / "disk.img"
    disk.rename(sandbox.path / "away.img")
    said = recover(served.path, code=1)
    assert f"{served.path} is not served again: {disk} cannot be used as a source: No such file" in said
    assert loops_of(sandbox) == set()
    run("umount", outer)
    assert "cannot be used" in recover(served.path, code=1)  # what was taken down at first is still known
    (sandbox.path / "away.img").rename(disk)
    said = recover(served.path, code=2)
    assert f"{outer}/place is not mounted again" in said
    assert f"mounted {files} again" in said
    assert len(loops_of(sandbox)) == 1
    assert os.path.ismount(files)


def test_a_mount_that_was_unmounted_lazily(sandbox: Sandbox) -> None:
    served = sandbox.mount(f"lazy={sandbox.disk(size=16 * MIB)}")
    device = sandbox.loop(served.live)
    sandbox.format(device, "ext4")
    files = sandbox.mount_device(device)
    write_durably(files / "a", "a")
    before = loops_of(sandbox), mounts_of(sandbox)
    run("umount", "-l", served.path)
    assert f"process {served.pid}) is alive" in recover(served.path, code=1)
    served.die()
    recover(served.path)
    assert (loops_of(sandbox), mounts_of(sandbox)) == before
    assert (files / "a").read_text() == "a"


def test_two_mounts_that_were_unmounted_lazily(sandbox: Sandbox) -> None:
    """Something is left of both. Whose image it is cannot be told any more, so it is not touched."""
    one = sandbox.mount(f"lazy={sandbox.disk()}")
    other = sandbox.mount(
        f"lazy={sandbox.disk('other.img')}", mountpoint=sandbox.path / "mnt2", store=sandbox.path / "store2"
    )
    device = sandbox.loop(one.live)
    others = sandbox.loop(other.live)
    for served in (one, other):
        served.die()
        run("umount", "-l", served.path)
    assert f"{device} is left alone: it may belong to {one.path} or to {other.path}" in recover(one.path, code=2)
    assert status_of(one.path)["last_stop"] == "not-clean"
    sandbox.unloop(device)
    sandbox.unloop(others)


@pytest.fixture
def stopped(served: Served, files: Path) -> Iterator[int]:
    """A daemon that hangs: the process id."""
    write_durably(files / "a", "a")
    os.kill(served.pid, signal.SIGSTOP)
    yield served.pid
    if alive(served.pid):
        os.kill(served.pid, signal.SIGCONT)


def test_a_daemon_that_hangs(sandbox: Sandbox, served: Served, files: Path, stopped: int) -> None:
    before = loops_of(sandbox), mounts_of(sandbox)
    waiting = sandbox.spawn("cat", served.path / "status", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert "did not answer within 5 s, but its daemon" in recover(served.path, code=1)
    assert alive(stopped)
    said = recover(served.path, "--force")
    assert f"aborted the connection of {served.path}" in said
    assert f"ended its daemon, process {stopped}" in said
    assert not alive(stopped)
    assert waiting.wait(10) != 0
    assert (loops_of(sandbox), mounts_of(sandbox)) == before
    assert (files / "a").read_text() == "a"


def test_a_hanging_mount_of_a_dead_daemon(sandbox: Sandbox, served: Served, stopped: int) -> None:
    """As when a thread of the dead daemon waits in the kernel: nobody answers, and the record's daemon is gone."""
    found = record.read(str(served.path))
    assert found is not None
    found.started -= 1
    record.write(found)
    os.kill(stopped, signal.SIGSTOP)
    rebuilt = run(*HCPFS, "recover", served.path, check=False, timeout=120)
    # The stopped process still has the disk; a really dead one would not.
    assert f"aborted the connection of {served.path}" in rebuilt.stdout
    assert rebuilt.returncode == 1
    assert "locked by another" in rebuilt.stderr or "in use by another" in rebuilt.stderr
    os.kill(stopped, signal.SIGKILL)
    wait_until(lambda: not alive(stopped), what="the end of the daemon")
    recover(served.path)
    assert (sandbox.path / "fs" / "a").read_text() == "a"


def test_a_connection_that_was_aborted_by_hand(sandbox: Sandbox, served: Served) -> None:
    probe.abort(next(mount.device for mount in beneath.mounts() if mount.mountpoint == str(served.path)))
    wait_until(lambda: not alive(served.pid), what="the end of the daemon")
    recover(served.path)
    assert served.status["last_stop"] == "clean"


def test_where_nothing_is_known(sandbox: Sandbox) -> None:
    assert recover(sandbox.path, code=1) == (
        f"hcpfs: no hcpfs is mounted at {sandbox.path}, and nothing is known of one that was: nothing to recover\n"
    )
    served = sandbox.mount(sandbox.disk())
    served.die()
    record.remove(str(served.path), served.pid)
    said = recover(served.path, code=1)
    assert (
        f"it was mounted is not known, as /run/hcpfs has no record of it: hcpfs mount --recover SOURCE... {served.path}"
        in said
    )
    run(*HCPFS, "mount", "--recover", *served.sources, served.path, "--store", served.store)
    assert status_of(served.path)["last_stop"] == "not-clean"


def test_the_record(sandbox: Sandbox, served: Served) -> None:
    found = record.read(str(served.path))
    assert found is not None
    assert (found.pid, found.images, found.is_alive) == (served.pid, ["disk.img"], True)
    assert Path(record.DIRECTORY).stat().st_mode & 0o7777 == 0o700
    file = next(path for path in Path(record.DIRECTORY).glob("*.json") if str(served.path) in path.read_text())
    assert file.stat().st_mode & 0o7777 == 0o600
    served.umount()
    assert not file.exists()
    assert record.read(str(served.path)) is None
    assert "nothing is known" in recover(served.path, code=1)


def test_a_record_of_somebody_else_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "DIRECTORY", str(tmp_path / "run"))
    one = record.of_this_process("/mnt/hcp", ["mount"], ["a"])
    record.write(one)
    assert record.read("/mnt/hcp") == one
    assert record.read("/mnt/other") is None
    file = next((tmp_path / "run").iterdir())
    text = file.read_text()
    file.write_text("nonsense")
    assert record.read("/mnt/hcp") is None
    file.unlink()
    (tmp_path / "elsewhere").write_text(text)
    file.symlink_to(tmp_path / "elsewhere")
    assert record.read("/mnt/hcp") is None
    record.write(one)  # replaces the link, and does not follow it
    assert not file.is_symlink()
    (tmp_path / "run").chmod(0o777)
    assert record.read("/mnt/hcp") is None
    with pytest.raises(PermissionError, match="is not only ours"):
        record.write(one)


def test_a_pid_that_is_somebody_else_s_by_now() -> None:
    one = record.of_this_process("/mnt/hcp", ["mount"], ["a"])
    assert one.is_alive
    assert one.lingers
    one.started += 1
    assert not one.is_alive
    assert not one.lingers


def test_a_mount_does_without_a_record(sandbox: Sandbox) -> None:
    (sandbox.path / "mnt").mkdir()
    words = [*HCPFS, "mount", sandbox.disk(), sandbox.path / "mnt", "--store", sandbox.path / "store"]
    script = 'mount -t tmpfs -o ro none /run && "$@" && cat "$0/status" && umount "$0"'
    done = run("unshare", "--mount", "sh", "-c", script, sandbox.path / "mnt", *words)
    assert "mountpoint" in done.stdout
    pid = int(done.stdout.partition("\npid ")[2].split()[0])
    wait_until(lambda: not alive(pid), what="the end of the daemon")
    assert "hcpfs recover will not know how it was mounted" in (sandbox.path / "store" / "hcpfs.log").read_text()


def test_the_kernel_s_words_for_images() -> None:
    def mount(number: int, mountpoint: str, root: str = "/") -> beneath.Mount:
        return beneath.Mount(9, mountpoint, "fuse.hcpfs", "/d", number, 1, root, "rw", "rw")

    slash = beneath.Mount(1, "/", "ext4", "/dev/vda", 1, 0, "/", "rw", "rw")
    dead = mount(2, "/mnt/hcp")
    image_of = above.images_on([slash, dead, mount(3, "/images", "/live")], dead)
    assert image_of("/mnt/hcp/live/a.img") == "/mnt/hcp/live/a.img"
    assert image_of("/mnt/hcp/snaps/s/a.img (deleted)") == "/mnt/hcp/snaps/s/a.img"
    assert image_of("/images/a.img") == "/mnt/hcp/live/a.img"
    assert image_of("/mnt/hcp2/live/a.img") is None
    detached = above.images_of_detached("/mnt/hcp", ["a.img", "b"])
    assert detached("/live/a.img") == "/mnt/hcp/live/a.img"
    assert detached("/snaps/x y/b (deleted)") == "/mnt/hcp/snaps/x y/b"
    assert detached("/live/aximg") is None
    assert detached("/srv/live/b") is None


def test_what_is_taken_down_can_be_written_and_read() -> None:
    state = loops.LoopState("loop0", "/f", 0, 0, 512, True, False, True, False, ((1, 2048, 8),))
    mount = above.MountAbove(0, 1, 2, 3, "loop0p1", "/srv", "ext4", "/", "rw", "rw")
    all_of_it = above.Above([above.LoopAbove(0, state)], [mount], [])
    again = above.Above.from_json(json.loads(json.dumps(all_of_it.to_json())))
    assert again.mounts == all_of_it.mounts
    assert again.loops[0].state._replace(partitions=state.partitions) == state
    all_of_it.add(again)
    assert (len(all_of_it.loops), len(all_of_it.mounts)) == (1, 1)
    with pytest.raises(TypeError):
        above.Above.from_json({"loops": [], "mounts": [{"nonsense": 1}], "binds": []})


def test_as_a_service(sandbox: Sandbox) -> None:
    """What systemd does with the unit of the reference: the same command again after each end of the daemon."""
    mountpoint = sandbox.path / "mnt"
    (line,) = re.findall(r"^ +ExecStart=\S+/hcpfs mount (.+) /dev/sdb1 /mnt/hcp$", REFERENCE.read_text(), re.MULTILINE)
    # A name of its own: after a stop it is all that tells whose the image was.
    disk = f"service={sandbox.disk(size=16 * MIB)}"
    command = [*line.split(), disk, mountpoint, "--store", sandbox.path / "store"]
    daemon = sandbox.serve_in_foreground(*command, mountpoint=mountpoint)
    device = sandbox.loop(mountpoint / "live" / "service")
    sandbox.format(device, "ext4")
    files = sandbox.mount_device(device)
    write_durably(files / "a", "a")
    before = loops_of(sandbox), mounts_of(sandbox)
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):  # a SIGTERM is a stop while the image is in use
        daemon.send_signal(number)
        assert daemon.wait(20) == (0 if number == signal.SIGTERM else -number)
        daemon = sandbox.serve_in_foreground(*command, mountpoint=mountpoint)
        wait_until(lambda: (loops_of(sandbox), mounts_of(sandbox)) == before, what="what was there before")
        assert int(status_of(mountpoint)["pid"]) == daemon.pid
        assert (files / "a").read_text() == "a"
    sandbox.unmount(files)
    sandbox.unloop(device)
    wait_until(lambda: run(*HCPFS, "umount", mountpoint, check=False).returncode == 0, what="the umount")
    assert daemon.wait(20) == 0
    assert record.read(str(mountpoint)) is None
