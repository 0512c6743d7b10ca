"""The scene of a measuring: disks of random bytes on tmpfs, servers over them, and snapshots that come and go.

Everything is below one sandbox, on the same tmpfs for all servers, and gone at the end.
"""

import os
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.bench import peers
from tests.bench.fio import Cell
from tests.bench.plan import MIB
from tests.bench.rounds import FAILURES, Measured
from tests.support.sandbox import Sandbox, Served, run

PIECE = 16 * MIB


class Scene:
    """A sandbox, and who serves in it."""

    def __init__(self, measured: Measured) -> None:
        self.measured = measured
        self.plan = measured.plan
        self.sandbox = Sandbox()
        self.images: dict[str, Path] = {}  #: of the other servers, by name
        self._running = ExitStack()

    def disk(self, size: int, name: str = "disk.img") -> Path:
        """A file that no server can make smaller: random bytes, some MiB of them again and again."""
        piece = os.urandom(PIECE)
        path = self.sandbox.path / name
        with path.open("wb") as file:
            for offset in range(0, size, PIECE):
                file.write(piece[: size - offset])
        return path

    def copy(self, path: Path, name: str) -> Path:
        """Another file of the same content; holes stay holes."""
        copied = self.sandbox.path / name
        run("cp", "--sparse=auto", path, copied)
        return copied

    def serve(self, disk: Path, name: str) -> Served:
        """Mount hcpfs over the disk."""
        place = self.sandbox.path / name
        place.mkdir()
        return self.sandbox.mount(disk, mountpoint=place / "mnt", store=place / "store")

    @contextmanager
    def on_loop(self, image: Path, name: str) -> Iterator[Path]:
        """The file system in the image, mounted from a loop device."""
        device = self.sandbox.loop(image, "--direct-io=on")
        root = self.sandbox.mount_device(device, name)
        yield root
        self.sandbox.unmount(root)
        self.sandbox.unloop(device)

    def start(self, below: Path, *servers: str) -> None:
        """Start other servers over the file. Who does not start is absent, and the reason is kept."""
        for server in servers:
            try:
                self.images[server] = self._running.enter_context(peers.ALL[server](self.sandbox, below))
            except FAILURES as error:
                self.measured.miss(server, error)

    def stop(self) -> None:
        """Stop them."""
        self.images.clear()
        self._running.close()


@contextmanager
def scene(measured: Measured) -> Iterator[Scene]:
    """A scene that is gone at the end. After a failure nobody is asked to stop: the sandbox ends them."""
    one = Scene(measured)
    try:
        yield one
        one.stop()
    finally:
        one.sandbox.close()


def overwrite(image: Path) -> None:
    """Write all of the image once, durably: from then on its chunks are where they stay."""
    Cell("write", "1M").for_bytes(image, image.stat().st_size, seed=1)


def scatter(image: Path, part: int, seed: int) -> None:
    """Write one `part`-th of the image's chunks, at random places."""
    Cell("randwrite", "4k", depth=16).for_bytes(image, image.stat().st_size // part, seed)


class Snapshots:
    """A number of snapshots of a mount, of which the oldest goes when a new one comes.

    `between` is done before each of the first ones, so that it has something of its own.
    """

    def __init__(self, served: Served, count: int, between: Callable[[], object] = lambda: None) -> None:
        self.served = served
        self._names: list[str] = []
        self._made = 0
        for _ in range(count):
            between()
            self._take()

    def renew(self) -> None:
        """Drop the oldest, take a new one."""
        (self.served.snaps / self._names.pop(0)).rmdir()
        self._take()

    def _take(self) -> None:
        self._made += 1
        name = f"s{self._made}"
        (self.served.snaps / name).mkdir()
        self._names.append(name)


def change_a_few(image: Path) -> None:
    """Change a few chunks somewhere, durably."""
    chunks = image.stat().st_size >> 12
    descriptor = os.open(image, os.O_RDWR)
    try:
        for _ in range(16):
            os.pwrite(descriptor, os.urandom(4096), random.randrange(chunks) << 12)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def warm(size: int) -> None:
    """Touch so much memory, and give it back: the first touch is slow in virtual machines."""
    piece = bytes(PIECE)
    path = Path(f"/dev/shm/hcpfs-warm-{os.getpid()}")
    try:
        with path.open("wb") as file:
            for _ in range(0, size, PIECE):
                file.write(piece)
    finally:
        path.unlink()
