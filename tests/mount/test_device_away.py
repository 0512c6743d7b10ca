"""What serves the disk dies, really: nothing is lost, and all goes on with the disk when it is back."""

import contextlib
import errno
import os
from pathlib import Path

import pytest

from tests.support.sandbox import Sandbox, Served, run

MIB = 1 << 20
SIZE = 16 * MIB


def _served(sandbox: Sandbox, way: str, options: list[str]) -> tuple[Served, Served, object, bytes]:
    """A disk that a daemon below serves, as a file or as a loop device on it, with a snapshot."""
    content = os.urandom(SIZE)
    below = sandbox.mount(sandbox.disk(content=content), mountpoint=sandbox.path / "below", store=sandbox.path / "sa")
    source = sandbox.loop(below.live) if way == "a loop device" else below.live
    above = sandbox.mount(f"n={source}", mountpoint=sandbox.path / "above", store=sandbox.path / "sb", options=options)
    (above.snaps / "x").mkdir()
    return below, above, source, content


def _write(image: Path, offset: int, data: bytes) -> int:
    """Write and flush; the errno, 0 for none."""
    descriptor = os.open(image, os.O_RDWR)
    try:
        view = memoryview(data)
        while view:
            written = os.pwrite(descriptor, view, offset)
            view, offset = view[written:], offset + written
        os.fsync(descriptor)
    except OSError as error:
        return error.errno
    finally:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    return 0


@pytest.mark.parametrize("options", [[], ["--sync"]], ids=["write-behind", "sync"])
@pytest.mark.parametrize("way", ["a file", "a loop device"])
def test_i1_a_disk_whose_server_dies_loses_no_snapshot_anything(sandbox: Sandbox, way: str, options: list[str]) -> None:
    below, above, source, content = _served(sandbox, way, options)
    below.die()
    assert _write(above.live, 4 * MIB, os.urandom(4 * MIB)) in (errno.EIO, errno.ENOTCONN)
    status = (above.path / "status").read_text()
    assert "the device is away" in status or f"image n ({source}) cannot be " in status, status
    assert above.info("x")["state"] == "valid"
    above.kill()
    if way == "a loop device":
        run("losetup", "-d", source)
    run("umount", "-l", below.path)
    below = below.again()
    source = sandbox.loop(below.live) if way == "a loop device" else below.live
    assert below.live.read_bytes() == content
    above = sandbox.mount(f"n={source}", mountpoint=above.path, store=above.store, options=options)
    assert above.info("x")["state"] == "valid"
    assert above.image("x").read_bytes() == content
    assert (above.snaps / "x" / "lost").read_bytes() == b""
    assert _write(above.live, 4 * MIB, b"n" * MIB) == 0
    assert above.image("x").read_bytes() == content


def test_the_file_system_of_a_sparse_disk_is_full_and_status_says_which(sandbox: Sandbox) -> None:
    """A small tmpfs holds the disk; the store has plenty."""
    place = sandbox.path / "small"
    place.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=4M", "none", place)
    with contextlib.ExitStack() as stack:
        stack.callback(run, "umount", "-l", place)
        with (place / "disk.img").open("wb") as disk:
            disk.truncate(SIZE)
        served = sandbox.mount(place / "disk.img")
        stack.callback(served.kill)
        (served.snaps / "x").mkdir()
        assert _write(served.live, 0, b"n" * 8 * MIB) == errno.ENOSPC
        status = (served.path / "status").read_text()
        assert f"image disk.img ({place}/disk.img) cannot be written at offset" in status, status
        assert "it is a sparse file" in status
        assert served.info("x")["state"] == "valid"
        assert served.image("x").read_bytes() == bytes(SIZE)


def test_a_disk_image_that_is_cut_while_it_is_served_says_what_to_do(sandbox: Sandbox) -> None:
    content = os.urandom(SIZE)
    disk = sandbox.disk(content=content)
    served = sandbox.mount(disk)
    (served.snaps / "x").mkdir()
    os.truncate(disk, 4 * MIB)
    assert _write(served.live, 10 * MIB, b"n" * MIB) == errno.EIO
    assert disk.stat().st_size == 4 * MIB
    status = (served.path / "status").read_text()
    assert f"{disk} was cut from {SIZE} to {4 * MIB} bytes" in status, status
    with served.image("x").open("rb", buffering=0) as image:
        assert image.read(4 * MIB) == content[: 4 * MIB]
        with pytest.raises(OSError, match="Input/output error"):
            image.read(MIB)
    served.kill()
    refusal = sandbox.refusal(disk, served.path, "--store", served.store)
    assert f"shrank from {SIZE} to {4 * MIB} bytes" in refusal
    assert "truncate alone gives zeroes" in refusal
    disk.write_bytes(content)
    served = served.again()
    assert served.image("x").read_bytes() == content
