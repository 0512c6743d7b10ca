"""Sources of all kinds: sectors of 512 and 4096 bytes, odd sizes, any offset and length, several at once."""

import os
import random
import threading

import pytest

from tests.support.sandbox import Sandbox, Served

STEPS = 250
KINDS = ["file", "odd file", "512 byte sectors", "odd number of sectors", "4096 byte sectors"]


class Source:
    """A source of some kind, and how to read it when hcpfs does not."""

    def __init__(self, sandbox: Sandbox, kind: str) -> None:
        odd = {"odd file": 777, "odd number of sectors": 3 * 512}.get(kind, 0)
        self.size = (2 << 20) + odd
        self.content = bytearray(random.Random(kind).randbytes(self.size))
        self.path = sandbox.disk(content=bytes(self.content))
        if "sectors" in kind:
            sector = "4096" if kind == "4096 byte sectors" else "512"
            self.path = sandbox.loop(self.path, "--sector-size", sector)

    def read(self) -> bytes:
        with open(self.path, "rb") as file:
            return file.read()


def _random_step(served: Served, source: Source, images: dict[str, bytearray], random_: random.Random) -> None:
    """One read or write at any offset, of any length, over the end too; against the model."""
    name = random_.choice(["", *images])
    model = images[name] if name else source.content
    offset = random_.choice([random_.randrange(source.size), random_.randrange(source.size // 512) * 512])
    length = random_.choice([1, 511, 512, 4095, 4096, 4097, 40000])
    fd = os.open(served.image(name) if name else served.live, os.O_RDWR)
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
    assert source.read() == source.content


def test_a_consistency_group_is_taken_at_one_instant(sandbox: Sandbox) -> None:
    """A counter is written to the first source, then to the second; no snapshot has them further apart than one."""
    served = sandbox.mount(f"first={sandbox.disk('a.img')}", f"second={sandbox.disk('b.img')}")
    first, second = (os.open(served.path / "live" / name, os.O_RDWR) for name in ("first", "second"))
    stop = threading.Event()
    written = []

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
    finally:
        stop.set()
        counter.join()
        os.close(first)
        os.close(second)
    seen = set()
    for number in range(25):
        images = served.snaps / f"s{number}"
        assert sorted(os.listdir(images)) == ["first", "info", "second"]
        ahead = int.from_bytes((images / "first").read_bytes()[8192:8200], "little")
        behind = int.from_bytes((images / "second").read_bytes()[1 << 20 : (1 << 20) + 8], "little")
        assert ahead - 1 <= behind <= ahead
        seen.add(ahead)
    assert len(seen) > 5
    assert written[0] > 25
    info = served.info("s3")
    assert info["size"] == str(2 * (8 << 20))
    assert info["first.size"] == info["second.size"] == str(8 << 20)
    served = served.remount()
    (served.snaps / "s3").rmdir()
    served.umount()
