"""Reads that wait for a disk, many under way at once in one thread: io_uring(7), through its system calls.

A thread for each read costs two wake-ups and takes the interpreter away from the thread that serves, which is several
times the work of the read. Here a read costs an entry of the submission queue; one system call starts all that were
queued, and what has completed is seen in shared memory.

The structures are those of <linux/io_uring.h>; the kernel is asked for no flags, so that the oldest that has the ring's
reads (Linux 5.6) will do. Entries of the queues are read and written by the thread that makes the system calls, which
order them; what the kernel writes meanwhile from elsewhere is published by the tail, which is read first.
"""

import ctypes
import errno
import mmap
import os
import select
import struct
from collections.abc import Callable
from typing import Protocol

import trio

from cow.geometry import CHUNK_BYTES

ENTRIES = 64  #: reads that may be under way at once
#: The memory that reads may go to: how long, and how many at once. The longest holds the longest request of the kernel
#: at any offset, in whole chunks with their checksums. 20 MiB in all.
SLOTS = ((16 << 10, 64), (144 << 10, 32), ((1 << 20) + 2 * CHUNK_BYTES, 14))

_SETUP, _ENTER = 425, 426  # <asm-generic/unistd.h>, the same everywhere
_OP_READ = 22
_ENTER_GETEVENTS = 1
_SINGLE_MMAP, _NODROP = 1, 2  # features, Linux 5.4 and 5.5
_SQES_AT = 0x10000000
_PARAMETERS = struct.Struct("=7I3I10I10I")
_SQE = struct.Struct("=BBHiQQIIQQQQ")
_CQE = struct.Struct("=QiI")

_libc = ctypes.CDLL(None, use_errno=True)

Done = Callable[[int], None]  #: told how many bytes were read, or the errno with a minus


class Slot:
    """Memory that reads go to, of the kind that has that number in `SLOTS`."""

    def __init__(self, kind: int) -> None:
        self.kind = kind
        self._pages = mmap.mmap(-1, SLOTS[kind][0])
        self.view = memoryview(self._pages)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._pages))


class Reads(Protocol):
    """Reads that are under way. Trio thread only."""

    def slot(self, length: int) -> Slot | None:
        """Memory for at least `length` bytes; None while there is none. To be given back."""

    def give_back(self, slot: Slot) -> None:
        """That memory is free again."""

    def has_room(self, count: int) -> bool:
        """Whether so many reads can be begun."""

    def begin(self, fd: int, slot: Slot, start: int, length: int, offset: int, done: Done) -> None:
        """Read from a file into the slot from its byte `start` on. There is room; `done` is told by `reap`."""

    def submit(self) -> None:
        """Have what was begun start. What cannot be started is told of at once, with an error."""

    def reap(self) -> int:
        """Tell of the reads that have completed, and return how many there were."""

    @property
    def under_way(self) -> int:
        """How many reads were begun and not told of."""

    async def ready(self) -> None:
        """Return when a read has completed."""

    def close(self) -> None:
        """Tell of all that is under way, when it has completed, and end. Blocks."""


class Ring(Reads):
    """Reads by io_uring. Raises OSError where the kernel has none, or grants none."""

    def __init__(self) -> None:
        parameters = ctypes.create_string_buffer(_PARAMETERS.size)
        self._fd = int(_libc.syscall(_SETUP, ctypes.c_uint(ENTRIES), parameters))
        if self._fd < 0:
            raise _failed()
        os.set_inheritable(self._fd, False)
        found = _PARAMETERS.unpack(parameters.raw)
        entries, completions, features, submitted, completed = found[0], found[1], found[5], found[10:20], found[20:30]
        if not features & _SINGLE_MMAP or not features & _NODROP:
            os.close(self._fd)
            raise OSError(errno.ENOSYS, "io_uring is too old")
        size = max(submitted[6] + entries * 4, completed[5] + completions * _CQE.size)
        shared, populate = mmap.MAP_SHARED, mmap.MAP_POPULATE
        self._queues = mmap.mmap(self._fd, size, shared | populate)
        self._entries = mmap.mmap(self._fd, entries * _SQE.size, shared | populate, offset=_SQES_AT)
        self._words = memoryview(self._queues)[: size // 4 * 4].cast("I")
        self._sq_tail, self._sq_mask = submitted[1] // 4, entries - 1
        self._cq_head, self._cq_tail, self._cq_mask = completed[0] // 4, completed[1] // 4, completions - 1
        self._completions_at = completed[5]
        for index in range(entries):
            self._words[submitted[6] // 4 + index] = index
        self._tail = 0  #: of the submission queue, with what is not submitted yet
        self._queued: list[int] = []  #: the numbers of those
        self._free = list(range(ENTRIES))
        #: What each number stands for. The memory has to stay while the kernel writes to it.
        self._reading: list[tuple[Done, Slot] | None] = [None] * ENTRIES
        self._slots: list[list[Slot]] = [[] for _ in SLOTS]  #: that are free, by kind
        self._made = [0] * len(SLOTS)

    def slot(self, length: int) -> Slot | None:
        """Memory for at least `length` bytes; None while there is none. To be given back."""
        kind = next((one for one, (most, _) in enumerate(SLOTS) if length <= most), None)
        if kind is None:
            return None
        if self._slots[kind]:
            return self._slots[kind].pop()
        if self._made[kind] == SLOTS[kind][1]:
            return None
        self._made[kind] += 1
        return Slot(kind)

    def give_back(self, slot: Slot) -> None:
        """That memory is free again."""
        self._slots[slot.kind].append(slot)

    def has_room(self, count: int) -> bool:
        """Whether so many reads can be begun."""
        return count <= len(self._free)

    def begin(self, fd: int, slot: Slot, start: int, length: int, offset: int, done: Done) -> None:
        """Read from a file into the slot from its byte `start` on. There is room; `done` is told by `reap`."""
        number = self._free.pop()
        self._reading[number] = done, slot
        place = (self._tail & self._sq_mask) * _SQE.size
        _SQE.pack_into(
            self._entries, place, _OP_READ, 0, 0, fd, offset, slot.address + start, length, 0, number, 0, 0, 0
        )
        self._tail += 1
        self._queued.append(number)

    def submit(self) -> None:
        """Have what was begun start. What the kernel does not take is told of at once, with its error."""
        self._words[self._sq_tail] = self._tail & 0xFFFFFFFF
        while self._queued:
            started = _libc.syscall(_ENTER, self._fd, len(self._queued), 0, _ENTER_GETEVENTS, None, 0)
            error = ctypes.get_errno() if started < 0 else 0
            if started > 0:
                del self._queued[:started]
            elif error != errno.EINTR:
                self._take_back(-(error or errno.EAGAIN))

    def _take_back(self, result: int) -> None:
        """The kernel looks at the queue in the system call only, so what it has not taken can be taken out."""
        queued, self._queued = self._queued, []
        self._tail -= len(queued)
        self._words[self._sq_tail] = self._tail & 0xFFFFFFFF
        for number in queued:
            self._tell(number, result)

    def reap(self) -> int:
        """Tell of the reads that have completed, and return how many there were."""
        words = self._words
        head, tail = words[self._cq_head], words[self._cq_tail]
        if head == tail:
            return 0
        count: int = (tail - head) & 0xFFFFFFFF
        for _ in range(count):
            number, result, _ = _CQE.unpack_from(
                self._queues, self._completions_at + (head & self._cq_mask) * _CQE.size
            )
            head = words[self._cq_head] = (head + 1) & 0xFFFFFFFF
            self._tell(number, result)
        return count

    def _tell(self, number: int, result: int) -> None:
        reading, self._reading[number] = self._reading[number], None
        self._free.append(number)
        assert reading is not None
        done, _ = reading
        done(result)

    @property
    def under_way(self) -> int:
        """How many reads were begun and not told of."""
        return ENTRIES - len(self._free)

    @property
    def fileno(self) -> int:
        """A descriptor that is readable when reads have completed."""
        return self._fd

    async def ready(self) -> None:
        """Return when a read has completed."""
        await trio.lowlevel.wait_readable(self._fd)

    def close(self) -> None:
        """Tell of all that is under way, when it has completed, and end. Blocks."""
        self.submit()
        come = select.poll()  # select(2) takes no descriptor from 1,024 on
        come.register(self._fd, select.POLLIN)
        while self.under_way:
            come.poll()
            self.reap()
        self._words.release()
        self._queues.close()
        self._entries.close()
        os.close(self._fd)


def _failed() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))
