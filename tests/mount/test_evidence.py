"""What `info` says of how a snapshot was taken: `yes` and `nothing-mounted` are proved, or not said."""

import mmap
import os
from pathlib import Path

import pytest

from tests.support.sandbox import Sandbox, Served, run


@pytest.fixture
def served(sandbox: Sandbox) -> Served:
    return sandbox.mount(sandbox.disk(size=32 << 20))


def taken(served: Served, name: str = "s") -> dict[str, str]:
    (served.snaps / name).mkdir()
    return served.info(name)


def test_a_program_that_writes_is_named(served: Served) -> None:
    with served.live.open("r+b"):
        info = taken(served)
    assert info["quiesced"] == "no"
    assert taken(served, "after")["quiesced"] == "nothing-mounted"


def test_a_mapping_of_a_closed_file_counts(served: Served) -> None:
    fd = os.open(served.live, os.O_RDWR)
    mapped = mmap.mmap(fd, 4096)
    os.close(fd)
    assert taken(served)["quiesced"] == "no"
    mapped.close()
    assert taken(served, "after")["quiesced"] == "nothing-mounted"


def test_a_reader_does_not_matter(served: Served) -> None:
    with served.live.open("rb"):
        assert taken(served)["quiesced"] == "nothing-mounted"


def test_swap_on_a_loop_device(sandbox: Sandbox, served: Served) -> None:
    device = sandbox.loop(served.live)
    run("mkswap", device)
    run("swapon", device)
    try:
        info = taken(served)
    finally:
        run("swapoff", device)
    assert (info["quiesced"], info["quiesce_note"]) == ("no", f"{device} is in use as swap space")


def test_what_is_acknowledged_by_an_idle_loop_device_is_in_the_image(sandbox: Sandbox, served: Served) -> None:
    device = sandbox.loop(served.live)
    fd = os.open(device, os.O_RDWR)
    os.pwrite(fd, b"ACKED", 20 << 20)
    info = taken(served)
    os.close(fd)
    assert info["quiesced"] == "no"
    assert Path(served.image("s")).read_bytes()[20 << 20 :][:5] == b"ACKED"
    info = taken(served, "idle")
    assert info["quiesced"] == "nothing-mounted", info.get("quiesce_note")


def test_a_lazily_unmounted_file_system_is_frozen(sandbox: Sandbox, served: Served) -> None:
    device = sandbox.loop(served.live)
    sandbox.format(device, "ext4")
    files = sandbox.mount_device(device, "my files")
    assert taken(served, "named")["frozen"] == str(files)
    with (files / "open").open("w"):
        run("umount", "-l", files)
        info = taken(served)
    assert (info["quiesced"], "mounted nowhere" in info["frozen"]) == ("yes", True), info
    assert "Inode" in run("debugfs", "-R", "stat open", served.image("s")).stdout
