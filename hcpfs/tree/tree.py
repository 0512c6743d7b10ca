"""The tree: what requests do to the file system. Knows no pyfuse3, and can be used without a mount.

The files and directories themselves are in hcpfs/tree/kinds.py.
"""

import errno
import logging
import os
import time
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import NamedTuple

import trio

from cow.clock import after
from cow.errors import SnapshotBusyError
from cow.events import Event
from cow.images.image import Image
from cow.images.origin import Origin
from cow.opening import Opened
from cow.store.store import Quiesce
from hcpfs.quiesce import busy
from hcpfs.quiesce.live import LiveImages
from hcpfs.system.words import listed
from hcpfs.tree.access import Access
from hcpfs.tree.handles import READ_ONLY_TEXT, NotPermittedError, ReadOnly
from hcpfs.tree.kinds import SNAPS, Nodes, inode_of, text_inodes
from hcpfs.tree.nodes import Attributes, Common, Entry
from hcpfs.tree.openfiles import OpenFiles, TextTimes
from hcpfs.tree.text import LastError, status
from hcpfs.tree.truncating import Truncating

_RELEASE_GRACE_SECONDS = 0.5

log = logging.getLogger("hcpfs")


class Opening(NamedTuple):
    """The answer to an open: the handle's number, and whether it is text, whose size is not known beforehand."""

    number: int
    is_text: bool


class Tree:
    """The file system over an open store. Trio thread only; raises CowError and OSError."""

    def __init__(self, opened: Opened, mountpoint: str, quiesce: Quiesce, access: Access, live: LiveImages) -> None:
        self.store = opened.store
        self._live = live
        self._opened = opened
        self._mountpoint = mountpoint
        self._quiesce = quiesce
        self._open = OpenFiles()
        self.handles = self._open.handles  #: the open files by number
        #: (inode, offset, length): the kernel drops what it has cached of that. Without it there is no O_TRUNC
        self.forget_cached: Callable[[int, int, int], Awaitable[None]] | None = None
        self._last_error: LastError | None = None
        self._released = trio.Event()  #: fires when an image is closed
        now_ns = time.time_ns()
        self._common = Common(opened.store, access, self._open, TextTimes(), self._status, now_ns, now_ns)
        self._nodes = Nodes(self._common)

    # -- names and attributes ------------------------------------------------------------------------------------

    def cached(self) -> list[str]:
        """The images that the kernel may have dirty pages of, by path: the live ones, and those that are open."""
        opened = [
            f"snaps/{os.fsdecode(snapshot.name)}/{os.fsdecode(image.origin.name)}"
            for snapshot in self.store.snapshots
            for image in snapshot.images
            if image.opened
        ]
        return [*self._live.inodes, *opened]

    def progress(self) -> object:
        """A value that changes as long as acknowledged writes are on their way to the disks."""
        return [origin.buffered_bytes for origin in self.store.origins], self.store.space.used_bytes

    def entries(self, inode: int) -> Iterator[Entry]:
        """The entries of a directory in the order of their cookies. Raises NotFoundError and NotDirectoryError."""
        return self._nodes.at(inode).entries()

    def count_files(self) -> int:
        """How many files and directories there are."""
        return self._nodes.count()

    def lookup(self, parent: int, name: bytes) -> int:
        """The inode of a name. Raises NotFoundError and NotDirectoryError."""
        return self._nodes.at(parent).find(name)

    async def attributes(self, inode: int, process: int = 0) -> Attributes:
        """What stat(2) shows for the inode to a process. Raises NotFoundError when it is gone."""
        return await self._nodes.at(inode).attributes(process)

    def _status(self) -> bytes:
        return status(self.store, self._mountpoint, self._opened.was_clean, self._opened.findings, self._last_error)

    # -- changes -------------------------------------------------------------------------------------------------

    async def mkdir(self, parent: int, name: bytes) -> int:
        """Take a snapshot. Returns the inode of its directory."""
        if parent != SNAPS:
            raise NotPermittedError("directories can only be made in snaps/, where each is a snapshot")
        snapshot = await self.store.create_snapshot(name, self._quiesce)
        self._note_change()
        log.info("snapshot %s taken: %s", os.fsdecode(name), snapshot.row.evidence)
        return inode_of(snapshot.id)

    async def rmdir(self, parent: int, name: bytes) -> None:
        """Drop a snapshot with the files in it."""
        if parent != SNAPS:
            raise NotPermittedError("only snapshots, the directories in snaps/, can be removed")
        snapshot = self.store.find(name)
        try:
            await self.store.delete_snapshot(name)
        except SnapshotBusyError:
            # A loop device that was just detached closes its file a moment later.
            with trio.move_on_after(_RELEASE_GRACE_SECONDS):
                await self._until_closed(name)
            await self._delete_or_say_who(name)
        if snapshot is not None:
            self._common.text_times.forget(text_inodes(snapshot.id))
        self._note_change()
        log.info("snapshot %s removed", os.fsdecode(name))

    def _note_change(self) -> None:
        self._common.changed_ns = after(self._common.changed_ns)

    async def _delete_or_say_who(self, name: bytes) -> None:
        try:
            await self.store.delete_snapshot(name)
        except SnapshotBusyError as error:
            snapshot = self.store.find(name)
            entries = () if snapshot is None else self.entries(inode_of(snapshot.id))
            users = await busy.who(self._mountpoint, [entry.inode for entry in entries])
            raise SnapshotBusyError(f"{error}. In use by: {listed(users)}" if users else str(error)) from error

    async def _until_closed(self, name: bytes) -> None:
        while (snapshot := self.store.find(name)) is not None and snapshot.is_open:
            await self._released.wait()

    async def rename(self, parent: int, name: bytes, new_parent: int, new_name: bytes, *, exchange: bool) -> None:
        """Rename a snapshot; the new name must be free, or the same."""
        if parent != SNAPS or new_parent != SNAPS or exchange:
            raise NotPermittedError("only snapshots can be renamed, and only within snaps/")
        await self.store.rename_snapshot(name, new_name)
        self._note_change()

    async def set_size(self, inode: int, size: int, number: int | None, process: int) -> None:
        """Accept an image's own size, which tools set after writing, and 0 right after an open: that is O_TRUNC.

        `number` is that of the open file for ftruncate(2), None for truncate(2) and O_TRUNC. Any other size is refused.
        """
        if size == (await self.attributes(inode)).size:
            handle = self.handles.get(number) if number is not None else None
            if isinstance(handle, Truncating):
                await handle.extend()
            return
        opened = self._open.just_opened(inode, process) if size == 0 and number is None else None
        handle = self.handles[opened.number] if opened is not None else None
        if opened is None or self.forget_cached is None or not isinstance(handle, Image | Origin):
            raise NotPermittedError(
                "an image has the size of its device and cannot be truncated or extended (dd: conv=notrunc)"
            )
        self.handles[opened.number] = truncating = Truncating(handle, partial(self.forget_cached, inode))
        await truncating.begin()

    # -- open files ----------------------------------------------------------------------------------------------

    def open(self, inode: int, flags: int, process: int = 0) -> Opening:
        """Give a handle of a file. `flags` are the O_ flags of the caller; O_TRUNC comes as `set_size`."""
        handle = self._nodes.at(inode).open()
        writable = flags & os.O_ACCMODE != os.O_RDONLY
        if flags & os.O_TRUNC:  # only where requests take the slow path
            raise NotPermittedError("an image cannot be truncated here: write over it in place (dd conv=notrunc)")
        if isinstance(handle, ReadOnly) and writable:
            raise NotPermittedError(READ_ONLY_TEXT)
        number = self._open.add(inode, handle, process, writable=writable)
        self._live.opened(number, inode, flags)
        if isinstance(handle, Image):
            handle.opened += 1
        return Opening(number, isinstance(handle, ReadOnly))

    def close(self, number: int) -> None:
        """Close an open file. atomic: no checkpoint, so that an rmdir right after it finds the image closed."""
        handle = self._open.remove(number)
        self._live.closed(number)
        if isinstance(handle, Truncating):
            handle = handle.image
        if isinstance(handle, Image):
            handle.opened -= 1
            self._released.set()
            self._released = trio.Event()

    # -- errors --------------------------------------------------------------------------------------------------

    def record_error(self, number: int, sentence: str) -> None:
        """Keep the sentence for an errno that a caller gets, for `status` and the log."""
        self._last_error = LastError(time.time_ns(), number, sentence)
        log.warning("%s: %s", errno.errorcode.get(number, "error"), sentence)

    def record_event(self, event: Event) -> None:
        """Keep the sentence for what no caller is told by an errno, for `status` and the log."""
        self._last_error = LastError(time.time_ns(), 0, str(event))
        log.warning("%s", event)
