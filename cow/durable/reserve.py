"""The reserve: space that is held back for operations that must not fail when the disk is full. # I6

A file `reserve` has space for recording that a snapshot was given up, for a journal file, and for a clean stop; spare
inodes (durable/inodes.py) are held back beside it. It is released for those operations only, and a part of it for
nothing but the next opening.
"""

import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

import trio

from cow.disk.directory import Directory
from cow.disk.file import File
from cow.disk.io import FULL
from cow.durable.inodes import OPENING_SPARES, Inodes, fill_up, let_go
from cow.errors import StoreFullError
from cow.events import Tell, Trouble
from cow.records.journal import FILE_BYTES

RESERVE_NAME = "reserve"
RESERVE_BYTES = 2 * FILE_BYTES  # for a second journal file, the maps and the catalog
OPENING_BYTES = FILE_BYTES // 2  # of it: for an opening, which saves the maps before it begins a journal file

T = TypeVar("T")


class Reserve:
    """The reserve of the store in `directory`, called `label` in messages. Empty until it is first filled."""

    def __init__(self, directory: Directory, inodes: Inodes, label: str, tell: Tell) -> None:
        self._directory = directory
        self._inodes = inodes
        self._label = label
        self._tell = tell
        self.is_full = False  #: whether everything is held back that should be
        self._changing = threading.Lock()  #: guards it against being filled up and released at once
        self._in_need = 0  #: how many callers are within `in_need`

    def count_beside_layers(self) -> int:
        """The bytes of the files beside the layers, with the whole reserve: it will be filled up again. Blocks."""
        with self._changing:
            try:
                file = self._directory.open(RESERVE_NAME)
            except FileNotFoundError:
                reserve = 0
            else:
                reserve = file.allocated_bytes
                file.close()
            self._inodes.count_beside_layers()
            return self._directory.allocated_here() + max(0, RESERVE_BYTES - reserve)

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
        """Call an action that must not fail for lack of room, releasing more of the reserve each time that it does.

        Raises what `action` raises; StoreFullError and errnos of a full disk when all of the reserve was not enough.
        """
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
        with self._changing:
            self.is_full = False
            shrink_reserve(self._directory, most_bytes)
            let_go(self._directory, most_spares)

    async def let_inodes_go(self) -> bool:
        """Where the file system is short of inodes, release those that are held back for old bytes.

        Returns whether there were any. They are not held back again while it is short of inodes.
        """
        return await trio.to_thread.run_sync(self._let_inodes_go)

    def _let_inodes_go(self) -> bool:
        with self._changing:
            went = self._inodes.let_go_for_write()
            self.is_full &= not went
            return went

    async def refill(self) -> None:
        """Fill it up again, as far as there is room; `tell` is called if that is not enough. Raises OSError."""
        if not await trio.to_thread.run_sync(self.fill):
            self._tell(
                Trouble(
                    f"the disk of the store {self._label} is full, its reserve too: make room on it (space, or inodes)"
                )
            )

    def fill(self) -> bool:
        """As `refill`, but returns False instead of calling `tell`. Does nothing within `in_need`. Blocks."""
        with self._changing:
            if self._in_need:
                return True  # later
            file = self._directory.open(RESERVE_NAME, create=True)
            try:
                self.is_full = _filled(file, RESERVE_BYTES)
            finally:
                file.close()
            self.is_full &= self._inodes.hold_back()
            return self.is_full


def _is_no_room(error: OSError | StoreFullError) -> bool:
    return isinstance(error, StoreFullError) or error.errno in FULL


def let_all_go(directory: Directory) -> None:
    """Release what an opening may need: all space, and the spare inodes where the file system is short. Blocks."""
    shrink_reserve(directory, 0)
    let_inodes_go(directory)


def let_inodes_go(directory: Directory) -> None:
    """Release the spare inodes, where the file system is short of inodes. Blocks."""
    free = directory.free_inodes()
    if free is not None and free < 2 * OPENING_SPARES:
        let_go(directory, 0)


def hold_inodes_back(directory: Directory) -> None:
    """Hold back inodes for the next opening, as far as there are any. Blocks."""
    with suppress(OSError):
        fill_up(directory, OPENING_SPARES, 0)


def shrink_reserve(directory: Directory, most_bytes: int) -> None:
    """Release all but `most_bytes` of a store's reserve to the file system. Blocks."""
    try:
        file = directory.open(RESERVE_NAME)
    except FileNotFoundError:
        return
    try:
        file.truncate(min(most_bytes, file.size_bytes))
    finally:
        file.close()


def keep_for_opening(directory: Directory) -> None:
    """Hold back what the next opening needs, as far as there is room. Blocks."""
    with suppress(OSError):
        file = directory.open(RESERVE_NAME)
        try:
            _filled(file, OPENING_BYTES)
        finally:
            file.close()
    hold_inodes_back(directory)


def _filled(file: File, size: int) -> bool:
    """Allocate `size` bytes, or as many as there are, to within 4 KiB. Returns whether that is all."""
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
