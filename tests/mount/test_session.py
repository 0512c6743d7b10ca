"""The session with the kernel, through real mounts: with the fast path and without it."""

import os
import subprocess
import sys
import time

import pytest

from tests.support.sandbox import HCPFS, Sandbox, Served, run

WITHOUT_THE_SEAM = [
    sys.executable,
    "-c",
    "import hcpfs.daemon.session as session; session._descriptors = set; import hcpfs.__main__",
]


@pytest.mark.parametrize("program", [HCPFS, WITHOUT_THE_SEAM], ids=["fast path", "pyfuse3 alone"])
def test_everything_works(sandbox: Sandbox, program: list[str]) -> None:
    disk, mountpoint, store = sandbox.disk(content=os.urandom(8 << 20)), sandbox.path / "mnt", sandbox.path / "store"
    log = (sandbox.path / "log").open("w+")
    daemon = sandbox.serve_in_foreground(
        disk, mountpoint, "--store", store, "--foreground", mountpoint=mountpoint, program=program, stderr=log
    )
    served = Served(sandbox, mountpoint, store, [str(disk)], [])
    before = served.live.read_bytes()
    (served.snaps / "a").mkdir()
    with served.live.open("r+b") as live:
        for offset in (0, 5000, 3 << 20):
            live.seek(offset)
            live.write(os.urandom(1 << 20))
        live.flush()
        os.fsync(live.fileno())
    with pytest.raises(PermissionError):
        (served.snaps / "a" / "other").touch()
    assert served.image("a").read_bytes() == before
    assert served.live.read_bytes() != before
    assert os.listdir(served.snaps) == ["a"]
    assert served.info("a")["state"] == "valid"
    (served.snaps / "a").rmdir()
    served.umount()
    assert daemon.wait(20) == 0
    log.seek(0)
    assert ("slow path" in log.read()) == (program is WITHOUT_THE_SEAM)
    log.close()


def test_who_is_killed_while_he_waits_for_an_answer_leaves_the_mount_usable(sandbox: Sandbox) -> None:
    served = sandbox.mount(sandbox.disk(content=os.urandom(32 << 20)))
    (served.snaps / "a").mkdir()
    for attempt in range(20):
        reader = sandbox.spawn("cat", *[served.image("a")] * 20, stdout=subprocess.DEVNULL)
        time.sleep(attempt / 200)
        reader.kill()
        reader.wait()
    before = served.image("a").read_bytes()
    run("dd", f"if={served.image('a')}", "iflag=direct", "bs=1M", f"of={sandbox.path / 'copy'}")
    assert (sandbox.path / "copy").read_bytes() == before
    served.umount()


def test_many_who_wait_at_once_are_all_answered(sandbox: Sandbox) -> None:
    """More than the tasks that there are, each for a thread of the daemon: a full sync of its own."""
    served = sandbox.mount(sandbox.disk(content=bytes(32 << 20)))
    (served.snaps / "a").mkdir()
    run(
        "fio", "--name=many", f"--filename={served.live}", "--rw=randwrite", "--bs=4k", "--fsync=1", "--numjobs=150",
        "--thread", "--io_size=64k", "--size=32m", "--ioengine=psync",
    )  # fmt: skip
    assert served.status["pid"]
    served.umount()
