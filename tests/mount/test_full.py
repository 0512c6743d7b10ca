"""The store's file system is full, for real: the origin goes on, and snapshots are given up oldest first."""

import os
import random
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.sandbox import Sandbox, Served, wait_until

MIB = 1 << 20


@pytest.fixture(params=["tmpfs", "ext4"])
def served(sandbox: Sandbox, request: pytest.FixtureRequest) -> Served:
    """A 64 MiB disk whose store has 44 MiB."""
    if request.param == "tmpfs":
        place = sandbox.mount_device("tmpfs", "small", "-t", "tmpfs", "-o", "size=44M,mode=700")
    else:
        device = sandbox.loop(sandbox.disk("small.img", 44 * MIB))
        sandbox.format(device, "ext4")
        place = sandbox.mount_device(device, "small")
    return sandbox.mount(sandbox.disk(size=64 * MIB), store=place / "store")


def _overwrite(served: Served, offset: int, length: int, random_: random.Random) -> bytes:
    data = random_.randbytes(length)
    with served.live.open("r+b", buffering=0) as live:
        live.seek(offset)
        for start in range(0, length, MIB):
            assert live.write(data[start : start + MIB]) == len(data[start : start + MIB])
        os.fsync(live.fileno())
    return data


def test_i8_the_origin_goes_on_and_the_oldest_snapshots_are_given_up(served: Served) -> None:
    random_ = random.Random(1)
    expected = bytearray(64 * MIB)
    moments = {}
    for number in range(4):
        moments[f"s{number}"] = bytes(expected)
        (served.snaps / f"s{number}").mkdir()
        at = number * 4 * MIB
        length = 20 * MIB if number == 3 else 4 * MIB
        expected[at : at + length] = _overwrite(served, at, length, random_)
    assert served.live.read_bytes() == expected
    states = {name: served.info(name)["state"] for name in moments}
    assert states["s0"] == "invalid"
    assert states["s3"] == "valid"
    assert "the store was full" in served.info("s0")["reason"]
    with pytest.raises(OSError, match="Input/output error"):
        served.image("s0").read_bytes()
    for name, moment in moments.items():
        if states[name] == "valid":
            assert served.image(name).read_bytes() == moment
    assert sorted(states.values()) == [states[name] for name in sorted(states)]  # the oldest first

    expected[:] = _overwrite(served, 0, 64 * MIB, random_)  # more than any snapshot can keep
    assert served.live.read_bytes() == expected
    assert {served.info(name)["state"] for name in moments} == {"invalid"}
    served = served.remount()
    assert served.live.read_bytes() == expected
    for name in moments:
        (served.snaps / name).rmdir()
    (served.snaps / "again").mkdir()
    _overwrite(served, 0, MIB, random_)
    assert served.image("again").read_bytes() == expected
    assert served.status["last_stop"] == "clean"


def test_a_snapshots_own_writes_get_enospc_and_cost_no_snapshot(served: Served) -> None:
    (served.snaps / "a").mkdir()
    (served.snaps / "b").mkdir()
    written = []
    with served.image("b").open("r+b", buffering=0) as image, pytest.raises(OSError, match="No space left"):
        written.extend(iter(lambda: image.write(os.urandom(MIB)), None))
    assert sum(written) > 12 * MIB
    assert served.info("a")["state"] == served.info("b")["state"] == "valid"
    assert served.image("a").read_bytes() == bytes(64 * MIB)
    _overwrite(served, 0, MIB, random.Random(2))  # there is room left for the origin's old bytes
    assert served.info("a")["state"] == served.info("b")["state"] == "valid"
    (served.snaps / "b").rmdir()
    assert served.status["last_error_errno"] == "ENOSPC"


@pytest.mark.parametrize("policy", ["block-writes", "lose-chunks", "drop-oldest"])
def test_i8_a_store_that_is_killed_each_time_it_has_run_full_opens_again(sandbox: Sandbox, policy: str) -> None:
    device = sandbox.loop(sandbox.disk("small.img", 48 * MIB))
    sandbox.format(device, "ext4")
    place = sandbox.mount_device(device, "small")
    options = ["-o", f"on_full={policy}"]
    served = sandbox.mount(sandbox.disk(size=24 * MIB), store=place / "store", options=options)
    (served.snaps / "a").mkdir()
    for number in range(3):
        for path in (served.image("a"), served.live):
            _overwrite_what_can_be(path, random.Random(number))
        served.kill()
        served = served.again()
        assert (served.store / "catalog.sqlite-wal").stat().st_size < 1 << 17, "it grows with each start"
        if "a" in os.listdir(served.snaps) and served.info("a")["state"] != "invalid":
            continue
        (served.snaps / "a").rmdir()
        _make_when_there_is_room(served.snaps / "a")
    (served.snaps / "a").rmdir()
    _make_when_there_is_room(served.snaps / "b")
    _overwrite(served, 0, MIB, random.Random(7))
    assert served.info("b")["state"] == "valid"


def _make_when_there_is_room(snapshot: Path) -> None:
    """What a removed one took comes back a moment later."""

    def is_made() -> bool:
        with suppress(OSError):
            snapshot.mkdir()
        return snapshot.exists()

    wait_until(is_made, what=f"room for {snapshot}")


def _overwrite_what_can_be(path: Path, random_: random.Random) -> None:
    """All of it, here and there, as far as there is room for what has to be kept."""
    with path.open("r+b", buffering=0) as image:
        for offset in random_.sample(range(0, 24 * MIB, 65536), 24 * MIB // 65536):
            with suppress(OSError):
                os.pwrite(image.fileno(), random_.randbytes(65536 - 4096), offset)
        with suppress(OSError):
            os.fsync(image.fileno())
