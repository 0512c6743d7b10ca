"""Reads that wait for a disk, many at once and while it is overwritten: by io_uring, and where it is refused."""

import mmap
import os
import random
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.sandbox import Sandbox

MIB, CHUNK = 1 << 20, 4096
SIZE = 16 * MIB
READERS = 16
# Refuses io_uring_setup(2) with EPERM, as containers do: seccomp(2), <linux/filter.h>.
_WITHOUT_IO_URING = """
import ctypes, os, struct, sys
filters = ((0x20, 0, 0, 0), (0x15, 0, 1, 425), (6, 0, 0, 0x50001), (6, 0, 0, 0x7FFF0000))
code = b"".join(struct.pack("HBBI", *one) for one in filters)
memory = ctypes.create_string_buffer(code, len(code))
program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", 4, ctypes.addressof(memory)))
prctl = ctypes.CDLL(None, use_errno=True).prctl
assert prctl(38, 1, 0, 0, 0) == 0 and prctl(22, 2, program, 0, 0) == 0, ctypes.get_errno()
os.execv(sys.executable, [sys.executable, "-m", "hcpfs", *sys.argv[1:]])
"""
PROGRAMS = {
    "io_uring": [sys.executable, "-m", "hcpfs"],
    "threads": [sys.executable, "-c", _WITHOUT_IO_URING],
}


@pytest.fixture(params=PROGRAMS)
def served(request: pytest.FixtureRequest, sandbox: Sandbox) -> tuple[Path, str, bytes]:
    """The mount point, the device, which has to be waited for, and what was on it; half of it is overwritten since."""
    content = os.urandom(SIZE)
    device = sandbox.loop(sandbox.disk(content=content))
    mountpoint = sandbox.path / "mnt"
    sandbox.serve_in_foreground(
        f"d={device}", mountpoint, "--store", sandbox.path / "store", "--foreground",
        mountpoint=mountpoint, program=PROGRAMS[request.param],
    )  # fmt: skip
    assert f"reads {request.param}\n" in (mountpoint / "status").read_text()
    (mountpoint / "snaps" / "a").mkdir()
    with (mountpoint / "live" / "d").open("r+b", buffering=0) as live:
        for start in range(0, SIZE, 2 * 64 * CHUNK):
            live.seek(start)
            live.write(os.urandom(64 * CHUNK))
        os.fsync(live.fileno())
    return mountpoint, device, content


def _forget(device: str) -> None:
    """Have the kernel drop what it caches of the device."""
    descriptor = os.open(device, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def _reader(image: Path, expected: bytes) -> Callable[[int], None]:
    def read(seed: int) -> None:
        descriptor, random_ = os.open(image, os.O_RDONLY | os.O_DIRECT), random.Random(seed)
        with mmap.mmap(-1, MIB) as memory:
            for _ in range(60):
                length = random_.choice((CHUNK, CHUNK, 3 * CHUNK, 128 << 10, MIB))
                offset = random_.randrange(0, SIZE - length + 1, CHUNK)
                assert os.preadv(descriptor, [memoryview(memory)[:length]], offset) == length
                assert memory[:length] == expected[offset : offset + length], f"wrong bytes in {length} at {offset}"
        os.close(descriptor)

    return read


def test_i2_i4_many_cold_reads_at_once_are_right(served: tuple[Path, str, bytes]) -> None:
    mountpoint, device, content = served
    _forget(device)
    with ThreadPoolExecutor(READERS) as threads:
        list(threads.map(_reader(mountpoint / "snaps" / "a" / "d", content), range(READERS)))


def test_i2_cold_reads_of_what_is_overwritten_meanwhile_are_right(served: tuple[Path, str, bytes]) -> None:
    mountpoint, device, content = served
    read = _reader(mountpoint / "snaps" / "a" / "d", content)
    with ThreadPoolExecutor(READERS) as threads, (mountpoint / "live" / "d").open("r+b", buffering=0) as live:
        _forget(device)
        readers = [threads.submit(read, seed) for seed in range(READERS)]
        random_ = random.Random(1)
        while not all(reader.done() for reader in readers):
            live.seek(random_.randrange(0, SIZE, CHUNK))
            live.write(os.urandom(CHUNK))
            if random_.random() < 0.02:
                os.fsync(live.fileno())
                _forget(device)
        for reader in readers:
            reader.result()
