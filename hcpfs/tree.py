"""The tree: what the file system is. Knows no pyfuse3 and can be used without a mount.

    /  live/NAME.img   snaps/SNAPSHOT/{NAME.img, info, lost}   status

Inode numbers are computed, not allocated, and never used twice: the fixed ones are small, and those of a snapshot
follow from its id. So nothing has to be remembered for the kernel, and `forget` has nothing to do.
"""

import errno
import logging
import os
import stat
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import trio

from cow.clock import after
from cow.errors import CowError, NotFoundError, SnapshotBusyError
from cow.events import Event
from cow.images.image import Image
from cow.images.origin import Origin
from cow.opening import Opened
from cow.scrub import OpenScrub
from cow.store.snapshot import Snapshot
from cow.store.store import Quiesce
from hcpfs import busy
from hcpfs.handles import READ_ONLY_TEXT, Handle, NotPermittedError, ReadOnly, Scrub, Text
from hcpfs.live import FIRST_INODE, LiveImages
from hcpfs.openfiles import OpenFiles, TextTimes
from hcpfs.text import LastError, info, listed, lost, status
from hcpfs.truncating import Truncating

ROOT, LIVE, SNAPS, STATUS = 1, 2, 3, 4
_SCRUBS = {b".verify": 5, b".repair": 6}  # not listed, so that nobody who reads the whole tree starts one
_SNAPSHOT_SHIFT = 20  # an inode is (snapshot id << 20) + place, and a snapshot's directory has place 0
_INFO, _LOST = 1, 2
_FIRST_IMAGE = 16
_TEXTS = {_INFO: info, _LOST: lost}
_RELEASE_GRACE_SECONDS = 0.5
_LEAST_BYTES = 4096  # that an image takes: a file with contents and no blocks is a single hole to tar and others
_IMAGE_SECONDS = 1.0  # st_blocks of a snapshot grows as the origin is overwritten

log = logging.getLogger("hcpfs")


class DirectoryAsFileError(CowError):
    """A directory was used as a file."""

    errno = errno.EISDIR


class NotDirectoryError(CowError):
    """A file was used as a directory."""

    errno = errno.ENOTDIR


class Access(NamedTuple):
    """Who may use the images: owner and mode. Directories get the mode's read bits as search bits too."""

    uid: int = 0
    gid: int = 0
    mode: int = 0o600


@dataclass(frozen=True)
class Attributes:
    """What stat(2) shows. `blocks` are 512 bytes each; for `valid_seconds` the kernel may say so without asking."""

    inode: int
    mode: int
    links: int
    size: int
    blocks: int
    modified_ns: int
    valid_seconds: float = _IMAGE_SECONDS


class Entry(NamedTuple):
    """A directory entry; `cookie` is where a listing goes on after it."""

    name: bytes
    inode: int
    cookie: int


class Opening(NamedTuple):
    """The answer to an open: the handle's number, and whether it is text, whose size is not known beforehand."""

    number: int
    is_text: bool


def _blocks(allocated_bytes: int) -> int:
    """What st_blocks says of that: 512 bytes each, in whole pages."""
    return -(-allocated_bytes // 4096) * 8


class Tree:
    """The file system over an open store. Trio thread only; raises CowError and OSError."""

    def __init__(self, opened: Opened, mountpoint: str, quiesce: Quiesce, access: Access, live: LiveImages) -> None:
        self.store = opened.store
        self._live = live
        self._opened = opened
        self._mountpoint = mountpoint
        self._quiesce = quiesce
        self._access = access
        self._open = OpenFiles()
        self.handles = self._open.handles  #: the open files by number
        #: (inode, offset, length): the kernel drops what it has cached of that. Without it there is no O_TRUNC
        self.forget_cached: Callable[[int, int, int], Awaitable[None]] | None = None
        self._text_times = TextTimes()
        self._last_error: LastError | None = None
        self._started_ns = time.time_ns()
        self._changed_ns = self._started_ns  #: when the list of snapshots last changed
        self._released = trio.Event()  #: fires when an image is closed

    # -- names and attributes ------------------------------------------------------------------------------------

    def cached(self) -> list[str]:
        """The images of which the kernel may cache what was written: the live ones, and those that are open."""
        opened = [
            f"snaps/{os.fsdecode(snapshot.name)}/{os.fsdecode(image.origin.name)}"
            for snapshot in self.store.snapshots
            for image in snapshot.images
            if image.opened
        ]
        return [*self._live.inodes, *opened]

    def progress(self) -> object:
        """Another value as long as what was acknowledged is on its way to the disks."""
        return [origin.buffered_bytes for origin in self.store.origins], self.store.space.used_bytes

    def entries(self, inode: int) -> Iterator[Entry]:
        """The entries of a directory in the order of their cookies."""
        yield Entry(b".", inode, 1)
        yield Entry(b"..", SNAPS if inode >> _SNAPSHOT_SHIFT else ROOT, 2)
        snapshot = self._snapshot(inode)
        if inode == ROOT:
            named = [(b"live", LIVE), (b"snaps", SNAPS), (b"status", STATUS)]
        elif inode == LIVE:
            named = [(origin.name, FIRST_INODE + place) for place, origin in enumerate(self.store.origins)]
        elif inode == SNAPS:
            for one in self.store.snapshots:
                yield Entry(one.name, one.id << _SNAPSHOT_SHIFT, 2 + one.id)
            return
        elif snapshot is not None and inode == snapshot.id << _SNAPSHOT_SHIFT:
            named = [(image.origin.name, inode + _FIRST_IMAGE + place) for place, image in enumerate(snapshot.images)]
            named += [(b"info", inode + _INFO), (b"lost", inode + _LOST)]
        else:
            raise NotDirectoryError("not a directory")
        for place, (name, number) in enumerate(named):
            yield Entry(name, number, 3 + place)

    def count_files(self) -> int:
        """How many files and directories there are."""
        images = len(self.store.origins)
        return 4 + images + len(self.store.snapshots) * (1 + images + len(_TEXTS))

    def lookup(self, parent: int, name: bytes) -> int:
        """The inode of a name. Raises NotFoundError."""
        if parent == SNAPS and name not in (b".", b".."):
            snapshot = self.store.find(name)
            if snapshot is not None:
                return snapshot.id << _SNAPSHOT_SHIFT
        elif parent == ROOT and name in _SCRUBS:
            return _SCRUBS[name]
        else:
            for entry in self.entries(parent):
                if entry.name == name:
                    return entry.inode
        raise NotFoundError("no such file or directory")

    async def attributes(self, inode: int, process: int = 0) -> Attributes:
        """What stat(2) shows for the inode to a process. Raises NotFoundError when it is gone."""
        if inode in (ROOT, LIVE, SNAPS):
            if inode == SNAPS:
                return self._directory(inode, 2 + len(self.store.snapshots), self._changed_ns)
            return self._directory(inode, 4 if inode == ROOT else 2, self._started_ns)
        if inode == STATUS:
            return self._text_attributes(inode, process)
        if inode in _SCRUBS.values():
            return Attributes(inode, stat.S_IFREG | 0o400, 1, 0, 0, time.time_ns())
        if not inode >> _SNAPSHOT_SHIFT:
            origin = self._origin(inode)
            return self._image_attributes(inode, origin, origin.name, await origin.allocated_bytes(), process)
        snapshot = self._snapshot(inode)
        if snapshot is None:
            raise NotFoundError("the snapshot was removed")
        place = inode - (snapshot.id << _SNAPSHOT_SHIFT)
        if place == 0:
            return self._directory(inode, 2, snapshot.row.created_ns)
        if place in _TEXTS:
            return self._text_attributes(inode, process)
        image = self._snapshot_image(snapshot, inode)
        return self._image_attributes(inode, image, image.origin.name, await image.allocated_bytes(), process)

    def _directory(self, inode: int, links: int, modified_ns: int) -> Attributes:
        readable = self._access.mode & 0o444
        mode = stat.S_IFDIR | 0o700 | readable | readable >> 2
        return Attributes(inode, mode, links, 0, 0, modified_ns)

    def _text_attributes(self, inode: int, process: int) -> Attributes:
        text = self._open.text_shown(inode, process) or self._text(inode)
        mode, size = stat.S_IFREG | self._access.mode & 0o444, len(text.content)
        return Attributes(inode, mode, 1, size, _blocks(size), text.modified_ns, valid_seconds=0)

    def _text(self, inode: int) -> Text:
        """The present text of a file that is one."""
        if inode == STATUS:
            content, since_ns = self._status(), self._started_ns
        else:
            snapshot = self._snapshot(inode)
            if snapshot is None:
                raise NotFoundError("the snapshot was removed")
            content = _TEXTS[inode - (snapshot.id << _SNAPSHOT_SHIFT)](snapshot)
            since_ns = max(self._started_ns, snapshot.row.created_ns)
        return Text(content, self._text_times.modified_ns(inode, content, since_ns))

    def _image_attributes(
        self, inode: int, image: Image | Origin, name: bytes, allocated_bytes: int, process: int
    ) -> Attributes:
        valid_seconds = _IMAGE_SECONDS
        if self._open.is_truncated(inode):
            valid_seconds = 0
            self._open.note_look(inode, name, process)
        blocks = _blocks(max(allocated_bytes, _LEAST_BYTES))
        mode = stat.S_IFREG | self._access.mode
        return Attributes(inode, mode, 1, image.size_bytes, blocks, image.modified_ns, valid_seconds)

    def _snapshot(self, inode: int) -> Snapshot | None:
        return self.store.by_id(inode >> _SNAPSHOT_SHIFT)

    def _origin(self, inode: int) -> Origin:
        place = inode - FIRST_INODE
        if not 0 <= place < len(self.store.origins):
            raise NotFoundError("no such file or directory")
        return self.store.origins[place]

    def _snapshot_image(self, snapshot: Snapshot, inode: int) -> Image:
        place = inode - (snapshot.id << _SNAPSHOT_SHIFT) - _FIRST_IMAGE
        if not 0 <= place < len(snapshot.images):
            raise NotFoundError("no such file or directory")
        return snapshot.images[place]

    def _status(self) -> bytes:
        return status(self.store, self._mountpoint, self._opened.was_clean, self._opened.findings, self._last_error)

    # -- changes -------------------------------------------------------------------------------------------------

    async def mkdir(self, parent: int, name: bytes) -> int:
        """Take a snapshot; the inode of its directory."""
        if parent != SNAPS:
            raise NotPermittedError("directories can only be made in snaps/, where each is a snapshot")
        snapshot = await self.store.create_snapshot(name, self._quiesce)
        self._changed_ns = after(self._changed_ns)
        log.info("snapshot %s taken: %s", os.fsdecode(name), snapshot.row.evidence)
        return snapshot.id << _SNAPSHOT_SHIFT

    async def rmdir(self, parent: int, name: bytes) -> None:
        """Drop a snapshot, whatever is listed in it."""
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
            inode = snapshot.id << _SNAPSHOT_SHIFT
            self._text_times.forget(range(inode, inode + _FIRST_IMAGE))
        self._changed_ns = after(self._changed_ns)
        log.info("snapshot %s removed", os.fsdecode(name))

    async def _delete_or_say_who(self, name: bytes) -> None:
        try:
            await self.store.delete_snapshot(name)
        except SnapshotBusyError as error:
            snapshot = self.store.find(name)
            entries = () if snapshot is None else self.entries(snapshot.id << _SNAPSHOT_SHIFT)
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
        self._changed_ns = after(self._changed_ns)

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
        """Give a handle for the file; the flags are as in <fcntl.h>. O_TRUNC comes as `set_size`."""
        handle = self._handle(inode)
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

    def _handle(self, inode: int) -> Handle:
        if inode == STATUS:
            return self._text(inode)
        if inode in _SCRUBS.values():
            return Scrub(OpenScrub(self.store, repair=inode == _SCRUBS[b".repair"]))
        if inode in (ROOT, LIVE, SNAPS):
            raise DirectoryAsFileError("a directory cannot be opened as a file")
        if not inode >> _SNAPSHOT_SHIFT:
            return self._origin(inode)
        snapshot = self._snapshot(inode)
        if snapshot is None:
            raise NotFoundError("the snapshot was removed")
        place = inode - (snapshot.id << _SNAPSHOT_SHIFT)
        if place in _TEXTS:
            return self._text(inode)
        return self._snapshot_image(snapshot, inode)

    def close(self, number: int) -> None:
        """Forget an open file. atomic: no checkpoint, so that an rmdir right after it finds the image closed."""
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
        """Keep the words for an errno, for `status` and the log."""
        self._last_error = LastError(time.time_ns(), number, sentence)
        log.warning("%s: %s", errno.errorcode.get(number, "error"), sentence)

    def record_event(self, event: Event) -> None:
        """Keep the words for what nobody is told by an errno, for `status` and the log."""
        self._last_error = LastError(time.time_ns(), 0, str(event))
        log.warning("%s", event)
