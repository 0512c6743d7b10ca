"""What happens when there is no room, by policy, and what is held back before that."""

import errno
import os
import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.sandbox import Sandbox, Served, parse, run

MIB = 1 << 20
SIZE = 64 * MIB


def _mount(sandbox: Sandbox, policy: str, content: bytes) -> Served:
    return sandbox.mount(sandbox.disk(content=content), options=["--quota", "48M", "-o", f"on_full={policy}"])


def _write(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b", buffering=0) as file:
        file.seek(offset)
        if file.write(data) != len(data):
            raise OSError("a short write")
        os.fsync(file.fileno())


def _lost(served: Served, name: str) -> list[tuple[int, int]]:
    lines = (served.snaps / name / "lost").read_text().splitlines()
    assert all(line.endswith(" disk.img") for line in lines)
    return [(int(line.split()[0]), int(line.split()[1])) for line in lines]


def test_i8_lose_chunks_costs_only_what_could_not_be_kept(sandbox: Sandbox) -> None:
    before = random.Random(1).randbytes(SIZE)
    served = _mount(sandbox, "lose-chunks", before)
    (served.snaps / "a").mkdir()
    assert _lost(served, "a") == []
    _write_all(served)  # never an error
    now = served.live.read_bytes()
    for _ in range(2):
        assert served.info("a")["state"] == "damaged"
        assert "could not be preserved" in served.info("a")["reason"] or "were lost" in served.info("a")["reason"]
        lost = _lost(served, "a")
        lost_bytes = sum(length for _, length in lost)
        assert 0 < lost_bytes < 2 * SIZE // 3
        good, wrong = 0, 0
        with served.image("a").open("rb", buffering=0) as image:
            for offset in range(0, SIZE, 64 * 1024):
                image.seek(offset)
                try:
                    assert image.read(64 * 1024) == before[offset : offset + 64 * 1024]
                    good += 64 * 1024
                except OSError:
                    assert any(at < offset + 64 * 1024 and offset < at + length for at, length in lost)
                    wrong += 64 * 1024
        assert good > SIZE // 3
        assert wrong >= lost_bytes
        assert served.live.read_bytes() == now
        served.kill()
        served = served.again()
    served.umount()
    assert Path(served.sources[0]).read_bytes() == now


def _write_all(served: Served) -> None:
    for offset in range(0, SIZE, MIB):
        _write(served.live, offset, os.urandom(MIB))


def test_block_writes_stops_the_writer_and_keeps_the_snapshot(sandbox: Sandbox) -> None:
    before = random.Random(1).randbytes(SIZE)
    served = _mount(sandbox, "block-writes", before)
    (served.snaps / "a").mkdir()
    with pytest.raises(OSError, match="No space left"):
        _write_all(served)
    assert "block-writes" in served.status["last_error"]
    assert served.info("a")["state"] == "valid"
    assert served.image("a").read_bytes() == before
    _write(served.live, 0, os.urandom(MIB))  # preserved already
    (served.snaps / "a").rmdir()
    _write(served.live, SIZE - MIB, os.urandom(MIB))


def test_warnings_at_80_90_and_95_percent_and_no_new_snapshot_from_90(sandbox: Sandbox) -> None:
    served = sandbox.mount(sandbox.disk(size=SIZE), options=["--quota", "60M"])
    (served.snaps / "a").mkdir()
    refused = 0
    for offset in range(0, SIZE, MIB):
        if int(served.status["used_percent"]) >= 96:
            break
        _write(served.live, offset, os.urandom(MIB))
        if int(served.status["used_percent"]) < 89:
            (served.snaps / "new").mkdir()
            (served.snaps / "new").rmdir()
        elif int(served.status["used_percent"]) > 90:
            error = _errno_of((served.snaps / "new").mkdir)
            if error is None:  # the figure is an upper bound, until mkdir has it counted anew
                assert int(served.status["used_percent"]) < 90
                (served.snaps / "new").rmdir()
                continue
            assert error == errno.ENOSPC
            assert "and from 90 % on there are no new snapshots" in served.status["last_error"]
            refused += 1
    assert refused
    assert served.info("a")["state"] == "valid"
    warnings = [
        line
        for line in (served.store / "hcpfs.log").read_text().splitlines()
        if "% full (" in line and "no new snapshots" not in line
    ]
    percents = [int(line.split(" is ")[1].split(" ")[0]) for line in warnings]
    assert [max(mark for mark in (80, 90, 95) if percent >= mark) for percent in percents] == [80, 90, 95]


def _errno_of(call: Callable[[], object]) -> int | None:
    try:
        call()
    except OSError as error:
        return error.errno
    return None


def test_i6_a_store_filled_again_and_again_never_troubles_the_origin(sandbox: Sandbox) -> None:
    """Snapshots come and go while the origin writes more than the store can keep."""
    fill_again_and_again(sandbox, cycles=50, seed=3)


def fill_again_and_again(sandbox: Sandbox, cycles: int, seed: int) -> None:
    """So many times a snapshot, and more writes to the origin than there is room for."""
    random_ = random.Random(seed)
    served = _mount(sandbox, "drop-oldest", bytes(SIZE))
    expected = bytearray(SIZE)
    for cycle in range(cycles):
        for old in sorted(served.snaps.iterdir())[:-2]:
            if parse((old / "info").read_bytes())["state"] == "invalid":
                old.rmdir()
        if int(served.status["used_percent"]) >= 90:
            sorted(served.snaps.iterdir())[0].rmdir()
        with suppress(OSError):  # there may still not be room for one more
            (served.snaps / f"s{cycle:06d}").mkdir()
        for _ in range(4):
            offset = random_.randrange(SIZE // MIB) * MIB
            data = random_.randbytes(8 * MIB)[: SIZE - offset]
            _write(served.live, offset, data)
            expected[offset : offset + len(data)] = data
        taken = int(run("du", "-s", "-B1", served.store).stdout.split()[0])
        assert taken <= 48 * MIB, sorted((path.stat().st_blocks * 512, path.name) for path in served.store.rglob("*"))
    assert served.live.read_bytes() == expected
    served.umount()
    assert Path(served.sources[0]).read_bytes() == expected
