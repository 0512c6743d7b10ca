"""ext4 and XFS in use, 20 snapshots under a writer that never stops: each image is clean and has exactly its files."""

import hashlib
import os
import random
import threading
from pathlib import Path

import pytest

from tests.support.sandbox import Sandbox, Served, run, wait_until

SNAPSHOTS = 20
DISK_BYTES = {"ext4": 96 << 20, "xfs": 320 << 20}
XFS_DIRTY_LOG = ("ALERT: The filesystem has valuable", "ignored because the -n", "which may be resolved by first")
MOUNT_OPTIONS = {"ext4": "rw", "xfs": "rw,nouuid"}
WITHOUT_RECOVERY = {"ext4": "ro,noload", "xfs": "ro,norecovery,nouuid"}


class Writer:
    """Creates, rewrites, appends, renames, deletes and syncs files in a directory of its own until stopped."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir()
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self.rounds = 0
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        random_ = random.Random(0)
        try:
            while not self._stop.is_set():
                path = self._directory / f"f{random_.randrange(40)}"
                choice = random_.random()
                if choice < 0.2 and path.exists():
                    path.unlink()
                elif choice < 0.3 and path.exists():
                    path.rename(self._directory / f"f{random_.randrange(40)}")
                else:
                    with path.open("ab" if choice < 0.6 else "wb") as file:
                        file.write(random_.randbytes(random_.randrange(20000)))
                        if choice > 0.8:
                            os.fsync(file.fileno())
                self.rounds += 1
        except BaseException as error:  # raised again by stop()
            self._failure = error

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()
        if self._failure is not None:
            raise self._failure


def _change_files(directory: Path, generation: int, random_: random.Random) -> dict[str, str]:
    """Change some of the files that only this thread touches: name -> sha256 of all of them.

    Every other time they are synced; else it is the freeze that has to write them out. No sync(2), which would wait
    for every other file system of the machine too.
    """
    directory.mkdir(exist_ok=True)
    for number in range(8):
        path = directory / f"g{random_.randrange(16)}"
        if random_.random() < 0.2 and path.exists():
            path.unlink()
        else:
            path.write_bytes(random_.randbytes(random_.randrange(60000)) + bytes([generation, number]))
    if generation % 2 == 0:
        for path in [*directory.iterdir(), directory]:
            _sync(path)
    return _digests(directory)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _digests(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


def _raw_digests(images: list[Path]) -> list[str]:
    """Of all bytes of the images, whatever file system is on them."""
    return [run("sha256sum", image).stdout.split()[0] for image in images]


def _check_clean(kind: str, device: str) -> None:
    """The image needs no recovery: it was quiesced, not just crash-consistent."""
    if kind == "ext4":
        assert "needs_recovery" not in run("dumpe2fs", "-h", device).stdout
        run("fsck.ext4", "-n", "-f", device)
        return
    # A freeze of XFS ends with one record of the superblock in the log, on purpose, and leaves the lazily kept count of
    # free blocks to it (the same after a bare fsfreeze and cp). Nothing else may be there to recover or to complain of.
    items = run("xfs_logprint", "-t", device).stdout
    assert items.count("BUF: cnt") == items.count("SUPER Block Buffer")
    assert "INO: cnt" not in items
    complaints = [
        line
        for line in run("xfs_repair", "-n", device, check=False).stdout.splitlines()
        if not line.startswith(("Phase", "No modify", "        - ", *XFS_DIRTY_LOG))
    ]
    assert [line for line in complaints if not line.startswith("sb_fdblocks")] == []


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
@pytest.mark.parametrize("direct_io", ["off", "on"])
def test_i2_i9_snapshots_of_a_busy_file_system(sandbox: Sandbox, kind: str, direct_io: str) -> None:
    served = sandbox.mount(sandbox.disk(size=DISK_BYTES[kind]))
    device = sandbox.loop(served.live, f"--direct-io={direct_io}")
    sandbox.format(device, kind)
    files = sandbox.mount_device(device)
    random_ = random.Random(1)
    writer = Writer(files / "writer")
    manifests = {}
    try:
        for generation in range(SNAPSHOTS):
            manifest = _change_files(files / "own", generation, random_)
            (served.snaps / f"s{generation}").mkdir()
            manifests[f"s{generation}"] = manifest
    finally:
        writer.stop()
    assert writer.rounds > SNAPSHOTS
    present = _digests(files / "own")
    sandbox.unmount(files)
    *names, last = manifests
    others = [served.live, served.image(last)]
    before = _raw_digests(others)
    for name in names:
        _check_snapshot(sandbox, served, name, kind, manifests[name], str(files))
    assert _raw_digests(others) == before
    _check_snapshot(sandbox, served, last, kind, manifests[last], str(files))
    assert _raw_digests([served.live]) == before[:1]
    for name, manifest in manifests.items():  # what was written to one image is not seen in another
        _check_own_write(sandbox, served, name, kind, manifest)
    files = sandbox.mount_device(device)
    assert _digests(files / "own") == present
    assert not (files / "own" / "new").exists()
    sandbox.unmount(files)


def _check_snapshot(
    sandbox: Sandbox, served: Served, name: str, kind: str, manifest: dict[str, str], frozen: str
) -> None:
    info = served.info(name)
    assert (info["state"], info["quiesced"], info["frozen"]) == ("valid", "yes", frozen), info
    assert "quiesce_note" not in info, info
    assert int(info["held_us"]) > 0
    device = sandbox.loop(served.image(name))
    _check_clean(kind, device)
    files = sandbox.mount_device(device, "old", "-o", WITHOUT_RECOVERY[kind])
    assert _digests(files / "own") == manifest
    sandbox.unmount(files)
    files = sandbox.mount_device(device, "old", "-o", MOUNT_OPTIONS[kind])
    assert _digests(files / "own") == manifest
    _digests(files / "writer")  # whatever is there can be read
    (files / "own" / "new").write_text(name)
    sandbox.unmount(files)
    if kind == "xfs":
        run("xfs_repair", "-n", device)
    sandbox.unloop(device)


def _check_own_write(sandbox: Sandbox, served: Served, name: str, kind: str, manifest: dict[str, str]) -> None:
    device = sandbox.loop(served.image(name))
    files = sandbox.mount_device(device, "old", "-o", MOUNT_OPTIONS[kind])
    assert (files / "own" / "new").read_text() == name
    (files / "own" / "new").unlink()
    assert _digests(files / "own") == manifest
    sandbox.unmount(files)
    sandbox.unloop(device)


@pytest.fixture
def mounted(sandbox: Sandbox) -> tuple[Served, Path]:
    """An ext4 on a loop on live/, which may be frozen for next to no time."""
    served = sandbox.mount(sandbox.disk(size=32 << 20), options=["-o", "freeze=0.0001"])
    device = sandbox.loop(served.live)
    sandbox.format(device, "ext4")
    return served, sandbox.mount_device(device)


def test_a_freeze_that_takes_too_long_is_given_up_and_thawed(sandbox: Sandbox, mounted: tuple[Served, Path]) -> None:
    served, files = mounted
    (files / "before").write_bytes(os.urandom(1 << 20))
    (served.snaps / "s").mkdir()
    (files / "after").write_text("it was thawed")
    os.sync()
    info = served.info("s")
    assert (info["state"], info["quiesced"]) == ("valid", "no")
    assert "0.0001 s" in info["quiesce_note"]
    image = sandbox.loop(served.image("s"))
    run("fsck.ext4", "-p", image, check=False)  # as after a power cut: the journal is replayed
    run("fsck.ext4", "-n", "-f", image)
    sandbox.unmount(files)


def test_the_freeze_of_somebody_else_is_respected(sandbox: Sandbox, mounted: tuple[Served, Path]) -> None:
    served, files = mounted
    run("fsfreeze", "-f", files)
    try:
        (served.snaps / "s").mkdir()
        writer = sandbox.spawn("touch", files / "new")
        wait_until(lambda: " D " in Path(f"/proc/{writer.pid}/stat").read_text(), what="the writer to be stuck still")
    finally:
        run("fsfreeze", "-u", files)
    assert writer.wait() == 0
    assert served.info("s")["quiesced"] == "no"
    assert "froze" in served.info("s")["quiesce_note"]
    sandbox.unmount(files)
