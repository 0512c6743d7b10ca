"""The other servers: how each is started over a file, where its image is then, and how it is stopped.

Each takes the sandbox, which cleans up after a failure, and the file below. The peers leave that as it is and keep what
is written elsewhere, as hcpfs does for its images. A server that cannot be had raises AbsentError.
"""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from tests.bench.plan import NBDKIT, PASSTHROUGH, QEMU, REFLINK, XMOUNT
from tests.bench.rounds import AbsentError
from tests.support.sandbox import Sandbox, run, wait_until

EXAMPLE = Path("/usr/share/doc/libfuse3-dev/examples/passthrough_ll.c")
NBD_CONNECTIONS = 4  # what nbdfuse takes by itself where the server allows it

Peer = Callable[[Sandbox, Path], AbstractContextManager[Path]]


@contextmanager
def qemu(sandbox: Sandbox, below: Path) -> Iterator[Path]:
    """A FUSE export of a fresh qcow2 overlay."""
    _need("qemu-img", "qemu-storage-daemon")
    place = _place(sandbox, "qemu")
    overlay, image = place / "overlay.qcow2", place / "image"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", below, "-F", "raw", overlay)
    image.touch()
    disk = f"driver=qcow2,node-name=overlay,file.driver=file,file.filename={overlay}"
    export = f"type=fuse,id=export,node-name=overlay,mountpoint={image},writable=on,allow-other=off"
    with _daemon(sandbox, image, image, "qemu-storage-daemon", "--blockdev", disk, "--export", export):
        yield image
    shutil.rmtree(place)


@contextmanager
def nbdkit(sandbox: Sandbox, below: Path) -> Iterator[Path]:
    """The copy-on-write filter of nbdkit, whose overlay is a temporary file, and nbdfuse over its socket."""
    _need("nbdkit", "nbdfuse")
    place = _place(sandbox, "nbdkit")
    socket, mountpoint = place / "socket", place / "mnt"
    mountpoint.mkdir()
    server = sandbox.spawn(
        "nbdkit", "--foreground", "--unix", socket, "--filter=cow", "file", below,
        env={**os.environ, "TMPDIR": str(place)}, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    wait_until(lambda: socket.exists() or server.poll() is not None, what="nbdkit's socket")
    image = mountpoint / "image"
    words = ("nbdfuse", "-C", NBD_CONNECTIONS, image, f"nbd+unix:///?socket={socket}")
    with _daemon(sandbox, mountpoint, image, *words):
        yield image
    server.terminate()
    server.wait()
    shutil.rmtree(place)


@contextmanager
def xmount(sandbox: Sandbox, below: Path) -> Iterator[Path]:
    """An xmount with a cache file, which takes the writes."""
    _need("xmount")
    place = _place(sandbox, "xmount")
    mountpoint = place / "mnt"
    mountpoint.mkdir()
    image = mountpoint / f"{below.stem}.dd"
    run("xmount", "--in", "raw", below, "--out", "raw", "--cache", place / "cache", mountpoint)
    wait_until(image.exists, what="xmount's image")
    yield image
    sandbox.unmount(mountpoint)
    shutil.rmtree(place)


@contextmanager
def passthrough(sandbox: Sandbox, below: Path) -> Iterator[Path]:
    """The example of libfuse, single-threaded, over a copy of the file: what FUSE allows, without any copy-on-write."""
    if not EXAMPLE.exists():
        raise AbsentError(f"{EXAMPLE} is not there: libfuse3-dev comes without its examples")
    place = _place(sandbox, "passthrough")
    program, source, mountpoint = place / "passthrough_ll", place / "source", place / "mnt"
    flags = run("pkg-config", "fuse3", "--cflags", "--libs").stdout.split()
    run("gcc", "-O2", EXAMPLE, *flags, "-o", program)
    source.mkdir()
    mountpoint.mkdir()
    shutil.copyfile(below, source / "image")
    image = mountpoint / "image"
    with _daemon(sandbox, mountpoint, image, program, "-s", "-f", "-o", f"source={source}", mountpoint):
        yield image
    shutil.rmtree(place)


@contextmanager
def reflink(sandbox: Sandbox, below: Path) -> Iterator[Path]:
    """A reflink copy in an XFS on a loop device: copy-on-write by the kernel, for whoever has such a file system."""
    _need("mkfs.xfs")
    place = _place(sandbox, "reflink")
    disk = place / "disk"
    with disk.open("wb") as file:
        file.truncate(3 * below.stat().st_size + (1 << 30))
    sandbox.format(disk, "xfs")
    device = sandbox.loop(disk, "--direct-io=on")
    root = sandbox.mount_device(device, "reflink/mnt")
    shutil.copyfile(below, root / "origin")
    run("cp", "--reflink=always", root / "origin", root / "image")
    run("sync", "-f", root)
    yield root / "image"
    sandbox.unmount(root)
    sandbox.unloop(device)
    shutil.rmtree(place)


ALL: dict[str, Peer] = {
    QEMU: qemu,
    NBDKIT: nbdkit,
    XMOUNT: xmount,
    PASSTHROUGH: passthrough,
    REFLINK: reflink,
}


def _need(*programs: str) -> None:
    missing = [program for program in programs if shutil.which(program) is None]
    if missing:
        raise AbsentError(f"not installed: {', '.join(missing)}")


def _place(sandbox: Sandbox, name: str) -> Path:
    place = sandbox.path / name
    place.mkdir()
    return place


@contextmanager
def _daemon(sandbox: Sandbox, mountpoint: Path, image: Path, *command: object) -> Iterator[None]:
    """A server that mounts by itself: wait until its image is there; unmount, and it ends."""
    log = sandbox.path / f"{Path(str(command[0])).name}.log"
    with log.open("wb") as errors:
        server = sandbox.spawn(*command, stdout=errors, stderr=errors)

    def is_served() -> bool:
        if server.poll() is not None:
            raise AbsentError(f"it exited {server.returncode}: {log.read_text()}")
        return image.exists() and image.stat().st_size > 0

    wait_until(is_served, what=f"the image of {log.stem}")
    yield
    sandbox.unmount(mountpoint)
    server.terminate()
    server.wait()
