"""What stat, statfs, readdir, open flags and the calls that change nothing tell a tool of the files here."""

import ctypes
import errno
import fcntl
import os
import random
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.sandbox import Sandbox, Served, parse, run, wait_until

MIB = 1 << 20
RENAME_NOREPLACE, RENAME_EXCHANGE, RENAME_WHITEOUT = 1, 2, 4

_libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture
def served(sandbox: Sandbox) -> Served:
    served = sandbox.mount(sandbox.disk(content=random.Random(1).randbytes(2 * MIB)))
    (served.snaps / "a").mkdir()
    return served


def _write(path: Path, offset: int = 0, length: int = 4096) -> None:
    with path.open("r+b", buffering=0) as file:
        file.seek(offset)
        file.write(os.urandom(length))
        os.fsync(file.fileno())


def _all(served: Served) -> list[Path]:
    return [served.path, *(Path(where, name) for where, down, files in os.walk(served.path) for name in down + files)]


# -- st_blocks ---------------------------------------------------------------------------------------------------


def test_no_image_has_fewer_blocks_than_a_file_with_contents(sandbox: Sandbox) -> None:
    """GNU tar, star and others take st_blocks 0 for one hole, whatever is read."""
    device = sandbox.loop(sandbox.disk("lower.img", size=MIB))
    sparse = sandbox.disk("sparse.img", size=64 * MIB)
    with sparse.open("r+b") as file:
        file.seek(32 * MIB)
        file.write(os.urandom(MIB))
    small = sandbox.disk("small.img", content=b"x" * 512)
    zero = sandbox.disk("zero.img", size=MIB)
    served = sandbox.mount(f"block={device}", f"sparse={sparse}", f"small={small}", f"zero={zero}")
    (served.snaps / "a").mkdir()
    live = {path.name: path.stat().st_blocks * 512 for path in (served.path / "live").iterdir()}
    assert live == {"block": MIB, "sparse": MIB, "small": 4096, "zero": 4096}
    for name in live:
        assert (served.snaps / "a" / name).stat().st_blocks * 512 == 4096
    served.umount()


def test_du_and_the_archive_of_a_snapshot_are_right_as_it_grows(sandbox: Sandbox, served: Served) -> None:
    image, expected = served.image("a"), served.live.read_bytes()
    for length in (0, 4096, MIB):
        if length:
            _write(served.live, 0, length)
        wait_until(lambda least=length: image.stat().st_blocks * 512 >= max(4096, least), what="a refreshed st_blocks")
        run("tar", "-C", image.parent, "-Scf", sandbox.path / "a.tar", image.name)
        run("tar", "-C", sandbox.path, "--transform", "s/^/un/", "-xf", sandbox.path / "a.tar")
        assert (sandbox.path / f"un{image.name}").read_bytes() == expected


# -- calls that change nothing --------------------------------------------------------------------------------------


def test_what_sets_things_to_what_they_are_succeeds(served: Served) -> None:
    for path in _all(served):
        found = path.stat()
        os.chmod(path, stat.S_IMODE(found.st_mode))
        os.chown(path, found.st_uid, found.st_gid)
        os.chown(path, -1, -1)
        os.chown(path, -1, found.st_gid)
        os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
        if path.is_file():
            os.truncate(path, found.st_size)
            run("chmod", f"{stat.S_IMODE(found.st_mode):o}", path)
            run("cp", "--attributes-only", "--preserve=all", path, path, check=False)  # "are the same file"
            if path.name == "disk.img":
                run("touch", "-r", path, path)  # which opens it for writing first
        assert path.stat() == found
    run("chown", "-R", "0:0", served.path)
    assert "last_error" not in served.status


def test_what_would_change_something_is_refused_in_words(served: Served) -> None:
    for path in (served.live, served.image("a"), served.path / "status", served.snaps / "a", served.snaps):
        found = path.stat()
        for change in (
            lambda path=path: os.chmod(path, 0o644),
            lambda path=path, mode=found.st_mode: os.chmod(path, stat.S_IMODE(mode) | stat.S_ISUID),
            lambda path=path: os.chown(path, 1, -1),
            lambda path=path: os.chown(path, -1, 1),
            lambda path=path: os.utime(path),
            lambda path=path, at=found.st_mtime_ns: os.utime(path, ns=(at, at + 1)),
            lambda path=path, at=found.st_mtime_ns: os.utime(path, ns=(at + 1, at)),
        ):
            with pytest.raises(PermissionError):
                change()
            assert "can only be set to what they are" in served.status["last_error"]
        if path.name != "status":
            assert path.stat() == found


def test_a_tree_that_was_copied_out_is_copied_back_without_a_word(sandbox: Sandbox, served: Served) -> None:
    """As rsync sets what differs, which is nothing."""
    run("rsync", "-a", f"{served.path}/", sandbox.path / "copy")
    for options in (["-a"], ["-aS"], ["-a", "--checksum", "--inplace"]):
        for place in ("snaps/", "live/"):
            done = run("rsync", *options, f"{sandbox.path}/copy/{place}", served.path / place)
            assert done.stderr == "", options


@pytest.mark.parametrize(
    "name", ["live/disk.img", "snaps/a/disk.img", "snaps/a/info", "status", "snaps/a", "snaps", ""]
)
def test_syncs_locks_and_looks_succeed(served: Served, name: str) -> None:
    path = served.path / name
    fd = os.open(path, os.O_RDONLY | os.O_NOATIME)
    os.fsync(fd)
    os.fdatasync(fd)
    fcntl.flock(fd, fcntl.LOCK_SH)
    other = os.open(path, os.O_RDONLY)
    with pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(fd)
    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(other)
    assert os.access(path, os.R_OK)
    assert os.access(path, os.F_OK)
    run("sync", path)
    run("sync", "-f", path)


def test_open_flags_do_what_users_expect(served: Served) -> None:
    for path in (served.live, served.image("a")):
        content = path.read_bytes()
        for flags in (os.O_CREAT, os.O_SYNC, os.O_DSYNC, os.O_NOATIME, os.O_NONBLOCK, os.O_CLOEXEC, os.O_NOFOLLOW):
            fd = os.open(path, os.O_RDWR | flags, 0o600)
            assert os.pwrite(fd, content[100:200], 100) == 100
            os.close(fd)
        with pytest.raises(FileExistsError):
            os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        fd = os.open(path, os.O_WRONLY | os.O_APPEND)  # at the end, where there is no room, as on a block device
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            os.write(fd, b"x")
        os.close(fd)
        with pytest.raises(NotADirectoryError):
            os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        assert path.read_bytes() == content
    for path in (served.path / "status", served.snaps / "a" / "info"):
        for flags in (os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC, os.O_WRONLY | os.O_CREAT | os.O_TRUNC):
            with pytest.raises(PermissionError):
                os.open(path, flags)
        fd = os.open(path, os.O_RDONLY | os.O_CREAT)
        assert os.read(fd, 10) == path.read_bytes()[:10]
        os.close(fd)


def _rename(old: Path, new: Path, flags: int) -> str:
    done = _libc.renameat2(-100, os.fsencode(old), -100, os.fsencode(new), flags)
    return "done" if done == 0 else errno.errorcode[ctypes.get_errno()]


def test_renames_with_flags(served: Served) -> None:
    a, b, c = (served.snaps / name for name in "abc")
    b.mkdir()
    inode = a.stat().st_ino
    os.rename(a, a)
    assert run("mv", a, a, check=False).returncode != 0  # it says that they are the same
    assert _rename(a, b, RENAME_NOREPLACE) == "EEXIST"
    assert _rename(a, b, 0) == "EEXIST"
    assert _rename(a, c, RENAME_WHITEOUT) == "EINVAL"
    assert "whiteout" in served.status["last_error"]
    assert _rename(a, c, RENAME_WHITEOUT | RENAME_NOREPLACE) == "EINVAL"
    assert _rename(a, b, RENAME_EXCHANGE) == "EPERM"
    assert sorted(os.listdir(served.snaps)) == ["a", "b"]
    assert _rename(a, c, RENAME_NOREPLACE) == "done"
    assert sorted(os.listdir(served.snaps)) == ["b", "c"]
    assert c.stat().st_ino == inode


# -- times and numbers -------------------------------------------------------------------------------------------


def test_stat_says_the_same_after_a_remount_where_nothing_changed(served: Served) -> None:
    """As restic compares inode, ctime, mtime and size, and borg too: no second copy of what they have."""
    _write(served.live)
    _write(served.image("a"), 8192)
    served = served.remount()

    def looks() -> list[tuple[object, ...]]:
        seen = [path.stat() for path in (served.live, served.image("a"))]
        return [(one.st_ino, one.st_mtime_ns, one.st_ctime_ns, one.st_size, one.st_mode, one.st_uid) for one in seen]

    before = looks()
    served = served.remount()
    assert looks() == before
    _write(served.live)
    _write(served.image("a"))
    assert all(now[1] > then[1] for now, then in zip(looks(), before, strict=True))


def test_a_snapshot_of_the_same_name_is_another_file(served: Served) -> None:
    old = served.image("a").stat()
    (served.snaps / "a").rmdir()
    (served.snaps / "a").mkdir()
    new = served.image("a").stat()
    assert new.st_ino != old.st_ino
    assert new.st_mtime_ns > old.st_mtime_ns
    changes = [served.snaps.stat().st_mtime_ns]
    for name in "bcd":
        (served.snaps / name).mkdir()
        changes.append(served.snaps.stat().st_mtime_ns)
    assert changes == sorted(set(changes))


def test_a_write_by_mmap_changes_the_time_when_it_is_written_back(served: Served) -> None:
    import mmap

    for path in (served.live, served.image("a")):
        before = path.stat().st_mtime_ns
        with path.open("r+b") as image, mmap.mmap(image.fileno(), 2 * MIB) as mapped:
            mapped[5000] = 1
            mapped.flush()
            synced = path.stat().st_mtime_ns
            mapped[9000] = 1
        closed = path.stat().st_mtime_ns
        assert before < synced <= closed
        with path.open("rb"):  # the close wrote back what the mapping had left
            assert path.stat().st_mtime_ns == closed


# -- the text files ----------------------------------------------------------------------------------------------


def test_a_text_has_the_size_that_is_read_also_right_after_a_change(served: Served) -> None:
    texts = [served.path / "status", served.snaps / "a" / "info", served.snaps / "a" / "lost"]
    for number in range(20):
        _write(served.live, 4096 * number)
        with pytest.raises(PermissionError):
            os.unlink(served.live)
        (served.snaps / ("s" * (number + 1))).mkdir()
        for text in texts:
            with text.open("rb") as file:
                assert os.fstat(file.fileno()).st_size == len(file.read()), text
            found = text.stat()
            assert found.st_blocks * 512 >= found.st_size
            assert int(run("stat", "-c", "%s", text).stdout) == len(text.read_bytes())


def test_a_text_is_the_same_until_something_changed_and_its_time_tells(served: Served) -> None:
    status, info = served.path / "status", served.snaps / "a" / "info"
    wait_until(lambda: len({status.read_bytes() for _ in range(20)}) == 1, what="a quiet status")
    for text in (status, info):
        seen: dict[os.stat_result, bytes] = {}
        for _ in range(50):
            found, content, again = text.stat(), text.read_bytes(), text.stat()
            if found == again:
                assert seen.setdefault(found, content) == content
                assert found.st_size == len(content)
        assert len(set(seen.values())) == len(seen)  # and another time is another text
    before, found = info.read_bytes(), info.stat()
    _write(served.live)
    after = info.stat()
    assert info.read_bytes() != before
    assert after.st_mtime_ns > found.st_mtime_ns
    assert info.stat() == after
    assert os.path.getsize(served.snaps / "a" / "lost") == 0


def test_a_text_of_the_same_length_has_another_time(sandbox: Sandbox, served: Served) -> None:
    """As rsync compares size and time, and would skip the file."""
    _write(served.live)
    info = served.snaps / "a" / "info"
    run("rsync", "-a", "--modify-window=-1", info, sandbox.path / "copy")
    length = len(info.read_bytes())
    _write(served.live, 4096)
    assert len(info.read_bytes()) == length  # preserved_bytes 4096, then 8192
    run("rsync", "-a", "--modify-window=-1", info, sandbox.path / "copy")
    assert (sandbox.path / "copy").read_bytes() == info.read_bytes()


def test_who_reads_a_text_sees_no_change_under_his_hands(served: Served) -> None:
    """As tar compares the times at the end with those at the open, and says "file changed as we read it"."""
    status = served.path / "status"
    with status.open("rb") as reading:
        opened = os.fstat(reading.fileno())
        (served.snaps / "b").mkdir()
        assert os.fstat(reading.fileno()) == opened
        text = reading.read()
        assert len(text) == opened.st_size
        assert parse(text)["snapshots"] == "1"
        assert os.fstat(reading.fileno()) == opened
        assert int(run("stat", "-c", "%s", status).stdout) == len(run("cat", status).stdout)  # others see the present
        assert "snapshots 2" in run("cat", status).stdout
    assert parse(status.read_bytes())["snapshots"] == "2"
    assert status.stat().st_mtime_ns > opened.st_mtime_ns


# -- statfs ------------------------------------------------------------------------------------------------------


def test_statfs_leaves_room_for_files_and_says_read_only(sandbox: Sandbox, served: Served) -> None:
    found = os.statvfs(served.path)
    assert 0 < found.f_ffree == found.f_favail < found.f_files < 1 << 32  # more fails in programs of 32 bits
    assert found.f_files - found.f_ffree == len(_all(served))
    assert 0 < found.f_bavail <= found.f_bfree <= found.f_blocks
    assert (found.f_namemax, found.f_flag & os.ST_RDONLY) == (255, 0)
    assert "%" in run("df", "-i", served.path).stdout
    served.umount()
    served = sandbox.mount(*served.sources, options=["-o", "ro"])
    assert os.statvfs(served.path).f_flag & os.ST_RDONLY
    for call in (
        lambda: os.open(served.live, os.O_RDWR),
        lambda: os.open(served.live, os.O_WRONLY | os.O_TRUNC),
        lambda: os.chmod(served.live, 0o600),
        lambda: os.mkdir(served.snaps / "b"),
    ):
        with pytest.raises(OSError, match=os.strerror(errno.EROFS)):
            call()
    assert not os.access(served.live, os.W_OK)


# -- readdir -----------------------------------------------------------------------------------------------------


def test_listings_of_many_snapshots(served: Served) -> None:
    """Types, inode numbers and link counts are what stat says, and a place in a listing stays where it is."""
    names = {f"{number:03}-{'n' * 60}" for number in range(250)} | {"a"}
    for name in sorted(names - {"a"}):
        (served.snaps / name).mkdir()
    with os.scandir(served.snaps) as listing:
        seen = {entry.name: (entry.inode(), entry.is_dir(follow_symlinks=False)) for entry in listing}
    assert seen == {name: (os.stat(served.snaps / name).st_ino, True) for name in names}
    assert served.snaps.stat().st_nlink == 2 + len(names)
    for path in (served.path, served.path / "live", served.snaps / "a"):
        with os.scandir(path) as listing:
            for entry in listing:
                assert (entry.inode(), entry.is_dir()) == (os.stat(entry.path).st_ino, os.path.isdir(entry.path))
    assert len(run("find", served.path, "-type", "d").stdout.splitlines()) == 3 + len(names)
    assert len(run("find", served.path, "-type", "f").stdout.splitlines()) == 2 + 3 * len(names)


class _Entry(ctypes.Structure):
    _fields_ = (
        ("inode", ctypes.c_uint64),
        ("offset", ctypes.c_int64),
        ("length", ctypes.c_ushort),
        ("kind", ctypes.c_ubyte),
        ("name", ctypes.c_char * 256),
    )


def _calls() -> tuple[Callable[..., object], ...]:
    _libc.opendir.restype = ctypes.c_void_p
    _libc.readdir.restype = ctypes.POINTER(_Entry)
    _libc.readdir.argtypes = _libc.closedir.argtypes = _libc.telldir.argtypes = (ctypes.c_void_p,)
    _libc.telldir.restype = ctypes.c_long
    _libc.seekdir.argtypes = (ctypes.c_void_p, ctypes.c_long)
    return _libc.opendir, _libc.readdir, _libc.telldir, _libc.seekdir, _libc.closedir


def test_telldir_and_seekdir_while_snapshots_come_and_go(served: Served) -> None:
    opendir, readdir, telldir, seekdir, closedir = _calls()
    names = [f"s{number:03}" for number in range(40)]
    for name in names:
        (served.snaps / name).mkdir()
    listing = opendir(os.fsencode(served.snaps))
    places: dict[str, int] = {}
    while entry := readdir(listing):
        places[entry.contents.name.decode()] = telldir(listing)  # the place of the next
    assert set(places) == {".", "..", "a", *names}
    for name in names[::2]:
        (served.snaps / name).rmdir()
    (served.snaps / "new").mkdir()
    for name in ("s005", "s017"):
        seekdir(listing, places[name])
        rest = []
        while entry := readdir(listing):
            rest.append(entry.contents.name.decode())
        assert rest == [one for one in names[1::2] if one > name] + ["new"]
    closedir(listing)


# -- the disk was changed without hcpfs ---------------------------------------------------------------------------


def test_a_disk_that_was_changed_without_hcpfs_is_copied_again(sandbox: Sandbox, served: Served) -> None:
    """Also the snapshots, which may show something else then; rsync -a compares size and time."""
    served = served.remount()  # with the fingerprint taken
    for kind in ("live", "snaps"):
        run("rsync", "-a", "--modify-window=-1", f"{served.path}/{kind}", sandbox.path / "copy")
    served.umount()
    disk = Path(served.sources[0])
    with disk.open("r+b") as file:
        file.write(os.urandom(8192))
    served = sandbox.mount(disk, options=["--accept", "changed", "-o", "read_suspect"])
    assert served.info("a")["state"] == "suspect"
    for _ in range(2):
        for kind in ("live", "snaps"):
            run("rsync", "-a", "--modify-window=-1", f"{served.path}/{kind}", sandbox.path / "copy")
        assert (sandbox.path / "copy" / "live" / "disk.img").read_bytes() == disk.read_bytes()
        assert (sandbox.path / "copy" / "snaps" / "a" / "disk.img").read_bytes() == served.image("a").read_bytes()
        served.umount()
        with disk.open("r+b") as file:
            file.seek(100_000)
            file.write(os.urandom(8192))
        served = served.again()
