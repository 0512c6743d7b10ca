"""The tree: what the file system is. Knows no pyfuse3 and can be used without a mount.

    /  live/NAME.img   snaps/SNAPSHOT/{NAME.img, info, lost}   status

Inode numbers are computed, not allocated, and never used twice: the fixed ones are small, and those of a snapshot
follow from its id. So nothing has to be remembered for the kernel, and `forget` has nothing to do.
"""

import errno
import json
import logging
import os
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import trio

from cow.errors import CowError, NotFoundError, SnapshotBusyError
from cow.image import Image
from cow.memory import Memory
from cow.opening import Opened
from cow.origin import Origin
from cow.scrub import Finding, OpenScrub
from cow.snapshot import Snapshot
from cow.store import Quiesce
from hcpfs.live import FIRST_INODE, LiveImages
from hcpfs.text import LastError, info, lost, status

ROOT, LIVE, SNAPS, STATUS = 1, 2, 3, 4
_SCRUBS = {b".verify": 5, b".repair": 6}  # not listed, so that nobody who reads the whole tree starts one
_SCRUB_LINE_SECONDS = 0.3
_SNAPSHOT_SHIFT = 20  # an inode is (snapshot id << 20) + place, and a snapshot's directory has place 0
_INFO, _LOST = 1, 2
_FIRST_IMAGE = 16
_TEXTS = {_INFO: info, _LOST: lost}
_RELEASE_GRACE_SECONDS = 0.5
_READ_ONLY_TEXT = "status, info and lost can only be read"

log = logging.getLogger("hcpfs")


class NotPermittedError(CowError):
    """The tree has a fixed shape: only mkdir, rmdir and rename in snaps/, and writes to images."""

    errno = errno.EPERM


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
    """What stat(2) shows. `blocks` are 512 bytes each."""

    inode: int
    mode: int
    links: int
    size: int
    blocks: int
    modified_ns: int


class Entry(NamedTuple):
    """A directory entry; `cookie` is where a listing goes on after it."""

    name: bytes
    inode: int
    cookie: int


class Handle(Protocol):
    """An open file."""

    def read_nowait(self, offset: int, length: int, into: memoryview) -> bytes | memoryview | None:
        """Read, where that needs no waiting, else None; short only at the end.

        What is returned may be a view of `into`, which is best as long as the engine's `covering_bytes(length)`.
        """

    async def read_waiting(self, offset: int, length: int) -> bytes | bytearray:
        """Read what could not be had without waiting."""

    def write_nowait(self, offset: int, data: bytes | memoryview, memory: Memory | None = None) -> int | None:
        """Write, where that needs no waiting, else None; short only at the end.

        `data` may be a view of `memory`, which may be kept for longer; other views are not.
        """

    async def write_waiting(self, offset: int, data: bytes | memoryview, memory: Memory | None = None) -> int:
        """Write what could not be written without waiting. A view's memory stays as it is until the return."""

    async def sync(self) -> None:
        """Make writes durable."""


class _ReadOnly:
    """An open file that is no image."""

    def read_nowait(self, offset: int, length: int, into: memoryview) -> bytes | None:
        return None

    def write_nowait(self, offset: int, data: bytes | memoryview, memory: Memory | None = None) -> int | None:
        return None

    async def write_waiting(self, offset: int, data: bytes | memoryview, memory: Memory | None = None) -> int:
        raise NotPermittedError(_READ_ONLY_TEXT)

    async def sync(self) -> None:
        return


class _Text(_ReadOnly):
    """An open `status` or `info`: the text as it was at the open."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    async def read_waiting(self, offset: int, length: int) -> bytes:
        return self._content[offset : offset + length]


class _Scrub(_ReadOnly):
    """An open `.verify` or `.repair`: reading it does the work, and gives a line of JSON for each finding and so often.

    `{"done": bytes, "total": bytes}`, `{"finding": sentence, "repaired": bool}`, and at last `{"end": true}`.
    """

    def __init__(self, scrub: OpenScrub) -> None:
        self._scrub = scrub
        self._text = b""
        self._ended = False

    async def read_waiting(self, offset: int, length: int) -> bytes:
        if offset == len(self._text) and not self._ended:
            self._text += await self._more()
        return self._text[offset : offset + length]

    async def _more(self) -> bytes:
        lines: list[dict[str, object]] = []
        deadline = time.monotonic() + _SCRUB_LINE_SECONDS
        while time.monotonic() < deadline:
            found = await self._scrub.step()
            if found is None:
                self._ended = True
                lines.append({"end": True})
                break
            for one in found:
                if isinstance(one, Finding):
                    lines.append({"finding": one.sentence, "repaired": one.repaired})
                elif not lines or "done" not in lines[-1]:
                    lines.append({"done": one.done_bytes, "total": one.total_bytes})
                else:
                    lines[-1] = {"done": one.done_bytes, "total": one.total_bytes}
        return "".join(json.dumps(line) + "\n" for line in lines).encode()


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
        self._access = access
        self.handles: dict[int, Handle] = {}  #: the open files by number
        self._next_handle = 1
        self._last_error: LastError | None = None
        self._changed_ns = time.time_ns()  #: when the list of snapshots last changed
        self._released = trio.Event()  #: fires when an image is closed

    # -- names and attributes ------------------------------------------------------------------------------------

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

    async def attributes(self, inode: int) -> Attributes:
        """What stat(2) shows for the inode. Raises NotFoundError when it is gone."""
        if inode in (ROOT, LIVE, SNAPS):
            links = {ROOT: 4, LIVE: 2, SNAPS: 2 + len(self.store.snapshots)}[inode]
            return self._directory(inode, links, self._changed_ns)
        if inode == STATUS:
            return self._text(inode, self._status(), time.time_ns())
        if inode in _SCRUBS.values():
            return Attributes(inode, stat.S_IFREG | 0o400, 1, 0, 0, time.time_ns())
        if not inode >> _SNAPSHOT_SHIFT:
            origin = self._origin(inode)
            blocks = -(-origin.size_bytes // 512)
            return self._image(inode, origin.size_bytes, blocks, origin.modified_ns)
        snapshot = self._snapshot(inode)
        if snapshot is None:
            raise NotFoundError("the snapshot was removed")
        place = inode - (snapshot.id << _SNAPSHOT_SHIFT)
        if place == 0:
            return self._directory(inode, 2, snapshot.row.created_ns)
        if place in _TEXTS:
            return self._text(inode, _TEXTS[place](snapshot), max(image.modified_ns for image in snapshot.images))
        image = self._snapshot_image(snapshot, inode)
        allocated = await image.allocated_bytes()
        return self._image(inode, image.size_bytes, -(-allocated // 512), image.modified_ns)

    def _directory(self, inode: int, links: int, modified_ns: int) -> Attributes:
        readable = self._access.mode & 0o444
        mode = stat.S_IFDIR | 0o700 | readable | readable >> 2
        return Attributes(inode, mode, links, 0, 0, modified_ns)

    def _text(self, inode: int, content: bytes, modified_ns: int) -> Attributes:
        return Attributes(inode, stat.S_IFREG | self._access.mode & 0o444, 1, len(content), 0, modified_ns)

    def _image(self, inode: int, size: int, blocks: int, modified_ns: int) -> Attributes:
        return Attributes(inode, stat.S_IFREG | self._access.mode, 1, size, blocks, modified_ns)

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
        self._changed_ns = time.time_ns()
        log.info("snapshot %s taken: %s", os.fsdecode(name), snapshot.row.evidence)
        return snapshot.id << _SNAPSHOT_SHIFT

    async def rmdir(self, parent: int, name: bytes) -> None:
        """Drop a snapshot, whatever is listed in it."""
        if parent != SNAPS:
            raise NotPermittedError("only snapshots, the directories in snaps/, can be removed")
        try:
            await self.store.delete_snapshot(name)
        except SnapshotBusyError:
            # A loop device that was just detached closes its file a moment later.
            with trio.move_on_after(_RELEASE_GRACE_SECONDS):
                await self._until_closed(name)
            await self.store.delete_snapshot(name)
        self._changed_ns = time.time_ns()
        log.info("snapshot %s removed", os.fsdecode(name))

    async def _until_closed(self, name: bytes) -> None:
        while (snapshot := self.store.find(name)) is not None and snapshot.is_open:
            await self._released.wait()

    async def rename(self, parent: int, name: bytes, new_parent: int, new_name: bytes, *, exchange: bool) -> None:
        """Rename a snapshot; the new name must be free."""
        if parent != SNAPS or new_parent != SNAPS or exchange:
            raise NotPermittedError("only snapshots can be renamed, and only within snaps/")
        await self.store.rename_snapshot(name, new_name)
        self._changed_ns = time.time_ns()

    async def set_size(self, inode: int, size: int) -> None:
        """Accept an image's own size, which tools set after writing, and refuse any other."""
        if size != (await self.attributes(inode)).size:
            raise NotPermittedError("an image has the size of its device and cannot be truncated or extended")

    # -- open files ----------------------------------------------------------------------------------------------

    def open(self, inode: int, flags: int) -> Opening:
        """Give a handle for the file; the flags are as in <fcntl.h>."""
        handle = self._handle(inode)
        if flags & os.O_TRUNC:
            raise NotPermittedError(
                "an image cannot be truncated: write over it in place (dd conv=notrunc, rsync --inplace)"
            )
        if isinstance(handle, _ReadOnly) and flags & os.O_ACCMODE != os.O_RDONLY:
            raise NotPermittedError(_READ_ONLY_TEXT)
        number = self._next_handle
        self._next_handle += 1
        self.handles[number] = handle
        self._live.opened(number, inode, flags)
        if isinstance(handle, Image):
            handle.opened += 1
        return Opening(number, isinstance(handle, _ReadOnly))

    def _handle(self, inode: int) -> Handle:
        if inode == STATUS:
            return _Text(self._status())
        if inode in _SCRUBS.values():
            return _Scrub(OpenScrub(self.store, repair=inode == _SCRUBS[b".repair"]))
        if inode in (ROOT, LIVE, SNAPS):
            raise DirectoryAsFileError("a directory cannot be opened as a file")
        if not inode >> _SNAPSHOT_SHIFT:
            return self._origin(inode)
        snapshot = self._snapshot(inode)
        if snapshot is None:
            raise NotFoundError("the snapshot was removed")
        place = inode - (snapshot.id << _SNAPSHOT_SHIFT)
        if place in _TEXTS:
            return _Text(_TEXTS[place](snapshot))
        return self._snapshot_image(snapshot, inode)

    def close(self, number: int) -> None:
        """Forget an open file. atomic: no checkpoint, so that an rmdir right after it finds the image closed."""
        handle = self.handles.pop(number)
        self._live.closed(number)
        if isinstance(handle, Image):
            handle.opened -= 1
            self._released.set()
            self._released = trio.Event()

    # -- errors --------------------------------------------------------------------------------------------------

    def record_error(self, number: int, sentence: str) -> None:
        """Keep the words for an errno, for `status` and the log."""
        self._last_error = LastError(time.time_ns(), number, sentence)
        log.warning("%s: %s", errno.errorcode.get(number, "error"), sentence)

    def record_trouble(self, sentence: str) -> None:
        """Keep what nobody is told by an errno."""
        self._last_error = LastError(time.time_ns(), 0, sentence)
        log.warning("%s", sentence)
