"""Every errno of the reference's table, provoked by system calls, with its sentence in `status`."""

import ctypes
import errno
import os
import random
import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.sandbox import Sandbox, Served, run, wait_until

MIB = 1 << 20
RENAME_EXCHANGE = 2

_libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture
def served(sandbox: Sandbox) -> Served:
    served = sandbox.mount(sandbox.disk(content=random.Random(5).randbytes(MIB)))
    (served.snaps / "a").mkdir()
    return served


def _fails(served: Served, number: int, call: Callable[[], object], words: str | None = None) -> None:
    """The call fails with that errno, and `status` has it in words."""
    with pytest.raises(OSError) as caught:  # noqa: PT011 - the errno is checked below
        call()
    assert errno.errorcode[caught.value.errno] == errno.errorcode[number]
    if words is not None:
        assert served.status["last_error_errno"] == errno.errorcode[number]
        assert words in served.status["last_error"]


def _write(path: Path, offset: int, data: bytes) -> int:
    fd = os.open(path, os.O_RDWR)
    try:
        written = os.pwrite(fd, data, offset)
        os.fsync(fd)
        return written
    finally:
        os.close(fd)


def test_eexist(served: Served) -> None:
    (served.snaps / "b").mkdir()
    _fails(served, errno.EEXIST, (served.snaps / "a").mkdir)
    _fails(served, errno.EEXIST, lambda: os.rename(served.snaps / "a", served.snaps / "b"), "there is a snapshot b")
    assert sorted(os.listdir(served.snaps)) == ["a", "b"]


def test_enospc_when_the_open_files_would_run_out(served: Served) -> None:
    resource.prlimit(served.pid, resource.RLIMIT_NOFILE, (90, 90))

    def take_many() -> None:
        for number in range(10):
            (served.snaps / f"s{number}").mkdir()
            _write(served.live, number * 4096, b"n" * 4096)

    _fails(served, errno.ENOSPC, take_many, "this process may open 90")
    assert len(os.listdir(served.snaps)) > 2
    assert {served.info(name)["state"] for name in os.listdir(served.snaps)} == {"valid"}


@pytest.mark.parametrize("name", ["new\nline", "tab\t", "\x7f", "\x01", "\x85", "\x9b31m", ".hidden", "..."])
def test_einval(served: Served, name: str) -> None:
    _fails(served, errno.EINVAL, lambda: os.mkdir(served.snaps / name), "cannot name a snapshot")
    _fails(served, errno.EINVAL, lambda: os.rename(served.snaps / "a", served.snaps / name), "cannot name a snapshot")


def test_dots_are_the_kernels(served: Served) -> None:
    """They never reach us; whoever tries gets what any file system says, and nothing is made."""
    for name in (".", "..", "a/..", "../escaped"):
        with pytest.raises(OSError):  # noqa: PT011 - which one is the kernel's choice
            os.mkdir(f"{served.snaps}/{name}")
        with pytest.raises(OSError):  # noqa: PT011
            os.rename(served.snaps / "a", f"{served.snaps}/{name}")
    assert os.listdir(served.snaps) == ["a"]


def test_enametoolong(served: Served) -> None:
    _fails(served, errno.ENAMETOOLONG, lambda: os.mkdir(served.snaps / ("x" * 256)))
    os.mkdir(served.snaps / ("x" * 255))
    os.rmdir(served.snaps / ("x" * 255))


def test_enoent(served: Served) -> None:
    _fails(served, errno.ENOENT, lambda: os.rmdir(served.snaps / "missing"))
    _fails(served, errno.ENOENT, lambda: os.rename(served.snaps / "missing", served.snaps / "b"))
    _fails(served, errno.ENOENT, lambda: os.open(served.snaps / "a" / "missing", os.O_RDONLY))


def test_ebusy_while_an_image_is_open(sandbox: Sandbox, served: Served) -> None:
    with served.image("a").open("rb"):
        _fails(served, errno.EBUSY, (served.snaps / "a").rmdir, "snapshot a is in use")
    device = sandbox.loop(served.image("a"))
    _fails(served, errno.EBUSY, (served.snaps / "a").rmdir, "losetup -d")
    sandbox.unloop(device)
    (served.snaps / "a").rmdir()
    assert os.listdir(served.snaps) == []


def test_eperm(served: Served) -> None:
    live, image, snaps = served.live, served.image("a"), served.snaps
    for call in (
        lambda: (served.path / "new").write_bytes(b""),
        lambda: (snaps / "a" / "new").write_bytes(b""),
        lambda: (snaps / "new").touch(),
        lambda: (served.path / "new").mkdir(),
        lambda: (snaps / "a" / "new").mkdir(),
        image.unlink,
        live.unlink,
        (snaps / "a" / "info").unlink,
        snaps.rmdir,
        (served.path / "live").rmdir,
        lambda: image.chmod(0o644),
        lambda: os.chown(image, 1, 1),
        lambda: os.utime(image, (1, 1)),
        lambda: os.truncate(image, 5),
        lambda: os.truncate(live, 2 * MIB),
        lambda: os.mkfifo(snaps / "fifo"),
        lambda: os.symlink("a", snaps / "link"),
        lambda: os.link(image, snaps / "a" / "link"),
        lambda: os.rename(image, snaps / "a" / "other"),
        lambda: os.rename(snaps / "a", served.path / "live" / "a"),
        lambda: os.open(snaps / "a" / "info", os.O_RDWR) and _write(snaps / "a" / "info", 0, b"x"),
    ):
        _fails(served, errno.EPERM, call)
    other = os.fsencode(snaps / "b")
    os.mkdir(other)
    assert _libc.renameat2(-100, os.fsencode(snaps / "a"), -100, other, RENAME_EXCHANGE) == -1
    assert ctypes.get_errno() == errno.EPERM
    assert served.image("a").stat().st_size == MIB


def test_the_own_size_is_accepted(served: Served) -> None:
    """As rsync --inplace and others do after writing."""
    before = served.image("a").read_bytes()
    os.truncate(served.image("a"), MIB)
    assert served.image("a").read_bytes() == before


@pytest.mark.parametrize("which", ["live", "snapshot"])
def test_enospc_beyond_the_end(served: Served, which: str) -> None:
    path = served.live if which == "live" else served.image("a")
    _fails(served, errno.ENOSPC, lambda: _write(path, MIB, b"x"), "beyond the end")
    _fails(served, errno.ENOSPC, lambda: _write(path, 1 << 50, b"x"), "beyond the end")
    assert _write(path, MIB - 10, b"0123456789abc") == 10
    assert path.read_bytes()[-10:] == b"0123456789"


def test_no_extended_attributes(served: Served) -> None:
    _fails(served, errno.EOPNOTSUPP, lambda: os.getxattr(served.live, "user.x"))
    _fails(served, errno.EOPNOTSUPP, lambda: os.setxattr(served.live, "user.x", b"y"))
    _fails(served, errno.EOPNOTSUPP, lambda: os.listxattr(served.live))


def test_edquot_for_a_snapshots_own_writes(sandbox: Sandbox) -> None:
    served = sandbox.mount(sandbox.disk(size=64 * MIB), options=["--quota", "32M"])
    (served.snaps / "a").mkdir()

    def fill() -> None:
        for offset in range(0, 64 * MIB, MIB):
            _write(served.image("a"), offset, os.urandom(MIB))

    _fails(served, errno.EDQUOT, fill, "is full")
    assert served.info("a")["state"] == "valid"
    assert int(served.info("a")["written_bytes"]) > 8 * MIB


def _overwrite_10_mib(served: Served, quota: int) -> None:
    for offset in range(0, 10 * MIB, MIB):
        assert _write(served.live, offset, os.urandom(MIB)) == MIB
        assert int(run("du", "-s", "-B1", served.store).stdout.split()[0]) <= quota


def test_i6_the_quota_holds_and_the_oldest_snapshot_goes_first(sandbox: Sandbox) -> None:
    served = sandbox.mount(sandbox.disk(size=16 * MIB), options=["--quota", "64M"])
    for number in range(6):
        (served.snaps / f"s{number}").mkdir()
        moment = served.live.read_bytes()
        _overwrite_10_mib(served, 64 * MIB)
    states = [served.info(f"s{number}")["state"] for number in range(6)]
    assert states[0] == "invalid"
    assert states[5] == "valid"
    assert states == sorted(states)  # invalid ones, then valid ones
    assert served.image("s5").read_bytes() == moment
    _fails(served, errno.EIO, served.image("s0").read_bytes, "given up")
    assert "the store was full" in served.info("s0")["reason"]
    served = served.remount()
    _fails(served, errno.EIO, served.image("s0").read_bytes, "given up")
    assert served.image("s5").read_bytes() == moment
    (served.snaps / "s0").rmdir()


def test_an_open_snapshot_is_dropped_last(sandbox: Sandbox) -> None:
    served = sandbox.mount(sandbox.disk(size=16 * MIB), options=["--quota", "64M"])
    (served.snaps / "s0").mkdir()
    moment = served.live.read_bytes()
    with served.image("s0").open("rb") as image:
        for number in range(1, 6):
            _overwrite_10_mib(served, 64 * MIB)
            (served.snaps / f"s{number}").mkdir()
        _overwrite_10_mib(served, 64 * MIB)
        assert served.info("s0")["state"] == "valid"
        assert served.info("s1")["state"] == "invalid"
        assert image.read() == moment


def test_a_snapshot_whose_end_frees_nothing_is_not_dropped_for_an_open_one(sandbox: Sandbox) -> None:
    """All that the newer one keeps is needed by the older, open one too."""
    served = sandbox.mount(sandbox.disk(size=64 * MIB), options=["--quota", "40M"])
    (served.snaps / "old").mkdir()
    with served.image("old").open("rb"):
        _write(served.live, 0, os.urandom(10 * MIB))
        (served.snaps / "new").mkdir()
        moment = served.live.read_bytes()
        for offset in range(20 * MIB, 38 * MIB, MIB):
            _write(served.live, offset, os.urandom(MIB))
        assert served.info("old")["state"] == "invalid"
        assert served.info("new")["state"] == "valid"
        assert served.image("new").read_bytes() == moment


def test_erofs(sandbox: Sandbox, served: Served) -> None:
    served.umount()
    served = sandbox.mount(sandbox.path / "disk.img", options=["-o", "ro"])
    _fails(served, errno.EROFS, (served.snaps / "b").mkdir)
    _fails(served, errno.EROFS, (served.snaps / "a").rmdir)
    _fails(served, errno.EROFS, lambda: os.rename(served.snaps / "a", served.snaps / "b"))
    _fails(served, errno.EROFS, lambda: os.open(served.live, os.O_RDWR))
    assert served.image("a").read_bytes() == served.live.read_bytes()
    assert served.status["read_only"] == "1"
    served.umount()


@pytest.mark.parametrize("file", ["data.0000", "sums", "map"])
def test_i4_eio_for_what_the_store_lost(served: Served, file: str) -> None:
    before = served.live.read_bytes()
    for chunk in (3, 4, 9):
        _write(served.live, chunk * 4096, b"n" * 4096)
    served.umount()
    (path,) = served.store.glob(f"layers/*/{file}")
    content = bytearray(path.read_bytes())
    content[{"data.0000": 4 * 4096 + 7, "sums": 4 * 8 + 3, "map": len(content) // 2}[file]] ^= 4
    path.write_bytes(content)
    served = served.again()
    fd = os.open(served.image("a"), os.O_RDONLY)
    if file == "map":  # what the layer holds is unknown, so nothing that it might hold is shown
        _fails(served, errno.EIO, lambda: os.pread(fd, 4096, 0), "was given up")
        assert "map of layer" in served.info("a")["reason"]
    else:
        _fails(served, errno.EIO, lambda: os.pread(fd, 4096, 4 * 4096), "chunk 4 (offset 16384)")
        assert os.pread(fd, 4096, 3 * 4096) == before[3 * 4096 : 4 * 4096]
        assert served.info("a")["state"] == "damaged"
        assert "chunk 4 (offset 16384)" in served.info("a")["reason"]
    os.close(fd)
    assert _write(served.live, 0, b"the origin goes on") == 18
    served = served.remount()
    _fails(served, errno.EIO, lambda: served.image("a").read_bytes())
    assert served.info("a")["state"] == ("invalid" if file == "map" else "damaged")
    (served.snaps / "a").rmdir()


def test_i4_what_an_older_snapshot_needs_outlives_a_newer_one_that_is_damaged(served: Served) -> None:
    """The newer one lost the map of its delta and is given up; what the origin overwrote is kept for the older."""
    before = served.live.read_bytes()
    (served.snaps / "b").mkdir()
    _write(served.live, 0, b"n" * 8192)
    fd = os.open(served.image("b"), os.O_RDWR)
    os.pwrite(fd, b"own", 500000)
    os.fsync(fd)
    os.close(fd)
    served.umount()
    path = next(path for path in served.store.glob("layers/*/map") if (path.parent / "sums").stat().st_size > 500)
    path.write_bytes(b"garbage")
    served = served.again()
    for _ in range(2):
        assert served.info("b")["state"] == "invalid"
        assert "map of layer" in served.info("b")["reason"]
        _fails(served, errno.EIO, served.image("b").read_bytes)
        assert served.image("a").read_bytes() == before
        served = served.remount()


def test_i4_a_damaged_journal_makes_snapshots_invalid_rather_than_wrong(served: Served) -> None:
    _write(served.live, 0, b"n" * 8192)
    served.kill()
    (journal,) = served.store.glob("journal.*")
    content = bytearray(journal.read_bytes())
    content[600] ^= 1
    journal.write_bytes(content)
    served = served.again()
    assert served.info("a")["state"] == "invalid"
    assert "does not match its checksum" in served.status["found"]
    _fails(served, errno.EIO, lambda: served.image("a").read_bytes())
    (served.snaps / "a").rmdir()
    (served.snaps / "b").mkdir()
    wait_until(lambda: len(list(served.store.glob("layers/*"))) == 0, what="the removal of the layers")
    assert served.image("b").read_bytes() == served.live.read_bytes()
