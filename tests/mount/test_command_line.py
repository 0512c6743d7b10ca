"""The commands as a person and mount(8) call them."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cow.config import Source
from cow.errors import RefusedError
from hcpfs import __version__
from hcpfs.daemon import stores
from hcpfs.options import Accept, MountOptions, UsageError, accepting, apply_options, parse_size, parse_source
from hcpfs.quiesce.helper import WRITE_BACK_SECONDS
from hcpfs.system import beneath
from hcpfs.tree.lines import path_in
from tests.support.sandbox import HCPFS, Sandbox, alive, run, status_of, wait_until

MOUNT_PATH = Path("/usr/local/sbin/hcpfs")  # mount(8) gives its helpers a PATH of its own, of which this is the first


@pytest.fixture
def installed() -> Iterator[None]:
    """The program where mount(8) finds it, as the README tells."""
    MOUNT_PATH.symlink_to(Path(sys.executable).parent / "hcpfs")
    yield
    MOUNT_PATH.unlink()


def test_version_and_help() -> None:
    assert run(*HCPFS, "--version").stdout == f"hcpfs {__version__}\n"
    text = run(*HCPFS, "--help").stdout
    assert "mkdir /mnt/hcp/snaps/monday" in text
    for command in ("mount", "umount", "ls", "recover"):
        assert command in text
        assert "Usage: hcpfs" in run(*HCPFS, command, "--help").stdout


def test_sizes() -> None:
    assert [parse_size(text) for text in ("0", "512", "1K", "2m", "3G", "1T", "20GiB")] == [
        0, 512, 1 << 10, 2 << 20, 3 << 30, 1 << 40, 20 << 30,
    ]  # fmt: skip
    for text in ("", "-1", "1.5G", "G", "1P", "1 2"):
        with pytest.raises(UsageError, match="is not a size"):
            parse_size(text)


def test_names_of_sources() -> None:
    assert parse_source("/dev/sdb1") == Source(b"sdb1.img", "/dev/sdb1")
    assert parse_source("/images/disk.img") == Source(b"disk.img", "/images/disk.img")
    assert parse_source("data=/dev/sdb1") == Source(b"data", "/dev/sdb1")
    assert parse_source("/dev/disk/by-id/x=1") == Source(b"x=1.img", "/dev/disk/by-id/x=1")
    for text in ("info=/dev/sdb1", ".x=/dev/sdb1", "=/dev/sdb1", f"{'x' * 256}=/dev/sdb1"):
        with pytest.raises(UsageError, match="cannot name an image"):
            parse_source(text)


def test_default_stores_are_one_for_each_set_of_sources() -> None:
    def store(*sources: str) -> str:
        return MountOptions(sources=[parse_source(source) for source in sources]).store_path

    assert store("/dev/sdb1").startswith("/var/lib/hcpfs/sdb1.img-")
    assert len({store("/dev/sdb1"), store("/dev/sdc1"), store("/dev/sdb1", "/dev/sdc1")}) == 3
    assert store("/dev/sdb1") == store("/dev/sdb1")
    assert store("/dev/sdb1", "data=/dev/sda1") == store("data=/dev/sda1", "/dev/sdb1")


def test_i4_no_second_default_store_is_made_for_a_device_whose_snapshots_are_in_another(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written with it would not be kept for them, and they would read wrong bytes."""
    monkeypatch.setattr(stores, "STORES", str(sandbox.path / "stores"))
    device, store = sandbox.loop(sandbox.disk()), sandbox.path / "stores" / "one"
    store.parent.mkdir()
    (sandbox.path / "alias").symlink_to(device)
    served = sandbox.mount(device, store=store)
    other = MountOptions(sources=[parse_source(str(sandbox.path / "alias"))])
    stores.check_no_other(other)  # that has no snapshots yet
    (served.snaps / "a").mkdir()
    for spelled in (f"{sandbox.path}/alias", f"data={device}"):
        other = MountOptions(sources=[parse_source(spelled)])
        with pytest.raises(RefusedError, match=f"of which the store {store} has 1 snapshot"):
            stores.check_no_other(other)
    stores.check_no_other(MountOptions(sources=[parse_source(str(sandbox.disk("b.img")))]))
    other.store = "/elsewhere"
    stores.check_no_other(other)


def test_options_of_mount_and_fstab() -> None:
    options = MountOptions()
    apply_options(options, ["rw,nofail,x-systemd.automount,quota=2G,store=/s", "source=b=/dev/sdb,ro,gid=7,mode=640"])
    assert (options.quota_bytes, options.store, options.read_only) == (2 << 30, "/s", True)
    assert options.sources == [Source(b"b", "/dev/sdb")]
    assert (options.access.gid, options.access.mode) == (7, 0o640)
    apply_options(options, ["accept=quota+changed"])
    assert options.accept == {Accept.QUOTA, Accept.CHANGED}


def test_the_words_for_mounting_again_say_the_same_from_anywhere() -> None:
    options = MountOptions(mountpoint="/mnt/hcp", sources=[parse_source("/dev/disk/by-id/x=1"), parse_source("b=rel")])
    apply_options(options, ["source=c=/dev/sdc,store=st,quota=2G,ro,allow_other,uid=5,gid=7,mode=640,freeze=2.5"])
    options.accept = {Accept.QUOTA, Accept.CHANGED}
    command, *words = options.arguments()
    again = MountOptions(mountpoint="/mnt/hcp")
    again.store, again.quota_bytes = words[words.index("--store") + 1], parse_size(words[words.index("--quota") + 1])
    again.sources = [parse_source(word) for word in words[:3]]
    apply_options(again, [words[words.index("-o") + 1]])
    options.store = options.store_path
    assert accepting(options.accept) == ["--accept", "changed", "--accept", "quota"]  # for the one start
    options.accept.clear()
    assert (command, again) == ("mount", options)
    assert all(source.path.startswith("/") for source in again.sources)


def test_ls(sandbox: Sandbox) -> None:
    served = sandbox.mount(sandbox.disk())
    assert json.loads(run(*HCPFS, "ls", served.path, "--json").stdout) == []
    for name in ("zebra", "aardvark [bold]"):
        (served.snaps / name).mkdir()
    with served.live.open("r+b") as live:
        live.write(b"x" * 8192)
    found = json.loads(run(*HCPFS, "ls", served.path, "--json").stdout)
    assert [one["name"] for one in found] == ["zebra", "aardvark [bold]"]  # by time
    assert [one["preserved_bytes"] for one in found] == ["0", "8192"]
    table = run(*HCPFS, "ls", served.path, env={**os.environ, "COLUMNS": "120"}).stdout.splitlines()
    assert table[0].split() == ["NAME", "CREATED", "STATE", "QUIESCED", "SIZE", "PRESERVED", "WRITTEN"]
    assert "aardvark [bold]" in table[2]
    assert table[2].split()[-3:] == ["8.0M", "8.0K", "0B"]
    (served.snaps / ("n" * 200)).mkdir()
    table = run(*HCPFS, "ls", served.path).stdout.splitlines()
    assert len(table) == 4, "nothing is broken or cut where it is no terminal"
    assert table[3].startswith("n" * 200 + "  20")
    assert "…" not in "".join(table)


@pytest.mark.parametrize("command", ["ls", "umount"])
def test_where_nothing_is_mounted(sandbox: Sandbox, command: str) -> None:
    done = run(*HCPFS, command, sandbox.path, check=False)
    assert (done.returncode, done.stderr) == (1, f"hcpfs: no hcpfs is mounted at {sandbox.path}\n")


def test_umount_returns_when_the_device_is_released(sandbox: Sandbox) -> None:
    disk = sandbox.disk()
    device = sandbox.loop(sandbox.disk("second.img"))
    served = sandbox.mount(disk, device)
    served.umount()
    os.close(os.open(device, os.O_RDWR | os.O_EXCL))
    with disk.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert not alive(served.pid)


def test_the_mount_point_may_be_named_by_a_symbolic_link(sandbox: Sandbox) -> None:
    """The kernel tells of its real path, by which what is mounted on the images is found, and who is to be freed."""
    (sandbox.path / "mnt").mkdir()
    link = sandbox.path / "link"
    link.symlink_to("mnt")
    served = sandbox.mount(sandbox.disk(), mountpoint=link)
    assert served.status["mountpoint"] == str(sandbox.path / "mnt")
    device = sandbox.loop(served.live)
    sandbox.format(device, "ext4")
    target = sandbox.mount_device(device)
    (link / "snaps" / "a").mkdir()
    assert "quiesced yes" in (link / "snaps" / "a" / "info").read_text()
    assert json.loads(run(*HCPFS, "ls", link, "--json").stdout)[0]["name"] == "a"
    assert run(*HCPFS, "verify", link).stdout == "all is well\n"
    served.die()
    run(*HCPFS, "recover", link)
    sandbox.unmount(target)
    sandbox.unloop(device)
    wait_until(lambda: run(*HCPFS, "umount", link, check=False).returncode == 0, what="the umount")
    assert not os.path.ismount(sandbox.path / "mnt")


def test_the_real_path_of_a_mount_point(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "up").symlink_to("../a")
    (tmp_path / "chain").symlink_to("a/up/b")
    (tmp_path / "round").symlink_to("round")
    real = os.path.realpath(tmp_path)
    paths = {"chain": "a/b", "chain/": "a/b", "a/up": "a", "a/up/..": ".", "missing": "missing", "a/./b/../b": "a/b"}
    for path, wanted in paths.items():
        assert beneath.real_path(f"{tmp_path}/{path}") == os.path.normpath(os.path.join(real, wanted)), path
    assert beneath.real_path(f"{tmp_path}/round") == os.path.join(real, "round")
    assert beneath.real_path("/") == "/"


def test_umount_of_a_store_whose_path_is_not_utf_8_or_has_a_line_break(sandbox: Sandbox) -> None:
    store = sandbox.path / os.fsdecode(b"sto\xff\nre\\n")
    served = sandbox.mount(sandbox.disk(), store=store)
    assert path_in(served.status["store"]) == str(store)
    served.umount()


@pytest.mark.parametrize("command", [["ls"], ["ls", "--json"], ["verify"]])
def test_an_answer_that_cannot_be_written_is_told_in_a_sentence(sandbox: Sandbox, command: list[str]) -> None:
    served = sandbox.mount(sandbox.disk())
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*HCPFS, *command, served.path], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 1
    assert done.stderr.strip() == "hcpfs: standard output cannot be used: No space left on device"


def test_a_mistyped_command_is_not_taken_for_a_mount(sandbox: Sandbox) -> None:
    done = run(*HCPFS, "unmount", sandbox.path, check=False)
    assert done.returncode == 2
    assert "No such command 'unmount'" in done.stderr


def test_a_directory_that_is_no_store_gets_no_advice_on_its_rights(sandbox: Sandbox) -> None:
    sandbox.path.chmod(0o777)
    done = run(*HCPFS, "verify", sandbox.path, check=False)
    assert done.returncode == 1
    assert "is not a store of hcpfs" in done.stderr
    assert "chmod" not in done.stderr


def test_umount_says_what_keeps_it(sandbox: Sandbox) -> None:
    served = sandbox.mount(sandbox.disk())
    device = sandbox.loop(served.live)
    done = run(*HCPFS, "umount", served.path, check=False)
    assert done.returncode == 1
    assert "is in use, and nothing was unmounted" in done.stderr
    assert device in done.stderr
    sandbox.unloop(device)
    wait_until(lambda: run(*HCPFS, "umount", served.path, check=False).returncode == 0, what="the umount")


def test_umount_says_so_when_the_store_is_gone(sandbox: Sandbox) -> None:
    served = sandbox.mount(sandbox.disk())
    shutil.rmtree(served.store)
    done = run(*HCPFS, "umount", served.path, check=False)
    assert done.returncode == 1
    assert "not clean" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("way", ["umount", "SIGTERM", "SIGINT"])
def test_every_way_to_stop_is_clean(sandbox: Sandbox, way: str) -> None:
    served = sandbox.mount(sandbox.disk())
    (served.snaps / "a").mkdir()
    with served.image("a").open("r+b") as image:
        image.write(b"not flushed")
    if way == "umount":
        run("umount", served.path)
    else:
        os.kill(served.pid, signal.Signals[way])
    wait_until(lambda: not alive(served.pid), what="the end of the daemon")
    assert not os.path.ismount(served.path)
    served = served.again()
    assert served.status["last_stop"] == "clean"
    assert served.image("a").read_bytes()[:11] == b"not flushed"


def _in_the_foreground(sandbox: Sandbox) -> tuple[Path, "subprocess.Popen[str]"]:
    """A mount, and its daemon with a pipe for its log."""
    mountpoint = sandbox.path / "mnt"
    mountpoint.mkdir()
    daemon = sandbox.spawn(
        *HCPFS, "mount", "--foreground", sandbox.disk(), mountpoint, "--store", sandbox.path / "store",
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_until(lambda: os.path.ismount(mountpoint), what="the mount")
    return mountpoint, daemon


def test_in_the_foreground_it_logs_to_standard_error(sandbox: Sandbox) -> None:
    mountpoint, process = _in_the_foreground(sandbox)
    (mountpoint / "snaps" / "a").mkdir()
    run(*HCPFS, "umount", mountpoint)
    _, log = process.communicate()
    assert process.returncode == 0
    assert "snapshot a taken" in log
    assert "closed clean" in log


def test_a_stop_does_not_wait_for_a_snapshot_that_is_being_quiesced(sandbox: Sandbox) -> None:
    """To quiesce, the mount is looked at from outside, which gets no answer any more."""
    mountpoint, daemon = _in_the_foreground(sandbox)
    assert daemon.stderr is not None
    (mountpoint / "snaps" / "before").mkdir()
    (freezer,) = map(int, run("pgrep", "-P", daemon.pid, "-f", "freezer").stdout.split())
    os.kill(freezer, signal.SIGSTOP)
    taking = sandbox.spawn("mkdir", mountpoint / "snaps" / "a", stderr=subprocess.DEVNULL)
    syscall = Path(f"/proc/{taking.pid}/wchan")
    wait_until(lambda: syscall.read_text() == "request_wait_answer", what="the mkdir to wait for its answer")
    daemon.send_signal(signal.SIGTERM)
    assert any("SIGTERM: unmounting" in line for line in daemon.stderr)
    os.kill(freezer, signal.SIGCONT)
    assert daemon.wait(WRITE_BACK_SECONDS / 2) == 0
    taking.wait()
    daemon.stderr.close()
    assert not os.path.ismount(mountpoint)


@pytest.mark.usefixtures("installed")
def test_mount_t_fuse_hcpfs(sandbox: Sandbox) -> None:
    disk, mountpoint, store = sandbox.disk(), sandbox.path / "mnt", sandbox.path / "the store"
    mountpoint.mkdir()
    run("mount", "-t", "fuse.hcpfs", disk, mountpoint, "-o", f"store={store},quota=64M")
    status = status_of(mountpoint)
    assert (status["quota_bytes"], status["store"]) == (str(64 << 20), str(store))
    (mountpoint / "snaps" / "a").mkdir()
    assert f"{disk} on {mountpoint} type fuse.hcpfs" in run("mount").stdout
    run("umount", mountpoint)
    wait_until(lambda: not alive(int(status["pid"])), what="the end of the daemon")


@pytest.mark.usefixtures("installed")
def test_a_line_of_fstab(sandbox: Sandbox) -> None:
    disk, second, mountpoint = sandbox.disk(), sandbox.disk("second.img"), sandbox.path / "mnt"
    mountpoint.mkdir()
    table = sandbox.path / "fstab"
    table.write_text(
        f"{disk} {mountpoint} fuse.hcpfs store={sandbox.path}/store,source=two={second},"
        "nofail,x-systemd.requires=a 0 0\n"
    )
    run("mount", "-T", table, mountpoint)
    assert sorted(os.listdir(mountpoint / "live")) == ["disk.img", "two"]
    pid = status_of(mountpoint)["pid"]
    run(*HCPFS, "umount", mountpoint)
    assert not alive(int(pid))


@pytest.mark.usefixtures("installed")
def test_what_mount_8_is_told_when_it_is_refused(sandbox: Sandbox) -> None:
    (sandbox.path / "mnt").mkdir()
    done = run("mount", "-t", "fuse.hcpfs", sandbox.path / "missing", sandbox.path / "mnt", check=False)
    assert done.returncode != 0
    assert "cannot be used as a source: No such file" in done.stderr
