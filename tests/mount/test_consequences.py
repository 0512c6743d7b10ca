"""What a person must know is said by the command that causes it, and what would cost snapshots is refused."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.sandbox import HCPFS, MARK, Sandbox, Served, parse, run, wait_until

MIB = 1 << 20


def mount_again(served: Served, *options: object) -> str:
    """Mount with other options; what is said on standard error."""
    run(*HCPFS, "umount", served.path)
    done = run(*HCPFS, "mount", *served.sources, served.path, "--store", served.store, *options)
    return done.stderr


def overwrite(served: Served, offset: int, length: int) -> None:
    with served.live.open("r+b") as live:
        live.seek(offset)
        live.write(os.urandom(length))
        live.flush()
        os.fsync(live.fileno())


@pytest.fixture
def nearly_full(sandbox: Sandbox) -> Served:
    """Three snapshots of a disk of 16 MiB, with 8 MiB of old bytes each, in a store with a quota of 64 MiB."""
    served = sandbox.mount(sandbox.disk(size=16 * MIB), options=["--quota", "64M"])
    for number, name in enumerate(("oldest", "middle", "newest")):
        (served.snaps / name).mkdir()
        overwrite(served, number * 4 * MIB, 8 * MIB)
    served.umount()
    return served


POLICIES = {
    "drop-oldest": "given up: oldest",
    "lose-chunks": "lost to 3 snapshots",
    "block-writes": "the writer would get ENOSPC",
}


@pytest.mark.parametrize("policy", POLICIES)
def test_a_quota_below_what_is_used_says_what_the_next_write_costs(nearly_full: Served, policy: str) -> None:
    served, sandbox = nearly_full, nearly_full.sandbox
    words = (*served.sources, served.path, "--store", served.store, "-o", f"on_full={policy}")
    said = sandbox.refusal(*words, "--quota", "36M")
    assert POLICIES[policy] in said
    assert "--accept quota" in said
    assert "MiB already" in said
    assert "note:" not in said
    again = served.again()
    assert again.status["snapshots.valid"] == "3", "a refusal costs nothing"


def test_a_low_quota_is_accepted_once_and_is_the_quota_from_then_on(nearly_full: Served) -> None:
    served = nearly_full
    words = (*served.sources, served.path, "--store", served.store)
    said = run(*HCPFS, *words[:2], "-o", f"store={served.store},quota=36M,accept=quota").stderr  # as mount(8) calls it
    assert said.startswith("hcpfs: note: the store")
    assert "100 % full" in said
    assert "take no writes of their own, and some may be lost" in said
    run(*HCPFS, "umount", served.path)
    run(*HCPFS, "mount", *words, "--quota", "36M")  # at the next boot nobody is there to accept it
    overwrite(served, 0, 4 * MIB)  # which the newest has not kept yet
    assert int(served.status["snapshots.invalid"]) > 0
    said = mount_again(served)
    assert "note: invalid in" in said
    assert "(oldest" in said
    assert "rmdir it" in said
    served.pid = int(served.status["pid"])
    served.die()
    said = run(*HCPFS, "recover", served.path).stderr
    assert "hcpfs: note: invalid in" in said


def test_a_low_quota_is_not_refused_where_nothing_can_be_lost(sandbox: Sandbox) -> None:
    served = sandbox.mount(sandbox.disk(), options=["--quota", "1G"])
    said = mount_again(served, "--quota", "32M")
    assert "refused" not in said
    assert served.status["quota_bytes"] == str(32 * MIB)


def test_a_quota_beyond_the_disk_is_told(sandbox: Sandbox) -> None:
    served = sandbox.mount(sandbox.disk())
    assert "hcpfs: note: the quota is 1073741824 MiB, and the file system" in mount_again(served, "--quota", "1024T")


# -- sources that cannot be written to ---------------------------------------------------------------------------------


@pytest.fixture
def disk_on_ext4(sandbox: Sandbox) -> Path:
    image = sandbox.disk("fs.img", 40 * MIB)
    sandbox.format(image, "ext4")
    path = sandbox.mount_device(image, "fs", "-o", "loop") / "disk.img"
    with path.open("wb") as file:
        file.truncate(8 * MIB)
    return path


def _immutable(sandbox: Sandbox, path: Path) -> Path:
    run("chattr", "+i", path)
    return path


def _append_only(sandbox: Sandbox, path: Path) -> Path:
    run("chattr", "+a", path)
    return path


def _read_only_mount(sandbox: Sandbox, path: Path) -> Path:
    run("mount", "-o", "remount,ro", path.parent)
    return path


def _read_only_bind_mount(sandbox: Sandbox, path: Path) -> Path:
    target = sandbox.mount_device(path.parent, "bind", "--bind")
    run("mount", "-o", "remount,bind,ro", target)
    return target / path.name


def _read_only_loop(sandbox: Sandbox, path: Path) -> Path:
    return Path(sandbox.loop(path, "--read-only"))


def _device_set_read_only(sandbox: Sandbox, path: Path) -> Path:
    device = sandbox.loop(path)
    run("blockdev", "--setro", device)
    return Path(device)


UNWRITABLE: dict[Callable[[Sandbox, Path], Path], str] = {
    _immutable: "immutable",
    _append_only: "append-only",
    _read_only_mount: "mounted read-only",
    _read_only_bind_mount: "mounted read-only",
    _read_only_loop: "the device is read-only",
    _device_set_read_only: "the device is read-only",
}


@pytest.mark.parametrize("make", UNWRITABLE)
def test_a_source_that_cannot_be_written_to_is_refused_and_served_read_only(
    sandbox: Sandbox, disk_on_ext4: Path, make: Callable[[Sandbox, Path], Path]
) -> None:
    source = make(sandbox, disk_on_ext4)
    try:
        mountpoint = sandbox.path / "mnt"
        mountpoint.mkdir()
        said = sandbox.refusal(source, mountpoint, "--store", sandbox.path / "above" / "store")
        assert f"{source} cannot be written to" in said
        assert UNWRITABLE[make] in said
        assert "-o ro" in said
        assert not (sandbox.path / "above").exists()
        served = sandbox.mount(source, options=["-o", "ro"])
        assert served.live.read_bytes() == bytes(8 * MIB)
        served.umount()
    finally:
        run("chattr", "-i", "-a", disk_on_ext4, check=False)


def test_a_file_without_write_permission_is_served_with_a_note(sandbox: Sandbox) -> None:
    served = sandbox.mount(sandbox.disk())
    Path(served.sources[0]).chmod(0o444)
    assert "note: nobody has the right to write" in mount_again(served)


# -- options and places that do less than they seem ------------------------------------------------------------------


def test_options_that_do_less_than_they_seem_say_so(sandbox: Sandbox) -> None:
    served = sandbox.mount(sandbox.disk())
    assert "without allow_other the kernel keeps" in mount_again(served, "-o", "mode=644")
    assert "give uid=, gid= or mode=" in mount_again(served, "-o", "allow_other")
    assert mount_again(served, "-o", "allow_other,mode=644") == ""
    assert "quota and sync has no effect" in mount_again(served, "-o", "ro,sync,quota=1G")
    assert "freeze=0 leaves no time" in mount_again(served, "-o", "freeze=0")
    run(*HCPFS, "umount", served.path)
    (served.path / "mine").write_text("x")
    assert (
        f"{served.path} is not empty: what is in it (mine) is hidden"
        in run(*HCPFS, "mount", *served.sources, served.path, "--store", served.store).stderr
    )


def test_in_the_foreground_notes_are_in_the_log(sandbox: Sandbox) -> None:
    mountpoint = sandbox.path / "mnt"
    mountpoint.mkdir()
    (mountpoint / "mine").touch()
    with (sandbox.path / "said").open("w+") as said:
        words = (sandbox.disk(), mountpoint, "--store", sandbox.path / "store", "--foreground")
        process = sandbox.serve_in_foreground(*words, mountpoint=mountpoint, stderr=said)
        run(*HCPFS, "umount", mountpoint)
        process.wait()
        assert "WARNING hcpfs: " in (text := Path(said.name).read_text())
        assert text.count("is not empty") == 1


# -- refusals leave nothing ------------------------------------------------------------------------------------------


@pytest.fixture
def no_fuse(sandbox: Sandbox) -> list[str]:
    """Words before `hcpfs` that let it find no FUSE device: a refusal at the very end of a start."""
    return ["unshare", "--mount", "sh", "-c", 'mount --bind /dev/null /dev/fuse && exec "$@"', "sh"]


def test_a_refused_mount_leaves_no_store_and_no_directory(sandbox: Sandbox, no_fuse: list[str]) -> None:
    disk, mountpoint = sandbox.disk(), sandbox.path / "mnt"
    mountpoint.mkdir()
    store = sandbox.path / "a" / "b" / "store"
    held = sandbox.mount(sandbox.disk("held.img"), mountpoint=sandbox.path / "held", store=sandbox.path / "held-store")
    for words in (
        [sandbox.path / "missing.img", mountpoint],
        [disk, sandbox.path / "nowhere"],
        [disk, mountpoint, "--quota", "1M"],
        [f"x={disk}", f"x={held.sources[0]}", mountpoint],
        [disk, held.sources[0], mountpoint],  # locked
    ):
        sandbox.refusal(*words, "--store", store)
        assert not (sandbox.path / "a").exists(), words
    done = run(*no_fuse, *HCPFS, "mount", disk, mountpoint, "--store", store, check=False)
    assert done.returncode == 1
    assert "could not be mounted" in done.stderr
    assert not (sandbox.path / "a").exists()
    store.mkdir(parents=True)
    run(*no_fuse, *HCPFS, "mount", disk, mountpoint, "--store", store, check=False)
    assert list(store.iterdir()) == [], "what was there before stays, and nothing is in it"


def test_a_refusal_of_a_store_that_exists_is_in_its_log_and_takes_nothing_from_it(
    sandbox: Sandbox, no_fuse: list[str]
) -> None:
    served = sandbox.mount(sandbox.disk())
    (served.snaps / "a").mkdir()
    served.umount()
    words = ("mount", *served.sources, served.path, "--store", served.store)
    run(*no_fuse, *HCPFS, *words, check=False)
    assert "could not be mounted" in (served.store / "hcpfs.log").read_text()
    again = served.again()
    assert again.info("a")["state"] == "valid"


# -- a store that is gone --------------------------------------------------------------------------------------------


def _removed(served: Served) -> None:
    run("rm", "-rf", served.store)


def _layers_removed(served: Served) -> None:
    run("rm", "-rf", served.store / "layers")


def _a_layer_removed(served: Served) -> None:
    run("rm", "-rf", served.store / "layers" / "0000000000000001")


def _catalog_replaced(served: Served) -> None:
    os.rename(served.store / "catalog.sqlite", served.store / "catalog.sqlite.old")
    (served.store / "catalog.sqlite").touch()


def _journal_removed(served: Served) -> None:
    for path in served.store.glob("journal.*"):
        path.unlink()


def _renamed(served: Served) -> None:
    os.rename(served.store, f"{served.store}.old")


def _mounted_over(served: Served) -> None:
    run("mount", "-t", "tmpfs", MARK, served.store)


GONE = {
    _removed: "was removed while it is in use",
    _layers_removed: "layers was removed or replaced",
    _a_layer_removed: "layers/0000000000000001 was removed or replaced",
    _catalog_replaced: "catalog.sqlite was removed or replaced",
    _journal_removed: "journal.* was removed or replaced",
    _renamed: "does not lead to the store any more",
    _mounted_over: "does not lead to the store any more",
}


@pytest.mark.parametrize("remove", GONE)
def test_a_store_that_is_gone_takes_no_snapshot_and_says_so(sandbox: Sandbox, remove: Callable[[Served], None]) -> None:
    served = sandbox.mount(sandbox.disk(content=os.urandom(8 * MIB)))
    before = served.live.read_bytes()
    (served.snaps / "a").mkdir()
    overwrite(served, 0, MIB)
    remove(served)
    with pytest.raises(OSError, match="Stale file handle"):
        (served.snaps / "b").mkdir()
    assert GONE[remove] in served.status["store_trouble"]
    assert served.status["last_error"] == served.status["store_trouble"]
    assert served.image("a").read_bytes() == before, "what is to be saved can still be copied"


def test_a_store_whose_file_system_was_unmounted_lazily_takes_no_snapshot(sandbox: Sandbox) -> None:
    image = sandbox.disk("fs.img", 60 * MIB)
    sandbox.format(image, "ext4")
    place = sandbox.mount_device(image, "fs", "-o", "loop")
    served = sandbox.mount(sandbox.disk(), store=place / "store")
    run("umount", "--lazy", place)
    with pytest.raises(OSError, match="Stale file handle"):
        (served.snaps / "a").mkdir()
    assert "umount -l" in served.status["last_error"]
    run(*HCPFS, "umount", served.path, check=False)  # it cannot be seen to have ended clean
    wait_until(lambda: not Path(f"/proc/{served.pid}").exists())
    sandbox.mount_device(image, "fs", "-o", "loop")
    assert sandbox.mount(*served.sources, store=place / "store").status["last_stop"] == "clean"


# -- verify ----------------------------------------------------------------------------------------------------------


def test_verify_counts_what_repair_counts(sandbox: Sandbox) -> None:
    served = sandbox.mount(sandbox.disk())
    (served.snaps / "a").mkdir()
    overwrite(served, 0, MIB)
    served.kill()
    layers = served.store / "layers"
    (layers / "file").touch()
    (layers / "directory" / "below").mkdir(parents=True)
    (layers / "empty").mkdir()  # which can be removed, and is
    looked = run(*HCPFS, "verify", served.store, check=False)
    repaired = run(*HCPFS, "verify", "--repair", served.store, check=False)
    assert looked.stdout == repaired.stdout
    assert "2 things were found, 0 of them repaired" in looked.stdout
    assert "remove it by hand" in looked.stdout
    assert (looked.returncode, repaired.returncode) == (3, 3)
    assert "note: " in run(*HCPFS, "mount", *served.sources, served.path, "--store", served.store).stderr
    assert parse((served.path / "status").read_bytes())["snapshots.valid"] == "1"
