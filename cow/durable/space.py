"""What the store takes and what it may take. # I6

The figure in use is a measurement plus an upper bound of what was promised since, so it errs on the safe side; before
anything is refused it is measured anew.

There may be thousands of layers, so their files are not all looked at each time. What is written into them is promised
before; what else changes in them is noted with `changing_layers`. What grows without a promise is looked at each time:
the files beside them (the catalog, the journal, the reserve), and how many layers have a directory.

A file `reserve` holds space back for what must not fail when the disk is full: recording that a snapshot was given up,
a journal file, a clean stop. It is let go for those moments only, and a part of it for nothing but the next opening.
Inodes are counted and held back in the same way (durable/inodes.py).
"""

import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import TypeVar

import trio

from cow.disk.directory import Directory
from cow.disk.file import File
from cow.disk.io import FULL
from cow.durable.inodes import OPENING_SPARES, Inodes, fill_up, let_go
from cow.errors import QuotaError, RefusedError, StoreFullError
from cow.events import Filling, Tell, Trouble
from cow.geometry import CHUNK_BYTES
from cow.records.journal import FILE_BYTES

RESERVE_NAME = "reserve"
RESERVE_BYTES = 2 * FILE_BYTES  # for a second journal file, the maps and the catalog
OPENING_BYTES = FILE_BYTES // 2  # of it: what an opening needs, which saves the maps before it begins a journal file
CATALOG_BYTES = 1 << 20  # that it may grow by between two looks, with its write-ahead log
UNPROMISED_BYTES = FILE_BYTES + CATALOG_BYTES  # a journal file may come beside another
LEAST_QUOTA_BYTES = 32 << 20
MOST_BYTES_PER_CHUNK = 2 * 4096  # the chunk, and a page of checksums
MOST_BYTES_OF_A_WRITE = (1 << 20) + (8 << 10)  # a request's old bytes, and their checksums
MOST_BYTES_PER_DIRECTORY = 4096  # with the few names that a layer's has
_PLENTY_CHUNKS, _PLENTY_SECONDS = 8192, 1.0  # 64 MiB at most
MEASURE_SECONDS = 5.0  # for so long the promises do for the layers, where there is plenty of room
WARNING_PERCENTS = (80, 90, 95)
REARM_PERCENT = 10  # below a warning's mark: from there on it is given again; merging layers makes the figure sway
MOST_PERCENT_FOR_SNAPSHOTS = 90  # no new snapshot from here on
MOST_PERCENT_FOR_WRITES = 95  # no snapshot's own writes from here on: the rest is for the origin's old bytes

_MAKE_INODES = "remove snapshots, or other files on that file system, or have the store on one with more inodes"


T = TypeVar("T")


class Space:
    """The store's space. `quota_bytes` None means: whatever the file system has.

    `layers_directory` is the one directory below `directory`. `tell` hears when the store fills up beyond one of
    `WARNING_PERCENTS`.
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
        self.holding_back = False  #: whether the reserve is filled
        self._reserve = threading.Lock()  #: guards it against being filled up and let go at once
        self._in_need = 0  #: how many need what was let go of it
        self.inodes = Inodes(directory)
        self._beside_layers = self._count_beside_layers()
        self._layers, self._in_layers, self.inodes.in_layers = self._count_layers()
        self._new_layers = 0  #: whose directories came since the layers were measured
        self._measure_from = 0.0  #: until then the layers are not measured anew without need
        self._promised = 0  #: written into the layers since they began to be measured, at most
        self._measuring = trio.Lock()  #: two at once would take the same promises back twice
        self._open = 0  #: about to be written, at most
        self.waiting_chunks = 0  #: of snapshots' own writes, in memory
        self._look_again = 0.0  #: others may fill the disk too
        self._plenty = -1  #: chunks that find room before that has to be looked at again

    @property
    def used_bytes(self) -> int:
        """What the store takes, at most."""
        measured = self._beside_layers + self._in_layers + self._new_layers * MOST_BYTES_PER_DIRECTORY
        return measured + self._promised + self._open + self.waiting_chunks * MOST_BYTES_PER_CHUNK

    @property
    def available_bytes(self) -> int:
        """What may still be kept in it."""
        return max(0, self.total_bytes - UNPROMISED_BYTES - self.used_bytes)

    @property
    def total_bytes(self) -> int:
        """The quota, or what the file system could give when that is less."""
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
        """How much is in the way of a first overwrite of the longest request; not more than 0 when nothing is."""
        quota = self.total_bytes if self.quota_bytes is None else self.quota_bytes
        return self.used_bytes + MOST_BYTES_OF_A_WRITE + UNPROMISED_BYTES - quota

    @property
    def has_room_for_a_write(self) -> bool:
        """Whether the quota has room for that."""
        return self.excess_bytes <= 0

    async def measure(self) -> None:
        """Count anew what the store takes. What is still being written may be seen or not, so it stays promised."""
        await self.count()
        self._warn()

    async def count(self) -> None:
        """The same without a warning."""
        async with self._measuring:
            await self._look_beside_layers()
            await self._measure_layers()

    async def keep_up(self) -> None:
        """Count anew what may have changed: the layers where they did, after a while, and when space is scarce."""
        async with self._measuring:
            await self._look_beside_layers()
            if time.monotonic() >= self._measure_from or self.used_percent >= WARNING_PERCENTS[0]:
                await self._measure_layers()
        self._warn()

    @contextmanager
    def changing_layers(self) -> Iterator[None]:
        """Around what makes layers take more or less than what was promised: `keep_up` counts them the next time."""
        try:
            yield
        finally:
            self._measure_from = 0.0

    async def _look_beside_layers(self) -> None:
        self._beside_layers = await trio.to_thread.run_sync(self._count_beside_layers)
        present = await trio.to_thread.run_sync(self._layers_directory.names)
        self._new_layers = max(0, len(present) - self._layers)

    async def _measure_layers(self) -> None:
        promised = self._promised
        self._measure_from = time.monotonic() + MEASURE_SECONDS  # now, as layers may change while they are counted
        try:
            counted = await trio.to_thread.run_sync(self._count_layers)
            self._layers, self._in_layers, self.inodes.in_layers = counted
        except BaseException:
            self._measure_from = 0.0
            raise
        self._new_layers = 0
        self._promised -= promised
        self._plenty = -1

    def _count_beside_layers(self) -> int:
        """What the files beside them take, with the whole reserve: what was let go of it is filled up again. Blocks."""
        with self._reserve:
            try:
                file = self._directory.open(RESERVE_NAME)
            except FileNotFoundError:
                reserve = 0
            else:
                reserve = file.allocated_bytes
                file.close()
            self.inodes.count_beside_layers()
            return self._directory.allocated_here() + max(0, RESERVE_BYTES - reserve)

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
        """Around writing up to `count` bytes: old bytes of the origin.

        Raises QuotaError when the store would pass its quota. What the file system has left shows when it is written.
        """
        return Room(self, count, self._check_for_old_bytes)

    def room_for_write(self, count: int) -> "Room":
        """Around writing up to `count` bytes: a snapshot's own writes, which leave a margin for the origin's old bytes.

        Raises QuotaError or StoreFullError when only the margin is left.
        """
        return Room(self, count, self.check_for_write)

    def keeping(self, count: int) -> "Room":
        """Around writing up to `count` bytes for which there is room."""
        return Room(self, count, None)

    async def _check_for_old_bytes(self, count: int) -> None:
        await self._check_quota(count, 100)

    def is_roomy(self, chunks: int) -> bool:
        """Whether so many chunks of a snapshot's own writes find room, with much to spare.

        The quota is held each time. The disk is looked at once in a while only, as this is asked for every write.
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
        """Whether `count` bytes more are more than so much of the quota."""
        quota = self.quota_bytes
        return quota is not None and self.used_bytes + count > (quota - UNPROMISED_BYTES) * percent // 100

    async def check_for_merge(self, count: int) -> None:
        """Raise StoreFullError when `count` bytes more would bring the store to where it warns: merging can wait."""
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
        """Up to `count` bytes are about to be written; followed by `keep_promise`, whatever comes between."""
        self._open += count

    def keep_promise(self, count: int) -> None:
        """They are written, or some of them."""
        self._open -= count
        self._promised += count
        self._plenty -= -(-count // CHUNK_BYTES)

    @contextmanager
    def in_need(self) -> Iterator[Callable[[], None]]:
        """Within the block the reserve is not filled up again.

        Yields a blocking function that releases it: the first call all but what the next opening needs, the second
        half of that, the third the rest.
        """
        levels = iter(((OPENING_BYTES, OPENING_SPARES), (OPENING_BYTES // 2, OPENING_SPARES // 2)))
        self._in_need += 1
        try:
            yield lambda: self._let_go(*next(levels, (0, 0)))
        finally:
            self._in_need -= 1

    async def see_through(self, action: Callable[[], Awaitable[T]]) -> T:
        """Do what must not fail for want of room: if it does, again with a part of what is held back, and with all."""
        try:
            return await action()
        except (OSError, StoreFullError) as error:
            if not _is_no_room(error):
                raise
        with self.in_need() as let_go:
            for _ in range(2):
                await trio.to_thread.run_sync(let_go)
                try:
                    return await action()
                except (OSError, StoreFullError) as error:
                    if not _is_no_room(error):
                        raise
            await trio.to_thread.run_sync(let_go)
            return await action()

    def _let_go(self, most_bytes: int, most_spares: int) -> None:
        with self._reserve:
            self.holding_back = False
            shrink_reserve(self._directory, most_bytes)
            let_go(self._directory, most_spares)

    async def let_inodes_go(self) -> bool:
        """Where the file system is short of inodes, give back those that are held back for old bytes.

        Whether there were some. They are not taken again as long as it is.
        """
        return await trio.to_thread.run_sync(self._let_inodes_go)

    def _let_inodes_go(self) -> bool:
        with self._reserve:
            went = self.inodes.let_go_for_write()
            self.holding_back &= not went
            return went

    async def refill(self) -> None:
        """Fill up the reserve, as far as there is room; where that is not enough it is told. Raises OSError."""
        if not await trio.to_thread.run_sync(self.hold_back):
            self._tell(
                Trouble(
                    f"the disk of the store {self._layers_directory.label} is full, its reserve too: make room on it "
                    f"(space, or inodes)"
                )
            )

    def hold_back(self) -> bool:
        """Fill the reserve up again, as far as there is room; False when that is not enough. Blocks."""
        with self._reserve:
            if self._in_need:
                return True  # later
            file = self._directory.open(RESERVE_NAME, create=True)
            try:
                self.holding_back = _filled(file, RESERVE_BYTES)
            finally:
                file.close()
            self.holding_back &= self.inodes.hold_back()
            return self.holding_back


def _is_no_room(error: OSError | StoreFullError) -> bool:
    return isinstance(error, StoreFullError) or error.errno in FULL


def _consequence(percent: int) -> str:
    if percent >= MOST_PERCENT_FOR_WRITES:
        return "; until then there are no new ones, those there are take no writes of their own, and some may be lost"
    return "; until then there are no new ones" if percent >= MOST_PERCENT_FOR_SNAPSHOTS else ""


def let_all_go(directory: Directory) -> None:
    """Give back all that is held back: an opening may need it. Blocks."""
    shrink_reserve(directory, 0)
    let_inodes_go(directory)


def let_inodes_go(directory: Directory) -> None:
    """Give back the spare inodes, where the file system is short of them. Blocks."""
    free = directory.free_inodes()
    if free is not None and free < 2 * OPENING_SPARES:
        let_go(directory, 0)


def hold_inodes_back(directory: Directory) -> None:
    """Have inodes for the next opening, as far as there are some. Blocks."""
    with suppress(OSError):
        fill_up(directory, OPENING_SPARES, 0)


def shrink_reserve(directory: Directory, most_bytes: int) -> None:
    """Give all but so much of a store's reserve back to the file system. Blocks."""
    try:
        file = directory.open(RESERVE_NAME)
    except FileNotFoundError:
        return
    try:
        file.truncate(min(most_bytes, file.size_bytes))
    finally:
        file.close()


def keep_for_opening(directory: Directory) -> None:
    """Have what the next opening needs held back, as far as there is room. Blocks."""
    with suppress(OSError):
        file = directory.open(RESERVE_NAME)
        try:
            _filled(file, OPENING_BYTES)
        finally:
            file.close()
    hold_inodes_back(directory)


def _filled(file: File, size: int) -> bool:
    """Allocate so much, or what can be had of it, to the last 4 KiB. Whether it is all."""
    if _allocated(file, size):
        return True
    length, step = 0, size // 2
    while step >= 4096:
        if _allocated(file, length + step):
            length += step
        step //= 2
    return False


def _allocated(file: File, length: int) -> bool:
    try:
        file.allocate(length)
    except OSError as error:
        if error.errno not in FULL:
            raise
        return False
    return True


class Room:
    """Room for a write, while it is made: an asynchronous context manager, which looks for it when it is entered."""

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
