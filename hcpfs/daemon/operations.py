"""The adapter between pyfuse3 and the tree. It translates requests, and decides nothing: see hcpfs/tree/tree.py.

getxattr is answered with ENOSYS (pyfuse3's default), once; otherwise the kernel would ask for `security.capability`
before every write.

Reads, writes and syncs come here only where there is no fast path.

The kernel's cache. Images change only through this mount, so the kernel may keep the pages that it has read
(`keep_cache`): the second cp of an image that fits in memory makes no requests. Files opened with O_DIRECT get FUSE's
own direct I/O: it gives 1.3 times as many 4 KiB reads at depth 16, and the same at depth 1 and for writes.

FUSE's writeback cache stays off. Measured with it against without, medians of 3: small buffered writes gain (sequential
4 KiB 5.5 times, random 1.4; a loop device without direct I/O 1.5 to 1.9), large ones lose (sequential 1 MiB 0.66 to
0.71), a loop device with direct I/O gains nothing (0.97 to 1). And with it sizes and times would be the kernel's and
not the image's, a partial write would read first, and a writer would not be told that the store is full.
"""

import errno
import functools
import logging
import os
import stat
from collections.abc import Callable, Coroutine
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import pyfuse3
from pyfuse3 import (
    EntryAttributes,
    FileInfo,
    FUSEError,
    ReaddirToken,
    RequestContext,
    SetattrFields,
    StatvfsData,
)

from cow.buffer.memory import is_out_of_memory, out_of_memory
from cow.errors import CowError, NotFoundError
from cow.geometry import covering_bytes
from hcpfs.tree.access import Access
from hcpfs.tree.handles import NotPermittedError
from hcpfs.tree.nodes import Attributes
from hcpfs.tree.tree import Tree

ENTRY_SECONDS = 300.0  # names change through this mount only
_RENAME_FLAGS = pyfuse3.RENAME_NOREPLACE | pyfuse3.RENAME_EXCHANGE
# The number of files in statfs(2): more than there can be, so that programs never find too few left, and within 32
# bits, because 32-bit programs fail at more.
_MOST_FILES = 1 << 31

log = logging.getLogger("hcpfs")

P = ParamSpec("P")
R = TypeVar("R")


def _answered(
    handler: Callable[Concatenate["Operations", P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate["Operations", P], Coroutine[Any, Any, R]]:
    """Turn an exception of a handler into the errno for the caller, and keep its sentence."""

    @functools.wraps(handler)
    async def answer(self: "Operations", *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return await handler(self, *args, **kwargs)
        except Exception as error:
            raise self.answer(handler.__name__, error) from error

    return cast(Callable[Concatenate["Operations", P], Coroutine[Any, Any, R]], answer)


def _directory(inode: int) -> Attributes:
    return Attributes(inode, stat.S_IFDIR, links=2, size=0, blocks=0, modified_ns=0)


class UnknownFlagsError(CowError):
    """A call was made with flags that mean nothing here."""

    errno = errno.EINVAL


class Operations(pyfuse3.Operations):
    """The handlers; each translates one request."""

    supports_dot_lookup = False

    def __init__(self, tree: Tree, access: Access) -> None:
        super().__init__()
        self.tree = tree
        self._access = access
        self._handles = tree.handles

    def answer(self, request: str, error: Exception) -> FUSEError:
        """The exception to be raised to pyfuse3 for one of a handler."""
        return error if isinstance(error, FUSEError) else FUSEError(self.errno_of(request, error))

    def errno_of(self, request: str, error: Exception) -> int:
        """The errno for an exception of a handler, whose sentence is kept for `status` and the log."""
        number, sentence = errno.EIO, f"a defect of hcpfs in {request}: {error!r}; please report it"
        if isinstance(error, NotFoundError):
            return error.errno
        if isinstance(error, CowError):
            number, sentence = error.errno, str(error)
        elif isinstance(error, OSError):
            number, sentence = error.errno or errno.EIO, f"{request}: {error}"
        elif is_out_of_memory(error):
            number, sentence = errno.ENOMEM, f"{request}: {out_of_memory(error)}"
        else:
            # Passed on, it would end the session and take the device away from its users.
            log.error("a defect of hcpfs in %s", request, exc_info=error)
        self.tree.record_error(number, sentence)
        return number

    def _attributes(self, found: Attributes) -> EntryAttributes:
        entry = EntryAttributes()
        entry.st_ino = found.inode
        entry.st_mode = found.mode
        entry.st_nlink = found.links
        entry.st_uid = self._access.uid
        entry.st_gid = self._access.gid
        entry.st_size = found.size
        entry.st_blocks = found.blocks
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = found.modified_ns
        entry.entry_timeout = ENTRY_SECONDS
        entry.attr_timeout = found.valid_seconds
        return entry

    @_answered
    async def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        return self._attributes(await self.tree.attributes(self.tree.lookup(parent_inode, name), ctx.pid))

    async def forget(self, inode_list: object) -> None:
        """Do nothing: no state is kept for the kernel's inodes."""

    @_answered
    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        return self._attributes(await self.tree.attributes(inode, ctx.pid))

    @_answered
    async def setattr(
        self, inode: int, attr: EntryAttributes, fields: SetattrFields, fh: int | None, ctx: RequestContext
    ) -> EntryAttributes:
        found = await self.tree.attributes(inode, ctx.pid)
        differs = (
            (fields.update_mode and stat.S_IMODE(attr.st_mode) != stat.S_IMODE(found.mode))
            or (fields.update_uid and attr.st_uid != self._access.uid)
            or (fields.update_gid and attr.st_gid != self._access.gid)
            or (fields.update_mtime and attr.st_mtime_ns != found.modified_ns)
            or (fields.update_atime and attr.st_atime_ns != found.modified_ns)
        )
        if differs:
            raise NotPermittedError(
                "owner, mode and times are hcpfs's own, and can only be set to what they are: leave them out (cp "
                "without -p, rsync without -pogt), or mount with the options uid, gid and mode"
            )
        if fields.update_size:
            await self.tree.set_size(inode, attr.st_size, fh, ctx.pid)
        return self._attributes(await self.tree.attributes(inode))

    @_answered
    async def mkdir(self, parent_inode: int, name: bytes, mode: int, ctx: RequestContext) -> EntryAttributes:
        return self._attributes(await self.tree.attributes(await self.tree.mkdir(parent_inode, name)))

    @_answered
    async def rmdir(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        await self.tree.rmdir(parent_inode, name)

    @_answered
    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: RequestContext,
    ) -> None:
        if flags & ~_RENAME_FLAGS:  # RENAME_WHITEOUT, and future ones
            raise UnknownFlagsError(
                "a snapshot is renamed without leaving anything behind: there are no whiteouts here"
            )
        exchange = bool(flags & pyfuse3.RENAME_EXCHANGE)
        await self.tree.rename(parent_inode_old, name_old, parent_inode_new, name_new, exchange=exchange)

    @_answered
    async def unlink(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        raise NotPermittedError("images cannot be removed one by one: rmdir the snapshot")

    @_answered
    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        raise NotPermittedError("no files can be made here: mkdir in snaps/ takes a snapshot")

    @_answered
    async def mknod(self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: RequestContext) -> EntryAttributes:
        raise NotPermittedError("no files can be made here: mkdir in snaps/ takes a snapshot")

    @_answered
    async def symlink(self, parent_inode: int, name: bytes, target: bytes, ctx: RequestContext) -> EntryAttributes:
        raise NotPermittedError("no links can be made here")

    @_answered
    async def link(self, inode: int, new_parent_inode: int, new_name: bytes, ctx: RequestContext) -> EntryAttributes:
        raise NotPermittedError("no links can be made here")

    @_answered
    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        opening = self.tree.open(inode, flags, ctx.pid)
        # Images change only through this mount, so the kernel may keep their pages. On a file opened with O_DIRECT it
        # would turn the short write across an image's end into EIO, unless FUSE's own direct I/O is used.
        direct_io = opening.is_text or bool(flags & os.O_DIRECT)
        return FileInfo(fh=opening.number, direct_io=direct_io, keep_cache=not opening.is_text)

    # Frequent requests are first tried without waiting, and do without the decorator.

    async def read(self, fh: int, off: int, size: int) -> bytes:
        try:
            handle = self._handles[fh]
            data = handle.read_nowait(off, size, memoryview(bytearray(covering_bytes(size))))
            return bytes(data if data is not None else await handle.read_waiting(off, size))
        except Exception as error:
            raise self.answer("read", error) from error

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        try:
            handle = self._handles[fh]
            written = handle.write_nowait(off, buf)
            return written if written is not None else await handle.write_waiting(off, buf)
        except Exception as error:
            raise self.answer("write", error) from error

    @_answered
    async def fsync(self, fh: int, datasync: bool) -> None:
        await self._handles[fh].sync()

    @_answered
    async def release(self, fh: int) -> None:
        self.tree.close(fh)

    @_answered
    async def opendir(self, inode: int, ctx: RequestContext) -> int:
        return inode

    @_answered
    async def readdir(self, fh: int, start_id: int, token: ReaddirToken) -> None:
        for entry in list(self.tree.entries(fh)):
            if entry.cookie <= start_id:
                continue
            try:
                is_dot = entry.name in (b".", b"..")  # the kernel uses their type and number alone
                found = _directory(entry.inode) if is_dot else await self.tree.attributes(entry.inode)
            except NotFoundError:
                continue  # removed while we listed
            if not pyfuse3.readdir_reply(token, entry.name, self._attributes(found), entry.cookie):
                return

    async def releasedir(self, fh: int) -> None:
        """Do nothing: a directory's handle is its inode."""

    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        """Do nothing: names are durable already when mkdir, rmdir and rename return. # I5"""

    @_answered
    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        space = self.tree.store.space
        data = StatvfsData()
        data.f_bsize = data.f_frsize = 4096
        data.f_blocks = space.total_bytes // 4096
        data.f_bfree = data.f_bavail = space.available_bytes // 4096
        data.f_files = _MOST_FILES
        data.f_ffree = data.f_favail = _MOST_FILES - self.tree.count_files()
        data.f_namemax = 255
        return data
