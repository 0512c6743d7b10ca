"""Loop devices as sysfs shows them; detaching them, and setting them up again as they were.

sysfs answers also when the file system of the backing file is dead or hangs; LOOP_GET_STATUS64 does not.
"""

import ctypes
import errno
import fcntl
import os
import struct
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from hcpfs.system.blocks import entry_of, number_of

DELETED = " (deleted)"  # the kernel adds it to the path once it has noticed that names cannot be looked up any more
SECTOR_BYTES = 512

_CLR_FD, _CONFIGURE, _GET_FREE = 0x4C01, 0x4C0A, 0x4C82
_READ_ONLY, _AUTOCLEAR, _PARTSCAN, _DIRECT_IO = 1, 4, 8, 16
# struct loop_config with its loop_info64: descriptor of the file, block size, offset, size limit, flags; all else zero
_CONFIG = struct.Struct("=II 24x QQ 12x I 240x")
# struct blkpg_ioctl_arg: operation, address of a struct blkpg_partition: start and length in bytes, number
_BLKPG, _ADD = 0x1269, 1
_BLKROSET = 0x125D
_BLKPG_ARGUMENT = struct.Struct("@iiiP")
_PARTITION = struct.Struct("@qqi128x0q")
_DETACH_SECONDS = 2.0  # it takes a moment after the last use
_TRIES = 16


class LoopState(NamedTuple):
    """How a loop device is set up. Offset and sizes in bytes; a size limit of 0 means none."""

    name: str  #: such as loop0
    file: str
    offset: int
    size_limit: int
    block_size: int
    read_only: bool
    direct_io: bool
    part_scan: bool
    autoclear: bool
    partitions: tuple[tuple[int, int, int], ...]  #: number, start and length in sectors of 512 bytes

    @property
    def path(self) -> str:
        """The device."""
        return f"/dev/{self.name}"

    @property
    def size_bytes(self) -> int:
        """The size of the device, in whole sectors; 0 when it is gone."""
        with suppress(OSError, ValueError):
            return int(Path(f"/sys/block/{self.name}/size").read_text()) * SECTOR_BYTES
        return 0

    @property
    def device(self) -> int:
        """The device number, or 0 when it is gone."""
        return number_of(Path(f"/sys/block/{self.name}")) or 0


def states() -> list[LoopState]:
    """All loop devices that have a backing file."""
    found = []
    for entry in sorted(Path("/sys/block").glob("loop*")):
        with suppress(OSError):  # not set up, or gone meanwhile
            found.append(_state(entry))
    return found


def _state(entry: Path) -> LoopState:
    file = os.fsdecode((entry / "loop/backing_file").read_bytes().rstrip(b"\n"))

    def number(name: str) -> int:
        return int((entry / name).read_text())

    return LoopState(
        entry.name,
        file,
        number("loop/offset"),
        number("loop/sizelimit"),
        number("queue/logical_block_size"),
        bool(number("ro")),
        bool(number("loop/dio")),
        bool(number("loop/partscan")),
        bool(number("loop/autoclear")),
        tuple(sorted(_partitions(entry))),
    )


def _partitions(entry: Path) -> Iterator[tuple[int, int, int]]:
    for part in entry.glob("*/partition"):
        number, start, length = (int((part.parent / name).read_text()) for name in ("partition", "start", "size"))
        yield number, start, length


def detach(state: LoopState) -> bool:
    """Detach the device. False when it is still in use: it is detached when its last user closes it. Raises OSError."""
    try:
        fd = os.open(state.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            fcntl.ioctl(fd, _CLR_FD)
        finally:
            os.close(fd)
    except OSError as error:
        if error.errno not in (errno.ENXIO, errno.ENOENT):  # detached already
            raise
    deadline = time.monotonic() + _DETACH_SECONDS
    shown = Path(f"/sys/block/{state.name}/loop/backing_file")
    while shown.exists():
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.01)
    return True


def attach(state: LoopState) -> tuple[str, int]:
    """Set a loop device up in this way, under the same name if that is free.

    Returns its name and a descriptor of it. With autoclear it is detached when its last descriptor and mount are gone.
    Raises OSError.
    """
    flags = os.O_RDONLY if state.read_only else os.O_RDWR
    file = os.open(state.file, flags | os.O_CLOEXEC)
    try:
        with suppress(FileNotFoundError):
            device = os.open(state.path, flags | os.O_CLOEXEC)
            if _configure(device, state, file):
                return state.name, device
        for _ in range(_TRIES):
            name = _free()
            device = os.open(f"/dev/{name}", flags | os.O_CLOEXEC)
            if _configure(device, state, file):
                return name, device
        raise OSError(errno.EBUSY, "others take every free loop device first")
    finally:
        os.close(file)


def _configure(device: int, state: LoopState, file: int) -> bool:
    """Give the device its backing file. When it has one already, close it and return False."""
    try:
        fcntl.ioctl(device, _CONFIGURE, _config(state, file))
    except OSError as error:
        os.close(device)
        if error.errno == errno.EBUSY:
            return False
        raise
    if not state.read_only:  # a flag that somebody set on the device of that number stays with it
        fcntl.ioctl(device, _BLKROSET, bytes(4))
    _add_partitions(device, state)
    return True


def _add_partitions(device: int, state: LoopState) -> None:
    """Add the partitions that the kernel did not find because somebody had added them by hand (partx)."""
    entry = entry_of(os.fstat(device).st_rdev)
    there = {number for number, _, _ in _partitions(entry)}
    for number, start, length in state.partitions:
        if number not in there:
            part = ctypes.create_string_buffer(
                _PARTITION.pack(start * SECTOR_BYTES, length * SECTOR_BYTES, number), _PARTITION.size
            )
            with suppress(OSError):  # whoever wants to use it sees that it is missing
                fcntl.ioctl(device, _BLKPG, _BLKPG_ARGUMENT.pack(_ADD, 0, _PARTITION.size, ctypes.addressof(part)))


def _config(state: LoopState, file: int) -> bytes:
    flags = (
        _READ_ONLY * state.read_only
        | _AUTOCLEAR * state.autoclear
        | _PARTSCAN * state.part_scan
        | _DIRECT_IO * state.direct_io
    )
    return _CONFIG.pack(file, state.block_size, state.offset, state.size_limit, flags)


def _free() -> str:
    control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    try:
        return f"loop{fcntl.ioctl(control, _GET_FREE)}"
    finally:
        os.close(control)
