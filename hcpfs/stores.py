"""What can be told of stores without opening them: whether one stopped clean, and whose snapshots they have."""

import os
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import closing, suppress

from cow.catalog import FILE_NAME, State
from cow.errors import RefusedError
from hcpfs.options import STORES, MountOptions


def stopped_clean(store: str) -> bool:
    """Whether the last stop of a store is recorded as clean; not so when it is gone."""
    try:
        with closing(_catalog(store)) as catalog:
            return bool(catalog.execute("SELECT value FROM store WHERE key = 'clean'").fetchone() == (1,))
    except sqlite3.Error:
        return False


def check_no_other(options: MountOptions) -> None:
    """Refuse to make a default store where another one has snapshots of the same device. # I4

    It was named otherwise then, and what is written with the new store would not be kept for those snapshots. Who names
    a store has chosen. Raises RefusedError.
    """
    if options.store is not None or os.path.exists(os.path.join(options.store_path, FILE_NAME)):
        return
    for source in options.sources:
        for store, path in _with_snapshots():
            if _is_same_device(source.path, path):
                raise RefusedError(
                    f"{source.path} has snapshots in the store {store}, which must get its old bytes: mount it as "
                    f"before, as {path}, or choose a store with --store; with another one they turn wrong"
                )


def _with_snapshots() -> Iterator[tuple[str, str]]:
    """The default stores with snapshots that can be used, and the devices that they are of."""
    with suppress(FileNotFoundError):
        for name in sorted(os.listdir(STORES)):
            store = os.path.join(STORES, name)
            with suppress(sqlite3.Error), closing(_catalog(store)) as catalog:
                if catalog.execute("SELECT 1 FROM snapshots WHERE state != ?", (State.INVALID,)).fetchone():
                    found = catalog.execute("SELECT path FROM origins ORDER BY id").fetchall()
                    yield from ((store, os.fsdecode(path)) for (path,) in found)


def _catalog(store: str) -> sqlite3.Connection:
    return sqlite3.connect(f"file:{os.path.join(store, FILE_NAME)}?mode=ro", uri=True)


def _is_same_device(one: str, other: str) -> bool:
    try:
        first, second = os.stat(one), os.stat(other)
    except OSError:
        return False
    if stat.S_ISBLK(first.st_mode) and stat.S_ISBLK(second.st_mode):
        return first.st_rdev == second.st_rdev
    return os.path.samestat(first, second)
