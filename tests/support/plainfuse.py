"""A file system in user space that passes a directory through and has no fallocate, as sshfs and many others."""

import os
import stat

import pyfuse3
import trio


class Plain(pyfuse3.Operations):
    """Paths below a directory, by inode."""

    def __init__(self, root: str) -> None:
        super().__init__()
        self._paths = {pyfuse3.ROOT_INODE: root}
        self._opened: dict[int, int] = {}  # by inode

    def _path(self, parent: int, name: bytes) -> str:
        return os.path.join(self._paths[parent], os.fsdecode(name))

    def _entry(self, path: str) -> pyfuse3.EntryAttributes:
        try:
            status = os.stat(path)
        except OSError as error:
            raise pyfuse3.FUSEError(error.errno) from error
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = pyfuse3.ROOT_INODE if path == self._paths[pyfuse3.ROOT_INODE] else status.st_ino
        self._paths.setdefault(entry.st_ino, path)
        for name in ("st_mode", "st_nlink", "st_uid", "st_gid", "st_size", "st_blocks"):
            setattr(entry, name, getattr(status, name))
        return entry

    async def getattr(self, inode: int, ctx: object = None) -> pyfuse3.EntryAttributes:
        if inode in self._opened:  # it may have no name any more
            return self._entry(f"/proc/self/fd/{self._opened[inode]}")
        return self._entry(self._paths[inode])

    async def lookup(self, parent: int, name: bytes, ctx: object = None) -> pyfuse3.EntryAttributes:
        return self._entry(self._path(parent, name))

    async def mkdir(self, parent: int, name: bytes, mode: int, ctx: object) -> pyfuse3.EntryAttributes:
        os.mkdir(self._path(parent, name), mode & 0o777)
        return self._entry(self._path(parent, name))

    async def rmdir(self, parent: int, name: bytes, ctx: object) -> None:
        os.rmdir(self._path(parent, name))

    async def unlink(self, parent: int, name: bytes, ctx: object) -> None:
        os.unlink(self._path(parent, name))

    async def opendir(self, inode: int, ctx: object) -> int:
        return inode

    async def readdir(self, handle: int, start: int, token: object) -> None:
        names = sorted(os.listdir(self._paths[handle]))
        for place, name in enumerate(names[start:], start + 1):
            if not pyfuse3.readdir_reply(
                token, os.fsencode(name), self._entry(self._path(handle, os.fsencode(name))), place
            ):
                return

    async def create(self, parent: int, name: bytes, mode: int, flags: int, ctx: object) -> tuple[object, object]:
        path = self._path(parent, name)
        fd = os.open(path, os.O_RDWR | os.O_CREAT, stat.S_IMODE(mode))
        entry = self._entry(path)
        self._opened[entry.st_ino] = fd
        return pyfuse3.FileInfo(fh=fd), entry

    async def setattr(self, inode: int, attr: object, fields: object, fh: int | None, ctx: object) -> object:
        return await self.getattr(inode)

    async def write(self, handle: int, offset: int, data: bytes) -> int:
        return os.pwrite(handle, data, offset)

    async def read(self, handle: int, offset: int, length: int) -> bytes:
        return os.pread(handle, length, offset)

    async def release(self, handle: int) -> None:
        self._opened.pop(os.fstat(handle).st_ino, None)
        os.close(handle)

    async def statfs(self, ctx: object) -> pyfuse3.StatvfsData:
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = 4096
        data.f_blocks = data.f_bfree = data.f_bavail = 1 << 20
        data.f_namemax = 255
        return data


def serve(root: str, mountpoint: str) -> None:
    """Mount, and serve until the end of the process or the unmount."""
    pyfuse3.init(Plain(root), mountpoint, {"fsname=plain", "subtype=plain"})
    trio.run(pyfuse3.main)
    pyfuse3.close()
