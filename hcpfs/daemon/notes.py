"""What a person must know at the mount, in sentences: snapshots that are not whole, options that have no effect.

They are printed for the person who mounts, and logged. Each says what, where, and what to do.
"""

import os
from collections.abc import Iterator

from cow.errors import printable
from cow.records.rows import State
from cow.store.store import Store
from hcpfs.options import MountOptions
from hcpfs.system.words import listed
from hcpfs.tree.access import Access

_OTHERS = 0o077  # the bits of a mode for all but the owner
_WORTH = {
    State.DAMAGED: "what was lost of such a snapshot reads EIO, the rest is as it was: `lost` in it says which bytes",
    State.SUSPECT: "the disk was changed without hcpfs, so what such a snapshot reads from there may be wrong, and is "
    "refused without read_suspect; what the store has of it is right: copy what you need and rmdir it",
    State.INVALID: "such a snapshot was given up and cannot be read, `info` in it says why: rmdir it",
}


def of_snapshots(store: Store) -> Iterator[str]:
    """Snapshots that are damaged, suspect or invalid."""
    for state, worth in _WORTH.items():
        found = [one for one in store.snapshots if one.row.state is state]
        if found:
            count = f"{len(found)} of {len(store.snapshots)} snapshots"
            names = listed(printable(one.name) for one in found)
            yield f"{state} in {store.path}: {count} ({names}): {worth}"


def of_mount(options: MountOptions) -> Iterator[str]:
    """Effects of the mount that may be unexpected, told by its options and by what is at the mount point."""
    yield from _hidden(options.mountpoint)
    yield from _of_access(options)
    if options.read_only:
        without = [name for name, given in (("quota", options.quota_bytes), ("sync", options.sync)) if given]
        if without:
            yield f"with ro nothing is written through hcpfs, so {' and '.join(without)} has no effect"
    if options.freeze_seconds == 0:
        yield "freeze=0 leaves no time to freeze a file system, so mounted disks are taken as after a power cut"
    for source in options.sources:
        if not options.read_only and not os.stat(source.path).st_mode & 0o222:
            yield (
                f"nobody has the right to write {source.path} by its mode, and root writes to it all the same: mount "
                f"with -o ro if it shall stay as it is"
            )


def _hidden(mountpoint: str) -> Iterator[str]:
    names = sorted(os.listdir(mountpoint))
    if names:
        shown = ", ".join(printable(os.fsencode(name)) for name in names[:3]) + (", ..." if len(names) > 3 else "")
        yield f"{mountpoint} is not empty: what is in it ({shown}) is hidden until the umount"


def _of_access(options: MountOptions) -> Iterator[str]:
    access = options.access
    others = access.uid != os.geteuid() or access.mode & _OTHERS
    if access != Access() and others and not options.allow_other:
        yield (
            f"uid={access.uid}, gid={access.gid}, mode={access.mode:o} let nobody else in: without allow_other the "
            f"kernel keeps all but the one who mounts out"
        )
    elif options.allow_other and access == Access():
        yield "allow_other lets others see the tree, and root alone read it: give uid=, gid= or mode= too"


def of_room(store: Store) -> Iterator[str]:
    """A quota that is more than the file system has room for."""
    quota, total = store.space.quota_bytes, store.space.total_bytes
    if quota is not None and total < quota:
        yield (
            f"the quota is {quota >> 20} MiB, and the file system of the store {store.path} has room for "
            f"{total >> 20} MiB of it: what others leave there is what counts"
        )
