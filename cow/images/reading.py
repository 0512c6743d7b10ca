"""A read of an image that waits for a disk, in no thread and no task: begun, and answered when its parts have come.

The parts, of the device and of layers, are read by `Reads` beside each other. When all have come, what is from layers
is checked, and the sets are looked at once more for what is from the device. Whatever is amiss, the answer is None:
then the caller reads the other way, which waits for writers, tells errors apart and records damage.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from cow.disk.ring import Reads
from cow.errors import CowError
from cow.geometry import CHUNK_BYTES, Run, covering
from cow.layers.chain import Share
from cow.layers.sums import SUM_BYTES

MOST_PARTS = 8  #: of one read; what is scattered more is read in a thread

Answer = Callable[[memoryview | None], None]  #: the memory is valid during the call only


class Beneath(Protocol):
    """What an image is read from."""

    def device_at(self, run: Run) -> int | None:
        """The descriptor to read a run of the device from; None where it is not to be read like that."""

    def is_overtaken(self, found: Sequence[Share]) -> bool:
        """Whether what was read from the device may be newer than what is to be shown. # I2

        Raises CowError where nothing is to be shown any more.
        """


class Reading:
    """One read. Trio thread only. `found` says where to find the chunks."""

    def __init__(self, reads: Reads, beneath: Beneath, found: Sequence[Share], answer: Answer) -> None:
        self._reads = reads
        self._beneath = beneath
        self._found = found
        self._answer = answer
        self._is_whole = True

    def begin(self, offset: int, length: int) -> bool:
        """Begin to read an extent. False where it has to be read the other way: there is no answer then."""
        run = covering(offset, length)
        parts = list[tuple[int, int, int, int]]()  # descriptor, place in the memory, length, place in the file
        wanted = run.length  # then the checksums
        for layer, runs in self._found:
            if len(parts) + 2 * len(runs) > MOST_PARTS:
                return False
            for one in runs:
                place = (one.first - run.first) * CHUNK_BYTES
                if layer is None:
                    device = self._beneath.device_at(one)
                    if device is None:
                        return False
                    parts.append((device, place, one.length, one.offset))
                    continue
                at = layer.place_of(one)
                if at is None:
                    return False
                size = one.chunks * SUM_BYTES
                parts += [(at.data, place, one.length, at.offset), (at.sums, wanted, size, one.first * SUM_BYTES)]
                wanted += size
        reads = self._reads
        slot = reads.slot(wanted) if reads.has_room(len(parts)) else None
        if slot is None:
            return False
        self._slot, self._left = slot, len(parts)
        self._run, self._extent = run, slice(offset - run.offset, offset - run.offset + length)
        for layer, _ in self._found:
            if layer is not None:
                layer.files.pin()
        for descriptor, place, size, at_offset in parts:
            reads.begin(descriptor, slot, place, size, at_offset, partial(self._came, size))
        return True

    def _came(self, wanted: int, result: int) -> None:
        if result != wanted:
            self._is_whole = False
        self._left -= 1
        if not self._left:
            self._end()

    def _end(self) -> None:
        for layer, _ in self._found:
            if layer is not None:
                layer.files.unpin()
        try:
            self._answer(self._slot.view[self._extent] if self._is_right() else None)
        finally:
            self._reads.give_back(self._slot)

    def _is_right(self) -> bool:
        if not self._is_whole or not self._matches():
            return False
        try:
            return not self._beneath.is_overtaken(self._found)
        except CowError:  # the snapshot was given up; who reads the other way is told
            return False

    def _matches(self) -> bool:
        """Whether what is from layers is what its checksums say. # I4"""
        view, at = self._slot.view, self._run.length
        for layer, runs in self._found:
            if layer is None:
                continue
            for one in runs:
                place, size = (one.first - self._run.first) * CHUNK_BYTES, one.chunks * SUM_BYTES
                if layer.sums.of_data(one.first, view[place : place + one.length]) != view[at : at + size]:
                    return False
                at += size
        return True


async def tell_of(reads: Reads) -> None:
    """Tell of the reads that complete while nobody else does; runs until cancelled."""
    while True:
        await reads.ready()
        reads.reap()
