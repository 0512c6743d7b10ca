"""The daemon: opens the store, mounts the tree, serves until the umount, closes clean.

Order matters. The checks come first (refusals.py), so that a refusal leaves nothing behind; the freezer is
a child process, so it is started before there are requests; the store is closed after the last request, and only then
are the devices released.
"""

import logging
import os
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import NamedTuple

import trio

from cow.config import Source
from cow.errors import CowError, RefusedError
from cow.events import Event
from cow.opening import Opened, open_store
from hcpfs.daemon import notes, record, stores
from hcpfs.daemon.ending import Ending, Mounted
from hcpfs.daemon.operations import Operations
from hcpfs.daemon.session import Session, terminate
from hcpfs.daemon.supervisor import Supervisor
from hcpfs.options import STORES, Accept, MountOptions
from hcpfs.quiesce.helper import Freezer
from hcpfs.quiesce.live import LiveImages
from hcpfs.quiesce.quiesce import Quiescer
from hcpfs.system import beneath, ground, loops, mountpoint, readahead
from hcpfs.system.memory import keep_memory
from hcpfs.system.process import harden
from hcpfs.system.superblock import superblock_of
from hcpfs.system.terminal import standard_error_diverted
from hcpfs.system.threads import start_threads
from hcpfs.tree.tree import Tree

_AGAIN_SECONDS = 0.1  # until the service manager is told again, if it could not take the message

log = logging.getLogger("hcpfs")


class Start(NamedTuple):
    """What is called at the start of a mount, and when."""

    on_ready: Callable[[], None]  #: the mount is usable
    on_note: Callable[[str], None]  #: before that, with what a person must know
    on_open: Callable[[], None]  #: the store is open


def serve(options: MountOptions, start: Start, supervisor: Supervisor) -> None:
    """Mount and serve. Returns after the umount, when all is durable and the devices are released.

    The notes for `start` are logged, too. Raises RefusedError, CowError or OSError, with a sentence, when it cannot be
    mounted or not be closed clean.
    """
    keep_memory()
    refused = harden()
    if refused:
        log.warning("not permitted, so memory pressure may stall this mount: %s", "; ".join(refused))
    ending = Ending(supervisor, foreground=options.foreground)

    try:
        trio.run(ending.see_to, partial(_serve, options, ending, supervisor, start))
    except BaseExceptionGroup as group:
        if (rest := group.split((CowError, OSError))[1]) is not None:
            raise rest from group
        raise _only(group) from group


def _only(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first plain exception of a group, because they all have one cause here."""
    first = group.exceptions[0]
    return _only(first) if isinstance(first, BaseExceptionGroup) else first


async def _serve(options: MountOptions, ending: Ending, supervisor: Supervisor, start: Start) -> None:
    start_threads()
    told = set()

    def note(sentence: str) -> None:
        log.warning("%s", sentence)
        if sentence not in told:
            told.add(sentence)
            start.on_note(sentence)

    tree: Tree | None = None

    def hear(event: Event) -> None:
        sentence = str(event)
        if tree is None:
            note(sentence)
            return
        tree.record_event(event)
        if sentence not in told:
            start.on_note(sentence)

    ending.enter("opening the store")
    async with (
        _held(options.sources),
        _freezer() as freezer,
        open_store(
            options.store_path,
            options.sources,
            quota_bytes=options.quota_bytes,
            on_full=options.on_full,
            write_behind=not options.sync,
            read_only=options.read_only,
            read_suspect=options.read_suspect,
            accept_changed=Accept.CHANGED in options.accept,
            accept_unchanged=Accept.UNCHANGED in options.accept,
            superblock_of=superblock_of,
            accept_quota=Accept.QUOTA in options.accept,
            elsewhere=STORES,
            tell=hear,
        ) as opened,
    ):
        start.on_open()
        for sentence in _to_be_known(opened, options):
            note(sentence)
        live = LiveImages(opened.store.origins)
        quiescer = Quiescer(options.mountpoint, live, freezer, options.freeze_seconds)
        tree = Tree(opened, options.mountpoint, quiescer.quiesce, options.access, live)
        session = _mount(Operations(tree, options.access), options)

        def terminate_session() -> None:
            freezer.give_up()
            terminate()

        ready = trio.Event()
        try:
            ending.served(
                Mounted(options.mountpoint, _device(options.mountpoint), tree.cached, terminate_session, tree.progress)
            )
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_get_ready, options, quiescer, supervisor, note, start.on_ready, ready)
                await session.serve()
                nursery.cancel_scope.cancel()
            in_use = any(state.file.startswith(f"{options.mountpoint}/") for state in loops.states())
        finally:
            session.close()
        ending.enter("closing the store")
        log.info("unmounted; closing the store")
    log.info("closed clean")
    if in_use or mountpoint.is_served(options.mountpoint):  # it still is when its connection was aborted
        log.warning(
            "what used the images finds them dead, and only what was flushed is there: hcpfs recover %s gets it going "
            "again",
            options.mountpoint,
        )
    else:
        _forget(options.mountpoint)
    if ending.asked_by and not ready.is_set():
        raise RefusedError(f"{ending.asked_by} ended it before it was usable")


def _to_be_known(opened: Opened, options: MountOptions) -> Iterator[str]:
    """What a person must know of the store and of this mount. Remembers the store (see `stores.remember`)."""
    try:
        stores.remember(options.store_path)
    except OSError as error:
        yield (
            f"a second store for this disk might be made some day without a question, as {STORES} takes no link to "
            f"this one ({error.strerror})"
        )
    yield from opened.findings
    yield from notes.of_snapshots(opened.store)
    yield from notes.of_room(opened.store)
    yield from notes.of_mount(options)


def _device(mountpoint: str) -> int:
    """The device number of the mount that this process has just made."""
    return [mount.device for mount in beneath.mounts() if mount.mountpoint == mountpoint][-1]


@asynccontextmanager
async def _held(sources: Sequence[Source]) -> AsyncIterator[None]:
    with ground.held([source.path for source in sources]):
        yield


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
    flags.update(option.replace("\\", "\\\\").replace(",", "\\,") for option in options.contexts)
    with standard_error_diverted() as said:
        try:
            return Session(operations, options.mountpoint, flags)
        except RuntimeError as error:
            words = said() or f"{error}: is /dev/fuse there?"
            raise RefusedError(f"{options.mountpoint} could not be mounted: {words}") from error


def _widen_read_ahead(mountpoint: str) -> None:
    try:
        readahead.widen(mountpoint)
    except OSError as error:
        log.warning("the read-ahead of the mount stays as it is, so that cp and mmap are slower: %s", error)


async def _get_ready(
    options: MountOptions,
    quiescer: Quiescer,
    supervisor: Supervisor,
    note: Callable[[str], None],
    on_ready: Callable[[], None],
    ready: trio.Event,
) -> None:
    await quiescer.write_back()  # it goes through the mount, which is usable then
    _widen_read_ahead(options.mountpoint)
    try:
        paths = [source.path for source in options.sources]
        record.write(
            record.of_this_process(
                options.mountpoint, options.arguments(), options.image_names, options.store_path, paths
            )
        )
    except OSError as error:
        note(
            f"should this daemon die, hcpfs recover will not know how it was mounted, as {record.DIRECTORY} takes no "
            f"record ({error}): use hcpfs mount --recover with the same arguments then"
        )
    on_ready()
    ready.set()
    while not supervisor.tell(f"serving {options.mountpoint}; the store is {options.store_path}", READY=1):  # noqa: ASYNC110
        await trio.sleep(_AGAIN_SECONDS)


def _forget(mountpoint: str) -> None:
    try:
        record.remove(mountpoint, os.getpid())
    except OSError as error:
        log.warning("the record of this mount in %s is not removed: %s", record.DIRECTORY, error)
