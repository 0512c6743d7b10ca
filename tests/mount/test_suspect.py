"""The device was changed while hcpfs was not running, and the user accepts it: its snapshots are suspect."""

import errno
import os
from pathlib import Path

import pytest

from tests.support.sandbox import Sandbox, Served

MIB = 1 << 20
ACCEPT = ["--accept", "changed"]


def _behind_our_back(disk: Path, offset: int) -> None:
    with disk.open("r+b") as file:
        file.seek(offset)
        file.write(b"behind our back")


def _accepted(served: Served) -> Served:
    return served.sandbox.mount(*served.sources, options=ACCEPT)


@pytest.fixture
def served(sandbox: Sandbox) -> Served:
    """A snapshot `a` whose first MiB the origin overwrote since."""
    served = sandbox.mount(sandbox.disk(content=os.urandom(8 * MIB)))
    (served.snaps / "a").mkdir()
    with served.live.open("r+b") as live:
        live.write(os.urandom(MIB))
        live.flush()
        os.fsync(live.fileno())
    return served


@pytest.mark.parametrize("stop", ["umount", "kill"])
@pytest.mark.parametrize("offset", [8 * MIB - 100, 2 * MIB + 50])  # the end, and one of those spread over the device
def test_i4_snapshots_of_a_changed_device_are_suspect(sandbox: Sandbox, served: Served, stop: str, offset: int) -> None:
    preserved = served.image("a").read_bytes()[:MIB]
    # A crash right after the mkdir may come before the fingerprint, so let the chores end first.
    served = served.remount()
    getattr(served, stop)()
    _behind_our_back(Path(served.sources[0]), offset)
    served = _accepted(served)
    assert served.status["last_stop"] == ("clean" if stop == "umount" else "not-clean")
    assert "was changed while hcpfs was not running" in served.status["found"]
    assert served.status["snapshots.suspect"] == "1"
    assert served.info("a")["state"] == "suspect"
    assert "may be wrong" in served.info("a")["reason"]
    with served.image("a").open("rb", buffering=0) as image:
        assert image.read(MIB) == preserved  # from the store, checked, and right
    _is_refused(served, 4 * MIB)
    assert "read_suspect" in served.status["last_error"]
    (served.snaps / "b").mkdir()  # one taken now is right
    assert served.image("b").read_bytes() == Path(served.sources[0]).read_bytes()
    served.umount()
    served = sandbox.mount(*served.sources, options=["-o", "read_suspect"])
    assert served.info("a")["state"] == "suspect"
    assert served.info("b")["state"] == "valid"
    assert len(served.image("a").read_bytes()) == 8 * MIB


def test_i4_what_the_origin_overwrites_later_is_no_less_suspect(sandbox: Sandbox, served: Served) -> None:
    """The bytes that nobody believes on the device are not believed in the store either, where they are preserved."""
    served = served.remount()
    before = Path(served.sources[0]).read_bytes()
    served.umount()
    _behind_our_back(Path(served.sources[0]), 2 * MIB + 50)  # seen
    _behind_our_back(Path(served.sources[0]), 3 * MIB + 8192 * 3)  # not seen
    served = _accepted(served)
    assert served.status["snapshots.suspect"] == "1"
    (served.snaps / "b").mkdir()
    trusted = served.image("b").read_bytes()
    with served.live.open("r+b") as live:
        live.seek(2 * MIB)
        live.write(os.urandom(2 * MIB))
    served.options = []
    for _ in range(2):
        _is_refused(served, 3 * MIB + 8192 * 3)
        assert served.image("b").read_bytes() == trusted
        served = served.remount()
    (served.snaps / "b").rmdir()  # its layers go on to serve `a`
    served = served.remount()
    _is_refused(served, 3 * MIB + 8192 * 3)
    with served.image("a").open("rb", buffering=0) as image:
        assert len(image.read(MIB)) == MIB  # preserved before
    served.umount()
    served = sandbox.mount(*served.sources, options=["-o", "read_suspect"])
    assert served.image("a").read_bytes()[2 * MIB + 65 : 3 * MIB] == before[2 * MIB + 65 : 3 * MIB]


def _is_refused(served: Served, offset: int) -> None:
    fd = os.open(served.image("a"), os.O_RDONLY | os.O_DIRECT)  # without the read-ahead of the kernel
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        os.preadv(fd, [_aligned(4096)], offset)
    os.close(fd)


def _aligned(length: int) -> memoryview:
    import mmap

    return memoryview(mmap.mmap(-1, length))


def test_after_a_crash_what_no_snapshot_reads_may_have_changed(served: Served) -> None:
    """The origin overwrote its first MiB through us, so it is preserved, and what is there now matters to nobody."""
    before = served.image("a").read_bytes()
    served = served.remount()
    served.kill()
    _behind_our_back(Path(served.sources[0]), 5000)
    served = served.again()
    assert "was changed" not in served.status.get("found", "")
    assert served.info("a")["state"] == "valid"
    assert served.image("a").read_bytes() == before


def test_without_a_snapshot_nothing_is_suspect(sandbox: Sandbox) -> None:
    served = sandbox.mount(sandbox.disk())
    served.umount()
    _behind_our_back(Path(served.sources[0]), 0)
    served = served.again()
    assert "found" not in served.status
