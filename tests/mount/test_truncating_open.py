"""Tools that write a whole image open it with O_TRUNC, and trust that what they skip reads as zeroes.

Whatever they say with exit code 0 is compared: at once, through the kernel's cache, and from hcpfs itself.
"""

import errno
import itertools
import mmap
import os
import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.fio import fio_verify
from tests.support.sandbox import Sandbox, Served, run

SIZE = 3 << 20
KIB = 1 << 10


def _sparse(path: Path, pieces: dict[int, int], size: int = SIZE) -> Path:
    """A file of that size with holes, and random bytes in the pieces: offset, length."""
    with path.open("wb") as file:
        file.truncate(size)
        for offset, length in pieces.items():
            file.seek(offset)
            file.write(random.Random(offset).randbytes(length))
    return path


@pytest.fixture
def backups(sandbox: Sandbox) -> dict[str, Path]:
    place = sandbox.path / "backups"
    place.mkdir()
    pieces = {512: 512, 100 * KIB + 512: 3000, 1024 * KIB: 320 * KIB, 2000 * 1000: 1, 2500 * KIB + 1: 10}
    return {
        "sparse": _sparse(place / "sparse", pieces),
        "begins and ends with data": _sparse(place / "ends", {0: 4096, SIZE - 4096: 4096}),
        "all zero": _sparse(place / "zero", {}),
        "full": _sparse(place / "full", {0: SIZE}),
    }


@pytest.fixture
def served(sandbox: Sandbox) -> Served:
    served = sandbox.mount(sandbox.disk(content=random.Random(1).randbytes(SIZE)))
    (served.snaps / "a").mkdir()
    (served.snaps / "witness").mkdir()
    return served


def _fill(path: Path, seed: int) -> bytes:
    """Fill the image with random bytes, which the kernel has in its cache then."""
    content = random.Random(seed).randbytes(SIZE)
    with path.open("r+b") as image:
        image.write(content)
    assert path.read_bytes() == content
    return content


def _uncached(path: Path) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        memory = mmap.mmap(-1, SIZE)
        assert os.preadv(fd, [memory], 0) == SIZE
        return bytes(memory)
    finally:
        os.close(fd)


def _tar_over(source: Path, target: Path, sandbox: Sandbox) -> list[object]:
    place = sandbox.path / "packed"
    place.mkdir(exist_ok=True)
    archive = place / "archive.tar"
    run("cp", "--sparse=always", source, place / target.name)
    run("tar", "-C", place, "--owner=0", "--group=0", "--mode=0600", "-Scf", archive, target.name)
    return ["tar", "-C", target.parent, "--overwrite", "-xmf", archive]


Tool = Callable[[Path, Path, Sandbox], list[object]]
TOOLS: dict[str, Tool] = {
    "cp": lambda source, target, _: ["cp", source, target],
    "cp sparse": lambda source, target, _: ["cp", "--sparse=always", source, target],
    "cp without holes": lambda source, target, _: ["cp", "--sparse=never", "--reflink=auto", source, target],
    "dd": lambda source, target, _: ["dd", f"if={source}", f"of={target}", "bs=64k"],
    "dd sparse": lambda source, target, _: ["dd", f"if={source}", f"of={target}", "bs=64k", "conv=sparse"],
    "dd sparse, by sectors": lambda source, target, _: ["dd", f"if={source}", f"of={target}", "conv=sparse"],
    "dd sparse, synced": lambda source, target, _: ["dd", f"if={source}", f"of={target}", "bs=4k", "conv=sparse,fsync"],
    "dd sparse, direct": lambda source, target, _: [
        *("dd", f"if={source}", f"of={target}", "bs=256k", "conv=sparse", "oflag=direct"),
    ],
    "dd sparse, by the shell": lambda source, target, _: [
        "sh",
        "-c",
        f"dd if='{source}' bs=4k conv=sparse > '{target}'",
    ],
    "rsync sparse": lambda source, target, _: ["rsync", "-I", "--inplace", "--sparse", source, target],
    "tar sparse": _tar_over,
    "qemu-img": lambda source, target, _: ["qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", source, target],
}


@pytest.mark.parametrize("which", ["live", "snapshot"])
def test_what_a_tool_has_written_with_exit_code_0_is_there(
    sandbox: Sandbox, served: Served, backups: dict[str, Path], which: str
) -> None:
    target = served.live if which == "live" else served.image("a")
    others = [served.image("witness"), served.image("a") if which == "live" else served.live]
    kept = [path.read_bytes() for path in others]
    for seed, ((tool, command), (backup, source)) in enumerate(itertools.product(TOOLS.items(), backups.items())):
        _fill(target, seed)
        run(*command(source, target, sandbox))
        expected = source.read_bytes()
        assert target.read_bytes() == expected, (tool, backup)
        assert _uncached(target) == expected, (tool, backup)
        assert target.stat().st_size == SIZE
    assert [path.read_bytes() for path in others] == kept  # I2, I9
    assert [_uncached(path) for path in others] == kept


def test_what_was_written_so_is_durable_with_the_tools_fsync(served: Served, backups: dict[str, Path]) -> None:
    for target in (served.live, served.image("a")):
        _fill(target, 9)
        run("dd", f"if={backups['sparse']}", f"of={target}", "bs=4k", "conv=sparse,fsync")
    served.kill()
    served = served.again()
    for target in (served.live, served.image("a")):
        assert target.read_bytes() == backups["sparse"].read_bytes()


def test_tools_that_cannot_work_here_say_so(sandbox: Sandbox, served: Served, backups: dict[str, Path]) -> None:
    """They replace the file, or set what cannot be set: a failure that the caller sees, and none loses anything."""
    content = _fill(served.live, 3)
    source = backups["sparse"]
    for command in (
        ["install", "-m", "600", source, served.live],
        ["rsync", "-a", "--sparse", source, served.live],
        ["mv", source, served.live],
        ["cp", "--remove-destination", source, served.live],
        ["qemu-img", "convert", "-f", "raw", "-O", "raw", source, served.live],
        ["truncate", "-s", "0", served.live],
        ["truncate", "-s", "+1", served.live],
    ):
        assert run(*command, check=False).returncode != 0, command
        assert served.live.read_bytes() == content, command
    smaller = _sparse(sandbox.path / "smaller", {0: 4096}, SIZE // 2)
    done = run("cp", "--sparse=always", smaller, served.live, check=False)
    assert done.returncode != 0  # it asks for the smaller size
    assert "Operation not permitted" in done.stderr


def test_nothing_written_changes_nothing(served: Served) -> None:
    for target in (served.live, served.image("a")):
        content = _fill(target, 4)
        modified = target.stat().st_mtime_ns
        run("sh", "-c", f": > '{target}'")
        run("cp", "/dev/null", target)
        with target.open("wb") as image:
            os.fsync(image.fileno())
            os.close(os.dup(image.fileno()))
            assert os.fstat(image.fileno()).st_size == SIZE
        assert target.stat().st_mtime_ns == modified
        assert target.read_bytes() == _uncached(target) == content


def test_a_few_bytes_written_leave_what_is_above_them(served: Served) -> None:
    """As on a block device: `dd if=mbr of=disk count=1` is no wipe."""
    content = _fill(served.live, 5)
    run("sh", "-c", f"echo hello > '{served.live}'")
    assert served.live.read_bytes() == b"hello\n" + content[6:]
    run("dd", "if=/dev/zero", f"of={served.live}", "count=1")
    assert served.live.read_bytes() == bytes(512) + content[512:]


def test_duplicated_descriptors_are_closed_one_by_one(served: Served) -> None:
    content = _fill(served.live, 6)
    first = os.open(served.live, os.O_RDWR | os.O_TRUNC)
    second, third = os.dup(first), os.dup(first)
    os.close(third)
    os.pwrite(first, b"x" * 10, 5000)
    os.close(first)
    assert served.live.read_bytes() == bytes(5000) + b"x" * 10 + content[5010:]
    os.pwrite(second, b"y" * 10, 90_000)
    os.close(second)
    assert served.live.read_bytes() == bytes(5000) + b"x" * 10 + bytes(84_990) + b"y" * 10 + content[90_010:]


def test_any_other_size_is_refused(served: Served) -> None:
    content = _fill(served.live, 7)
    with served.live.open("wb") as image:
        for size in (0, 1, SIZE - 1, SIZE + 1, 1 << 50):
            with pytest.raises(PermissionError):
                os.ftruncate(image.fileno(), size)
    for size in (0, 1, SIZE + 1):
        with pytest.raises(PermissionError):
            os.truncate(served.live, size)
    assert "has the size of its device" in served.status["last_error"]
    os.truncate(served.live, SIZE)
    assert served.live.read_bytes() == content


@pytest.mark.parametrize(
    "extend",
    [lambda fd: os.ftruncate(fd, SIZE), lambda fd: os.pwrite(fd, b"\0", SIZE - 1)],
    ids=["by its size", "by its last byte"],
)
def test_a_mapped_output_is_kept(served: Served, extend: Callable[[int], object]) -> None:
    """As a linker writes: O_TRUNC, the size, and stores into the mapping, which shows zeroes beside them."""
    for target in (served.live, served.image("a")):
        _fill(target, 8)
        with target.open("w+b") as image:
            extend(image.fileno())
            with mmap.mmap(image.fileno(), SIZE) as mapped:
                mapped[2_500_000:2_500_005] = b"first"
                mapped[70_000:70_005] = mapped[-9:-4] = b"other"
                assert mapped[-100:-9] == bytes(91)
        expected = bytearray(SIZE)
        expected[2_500_000:2_500_005] = b"first"
        expected[70_000:70_005] = expected[-9:-4] = b"other"
        assert target.read_bytes() == _uncached(target) == expected


def test_mapped_pages_of_others_are_not_taken_for_the_tools_own(served: Served) -> None:
    """The kernel may send them with the handle of whoever has the image open for writing, as the last one."""
    content = bytearray(_fill(served.live, 11))
    with served.live.open("r+b") as other, mmap.mmap(other.fileno(), SIZE) as mapped:
        tool = os.open(served.live, os.O_WRONLY | os.O_TRUNC)
        mapped[SIZE - 8192 : SIZE - 8188] = b"mine"
        mapped.flush()
        os.close(tool)
    content[SIZE - 8192 : SIZE - 8188] = b"mine"
    assert served.live.read_bytes() == _uncached(served.live) == content


def test_a_tool_that_finds_no_room_is_told(sandbox: Sandbox) -> None:
    """What it skips has to be kept for the snapshot: the zeroes are writes like others."""
    disk = sandbox.disk(content=random.Random(12).randbytes(64 << 20))
    served = sandbox.mount(disk, options=["--quota", "32M", "-o", "on_full=block-writes"])
    (served.snaps / "a").mkdir()
    source = _sparse(sandbox.path / "source", {(64 << 20) - 4096: 4096}, 64 << 20)
    done = run("cp", "--sparse=always", source, served.live, check=False)
    assert done.returncode != 0
    assert os.strerror(errno.ENOSPC) in done.stderr
    assert served.info("a")["state"] == "valid"
    assert served.image("a").read_bytes() == random.Random(12).randbytes(64 << 20)


@pytest.mark.parametrize("direct_io", ["off", "on"])
def test_who_has_the_image_open_is_not_disturbed(sandbox: Sandbox, served: Served, direct_io: str) -> None:
    """No moment at which the file seems empty: a loop device would read zeroes then."""
    device = sandbox.loop(served.live, f"--direct-io={direct_io}")
    stop = threading.Event()
    opened = 0

    def open_again_and_again() -> None:
        nonlocal opened
        while not stop.is_set():
            os.close(os.open(served.live, os.O_WRONLY | os.O_TRUNC))
            opened += 1

    thread = threading.Thread(target=open_again_and_again)
    thread.start()
    try:
        fio_verify(sandbox, device, SIZE >> 20)
        with served.live.open("r+b") as image, mmap.mmap(image.fileno(), SIZE) as mapped:
            stores = {random.Random(number).randrange(SIZE - 8): number for number in range(0, 2000)}
            for offset in stores:
                mapped[offset] = 7
            assert all(mapped[offset] == 7 for offset in stores)
            mapped.flush()
            assert all(mapped[offset] == 7 for offset in stores)
    finally:
        stop.set()
        thread.join()
    assert opened > 100
    assert served.live.read_bytes() == _uncached(served.live)
