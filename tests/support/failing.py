"""A disk that fails in one place, under an engine with a store on it."""

import errno
import os
from collections.abc import Callable
from functools import partial

from cow.disk.io import FALLOC_PUNCH_HOLE, Io
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

    def open(self, path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        self._check("open", path if dir_fd is None else f"{os.readlink(f'/proc/self/fd/{dir_fd}')}/{path}")
        return os.open(path, flags, mode, dir_fd=dir_fd)

    def pread_direct(self, fd: int, length: int, offset: int) -> bytes:
        self._check("pread", os.readlink(f"/proc/self/fd/{fd}"))
        return super().pread_direct(fd, length, offset)

    def pwrite_direct(self, fd: int, data: bytes, offset: int) -> None:
        self._check("pwrite", os.readlink(f"/proc/self/fd/{fd}"))
        super().pwrite_direct(fd, data, offset)

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


class BadSectors:
    """Chunks of the device that cannot be read, until they are written to, or `chunks` is changed.

    With `are_for_good` they cannot be written to either.
    """

    def __init__(self, io: BadIo, chunks: set[int], *, file: str = "disk.img", are_for_good: bool = False) -> None:
        self.chunks = chunks
        self.errno = errno.EIO
        self._file, self._are_for_good = file, are_for_good
        self._real_pwrite, self._real_pwritev = io.pwrite, io.pwritev
        io.pwrite_direct = self._pwrite
        for name in ("pread", "pread_direct"):
            setattr(io, name, partial(self._read, getattr(io, name)))
        real = io.preadv
        io.preadv = lambda fd, into, offset, flags=0: self._fill(real, fd, into, offset, flags)
        io.pwrite = self._pwrite
        io.pwritev = self._pwritev

    def _touched(self, fd: int, length: int, offset: int) -> set[int]:
        if not os.readlink(f"/proc/self/fd/{fd}").endswith(self._file):
            return set()
        return self.chunks & set(range(offset // CHUNK_BYTES, -(-(offset + length) // CHUNK_BYTES)))

    def _check(self, fd: int, length: int, offset: int) -> None:
        if self._touched(fd, length, offset):
            raise OSError(self.errno, os.strerror(self.errno))

    def _read(self, real: Callable[[int, int, int], bytes], fd: int, length: int, offset: int) -> bytes:
        self._check(fd, length, offset)
        return real(fd, length, offset)

    def _fill(self, real: Callable[..., int], fd: int, into: list[memoryview], offset: int, flags: int) -> int:
        self._check(fd, len(into[0]), offset)
        return real(fd, into, offset, flags)

    def _pwrite(self, fd: int, data: bytes, offset: int) -> int:
        return self._overwrite(fd, len(data), offset, self._real_pwrite, data, offset)

    def _pwritev(self, fd: int, parts: list[bytes], offset: int, flags: int = 0) -> int:
        return self._overwrite(fd, sum(map(len, parts)), offset, self._real_pwritev, parts, offset, flags)

    def _overwrite(self, fd: int, length: int, offset: int, real: Callable[..., int], *arguments: object) -> int:
        if self._are_for_good:
            self._check(fd, length, offset)
        written = real(fd, *arguments)
        self.chunks -= self._touched(fd, length, offset)
        return written


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
