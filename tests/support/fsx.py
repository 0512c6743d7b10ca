"""Random operations on a file or a block device of fixed size, held against a copy in memory: a small fsx.

Reads and writes of any offset and length, aligned ones with O_DIRECT, through a shared mapping, with syncs, reopened
descriptors and dropped caches in between.
"""

import errno
import mmap
import os
import random
from pathlib import Path

PAGE = 4096
MOST_BYTES = 64 * 1024
NOISE_BYTES = 4 << 20


class Fsx:
    """Works on `path`, whose content is `model`. Every read is compared at once."""

    def __init__(self, path: Path | str, model: bytearray, random_: random.Random) -> None:
        self.operations = 0
        self._path = path
        self._model = model
        self._random = random_
        self._fd = os.open(path, os.O_RDWR)
        self._direct = os.open(path, os.O_RDWR | os.O_DIRECT)
        self._buffer = mmap.mmap(-1, MOST_BYTES)
        self._actions = [
            (30, self._read),
            (30, self._write),
            (10, self._read_direct),
            (10, self._write_direct),
            (6, self._read_mapped),
            (6, self._write_mapped),
            (3, self._sync),
            (2, self._reopen),
            (3, self._drop_cache),
        ]
        self._weights = [weight for weight, _ in self._actions]
        self._noise = random_.randbytes(NOISE_BYTES)

    def step(self) -> None:
        """One more operation."""
        (_, action) = self._random.choices(self._actions, self._weights)[0]
        action()
        self.operations += 1

    def check(self) -> None:
        """Compare all of it."""
        self._drop_cache()
        for offset in range(0, len(self._model), 1 << 20):
            self._compare(os.pread(self._fd, 1 << 20, offset), offset)

    def settle(self) -> None:
        """Have all that was written arrive where snapshots are taken."""
        os.fsync(self._fd)

    def close(self) -> None:
        self._buffer.close()
        os.close(self._direct)
        os.close(self._fd)

    def _extent(self, align: int = 1) -> tuple[int, int]:
        length = self._random.choice((1, 100, 511, 512, 4096, 5000, 16384, MOST_BYTES))
        length = max(align, length // align * align)
        offset = self._random.randrange(len(self._model) // align) * align
        return offset, min(length, (len(self._model) - offset) // align * align)

    def _fresh(self, length: int) -> bytes:
        """Bytes that are hardly ever the same twice, cut out of noise, which is faster than making them."""
        start = self._random.randrange(NOISE_BYTES - length)
        return self._noise[start : start + length]

    def _compare(self, found: bytes, offset: int) -> None:
        expected = self._model[offset : offset + len(found)]
        if found == expected:
            return
        at = next(place for place in range(len(found)) if found[place] != expected[place])
        raise AssertionError(f"{self._path} at offset {offset + at} after {self.operations} operations reads wrong")

    def _take(self, offset: int, data: bytes) -> None:
        self._model[offset : offset + len(data)] = data

    def _read(self) -> None:
        offset, length = self._extent()
        found = os.pread(self._fd, length, offset)
        assert len(found) == length
        self._compare(found, offset)

    def _write(self) -> None:
        offset, length = self._extent()
        data = self._fresh(length)
        assert os.pwrite(self._fd, data, offset) == length
        self._take(offset, data)

    def _read_direct(self) -> None:
        offset, length = self._extent(PAGE)
        self._compare(self._buffer[: os.preadv(self._direct, [memoryview(self._buffer)[:length]], offset)], offset)

    def _write_direct(self) -> None:
        offset, length = self._extent(PAGE)
        data = self._fresh(length)
        self._buffer[:length] = data
        assert os.pwritev(self._direct, [memoryview(self._buffer)[:length]], offset) == length
        self._take(offset, data)

    def _map(self) -> mmap.mmap:
        return mmap.mmap(self._fd, len(self._model) // PAGE * PAGE)

    def _read_mapped(self) -> None:
        offset, length = self._extent()
        length = min(length, len(self._model) // PAGE * PAGE - offset)
        with self._map() as mapped:
            self._compare(mapped[offset : offset + max(0, length)], offset)

    def _write_mapped(self) -> None:
        offset, length = self._extent()
        length = max(0, min(length, len(self._model) // PAGE * PAGE - offset))
        data = self._fresh(length)
        with self._map() as mapped:
            mapped[offset : offset + length] = data
            mapped.flush()
        self._take(offset, data)

    def _sync(self) -> None:
        os.fsync(self._fd)

    def _reopen(self) -> None:
        os.close(self._fd)
        self._fd = os.open(self._path, os.O_RDWR)

    def _drop_cache(self) -> None:
        os.fsync(self._fd)
        try:
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
