"""A disk with a volatile cache that logs what reaches it: qemu-storage-daemon's blklogwrites, in the format of
dm-log-writes (Documentation/admin-guide/device-mapper/log-writes.rst), and the replay of that log up to a flush.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.support.sandbox import Sandbox, wait_until

_MAGIC = 0x6A736677736872
_SUPER = struct.Struct("<QQQI")  # magic, version, entries, bytes a sector
_ENTRY = struct.Struct("<QQQQ")  # sector, sectors, flags, bytes of data
_FLUSH, _FUA, _DISCARD = 1, 2, 4


class Entry(NamedTuple):
    """A write, or a flush (which may carry data too)."""

    offset: int
    length: int
    is_flush: bool
    is_discard: bool
    data: bytes


class LoggedDisk:
    """A loop device on a disk image whose writes and flushes are logged."""

    def __init__(self, sandbox: Sandbox, size: int) -> None:
        self.size = size
        self._log = sandbox.disk("log.img", 1 << 30)
        export = sandbox.disk("export.img", 0)
        image = sandbox.disk("logged.img", size)
        sandbox.spawn(
            "qemu-storage-daemon",
            *("--blockdev", f"driver=file,node-name=disk,filename={image}"),
            *("--blockdev", f"driver=file,node-name=log,filename={self._log}"),
            *("--blockdev", "driver=blklogwrites,node-name=logged,file=disk,log=log,log-super-update-interval=1"),
            *("--export", f"type=fuse,id=export,node-name=logged,mountpoint={export},writable=on"),
        )
        wait_until(lambda: export.stat().st_size == size, what="the export of qemu-storage-daemon")
        self.device = sandbox.loop(export, "--direct-io=off")

    def entries_so_far(self) -> int:
        """How many entries the log has, up to the last flush."""
        with self._log.open("rb") as log:
            magic, _, entries, _ = _SUPER.unpack(log.read(_SUPER.size))
        assert magic in (0, _MAGIC)
        return entries

    def entries(self) -> Iterator[Entry]:
        """All entries up to the last flush."""
        with self._log.open("rb") as log:
            _, _, count, sector_bytes = _SUPER.unpack(log.read(_SUPER.size))
            at = sector_bytes
            for _ in range(count):
                log.seek(at)
                sector, sectors, flags, _ = _ENTRY.unpack(log.read(_ENTRY.size))
                at += sector_bytes
                length = sectors * sector_bytes
                is_discard = bool(flags & _DISCARD)
                data = b""
                if length and not is_discard:
                    log.seek(at)
                    data = log.read(length)
                    at += length
                yield Entry(sector * sector_bytes, length, bool(flags & _FLUSH), is_discard, data)


def replay(entries: Iterator[Entry], size: int) -> Iterator[tuple[int, bytearray]]:
    """The disk's content at each flush, with the number of entries up to it. The content is used on: copy it."""
    content = bytearray(size)
    for number, entry in enumerate(entries, 1):
        if entry.is_discard:
            content[entry.offset : entry.offset + entry.length] = bytes(entry.length)
        else:
            content[entry.offset : entry.offset + entry.length] = entry.data
        if entry.is_flush:
            yield number, content


def write_image(path: Path, content: bytearray) -> Path:
    """The content as a file."""
    path.write_bytes(content)
    return path
