"""Inodes: a file system may run out of them while it has space, because of any program that uses it. # I6

They are counted as bytes are: those that the store has, and those that its layers may still need, because a layer makes
its files at its first write. Spare ones are held back by empty files, as space is by the reserve: for the next old
bytes, and for what an opening needs. Where a file system does not count inodes (btrfs) none of this has any effect.
"""

import re
from collections.abc import Callable

from cow.disk.directory import Directory
from cow.disk.io import FULL
from cow.layers.layerfiles import INODES_OF_A_LAYER

OPENING_SPARES = 6  # the catalog's -wal and -shm, a journal file, a map, the log, and one more
_PREFIX = "spare."


def is_spare(name: str) -> bool:
    """Whether a file has the name of a spare inode."""
    return re.fullmatch(r"spare\.[0-9]{1,6}", name, re.ASCII) is not None


class Inodes:
    """The inodes of the store in `directory`. Calls that change something block."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self._of_all_layers: Callable[[], int] = lambda: 0
        self._of_a_snapshot = 0
        self._of_a_write = INODES_OF_A_LAYER
        self._beside_layers = 0
        self._spares_missing = 0
        self.in_layers = 0  #: as last counted

    def expect(self, of_a_snapshot: int, origins: int, of_all_layers: Callable[[], int]) -> None:
        """Set how many inodes the layers of one snapshot, and all layers that there are, may take. Called once."""
        self._of_a_snapshot, self._of_all_layers = of_a_snapshot, of_all_layers
        self._of_a_write = origins * INODES_OF_A_LAYER

    @property
    def _wanted_spares(self) -> int:
        return OPENING_SPARES + self._of_a_write

    def count_beside_layers(self) -> None:
        """Count what is there, with all spare ones: those that were released are made again."""
        names = self._directory.names()
        self._spares_missing = max(0, self._wanted_spares - sum(map(is_spare, names)))
        self._beside_layers = len(names) + self._spares_missing

    @property
    def used(self) -> int:
        """How many the store has, plus those that its layers may still need."""
        return self._beside_layers + max(self.in_layers, self._of_all_layers())

    @property
    def available(self) -> int | None:
        """How many are left beyond that; None where they are not counted."""
        free = self._directory.free_inodes()
        if free is None:
            return None
        return max(0, free - self._spares_missing - max(0, self._of_all_layers() - self.in_layers))

    @property
    def used_percent(self) -> int:
        """How full the store is by its inodes, in percent, at most 100."""
        available = self.available
        return 0 if available is None else min(100, 100 * self.used // max(1, self.used + available))

    @property
    def fullness(self) -> str:
        """The same in words."""
        total = self.used + (self.available or 0)
        return f"{self.used_percent} % full ({self.used} of {total} inodes are taken, or may be by its layers)"

    @property
    def has_for_snapshot(self) -> bool:
        """Whether there are enough for one more snapshot, besides those that the present layers may need."""
        available = self.available
        return available is None or available >= self._of_a_snapshot

    @property
    def too_few(self) -> str:
        """What is wrong when there are not, in words."""
        return (
            f"the file system of the store {self._directory.label} has {self.available} inodes left for it, and a "
            f"snapshot may need {self._of_a_snapshot}"
        )

    @property
    def are_short(self) -> bool:
        """Whether so few are left that they are for the next old bytes alone."""
        free = self._directory.free_inodes()
        return free is not None and free < self._of_a_write

    def let_go_for_write(self) -> bool:
        """Where inodes are short, release those held back for old bytes. Returns whether there were any."""
        return self.are_short and let_go(self._directory, OPENING_SPARES) > 0

    def hold_back(self) -> bool:
        """Make the missing spare ones, as long as others are left too. Returns whether all are there."""
        return fill_up(self._directory, self._wanted_spares, self._of_a_write)


def let_go(directory: Directory, most: int) -> int:
    """Remove all but `most` spare inodes. Returns how many were removed. Blocks."""
    gone = [name for name in directory.names() if is_spare(name)][most:]
    for name in gone:
        directory.unlink(name)
    return len(gone)


def fill_up(directory: Directory, wanted: int, left: int) -> bool:
    """Make spare inodes up to `wanted`, while more than `left` are free. Returns whether all are there. Blocks."""
    free = directory.free_inodes()
    if free is None:
        return True
    present = {name for name in directory.names() if is_spare(name)}
    for name in (f"{_PREFIX}{number}" for number in range(wanted)):
        if len(present) >= wanted or free <= left:
            break
        if name not in present:
            try:
                directory.open(name, create=True).close()
            except OSError as error:
                if error.errno not in FULL:
                    raise
                break
            present.add(name)
            free -= 1
    return len(present) >= wanted
