"""kill -9 of the daemon in the middle of writes and of snapshots, many times over on the same store."""

import os
import random
import signal
import subprocess
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from tests.mount.test_kill_points import doomed
from tests.support.model import CHUNK
from tests.support.sandbox import Sandbox, status_of, wait_until
from tests.support.workload import CHUNKS, DEAD, History, check, work_until

ROUNDS = 15
FREEZE_SECONDS = 0.3
LONG_FREEZE_SECONDS = 1


@pytest.mark.parametrize("seed", [1, 2])
def test_i3_i4_i5_i8_killed_in_the_middle_of_anything(sandbox: Sandbox, seed: int) -> None:
    assert killed_at_random(sandbox, seed, ROUNDS) > ROUNDS


def killed_at_random(sandbox: Sandbox, seed: int, rounds: int) -> int:
    """Kill the daemon of one store so many times; how many snapshots were taken."""
    random_ = random.Random(seed)
    content = random_.randbytes(CHUNKS * CHUNK)
    disk = sandbox.disk(content=content)
    history = History(content)
    served = sandbox.mount(disk)
    for _ in range(rounds):
        work_until(partial(os.kill, served.pid, signal.SIGKILL), served, history, random_)
        served.kill()
        history.live.settle_after_kill(disk.read_bytes())
        served = served.again()
        assert status_of(served.path)["last_stop"] == "not-clean"
        check(served, history)
    served.umount()
    assert disk.read_bytes() == history.live.content
    return history.made


def test_a_killed_daemon_leaves_no_file_system_frozen(sandbox: Sandbox) -> None:
    """The daemon dies while its freezer holds a file system frozen: the broken pipe thaws it."""
    killed_while_freezing(sandbox, 5)


def killed_while_freezing(sandbox: Sandbox, rounds: int) -> None:
    """Kill the daemon so many times while it takes a snapshot; a write to the file system must end each time."""
    served = sandbox.mount(sandbox.disk(size=32 << 20))
    device = sandbox.loop(served.live)
    sandbox.format(device, "ext4")
    files = sandbox.mount_device(device)
    for attempt in range(rounds):
        taker = threading.Thread(target=_mkdir_or_die, args=(served.snaps / f"s{attempt}",))
        taker.start()
        killer = threading.Timer(0.005 * (attempt % 5), os.kill, (served.pid, signal.SIGKILL))
        killer.start()
        taker.join()
        killer.join()
        served.kill()
        probe = sandbox.spawn("sh", "-c", f"echo x 2>&1 > {files}/probe | :", stderr=subprocess.DEVNULL)
        wait_until(lambda probe=probe: probe.poll() is not None, what="the end of a write, so the thaw,")
        sandbox.unmount(files)
        sandbox.unloop(device)
        served = served.again()
        device = sandbox.loop(served.live)
        files = sandbox.mount_device(device)
    sandbox.unmount(files)


def test_a_daemon_that_hangs_leaves_no_file_system_frozen(sandbox: Sandbox) -> None:
    hung_while_freezing(sandbox, 5)


def hung_while_freezing(sandbox: Sandbox, rounds: int) -> None:
    """Stop the daemon so many times while it has a file system frozen, for longer than the freeze may last.

    The file system is on the disk that hangs, and thawing ext4 writes to it, so a write ends when the daemon goes on,
    or is killed, and not before. The snapshot must not claim to be quiesced then.
    """
    served = sandbox.mount(sandbox.disk(size=32 << 20))
    served.umount()
    process, marker = doomed(sandbox, served, "before add snapshot", 0, "-o", f"freeze={FREEZE_SECONDS}")
    device = sandbox.loop(served.live)
    sandbox.format(device, "ext4")
    files = sandbox.mount_device(device)
    for attempt in range(rounds):
        marker.unlink(missing_ok=True)
        name = served.snaps / f"s{attempt}"
        taker = threading.Thread(target=_mkdir_or_die, args=(name,))
        taker.start()
        wait_until(marker.exists, what="the stop of the daemon")
        probe = sandbox.spawn("sh", "-c", f"echo x 2>&1 > {files}/probe | :", stderr=subprocess.DEVNULL)
        time.sleep(2 * FREEZE_SECONDS)
        last = attempt == rounds - 1
        process.send_signal(signal.SIGKILL if last else signal.SIGCONT)
        taker.join()
        if last:
            process.wait()
            served.kill()
        wait_until(lambda probe=probe: probe.poll() is not None, what="the end of a write, so the thaw,")
        if not last:
            info = served.info(name.name)
            assert info["quiesced"] == "no", info
            assert "thawed" in info["quiesce_note"], info
    sandbox.unmount(files)


def test_a_file_system_is_thawed_while_the_daemon_still_hangs(sandbox: Sandbox) -> None:
    """XFS, unlike ext4, writes nothing to be thawed: so its writers go on although the disk below does not."""
    thawed_while_hung(sandbox, 3)


def thawed_while_hung(sandbox: Sandbox, rounds: int) -> None:
    """Stop the daemon so many times while it has an XFS frozen; a write must end then, when the time is over."""
    served = sandbox.mount(sandbox.disk(size=320 << 20))
    served.umount()
    process, marker = doomed(sandbox, served, "before add snapshot", 0, "-o", f"freeze={LONG_FREEZE_SECONDS}")
    device = sandbox.loop(served.live)
    sandbox.format(device, "xfs")
    files = sandbox.mount_device(device)
    (files / "probe").write_bytes(b"before")  # so that what the write needs is in memory
    for attempt in range(rounds):
        marker.unlink(missing_ok=True)
        name = served.snaps / f"s{attempt}"
        taker = threading.Thread(target=_mkdir_or_die, args=(name,))
        began = time.monotonic()
        taker.start()
        try:
            wait_until(marker.exists, what="the stop of the daemon")
            probe = sandbox.spawn("sh", "-c", f"echo {attempt} > {files}/probe")
            wait_until(lambda probe=probe: probe.poll() is not None, what="the end of a write, so the thaw,")
            assert time.monotonic() - began > LONG_FREEZE_SECONDS, "it was not frozen"
            assert _is_stopped(process.pid)
        finally:
            process.send_signal(signal.SIGCONT)
            taker.join()
        info = served.info(name.name)
        assert info["quiesced"] == "no", info
        assert "thawed" in info["quiesce_note"], info
    assert (files / "probe").read_text() == f"{rounds - 1}\n"
    sandbox.unmount(files)


def _is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def _mkdir_or_die(path: Path) -> None:
    try:
        path.mkdir()
    except OSError as error:
        if error.errno not in DEAD:
            raise
