"""What the next write to an origin would cost when the quota leaves it no room: refused unless the user means it.

A store that has reached its quota by itself follows its policy, and so does every later mount of it. What is refused
is a quota that is lower than the last one, or a first one.
"""

from collections.abc import Iterator

from cow.config import OnFull
from cow.durable.reserve import RESERVE_BYTES
from cow.durable.space import UNPROMISED_BYTES
from cow.errors import RefusedError, printable
from cow.records.catalog import Catalog
from cow.store.snapshot import Snapshot
from cow.store.store import Store

QUOTA_SETTING = "quota_bytes"  #: in the catalog: that of the last mount; 0 when there was none
_MOST_NAMES = 8


def check_quota(store: Store, catalog: Catalog, accepted: bool) -> None:
    """Raise RefusedError when the quota is lower than the last one, and the next write would find no room.

    Otherwise the quota is recorded as the last one. Blocks.
    """
    before = catalog.setting(QUOTA_SETTING)
    quota = store.space.quota_bytes or 0
    is_lower = quota and (not isinstance(before, int) or not before or quota < before)
    usable = [one for one in store.snapshots if one.usable]
    if is_lower and usable and not accepted and not store.space.has_room_for_a_write:
        used = store.space.used_bytes
        needed = used + RESERVE_BYTES + UNPROMISED_BYTES
        raise RefusedError(
            f"the store {store.path} takes {_mib(used)} MiB already, and a quota of {_mib(quota)} MiB leaves no room "
            f"for old bytes: at the next write to the disk {_cost(store, usable)}. Nothing was changed. Mount with a "
            f"quota of {_mib(needed)} MiB at least, or without a quota and rmdir snapshots; or, if this is meant, with "
            f"--accept quota (-o accept=quota)"
        )
    if quota != (before or 0):
        catalog.set_setting(QUOTA_SETTING, quota)


def _mib(count: int) -> int:
    return -(-count // (1 << 20))


def _cost(store: Store, usable: list[Snapshot]) -> str:
    if store.settings.on_full is OnFull.BLOCK_WRITES:
        return "the writer would get ENOSPC, at which a file system on it turns read-only (on_full=block-writes)"
    if store.settings.on_full is OnFull.LOSE_CHUNKS:
        return (
            f"what it overwrites would be lost to {len(usable)} snapshots, chunk by chunk, and read EIO there "
            f"(on_full=lose-chunks)"
        )
    gone = list(_given_up(store, usable))
    names = ", ".join(printable(one.name) for one in gone[:_MOST_NAMES])
    more = f" and {len(gone) - _MOST_NAMES} more" if len(gone) > _MOST_NAMES else ""
    whole = "all snapshots" if len(gone) == len(usable) else f"{len(gone)} of {len(usable)} snapshots, the oldest,"
    return f"{whole} would be given up: {names}{more} (on_full=drop-oldest)"


def _given_up(store: Store, usable: list[Snapshot]) -> Iterator[Snapshot]:
    """The snapshots that drop-oldest would give up until there is room, judged by what their files take now."""
    excess = store.space.excess_bytes
    for snapshot in usable:
        if excess <= 0:
            return
        yield snapshot
        for image in snapshot.images:
            for layer in image.view.own_layers():
                excess -= layer.files.allocated_bytes()
