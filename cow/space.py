"""What the store takes and what it may take. # I6

The figure in use is a measurement plus an upper bound of what was promised since, so it errs on the safe side; before
anything is refused it is measured anew.

A file `reserve` holds space back for what must not fail when the disk is full: recording that a snapshot was given up,
a journal file, a clean stop. It is let go for those moments only.
"""

import errno

import trio

from cow.device import Directory
from cow.errors import QuotaError, RefusedError
from cow.journal import FILE_BYTES

RESERVE_NAME = "reserve"
RESERVE_BYTES = 2 * FILE_BYTES  # for a second journal file, the maps and the catalog
LEAST_QUOTA_BYTES = 32 << 20


class Space:
    """The store's space. `quota_bytes` None means: whatever the file system has."""

    def __init__(self, directory: Directory, quota_bytes: int | None) -> None:
        if quota_bytes is not None and quota_bytes < LEAST_QUOTA_BYTES:
            raise RefusedError(f"a quota of {quota_bytes} bytes is too small: give at least {LEAST_QUOTA_BYTES >> 20}M")
        self.quota_bytes = quota_bytes
        self._directory = directory
        self.holding_back = False  #: whether the reserve is filled
        self.let_go()
        self._measured = directory.allocated_bytes()
        self._promised = 0

    @property
    def used_bytes(self) -> int:
        """What the store takes, at most."""
        return self._measured + self._promised

    @property
    def available_bytes(self) -> int:
        """What snapshots may still take."""
        free = self._directory.free_bytes()
        if self.quota_bytes is None:
            return free
        return max(0, min(free, self._limit(self.quota_bytes) - self.used_bytes))

    @staticmethod
    def _limit(quota_bytes: int) -> int:
        return quota_bytes - FILE_BYTES  # a new journal file is there for a while beside the old one

    @property
    def total_bytes(self) -> int:
        """The quota, or what the file system could give."""
        return self.used_bytes + self._directory.free_bytes() if self.quota_bytes is None else self.quota_bytes

    async def measure(self) -> None:
        """Count anew what the store takes."""
        promised = self._promised
        self._measured = await trio.to_thread.run_sync(self._directory.allocated_bytes)
        self._promised -= promised

    async def reserve(self, count: int) -> None:
        """Promise `count` bytes. Raises QuotaError when the store would pass its quota."""
        if self.quota_bytes is not None:
            limit = self._limit(self.quota_bytes)
            if self.used_bytes + count > limit:
                await self.measure()
            if self.used_bytes + count > limit:
                raise QuotaError(
                    f"the store {self._directory.label} is full: {self.used_bytes} of {self.quota_bytes} bytes are "
                    f"taken ({RESERVE_BYTES + FILE_BYTES} are held back for the journal): remove snapshots, or mount "
                    f"with a larger quota"
                )
        self._promised += count

    def let_go(self) -> None:
        """Give the reserve back to the file system. Blocks."""
        self.holding_back = False
        try:
            file = self._directory.open(RESERVE_NAME)
        except FileNotFoundError:
            return
        file.truncate(0)
        file.close()

    def hold_back(self) -> bool:
        """Fill the reserve up again; False when there is no room for it. Blocks."""
        file = self._directory.open(RESERVE_NAME, create=True)
        try:
            file.allocate(RESERVE_BYTES)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            file.truncate(0)
            return False
        finally:
            file.close()
        self.holding_back = True
        return True
