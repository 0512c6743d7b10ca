"""The kernel's caches: what they spare the daemon, and that nobody sees old bytes, times or sizes by them."""

import mmap
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from hcpfs.system import beneath, readahead
from tests.support.sandbox import Sandbox, Served, run

MIB = 1 << 20
SIZE = 16 * MIB
LENGTH = 64 << 10  # of a write


@pytest.fixture
def served(sandbox: Sandbox) -> Served:
    served = sandbox.mount(sandbox.disk(content=random.Random(3).randbytes(SIZE)))
    (served.snaps / "s").mkdir()
    return served


def _served_bytes(served: Served) -> int:
    """What the daemon has read so far, from files and requests."""
    found = re.search(r"^rchar: (\d+)$", Path(f"/proc/{served.pid}/io").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])


def _copy_cost(served: Served, image: Path) -> int:
    before = _served_bytes(served)
    shutil.copyfile(image, served.path.parent / "copy")
    return _served_bytes(served) - before


@pytest.mark.parametrize("which", ["live", "snapshot"])
def test_a_second_copy_does_not_reach_the_daemon(served: Served, which: str) -> None:
    image = served.live if which == "live" else served.image("s")
    first = _copy_cost(served, image)
    second = _copy_cost(served, image)
    assert first >= SIZE
    assert second < SIZE / 100


def test_the_kernel_reads_ahead_as_far_as_a_request_goes(served: Served) -> None:
    [mount] = [one for one in beneath.mounts() if one.mountpoint == str(served.path)]
    assert int(readahead.setting_of(mount).read_text()) == readahead.READ_AHEAD_KIB


def _buffered(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b", buffering=0) as file:
        file.seek(offset)
        assert file.write(data) == len(data)


def _direct(path: Path, offset: int, data: bytes) -> None:
    fd = os.open(path, os.O_RDWR | os.O_DIRECT)
    try:
        aligned = mmap.mmap(-1, len(data))
        aligned.write(data)
        assert os.pwritev(fd, [aligned], offset) == len(data)
    finally:
        os.close(fd)


def _mapped(path: Path, offset: int, data: bytes) -> None:
    fd = os.open(path, os.O_RDWR)
    try:
        with mmap.mmap(fd, SIZE) as mapping:
            mapping[offset : offset + len(data)] = data
            mapping.flush()
    finally:
        os.close(fd)


def _read_buffered(path: Path, offset: int) -> bytes:
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        return file.read(LENGTH)


def _read_direct(path: Path, offset: int) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        aligned = mmap.mmap(-1, LENGTH)
        assert os.preadv(fd, [aligned], offset) == LENGTH
        return bytes(aligned)
    finally:
        os.close(fd)


def _read_mapped(path: Path, offset: int) -> bytes:
    fd = os.open(path, os.O_RDONLY)
    try:
        with mmap.mmap(fd, SIZE, prot=mmap.PROT_READ) as mapping:
            return mapping[offset : offset + LENGTH]
    finally:
        os.close(fd)


WRITES = {"write": _buffered, "O_DIRECT": _direct, "mmap": _mapped}
READS = {"read": _read_buffered, "O_DIRECT": _read_direct, "mmap": _read_mapped}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("which", ["live", "snapshot"])
def test_what_is_written_one_way_is_read_every_way(
    served: Served, which: str, write: Callable[[Path, int, bytes], None]
) -> None:
    image = served.live if which == "live" else served.image("s")
    for number, (name, read) in enumerate(READS.items()):
        offset = number * MIB
        _read_buffered(image, offset)  # so that it is in the cache
        data = os.urandom(LENGTH)
        write(image, offset, data)
        assert read(image, offset) == data, name
    other = served.image("s") if which == "live" else served.live
    original = random.Random(3).randbytes(SIZE)
    assert other.read_bytes() == original


@pytest.mark.parametrize("write", [_buffered, _direct], ids=["write", "O_DIRECT"])
def test_size_and_time_are_told_at_once(served: Served, write: Callable[[Path, int, bytes], None]) -> None:
    for image in (served.live, served.image("s")):
        before = image.stat()
        write(image, 0, bytes(LENGTH))
        after = image.stat()
        assert after.st_size == before.st_size == SIZE
        assert after.st_mtime_ns > before.st_mtime_ns


@pytest.mark.parametrize("write", [_buffered, _direct], ids=["write", "O_DIRECT"])
def test_what_was_written_before_mkdir_is_in_the_snapshot_without_a_sync(
    served: Served, write: Callable[[Path, int, bytes], None]
) -> None:
    data = os.urandom(LENGTH)
    write(served.live, 3 * MIB, data)
    (served.snaps / "later").mkdir()
    write(served.live, 3 * MIB, bytes(LENGTH))
    assert _read_buffered(served.image("later"), 3 * MIB) == data
    assert _read_buffered(served.live, 3 * MIB) == bytes(LENGTH)


def test_what_stays_mapped_is_in_the_snapshot_without_a_sync(served: Served) -> None:
    fd = os.open(served.live, os.O_RDWR)
    try:
        with mmap.mmap(fd, SIZE) as mapping:
            mapping[5 * MIB : 5 * MIB + 4] = b"then"
            run("mkdir", served.snaps / "later")
            mapping[5 * MIB : 5 * MIB + 4] = b"last"
            assert _read_direct(served.image("later"), 5 * MIB)[:4] == b"then"
    finally:
        os.close(fd)
