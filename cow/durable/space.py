"""The space that the store takes, and that it may take. # I6

The figure for used space is a measurement plus an upper bound of what was promised since, so it errs on the safe side;
before anything is refused because of it, it is measured anew.

There may be thousands of layers, so not all of their files are measured each time. Bytes written into them are promised
beforehand; what else changes in them is noted with `changing_layers`. What grows without a promise is measured each
time: the files beside them (the catalog, the journal, the reserve), and how many layers have a directory.

Inodes are counted in the same way (durable/inodes.py). Operations that must not fail on a full disk have a reserve of
both (durable/reserve.py), which counts as used.
"""

import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

import trio

from cow.disk.directory import Directory
from cow.durable.inodes import Inodes
from cow.durable.reserve import RESERVE_BYTES, Reserve
from cow.errors import QuotaError, RefusedError, StoreFullError
from cow.events import Filling, Tell
from cow.geometry import CHUNK_BYTES
from cow.records.journal import FILE_BYTES

CATALOG_BYTES = 1 << 20  # by which it may grow between two measurements, with its write-ahead log
UNPROMISED_BYTES = FILE_BYTES + CATALOG_BYTES  # a journal file may come beside another
LEAST_QUOTA_BYTES = 32 << 20
MOST_BYTES_PER_CHUNK = 2 * 4096  # the chunk, and a page of checksums
MOST_BYTES_OF_A_WRITE = (1 << 20) + (8 << 10)  # a request's old bytes, and their checksums
MOST_BYTES_PER_DIRECTORY = 4096  # with the few names in a layer's directory
_PLENTY_CHUNKS, _PLENTY_SECONDS = 8192, 1.0  # 64 MiB at most
MEASURE_SECONDS = 5.0  # for this long promises do for measuring the layers, while there is plenty of room
WARNING_PERCENTS = (80, 90, 95)
REARM_PERCENT = 10  # below its mark a warning is armed again: merging layers makes the figure sway
MOST_PERCENT_FOR_SNAPSHOTS = 90  # no new snapshot from here on
MOST_PERCENT_FOR_WRITES = 95  # no snapshot's own writes from here on: the rest is for the origin's old bytes

_MAKE_INODES = "remove snapshots, or other files on that file system, or have the store on one with more inodes"


class Space:
    """The store's space. `quota_bytes` None means: whatever the file system has.

    `layers_directory` is the one directory below `directory`. `tell` is called when the store fills up
    to one of `WARNING_PERCENTS`.
    """

    def __init__(
        self,
        directory: Directory,
        layers_directory: Directory,
        quota_bytes: int | None,
        tell: Tell,
    ) -> None:
        if quota_bytes is not None and quota_bytes < LEAST_QUOTA_BYTES:
            raise RefusedError(f"a quota of {quota_bytes} bytes is too small: give at least {LEAST_QUOTA_BYTES >> 20}M")
        self.quota_bytes = quota_bytes
        self._directory = directory
        self._layers_directory = layers_directory
        self._tell = tell
        self._warned_percent = 0
        self.inodes = Inodes(directory)
        self.reserve = Reserve(directory, self.inodes, layers_directory.label, tell)
        self._beside_layers = self.reserve.count_beside_layers()
        self._layers, self._in_layers, self.inodes.in_layers = self._count_layers()
        self._new_layers = 0  #: whose directories were made since the layers were measured
        self._measure_from = 0.0  #: until then the layers are not measured anew without need
        self._promised = 0  #: bytes written into the layers since their last measurement began, at most
        self._measuring = trio.Lock()  #: two at once would subtract the same promises twice
        self._open = 0  #: bytes about to be written, at most
        self.waiting_chunks = 0  #: of snapshots' own writes, in memory
        self._look_again = 0.0  #: when to check the disk again, which others may fill too
        self._plenty = -1  #: chunks for which there is room before that has to be checked again

    @property
    def used_bytes(self) -> int:
        """The bytes that the store takes, at most."""
        measured = self._beside_layers + self._in_layers + self._new_layers * MOST_BYTES_PER_DIRECTORY
        return measured + self._promised + self._open + self.waiting_chunks * MOST_BYTES_PER_CHUNK

    @property
    def available_bytes(self) -> int:
        """The bytes that may still be kept in it."""
        return max(0, self.total_bytes - UNPROMISED_BYTES - self.used_bytes)

    @property
    def total_bytes(self) -> int:
        """The quota, or what the file system could provide if that is less."""
        could = self.used_bytes + self._directory.free_bytes()
        return could if self.quota_bytes is None else min(could, self.quota_bytes)

    @property
    def used_percent(self) -> int:
        """How full it is, at most 100: of its bytes or of its inodes, whichever is more."""
        return max(self._percent_of_bytes, self.inodes.used_percent)

    @property
    def _percent_of_bytes(self) -> int:
        return min(100, 100 * self.used_bytes // max(1, self.used_bytes + self.available_bytes))

    @property
    def _fullness(self) -> str:
        """What is full, in words."""
        if self.inodes.used_percent > self._percent_of_bytes:
            return self.inodes.fullness
        return f"{self.used_percent} % full ({self.used_bytes} of {self.total_bytes} bytes)"

    @property
    def _remedy(self) -> str:
        if self.inodes.used_percent > self._percent_of_bytes:
            return _MAKE_INODES
        return "remove snapshots, or mount with a larger quota"

    @property
    def excess_bytes(self) -> int:
        """How many bytes are too many for a first overwrite by the longest request; not more than 0 when none are."""
        quota = self.total_bytes if self.quota_bytes is None else self.quota_bytes
        return self.used_bytes + MOST_BYTES_OF_A_WRITE + UNPROMISED_BYTES - quota

    @property
    def has_room_for_a_write(self) -> bool:
        """Whether there is room for such an overwrite."""
        return self.excess_bytes <= 0

    async def measure(self) -> None:
        """Measure anew what the store takes. A write under way may be in the figure or not, so it stays promised."""
        await self.count()
        self._warn()

    async def count(self) -> None:
        """The same without a warning."""
        async with self._measuring:
            await self._look_beside_layers()
            await self._measure_layers()

    async def keep_up(self) -> None:
        """Measure anew what may have changed; the layers if they did, after a while, or when space is scarce."""
        async with self._measuring:
            await self._look_beside_layers()
            if time.monotonic() >= self._measure_from or self.used_percent >= WARNING_PERCENTS[0]:
                await self._measure_layers()
        self._warn()

    @contextmanager
    def changing_layers(self) -> Iterator[None]:
        """Around a change by which layers take more or less than was promised: the next `keep_up` measures them."""
        try:
            yield
        finally:
            self._measure_from = 0.0

    async def _look_beside_layers(self) -> None:
        self._beside_layers = await trio.to_thread.run_sync(self.reserve.count_beside_layers)
        present = await trio.to_thread.run_sync(self._layers_directory.names)
        self._new_layers = max(0, len(present) - self._layers)

    async def _measure_layers(self) -> None:
        promised = self._promised
        self._measure_from = time.monotonic() + MEASURE_SECONDS  # now, because layers may change while they are counted
        try:
            counted = await trio.to_thread.run_sync(self._count_layers)
            self._layers, self._in_layers, self.inodes.in_layers = counted
        except BaseException:
            self._measure_from = 0.0
            raise
        self._new_layers = 0
        self._promised -= promised
        self._plenty = -1

    def _count_layers(self) -> tuple[int, int, int]:
        """How many layers have a directory, what they take in bytes, and in inodes. Blocks."""
        return len(self._layers_directory.names()), *self._layers_directory.allocated()

    def _warn(self) -> None:
        percent = self.used_percent
        reached = max((one for one in WARNING_PERCENTS if percent >= one), default=0)
        if percent < self._warned_percent - REARM_PERCENT:
            self._warned_percent = reached
        if reached > self._warned_percent:
            self._warned_percent = reached
            remedy = f"{self._remedy}{_consequence(percent)}"
            self._tell(Filling(self._directory.label, percent, self._fullness, remedy))

    async def check_for_snapshot(self) -> None:
        """Raise StoreFullError when the store is too full for one more snapshot."""
        if self.used_percent >= MOST_PERCENT_FOR_SNAPSHOTS or not self.inodes.has_for_snapshot:
            await self.measure()
        if self.used_percent >= MOST_PERCENT_FOR_SNAPSHOTS:
            raise StoreFullError(
                f"the store {self._directory.label} is {self._fullness}, and from {MOST_PERCENT_FOR_SNAPSHOTS} % on "
                f"there are no new snapshots, so that those there are can be kept: {self._remedy}"
            )
        if not self.inodes.has_for_snapshot:
            raise StoreFullError(f"{self.inodes.too_few}: {_MAKE_INODES}")

    def room(self, count: int) -> "Room":
        """Around a write of up to `count` bytes: old bytes of the origin.

        Raises QuotaError when the store would exceed its quota. Whether the file system has room shows in the write.
        """
        return Room(self, count, self._check_for_old_bytes)

    def room_for_write(self, count: int) -> "Room":
        """Around a write of up to `count` bytes: a snapshot's own, which leaves a margin for the origin's old bytes.

        Raises QuotaError or StoreFullError when only the margin is left.
        """
        return Room(self, count, self.check_for_write)

    def keeping(self, count: int) -> "Room":
        """Around a write of up to `count` bytes for which there is room: nothing is checked."""
        return Room(self, count, None)

    async def _check_for_old_bytes(self, count: int) -> None:
        await self._check_quota(count, 100)

    def is_roomy(self, chunks: int) -> bool:
        """Whether there is room for so many chunks of a snapshot's own writes, with plenty to spare.

        The quota is checked each time, the disk only once in a while, because this is asked for every write.
        """
        if self._passes_quota(chunks * MOST_BYTES_PER_CHUNK, MOST_PERCENT_FOR_WRITES):
            return False
        self._plenty -= chunks
        if self._plenty < 0 or time.monotonic() >= self._look_again:
            needed = (_PLENTY_CHUNKS + self.waiting_chunks) * MOST_BYTES_PER_CHUNK
            left = self._directory.free_bytes() - (100 - MOST_PERCENT_FOR_WRITES) * self.total_bytes // 100
            self._plenty = _PLENTY_CHUNKS - chunks if needed <= left and not self.inodes.are_short else -1
            self._look_again = time.monotonic() + _PLENTY_SECONDS
        return self._plenty >= 0

    def _passes_quota(self, count: int, percent: int) -> bool:
        """Whether `count` more bytes would exceed `percent` of the quota."""
        quota = self.quota_bytes
        return quota is not None and self.used_bytes + count > (quota - UNPROMISED_BYTES) * percent // 100

    async def check_for_merge(self, count: int) -> None:
        """Raise StoreFullError when `count` more bytes would bring the store to its first warning: merging can wait."""
        if self._would_warn(count):
            await self.measure()
        if self._would_warn(count):
            raise StoreFullError(f"the store {self._directory.label} is too full for layers to be there twice")

    def _would_warn(self, count: int) -> bool:
        return 100 * (self.used_bytes + count) >= WARNING_PERCENTS[0] * (self.used_bytes + self.available_bytes)

    async def check_for_write(self, count: int) -> None:
        """Raise QuotaError or StoreFullError when `count` bytes of a snapshot's own writes would touch the margin."""
        waiting = self.waiting_chunks * MOST_BYTES_PER_CHUNK
        if count + waiting > self._directory.free_bytes() - (100 - MOST_PERCENT_FOR_WRITES) * self.total_bytes // 100:
            raise StoreFullError(
                f"the disk of the store {self._directory.label} is nearly full, and what is left is for the origin: "
                f"make room on it, or remove snapshots"
            )
        if self.inodes.are_short:
            raise StoreFullError(
                f"the file system of the store {self._directory.label} has no inodes left but for the origin's old "
                f"bytes: remove other files there, or snapshots"
            )
        await self._check_quota(count, MOST_PERCENT_FOR_WRITES)

    async def _check_quota(self, count: int, percent: int) -> None:
        if self._passes_quota(count, percent):
            await self.measure()
        if self._passes_quota(count, percent):
            raise QuotaError(
                f"the store {self._directory.label} is full: {self.used_bytes} of {self.quota_bytes} bytes are "
                f"taken ({RESERVE_BYTES + UNPROMISED_BYTES} are held back for the journal and the catalog): remove "
                f"snapshots, or mount with a larger quota"
            )

    def open_promise(self, count: int) -> None:
        """Note that up to `count` bytes are about to be written; `keep_promise` must follow in any case."""
        self._open += count

    def keep_promise(self, count: int) -> None:
        """Note that they are written, or some of them."""
        self._open -= count
        self._promised += count
        self._plenty -= -(-count // CHUNK_BYTES)


def _consequence(percent: int) -> str:
    if percent >= MOST_PERCENT_FOR_WRITES:
        return "; until then there are no new ones, those there are take no writes of their own, and some may be lost"
    return "; until then there are no new ones" if percent >= MOST_PERCENT_FOR_SNAPSHOTS else ""


class Room:
    """Room for a write, while it is made: an asynchronous context manager that checks for room on entry."""

    __slots__ = ("_check", "_count", "_space")

    def __init__(self, space: Space, count: int, check: Callable[[int], Awaitable[None]] | None) -> None:
        self._space = space
        self._count = count
        self._check = check

    async def __aenter__(self) -> None:
        if self._check is not None:
            await self._check(self._count)
        self._space.open_promise(self._count)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._space.keep_promise(self._count)
