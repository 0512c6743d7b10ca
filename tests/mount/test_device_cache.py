"""The disk under the origin has a volatile cache: at each of its flushes it holds all that was synced before, sound."""

import os
import random
from pathlib import Path

from tests.support.devicecache import LoggedDisk, replay, write_image
from tests.support.sandbox import Sandbox, run

SIZE = 48 << 20
FILES = 40


def test_i3_i8_what_was_synced_is_on_the_disk_at_every_flush_after(sandbox: Sandbox) -> None:
    assert check_flushes(sandbox, seed=1, files=FILES, most=24) >= 20


def check_flushes(sandbox: Sandbox, seed: int, files: int, most: int) -> int:
    """Write and sync so many files with snapshots in between, check the disk at up to `most` flushes; how many."""
    random_ = random.Random(seed)
    disk = LoggedDisk(sandbox, SIZE)
    served = sandbox.mount(disk.device)
    loop = sandbox.loop(served.live)
    sandbox.format(loop, "ext4")
    made_at = disk.entries_so_far()
    place = sandbox.mount_device(loop)
    synced: list[tuple[int, str, bytes]] = []  # how many entries the log had when the sync returned
    for number in range(files):
        content = random_.randbytes(random_.choice((100, 5000, 70_000)))
        synced.append(_write_synced(place, f"file{number}", content, disk))
        if number % 7 == 3:
            (served.snaps / f"s{number}").mkdir()
    sandbox.unmount(place)
    sandbox.unloop(loop)
    served.umount()

    flushes = [count for count, _ in replay(disk.entries(), SIZE) if count > made_at]
    chosen = set(random_.sample(flushes, min(len(flushes), most - 1)) + flushes[-1:])
    for count, content in replay(disk.entries(), SIZE):
        if count in chosen:
            _check(sandbox, content, [one for one in synced if one[0] <= count])
    return len(chosen)


def _write_synced(place: Path, name: str, content: bytes, disk: LoggedDisk) -> tuple[int, str, bytes]:
    with (place / name).open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    directory = os.open(place, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)
    return disk.entries_so_far(), name, content


def _check(sandbox: Sandbox, content: bytearray, synced: list[tuple[int, str, bytes]]) -> None:
    image = write_image(sandbox.path / "replayed.img", content)
    assert run("e2fsck", "-fy", image, check=False).returncode in (0, 1)
    run("e2fsck", "-fn", image)
    loop = sandbox.loop(image)
    place = sandbox.mount_device(loop, "replayed", "-o", "ro")
    for _, name, expected in synced:
        assert (place / name).read_bytes() == expected, name
    sandbox.unmount(place)
    sandbox.unloop(loop)
