"""Sources of all kinds: sectors of 512 and 4096 bytes, odd sizes, any offset and length, several at once."""

import errno
import os
import random
import threading
import time
from pathlib import Path

import pytest

from tests.support.sandbox import Sandbox, Served, wait_until

STEPS = 250
KINDS = ["file", "odd file", "512 byte sectors", "odd number of sectors", "4096 byte sectors"]


class Source:
    """A source of some kind, and how to read it when hcpfs does not."""

    def __init__(self, sandbox: Sandbox, kind: str) -> None:
        odd = {"odd file": 777, "odd number of sectors": 3 * 512}.get(kind, 0)
        self.size = (2 << 20) + odd
        self.content = bytearray(random.Random(kind).randbytes(self.size))
        self.path = self._file = sandbox.disk(content=bytes(self.content))
        if "sectors" in kind:
            sector = "4096" if kind == "4096 byte sectors" else "512"
            self.path = sandbox.loop(self.path, "--sector-size", sector)

    def read(self) -> bytes:
        return Path(self.path).read_bytes()

    def read_flushed(self) -> bytes:
        """What of it is past the kernel's cache of the device: in the file below, if it is a loop device."""
        return self._file.read_bytes()


def _random_step(served: Served, source: Source, images: dict[str, bytearray], random_: random.Random) -> None:
    """One read or write at any offset, of any length, over the end too, cached or O_DIRECT; against the model.

    Writes over the end are cached ones here: those with O_DIRECT have test_i2_i8_the_end_of_the_device to themselves.
    """
    name = random_.choice(["", *images])
    model = images[name] if name else source.content
    offset = random_.choice([random_.randrange(source.size), random_.randrange(source.size // 512) * 512])
    length = random_.choice([1, 511, 512, 4095, 4096, 4097, 40000])
    flags = 0 if offset + length > source.size else random_.choice([0, os.O_DIRECT])
    fd = os.open(served.image(name) if name else served.live, os.O_RDWR | flags)
    try:
        if random_.random() < 0.6:
            data = random_.randbytes(length)
            written = os.pwrite(fd, data, offset)
            assert written == min(length, source.size - offset)
            model[offset : offset + written] = data[:written]
        else:
            assert os.pread(fd, length, offset) == model[offset : offset + length]
    finally:
        os.close(fd)


@pytest.mark.parametrize("kind", KINDS)
def test_i2_i8_i9_any_offset_and_length(sandbox: Sandbox, kind: str) -> None:
    source = Source(sandbox, kind)
    random_ = random.Random(kind)
    served = sandbox.mount(source.path)
    assert served.live.stat().st_size == source.size
    images = {}
    for step in range(STEPS):
        if step % 60 == 0:
            (served.snaps / f"s{step}").mkdir()
            images[f"s{step}"] = bytearray(source.content)
        _random_step(served, source, images, random_)
    served = served.remount()
    for name, model in images.items():
        assert served.image(name).read_bytes() == model
    assert served.live.read_bytes() == source.content
    served.umount()
    assert source.read() == source.read_flushed() == source.content
    served = served.again()
    for _ in range(STEPS // 5):
        _random_step(served, source, images, random_)
    with served.live.open("rb") as file:
        os.fsync(file.fileno())
    served.kill()
    assert source.read() == source.content


@pytest.mark.parametrize("flags", [0, os.O_DIRECT], ids=["cached", "O_DIRECT"])
@pytest.mark.parametrize("kind", KINDS)
def test_i2_i8_the_end_of_the_device(sandbox: Sandbox, kind: str, flags: int) -> None:
    """Up to it all is written, over it what fits, past it nothing: ENOSPC, as on a disk. The end stays where it is."""
    source = Source(sandbox, kind)
    size = source.size
    served = sandbox.mount(source.path)
    (served.snaps / "s").mkdir()
    (served.snaps / "untouched").mkdir()
    original = bytes(source.content)
    models = {served.live: source.content, served.image("s"): bytearray(original)}
    random_ = random.Random(kind)
    for path, model in models.items():
        fd = os.open(path, os.O_RDWR | flags)
        try:
            for before_end, length in [
                (1, 1),
                (1, 2),
                (511, 511),
                (700, 4096),
                (4096, 4096),
                (4097, 9000),
                (100000, 200000),
            ]:
                data = random_.randbytes(length)
                assert os.pwrite(fd, data, size - before_end) == min(length, before_end)
                model[size - before_end :] = data[:before_end]  # each of them reaches the end
                assert os.pread(fd, length + 5000, size - before_end) == model[size - before_end :]
            for past_end in (0, 1, 511, 4096, 1 << 30):
                with pytest.raises(OSError, match="No space left") as failure:
                    os.pwrite(fd, b"past the end", size + past_end)
                assert failure.value.errno == errno.ENOSPC
                assert os.pread(fd, 4096, size + past_end) == b""
            assert os.fstat(fd).st_size == os.lseek(fd, 0, os.SEEK_END) == size
        finally:
            os.close(fd)
    served = served.remount()
    for path, model in models.items():
        assert path.read_bytes() == model
    assert served.image("untouched").read_bytes() == original
    served.umount()
    assert source.read() == source.read_flushed() == source.content


def _wait_beyond(time_ns: int) -> None:
    wait_until(lambda: time.time_ns() > time_ns, what="a later time")


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_has_the_snapshots_time_then_that_of_its_last_write(sandbox: Sandbox, kind: str) -> None:
    """Never the present time: what was recorded before it is looked at again later."""
    source = Source(sandbox, kind)
    served = sandbox.mount(source.path)
    times = [time.time_ns()]
    (served.snaps / "a").mkdir()
    times.append(time.time_ns())
    taken = served.image("a").stat().st_mtime_ns
    assert times[0] <= taken <= times[1]
    for path in (served.live, served.image("a")):
        _wait_beyond(time.time_ns() + 20_000_000)
        assert served.image("a").stat().st_mtime_ns == taken  # the write to the live image changes nothing in it
        began = time.time_ns()
        fd = os.open(path, os.O_RDWR)
        os.pwrite(fd, b"x" * 700, source.size - 700)
        os.fsync(fd)
        os.close(fd)
        ended = time.time_ns()
        assert began <= path.stat().st_mtime_ns <= ended
    seen = [path.stat().st_mtime_ns for path in (served.live, served.image("a"))]
    _wait_beyond(ended + 1_100_000_000)  # the kernel keeps attributes for a second
    assert [path.stat().st_mtime_ns for path in (served.live, served.image("a"))] == seen
    served = served.remount()
    assert [path.stat().st_mtime_ns for path in (served.live, served.image("a"))] == seen


def _counters(images: Path) -> tuple[int, int]:
    """What an image of each source has of the counter."""
    content = [(images / name).read_bytes() for name in ("first", "second")]
    return int.from_bytes(content[0][8192:8200], "little"), int.from_bytes(content[1][1 << 20 :][:8], "little")


def test_i2_a_consistency_group_is_taken_at_one_instant(sandbox: Sandbox) -> None:
    """A counter is written to the first source, then to the second; no snapshot has them further apart than one."""
    device = sandbox.loop(sandbox.disk("b.img"), "--sector-size", "4096")
    served = sandbox.mount(f"first={sandbox.disk('a.img')}", f"second={device}")
    first, second = (os.open(served.path / "live" / name, os.O_RDWR) for name in ("first", "second"))
    stop = threading.Event()
    written = []
    at_once = []

    def count() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            os.pwrite(first, number.to_bytes(8, "little"), 8192)
            os.pwrite(second, number.to_bytes(8, "little"), 1 << 20)
        written.append(number)

    counter = threading.Thread(target=count)
    counter.start()
    try:
        for number in range(25):
            (served.snaps / f"s{number}").mkdir()
            at_once.append(_counters(served.snaps / f"s{number}"))
    finally:
        stop.set()
        counter.join()
        os.close(first)
        os.close(second)
    assert all(ahead - 1 <= behind <= ahead for ahead, behind in at_once), at_once
    assert at_once == sorted(at_once)
    assert len(set(at_once)) > 5
    assert written[0] > 25
    info = served.info("s3")
    assert info["size"] == str(2 * (8 << 20))
    assert info["first.size"] == info["second.size"] == str(8 << 20)
    served = served.remount()
    for number in range(25):
        images = served.snaps / f"s{number}"
        assert sorted(os.listdir(images)) == ["first", "info", "lost", "second"]
        assert _counters(images) == at_once[number]
    (served.snaps / "s3").rmdir()
    served.umount()
