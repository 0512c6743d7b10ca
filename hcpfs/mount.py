"""The daemon: opens the store, mounts the tree, serves until the umount, closes clean.

Order matters. What can refuse comes first (`check`), so that a refusal leaves nothing; the freezer is a child, so it
starts before there are requests; the store closes after the last request, and only then are the devices released.
"""

import errno
import logging
import os
import signal
import stat
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import trio

from cow import Source, open_store
from cow.errors import CowError, RefusedError
from hcpfs import beneath, loops, readahead, record
from hcpfs.live import LiveImages
from hcpfs.operations import Operations
from hcpfs.options import STORES, MountOptions
from hcpfs.process import harden, keep_memory
from hcpfs.quiesce import Freezer, Quiescer
from hcpfs.session import Session, terminate
from hcpfs.tree import Tree

log = logging.getLogger("hcpfs")


def serve(options: MountOptions, on_ready: Callable[[], None]) -> None:
    """Mount and serve; returns after the umount, when all is durable and the devices are released.

    Raises RefusedError, CowError or OSError with a sentence when it cannot be mounted, or not be closed clean.
    """
    keep_memory()
    refused = harden()
    if refused:
        log.warning("not permitted, so memory pressure may stall this mount: %s", "; ".join(refused))
    try:
        trio.run(_serve, options, on_ready)
    except* (CowError, OSError) as group:
        raise _only(group) from group


def _only(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first plain exception of a group: they have one cause here."""
    first = group.exceptions[0]
    return _only(first) if isinstance(first, BaseExceptionGroup) else first


async def _serve(options: MountOptions, on_ready: Callable[[], None]) -> None:
    troubles: list[Callable[[str], None]] = [log.warning]
    async with (
        _freezer() as freezer,
        open_store(
            options.store_path,
            options.sources,
            quota_bytes=options.quota_bytes,
            on_full=options.on_full,
            write_behind=not options.sync,
            read_only=options.read_only,
            read_suspect=options.read_suspect,
            elsewhere=STORES,
            on_trouble=lambda sentence: troubles[-1](sentence),
        ) as opened,
    ):
        for finding in opened.findings:
            log.warning("found at the start: %s", finding)
        live = LiveImages(opened.store.origins)
        quiescer = Quiescer(options.mountpoint, live, freezer, options.freeze_seconds)
        tree = Tree(opened, options.mountpoint, quiescer.quiesce, options.access, live)
        troubles.append(tree.record_trouble)
        session = _mount(Operations(tree, options.access), options)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_terminate_on_signals, freezer)
                nursery.start_soon(_get_ready, options, quiescer, on_ready)
                await session.serve()
                nursery.cancel_scope.cancel()
            in_use = any(state.file.startswith(f"{options.mountpoint}/") for state in loops.states())
        finally:
            session.close()
        log.info("unmounted; closing the store")
    log.info("closed clean")
    if in_use or _is_mounted(options.mountpoint):  # it still is when its connection was aborted
        log.warning("what used the images finds them dead: hcpfs recover %s gets it going again", options.mountpoint)
    else:
        _forget(options.mountpoint)


@asynccontextmanager
async def _freezer() -> AsyncIterator[Freezer]:
    freezer = Freezer()
    await freezer.start()
    try:
        yield freezer
    finally:
        with trio.CancelScope(shield=True):
            await freezer.end()


def _mount(operations: Operations, options: MountOptions) -> Session:
    name = "+".join(source.path for source in options.sources).replace("\\", "\\\\").replace(",", "\\,")
    flags = {
        "default_permissions",
        "nosuid",
        "nodev",
        f"fsname={name.encode('ascii', 'replace').decode()}",
        "subtype=hcpfs",
    }
    if options.read_only:
        flags.add("ro")
    if options.allow_other:
        flags.add("allow_other")
    try:
        return Session(operations, options.mountpoint, flags)
    except RuntimeError as error:
        raise RefusedError(
            f"{options.mountpoint} could not be mounted ({error}): is /dev/fuse there, and are you root?"
        ) from error


def _widen_read_ahead(mountpoint: str) -> None:
    try:
        readahead.widen(mountpoint)
    except OSError as error:
        log.warning("the read-ahead of the mount stays as it is, so that cp and mmap are slower: %s", error)


async def _get_ready(options: MountOptions, quiescer: Quiescer, on_ready: Callable[[], None]) -> None:
    await quiescer.write_back()  # goes through the mount, so it is usable
    _widen_read_ahead(options.mountpoint)
    try:
        record.write(record.of_this_process(options.mountpoint, options.arguments(), options.image_names))
    except OSError as error:
        log.warning("hcpfs recover will not know how this was mounted: %s", error)
    on_ready()


def _forget(mountpoint: str) -> None:
    try:
        record.remove(mountpoint, os.getpid())
    except OSError as error:
        log.warning("the record of this mount in %s is not removed: %s", record.DIRECTORY, error)


async def _terminate_on_signals(freezer: Freezer) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for number in signals:
            log.info("%s: unmounting", signal.Signals(number).name)
            freezer.give_up()
            terminate()


def check(options: MountOptions) -> None:
    """Raise RefusedError for what can be seen to be wrong before anything is made or opened."""
    check_mountpoint(options.mountpoint)
    check_store_place(options.store_path, options.mountpoint)
    check_sources(options.sources)


def check_mountpoint(path: str) -> None:
    """Raise RefusedError unless a file system can be mounted at `path`."""
    try:
        kind = os.stat(path)
        if stat.S_ISDIR(kind.st_mode):
            os.listdir(path)  # stat(2) may still succeed on the mount of a dead daemon
    except OSError as error:
        dead = error.errno == errno.ENOTCONN
        hint = f"hcpfs recover {path} gets it going again" if dead else "make the directory first"
        raise RefusedError(f"the mount point {path} cannot be used ({error.strerror}): {hint}") from error
    if not stat.S_ISDIR(kind.st_mode):
        raise RefusedError(f"the mount point {path} is not a directory: name a directory")
    if _is_mounted(path):
        raise RefusedError(f"an hcpfs is mounted at {path} already: unmount it first, or choose another directory")


def _is_mounted(path: str) -> bool:
    return any(mount.mountpoint == path and mount.filesystem == beneath.FILESYSTEM_TYPE for mount in beneath.mounts())


def check_store_place(store: str, mountpoint: str) -> None:
    """Refuse a store that would make the daemon wait for itself. # I10"""
    real = os.path.realpath(store)
    if os.path.commonpath([real, os.path.realpath(mountpoint)]) == os.path.realpath(mountpoint):
        raise RefusedError(f"the store {store} is below the mount point {mountpoint}: put it somewhere else")
    present = real
    while not os.path.exists(present):
        present = os.path.dirname(present)
    image_of = beneath.hcpfs_under(present)
    if image_of is not None:
        raise RefusedError(
            f"the store {store} is on a file system that sits on an image of the hcpfs at {image_of}: it would have to "
            f"wait for itself; put the store on another disk"
        )


def check_sources(sources: Sequence[Source]) -> None:
    """Refuse a source that is mounted, naming where. The engine's O_EXCL is what holds; this says it better. # I7"""
    for source in sources:
        try:
            kind = os.stat(source.path)
        except OSError as error:
            raise RefusedError(f"{source.path} cannot be used as a source: {error.strerror}") from error
        if stat.S_ISBLK(kind.st_mode):
            _refuse_mounted(source.path, beneath.mountpoints_of(kind.st_rdev))
        for loop in beneath.loops_on(kind.st_dev, {kind.st_ino}) if stat.S_ISREG(kind.st_mode) else ():
            raise RefusedError(
                f"{source.path} is in use by the loop device {loop.path}, whose writes would not be seen: "
                f"losetup -d it first, and set it up on the live image instead"
            )


def _refuse_mounted(path: str, mountpoints: list[str]) -> None:
    if mountpoints:
        raise RefusedError(
            f"{path} is mounted at {mountpoints[0]}, so its writes would not be seen: unmount it, and mount the live "
            f"image instead"
        )
