"""What stat, ls, du and df show, and names of every kind."""

import os
import random
import stat
import time
from pathlib import Path

import pytest

from tests.support.sandbox import HCPFS, Sandbox, Served, run, wait_until

MIB = 1 << 20


@pytest.fixture
def served(sandbox: Sandbox) -> Served:
    return sandbox.mount(sandbox.disk(content=random.Random(6).randbytes(4 * MIB)))


def _overwrite(path: Path, offset: int, length: int) -> None:
    with path.open("r+b", buffering=0) as file:
        file.seek(offset)
        file.write(os.urandom(length))
        os.fsync(file.fileno())


def _created_ns(served: Served, name: str) -> int:
    """The time in `info`, to the microsecond."""
    whole, fraction = served.info(name)["created"].rstrip("Z").split(".")
    seconds = int(time.mktime(time.strptime(whole, "%Y-%m-%dT%H:%M:%S"))) - time.timezone
    return seconds * 1_000_000_000 + int(fraction) * 1000


def test_every_byte_that_a_name_may_have(sandbox: Sandbox, served: Served) -> None:
    allowed = [bytes([byte]) for byte in range(0x20, 0x100) if byte not in b"/\x7f"]
    names = [b"x" + byte for byte in allowed] + [
        "Sicherung vör dem Üpgrade ☃".encode(),
        "\u00e9".encode(),  # and the same to the eye, in two characters: names are bytes
        "e\u0301".encode(),
        b"\xff\xfe not UTF-8 \xc3",
        b"info",
        b"lost",
        b"status",
        b"snaps",
        b"disk.img",
        b"a  b",
        b"-rf",
        b"*",
        b"x" * 255,
    ]
    snaps = os.fsencode(served.snaps)
    for name in names:
        os.mkdir(os.path.join(snaps, name))
    assert sorted(os.listdir(snaps)) == sorted(names)
    served = served.remount()
    assert sorted(os.listdir(snaps)) == sorted(names)
    assert len(run(*HCPFS, "ls", served.path).stdout.splitlines()) >= len(names) + 1
    for name in names:
        assert os.path.getsize(os.path.join(snaps, name, b"disk.img")) == 4 * MIB
        if len(name) < 255:
            os.rename(os.path.join(snaps, name), os.path.join(snaps, b"renamed" + name))
            name = b"renamed" + name
        os.rmdir(os.path.join(snaps, name))
    assert os.listdir(snaps) == []


def test_a_name_can_be_used_again_at_once(served: Served) -> None:
    for number in range(4):
        (served.snaps / "a").mkdir()
        before = served.image("a").read_bytes()
        _overwrite(served.live, 0, 8192)
        assert served.image("a").read_bytes() == before
        (served.snaps / "a").rename(served.snaps / "b")
        assert served.image("b").read_bytes() == before
        assert not (served.snaps / "a").exists()
        _overwrite(served.image("b"), 100 * number, 50)
        (served.snaps / "b").rmdir()
        assert not (served.snaps / "b").exists()


def test_modes_and_owners(sandbox: Sandbox, served: Served) -> None:
    (served.snaps / "a").mkdir()
    assert stat.filemode(served.live.stat().st_mode) == "-rw-------"
    assert stat.filemode(served.image("a").stat().st_mode) == "-rw-------"
    assert stat.filemode((served.snaps / "a" / "info").stat().st_mode) == "-r--------"
    assert {stat.filemode(path.stat().st_mode) for path in (served.path, served.snaps)} == {"drwx------"}
    assert stat.filemode(served.store.stat().st_mode) == "drwx------"
    for path in [Path(where, name) for where, _, names in os.walk(served.store) for name in names]:
        assert path.stat().st_mode & 0o077 == 0, path
    served.umount()
    options = ["-o", "allow_other,mode=0640,uid=1,gid=7"]
    served = sandbox.mount(sandbox.path / "disk.img", options=options)
    image = served.image("a").stat()
    assert (stat.filemode(image.st_mode), image.st_uid, image.st_gid) == ("-rw-r-----", 1, 7)
    assert stat.filemode(served.snaps.stat().st_mode) == "drwxr-x---"


def test_other_users_see_nothing(sandbox: Sandbox, served: Served) -> None:
    sandbox.path.chmod(0o755)
    (served.snaps / "a").mkdir()
    for path in (served.path, served.live, served.image("a"), served.path / "status", served.store):
        done = run("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "ls", path, check=False)
        assert done.returncode != 0
        assert "Permission denied" in done.stderr


def test_mtime_is_the_snapshots_time_then_that_of_its_last_write(served: Served) -> None:
    (served.snaps / "a").mkdir()
    created = _created_ns(served, "a")
    assert served.image("a").stat().st_mtime_ns // 1000 == created // 1000
    _overwrite(served.live, 0, 4096)
    assert served.image("a").stat().st_mtime_ns // 1000 == created // 1000
    wait_until(lambda: time.time_ns() > created + 20_000_000, what="a later time")
    before = time.time_ns()
    _overwrite(served.image("a"), 0, 4096)
    after = time.time_ns()
    modified = served.image("a").stat().st_mtime_ns
    assert before <= modified <= after
    served = served.remount()
    assert served.image("a").stat().st_mtime_ns == modified
    served.kill()
    served = served.again()
    assert served.image("a").stat().st_mtime_ns == modified
    assert served.image("a").read_bytes()[4096:] == served.live.read_bytes()[4096:]
    assert served.image("a").stat().st_mtime_ns == modified


def test_i3_a_flushed_write_keeps_its_mtime_through_a_kill(served: Served) -> None:
    (served.snaps / "a").mkdir()
    _overwrite(served.image("a"), 0, 4096)
    modified = served.image("a").stat().st_mtime_ns
    served.kill()
    served = served.again()
    assert served.image("a").stat().st_mtime_ns == modified


def test_the_live_mtime_survives_a_clean_stop(served: Served) -> None:
    _overwrite(served.live, 0, 4096)
    modified = served.live.stat().st_mtime_ns
    served = served.remount()
    assert served.live.stat().st_mtime_ns == modified


def test_du_shows_what_a_snapshot_costs(served: Served) -> None:
    (served.snaps / "a").mkdir()
    assert served.image("a").stat().st_blocks * 512 == 4096  # the least: to tar -S a file without blocks is a hole
    _overwrite(served.live, 0, 2 * MIB)
    _overwrite(served.image("a"), 3 * MIB, MIB // 2)
    wait_until(lambda: served.image("a").stat().st_blocks * 512 >= 2.5 * MIB, what="a refreshed st_blocks")
    cost = served.image("a").stat().st_blocks * 512
    real = int(run("du", "-s", "-B1", served.store / "layers").stdout.split()[0])
    assert cost <= real <= cost + 64 * 1024
    assert served.info("a")["preserved_bytes"] == str(2 * MIB)
    assert served.info("a")["written_bytes"] == str(MIB // 2)
    assert served.live.stat().st_blocks * 512 == 4 * MIB
    (served.snaps / "a").rmdir()
    wait_until(lambda: not list((served.store / "layers").iterdir()), what="the return of the space")


def test_df_shows_the_quota_and_what_is_left(sandbox: Sandbox, served: Served) -> None:
    store = os.statvfs(served.store)
    assert os.statvfs(served.path).f_bavail * 4096 == pytest.approx(store.f_bavail * store.f_frsize, rel=0.01)
    served.umount()
    served = sandbox.mount(sandbox.path / "disk.img", options=["--quota", "64M"])
    (served.snaps / "a").mkdir()
    empty = os.statvfs(served.path)
    assert empty.f_blocks * 4096 == 64 * MIB
    _overwrite(served.live, 0, 2 * MIB)
    left = os.statvfs(served.path)
    assert 2 * MIB <= (empty.f_bavail - left.f_bavail) * 4096 <= 2.2 * MIB


def test_links_and_inodes(served: Served) -> None:
    for name in "abc":
        (served.snaps / name).mkdir()
    assert served.path.stat().st_nlink == 4
    assert served.snaps.stat().st_nlink == 5
    seen = [served.path.stat().st_ino]
    for where, directories, files in os.walk(served.path):
        seen += [os.stat(os.path.join(where, name)).st_ino for name in [*directories, *files]]
    assert len(seen) == len(set(seen)) == 1 + 3 + 1 + 3 * 4
    old = served.image("c").stat().st_ino
    (served.snaps / "c").rmdir()
    (served.snaps / "c").mkdir()
    assert served.image("c").stat().st_ino != old
    assert [name for name in run("ls", "-a", served.snaps).stdout.split() if name.startswith(".")] == [".", ".."]


def test_a_listing_is_right_while_snapshots_go(served: Served) -> None:
    names = [f"{'n' * 200}{number}" for number in range(120)]
    for name in names:
        (served.snaps / name).mkdir()
    with os.scandir(served.snaps) as listing:
        seen = [next(listing).name for _ in range(10)]
        for name in names[::2]:
            (served.snaps / name).rmdir()
        seen += [entry.name for entry in listing]
    assert len(seen) == len(set(seen))
    assert set(names[1::2]) <= set(seen)
    assert sorted(os.listdir(served.snaps)) == sorted(names[1::2])
