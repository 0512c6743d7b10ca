"""The tools that people use, on an image while the origin is being overwritten: the same bytes each time."""

import hashlib
import mmap
import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.fio import fio_verify
from tests.support.sandbox import Sandbox, Served, run, wait_until

DISK_BYTES = 24 << 20


class Overwriter:
    """Overwrites random parts of the live image until stopped."""

    def __init__(self, live: Path) -> None:
        self._live = live
        self._stop = threading.Event()
        self.writes = 0
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        random_ = random.Random(3)
        with self._live.open("r+b", buffering=0) as live:
            while not self._stop.is_set():
                live.seek(random_.randrange(DISK_BYTES - 70000))
                live.write(random_.randbytes(random_.choice([512, 4096, 65536])))
                self.writes += 1

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


@pytest.fixture
def served(sandbox: Sandbox) -> Served:
    return sandbox.mount(sandbox.disk(content=random.Random(2).randbytes(DISK_BYTES)))


@pytest.fixture
def moment(served: Served) -> Iterator[bytes]:
    """The content at the mkdir of `s`; the origin is overwritten from then on to the end of the test."""
    content = served.live.read_bytes()
    (served.snaps / "s").mkdir()
    overwriter = Overwriter(served.live)
    try:
        yield content
    finally:
        overwriter.stop()
    assert overwriter.writes > 10
    assert served.live.read_bytes() != content
    assert served.image("s").read_bytes() == content


def _fresh(path: Path) -> Path:
    """The file, with nothing of it in the kernel's cache, so that the next read asks hcpfs."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return path


def test_i2_cp_and_sha256sum(sandbox: Sandbox, served: Served, moment: bytes) -> None:
    expected = hashlib.sha256(moment).hexdigest()
    for attempt in range(4):
        run("cp", _fresh(served.image("s")), sandbox.path / f"copy{attempt}")
        assert (sandbox.path / f"copy{attempt}").read_bytes() == moment
        assert run("sha256sum", _fresh(served.image("s"))).stdout.split()[0] == expected


def test_i2_rsync_transfers_nothing_the_second_time(sandbox: Sandbox, served: Served, moment: bytes) -> None:
    target = sandbox.path / "backup"
    first = run("rsync", "-a", "--stats", served.image("s"), f"{target}/").stdout
    assert "Number of regular files transferred: 1" in first
    assert (target / "disk.img").read_bytes() == moment
    second = run("rsync", "-a", "--stats", served.image("s"), f"{target}/").stdout
    assert "Number of regular files transferred: 0" in second
    third = run("rsync", "-a", "--checksum", "--stats", _fresh(served.image("s")), f"{target}/").stdout
    assert "Number of regular files transferred: 0" in third


def test_rsync_puts_the_disk_back_to_a_snapshot_by_writing_what_differs(sandbox: Sandbox) -> None:
    """As the README has it: not all of the disk, which the other snapshots would have to keep."""
    before = random.Random(4).randbytes(8 << 20)
    disk = sandbox.disk(content=before)
    served = sandbox.mount(disk)
    (served.snaps / "monday").mkdir()
    with served.live.open("r+b") as live:
        live.seek(1 << 20)
        live.write(bytes(64 << 10))
    (served.snaps / "later").mkdir()
    run("rsync", "-I", "--inplace", "--no-whole-file", "--fsync", served.image("monday"), served.live)
    assert served.live.read_bytes() == before
    assert 0 < int(served.info("later")["preserved_bytes"]) <= 128 << 10
    served.umount()
    assert disk.read_bytes() == before


def test_rsync_sees_a_write_to_the_image(sandbox: Sandbox, served: Served, moment: bytes) -> None:
    target = sandbox.path / "backup"
    run("rsync", "-a", served.image("s"), f"{target}/")
    original = os.stat(served.image("s"))
    wait_until(lambda: time.time() > original.st_mtime + 1, what="the next second, as rsync compares whole ones")
    with served.image("s").open("r+b") as image:
        image.write(b"changed")
    assert os.stat(served.image("s")).st_mtime_ns > original.st_mtime_ns
    second = run("rsync", "-a", "--inplace", "--stats", served.image("s"), f"{target}/").stdout
    assert "Number of regular files transferred: 1" in second
    assert (target / "disk.img").read_bytes() == b"changed" + moment[7:]
    with served.image("s").open("r+b") as image:
        image.write(moment[:7])


def test_i2_qemu_img_convert(sandbox: Sandbox, served: Served, moment: bytes) -> None:
    copy = sandbox.path / "copy.qcow2"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", served.image("s"), copy)
    run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", _fresh(served.image("s")), copy)
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", copy, sandbox.path / "back")
    assert (sandbox.path / "back").read_bytes() == moment


def test_i2_direct_reads_and_mmap(sandbox: Sandbox, served: Served, moment: bytes) -> None:
    run("dd", f"if={served.image('s')}", f"of={sandbox.path / 'copy'}", "bs=1M", "iflag=direct", "status=none")
    assert (sandbox.path / "copy").read_bytes() == moment
    for _ in range(3):
        image = _fresh(served.image("s")).open("rb")
        with image, mmap.mmap(image.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            assert mapped[:] == moment


def test_writes_through_mmap_are_in_the_next_snapshot(served: Served) -> None:
    """They are in the kernel's cache only, until the mkdir has them written back."""
    with served.live.open("r+b") as live, mmap.mmap(live.fileno(), 0) as mapped:
        mapped[5000:5008] = b"mmapped!"
        (served.snaps / "s").mkdir()
        assert served.image("s").read_bytes()[5000:5008] == b"mmapped!"
        mapped[5000:5008] = b"ANOTHER!"
        mapped.flush()
    assert served.image("s").read_bytes()[5000:5008] == b"mmapped!"


@pytest.mark.parametrize("way", ["file", "file, O_DIRECT", "loop, direct-io off", "loop, direct-io on"])
@pytest.mark.parametrize("which", ["live", "snapshot"])
def test_i2_i3_i9_fio_verifies_what_it_wrote(sandbox: Sandbox, served: Served, which: str, way: str) -> None:
    """At once, through the kernel's cache, and again after a remount, from hcpfs; the other image keeps its bytes."""
    content = served.live.read_bytes()
    (served.snaps / "s").mkdir()
    written, other = served.live, served.image("s")
    if which == "snapshot":
        written, other = other, written
    device = sandbox.loop(written, f"--direct-io={way.split()[-1]}") if "loop" in way else None
    fio_verify(sandbox, device or written, 8, "--do_verify=1", "--fsync=16", f"--direct={int('O_DIRECT' in way)}")
    if device is not None:
        sandbox.unloop(device)
        wait_until(lambda: not Path(f"/sys/block/{Path(device).name}/loop").exists(), what="the end of the loop device")
    served.remount()
    fio_verify(sandbox, written, 8, "--verify_only")
    assert written.read_bytes()[8 << 20 :] == content[8 << 20 :]
    assert other.read_bytes() == content


@pytest.mark.parametrize("direct_io", ["on", "off"])
def test_ext4_through_a_loop_device_is_clean(sandbox: Sandbox, served: Served, direct_io: str) -> None:
    """1 KiB blocks send requests smaller than a chunk."""
    (served.snaps / "s").mkdir()
    for image in (served.live, served.image("s")):
        device = sandbox.loop(image, f"--direct-io={direct_io}")
        run("mkfs.ext4", "-q", "-E", "nodiscard", "-b", "1024", device)
        files = sandbox.mount_device(device)
        contents = {f"f{n}": random.Random(n).randbytes(n * 1500) for n in range(60)}
        for name, content in contents.items():
            (files / name).write_bytes(content)
        sandbox.unmount(files)
        run("fsck.ext4", "-n", "-f", device)
        files = sandbox.mount_device(device)
        assert {name: (files / name).read_bytes() for name in contents} == contents
        sandbox.unmount(files)
        sandbox.unloop(device)
