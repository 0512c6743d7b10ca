"""A disk that fails in one place, under an engine with a store on it."""

import errno
import os
from collections.abc import Callable

from cow.device import FALLOC_PUNCH_HOLE, Io
from cow.geometry import CHUNK_BYTES
from tests.support.engine import Engine


class BadIo(Io):
    """The system's calls, of which those that `fails` picks by name and path fail."""

    def __init__(self) -> None:
        self.fails: Callable[[str, str], bool] = lambda call, path: False
        self.errno = errno.EIO

    def _check(self, call: str, path: str) -> None:
        if self.fails(call, path):
            raise OSError(self.errno, os.strerror(self.errno))

    def pread(self, fd: int, length: int, offset: int) -> bytes:
        self._check("pread", os.readlink(f"/proc/self/fd/{fd}"))
        return os.pread(fd, length, offset)

    def preadv(self, fd: int, into: list[memoryview], offset: int, flags: int = 0) -> int:
        self._check("pread", os.readlink(f"/proc/self/fd/{fd}"))
        return os.preadv(fd, into, offset, flags)

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        self._check("pwrite", os.readlink(f"/proc/self/fd/{fd}"))
        return os.pwrite(fd, data, offset)

    def pwritev(self, fd: int, parts: list[bytes], offset: int, flags: int = 0) -> int:
        self._check("pwrite", os.readlink(f"/proc/self/fd/{fd}"))
        return os.pwritev(fd, parts, offset, flags)

    def fsync(self, fd: int) -> None:
        self._check("fsync", os.readlink(f"/proc/self/fd/{fd}"))
        os.fsync(fd)

    def fdatasync(self, fd: int) -> None:
        self._check("fdatasync", os.readlink(f"/proc/self/fd/{fd}"))
        os.fdatasync(fd)

    def unlink(self, name: str, *, dir_fd: int) -> None:
        self._check("unlink", name)
        os.unlink(name, dir_fd=dir_fd)

    def fallocate(self, fd: int, mode: int, offset: int, length: int) -> None:
        self._check("punch" if mode & FALLOC_PUNCH_HOLE else "fallocate", os.readlink(f"/proc/self/fd/{fd}"))
        super().fallocate(fd, mode, offset, length)


def at_first(count: int, call: str, file: str) -> Callable[[str, str], bool]:
    """Calls to a file fail so many times, and then no more."""
    left = list(range(count))
    return lambda called, path: called == call and path.endswith(file) and bool(left) and left.pop() >= 0


def take(engine: Engine, name: bytes) -> object:
    """Take a snapshot; its image."""
    return engine.call(engine.store.create_snapshot, name).images[0]


def write(engine: Engine, image: object, chunk: int, byte: bytes) -> None:
    """Write a chunk, durably."""
    engine.call(image.write, chunk * CHUNK_BYTES, byte * CHUNK_BYTES)
    engine.call(image.sync)
