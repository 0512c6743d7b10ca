"""A disk in memory that the engine runs on instead of the system's files, and that logs all it is asked for.

It stands in for `cow.device.Io`. Each call that changes something is logged with its begin and its end, so that
tests/crash/cut.py can make what a power cut at any moment would leave. Calls can be made to fail, to fall short, or to
be left out. The catalog's database lives in memory too; a transaction is one event that is there or not, which
tests/crash/test_catalog.py shows to be true of SQLite's files.
"""

import errno
import os
import sqlite3
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from cow.disk.io import FALLOC_PUNCH_HOLE, Geometry, Io
from cow.disk.trial import Trial
from tests.crash.calls import Call, Fault, Op, apply_to, resize, site_of_caller
from tests.crash.reads import SimulatedReads

STORE, SOURCE, ELSEWHERE, SECOND_SOURCE = "/store", "/disk.img", "/elsewhere", "/second.img"
STORE_INODE, SOURCE_INODE, ELSEWHERE_INODE, SECOND_SOURCE_INODE = 1, 2, 3, 4
SOURCE_INODES = (SOURCE_INODE, SECOND_SOURCE_INODE)
_ROOTS = {
    STORE: STORE_INODE, SOURCE: SOURCE_INODE, ELSEWHERE: ELSEWHERE_INODE, SECOND_SOURCE: SECOND_SOURCE_INODE,
}  # fmt: skip
PAGE = 4096
UNLIMITED = 1 << 40
# What these contain means nothing, and whether they are there neither.
_MEANINGLESS = {"reserve", "lock", "catalog.sqlite"}


@dataclass(frozen=True)
class State:
    """What is on the disk when nothing runs: contents and entries by inode number, and the catalog's database."""

    files: dict[int, bytes]
    directories: dict[int, dict[str, int]]
    catalog: bytes | None

    @property
    def sources(self) -> dict[int, bytes]:
        """The content of the one source, or of both."""
        return {number: self.files[number] for number in SOURCE_INODES if number in self.files}


@dataclass
class Inode:
    """A file or a directory as the running system sees it."""

    number: int
    is_directory: bool
    meaningless: bool = False
    content: bytearray = field(default_factory=bytearray)
    entries: dict[str, int] = field(default_factory=dict)
    pages: set[int] = field(default_factory=set)

    def touch(self, offset: int, length: int) -> None:
        self.pages.update(range(offset // PAGE, -(-(offset + length) // PAGE)))


def empty_state(*contents: bytes) -> State:
    """One source, or two, with that content, and no store yet."""
    return State(dict(zip(SOURCE_INODES, contents, strict=False)), {STORE_INODE: {}, ELSEWHERE_INODE: {}}, None)


class Disk(Io):
    """The calls of `Io` on a `State`. `decide(call)` may return a Fault; `left_out(call)` tells what is not done.

    With `in_memory` the engine takes it for a file system that waits for no disk, with `source_in_memory` only that of
    the sources.
    """

    def __init__(
        self,
        state: State,
        capacity_bytes: int = UNLIMITED,
        *,
        in_memory: bool = False,
        source_in_memory: bool = False,
    ) -> None:
        self.log: list[tuple[str, Any]] = []  #: ("begin", op), ("end", op) and ("mark", whatever a test put there)
        self.start = state
        self.capacity_bytes = capacity_bytes
        self._in_memory = in_memory
        self._source_in_memory = source_in_memory
        self.decide: Callable[[Call], Fault | None] | None = None
        self.left_out: Callable[[Call], bool] | None = None
        self.calls: Counter[Call] | None = None  #: set to have them counted
        self.database = state.catalog
        self._inodes = {
            number: Inode(number, False, content=bytearray(content)) for number, content in state.files.items()
        }
        self._inodes |= {
            number: Inode(number, True, entries=dict(entries)) for number, entries in state.directories.items()
        }
        for inode in list(self._inodes.values()):
            inode.touch(0, len(inode.content))
            for name, number in inode.entries.items():
                self._inodes[number].meaningless = name in _MEANINGLESS
        self._next_inode = max(*self._inodes, *SOURCE_INODES) + 1
        self._elsewhere = {ELSEWHERE_INODE, *self._inodes[ELSEWHERE_INODE].entries.values()}
        self._descriptors: dict[int, Inode] = {}
        self._next_descriptor = 1000
        self._locked: set[int] = set()
        self.is_cold = False  #: whether nothing can be read without waiting, unless `in_memory`

    # -- for tests -----------------------------------------------------------------------------------------------

    def mark(self, what: object) -> None:
        self.log.append(("mark", what))

    def content(self) -> bytes:
        """The sources as a running system sees them, one behind the other."""
        return b"".join(self._inodes[number].content for number in self.start.sources)

    @property
    def sources(self) -> list[str]:
        """Their paths."""
        return [path for path, number in _ROOTS.items() if number in self.start.sources]

    @property
    def open_descriptors(self) -> int:
        return len(self._descriptors)

    def settled(self) -> State:
        """The state once all has been written back."""
        files = {number: bytes(one.content) for number, one in self._inodes.items() if not one.is_directory}
        directories = {number: dict(one.entries) for number, one in self._inodes.items() if one.is_directory}
        return State(files, directories, self.database)

    # -- the log -------------------------------------------------------------------------------------------------

    def _ask(self, kind: str, inode: int) -> tuple[Call, Fault | None]:
        call = Call(kind, *site_of_caller(), inode in SOURCE_INODES, inode in self._elsewhere)
        if self.calls is not None:
            self.calls[call] += 1
        fault = self.decide(call) if self.decide is not None else None
        return call, fault

    def _fault_of(self, kind: str, inode: int) -> Fault | None:
        """The same for a call that changes nothing, so that nobody else wants to know of it."""
        return None if self.decide is None and self.calls is None else self._ask(kind, inode)[1]

    def _change(self, op: Op, apply: Callable[[], None]) -> None:
        self.log.append(("begin", op))
        apply()
        op.ended = True
        self.log.append(("end", op))

    def _entry_change(self, directory: Inode, kind: str, name: str, target: int, apply: Callable[[], None]) -> None:
        call, fault = self._ask(kind, directory.number)
        if fault is not None:
            raise OSError(fault.number or errno.EIO, os.strerror(fault.number or errno.EIO))
        if name in _MEANINGLESS:
            apply()
            return
        is_directory = target in self._inodes and self._inodes[target].is_directory
        op = Op(kind, directory.number, call.site, name=name, target=target, is_directory=is_directory)
        self._change(op, apply)

    # -- descriptors ---------------------------------------------------------------------------------------------

    def _descriptor(self, inode: Inode) -> int:
        self._next_descriptor += 1
        self._descriptors[self._next_descriptor] = inode
        return self._next_descriptor

    def open(self, path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if dir_fd is None:
            return self._descriptor(self._inodes[_ROOTS[path]])
        directory = self._descriptors[dir_fd]
        number = directory.entries.get(path)
        if number is None:
            if not flags & os.O_CREAT:
                raise FileNotFoundError(errno.ENOENT, "no such file", path)
            inode = self._new(directory, path, is_directory=False)
        else:
            inode = self._inodes[number]
        if inode.is_directory != bool(flags & os.O_DIRECTORY):
            raise NotADirectoryError(errno.ENOTDIR, "not what was asked for", path)
        return self._descriptor(inode)

    def _new(self, directory: Inode, name: str, *, is_directory: bool) -> Inode:
        inode = Inode(self._next_inode, is_directory, meaningless=name in _MEANINGLESS)
        self._next_inode += 1

        self._inodes[inode.number] = inode
        if directory.number in self._elsewhere:
            self._elsewhere.add(inode.number)

        def apply() -> None:
            directory.entries[name] = inode.number

        self._entry_change(directory, "link", name, inode.number, apply)
        return inode

    def close(self, fd: int) -> None:
        inode = self._descriptors.pop(fd)
        self._locked.discard(inode.number)

    def flock(self, fd: int, operation: int) -> None:
        number = self._descriptors[fd].number
        if number in self._locked:
            raise BlockingIOError(errno.EAGAIN, "locked")
        self._locked.add(number)

    def open_source(self, path: str, flags: int) -> int:
        return self.open(path, flags)

    def geometry(self, fd: int) -> Geometry:
        return Geometry(len(self._descriptors[fd].content), 512, is_block=False)

    def witness(self, fd: int) -> None:
        """It has no counters."""

    def is_in_memory(self, fd: int) -> bool:
        # If not, what blocks is done beside everything else, as on a real disk.
        return self._in_memory or (self._source_in_memory and self._descriptors[fd].number in SOURCE_INODES)

    def fstat(self, fd: int) -> Any:
        inode = self._descriptors[fd]
        kind = stat.S_IFDIR if inode.is_directory else stat.S_IFREG
        blocks = len(inode.pages) * PAGE // 512
        return SimpleNamespace(
            st_mode=kind | 0o700, st_uid=os.geteuid(), st_size=len(inode.content), st_blocks=blocks, st_mtime_ns=0
        )

    def entries_below(self, fd: int) -> Iterator[Any]:
        return iter(())  # for owners, modes and hard links, which this disk does not have

    def is_at(self, fd: int, path: str) -> bool:
        return True

    def posix_fadvise(self, fd: int, offset: int, length: int, advice: int) -> None:
        pass

    def fchmod(self, fd: int, mode: int) -> None:
        pass

    def fstatvfs(self, fd: int) -> Any:
        free = max(0, self.capacity_bytes - self._used()) // PAGE
        return SimpleNamespace(f_bavail=free, f_frsize=PAGE, f_blocks=self.capacity_bytes // PAGE, f_files=0, f_flag=0)

    def _used(self) -> int:
        return sum(len(one.pages) for one in self._reachable()) * PAGE

    def _reachable(self) -> list[Inode]:
        found, todo = [], [STORE_INODE]
        while todo:
            inode = self._inodes[todo.pop()]
            found.append(inode)
            todo += inode.entries.values()
        return found

    def allocated(self, fd: int) -> tuple[int, int]:
        below, count, todo = 0, 0, list(self._descriptors[fd].entries.values())
        while todo:
            inode = self._inodes[todo.pop()]
            below += len(inode.pages) * PAGE
            count += 1
            todo += inode.entries.values()
        return below, count

    def allocated_here(self, fd: int) -> int:
        return sum(len(self._inodes[one].pages) * PAGE for one in self._descriptors[fd].entries.values())

    # -- files ---------------------------------------------------------------------------------------------------

    def pread(self, fd: int, length: int, offset: int) -> bytes:
        inode = self._descriptors[fd]
        fault = self._fault_of("read", inode.number)
        if fault is not None and fault.short is None:
            raise OSError(fault.number, os.strerror(fault.number))
        data = bytes(inode.content[offset : offset + length])
        return data if fault is None else data[: max(1, fault.short)]

    def flush_by_another(self, fd: int) -> None:
        """Whether it is away shows when it is read."""

    def pread_direct(self, fd: int, length: int, offset: int) -> bytes:
        return self.pread(fd, length, offset)

    def pwrite_direct(self, fd: int, data: bytes | memoryview, offset: int) -> None:
        while data:
            written = self.pwrite(fd, data, offset)
            data, offset = data[written:], offset + written

    def reads(self) -> SimulatedReads:
        return SimulatedReads(self)

    def preadv(self, fd: int, parts: Sequence[bytearray | memoryview], offset: int, flags: int = 0) -> int:
        [part] = parts
        if self.is_cold and flags & os.RWF_NOWAIT:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        data = self.pread(fd, len(part), offset)
        part[: len(data)] = data
        return len(data)

    def pwritev(self, fd: int, parts: Sequence[bytes | memoryview], offset: int, flags: int = 0) -> int:
        return self.pwrite(fd, b"".join(parts), offset)

    def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        inode = self._descriptors[fd]
        call, fault = self._ask("write", inode.number)
        written = bytes(data)
        if fault is not None:
            if fault.short is None:
                raise OSError(fault.number, os.strerror(fault.number))
            written = written[: max(1, fault.short)]
        self._take_space(inode, offset, len(written))
        if inode.meaningless:
            return len(written)

        def apply() -> None:
            if len(inode.content) < offset:
                inode.content.extend(bytes(offset - len(inode.content)))
            inode.content[offset : offset + len(written)] = written

        self._change(Op("write", inode.number, call.site, offset=offset, data=written), apply)
        return len(written)

    def _take_space(self, inode: Inode, offset: int, length: int) -> None:
        if inode.number in SOURCE_INODES:
            return
        before = set() if self.capacity_bytes == UNLIMITED else set(inode.pages)
        inode.touch(offset, length)
        if self.capacity_bytes != UNLIMITED and self._used() > self.capacity_bytes:
            inode.pages = before
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def ftruncate(self, fd: int, length: int) -> None:
        inode = self._descriptors[fd]
        call, fault = self._ask("truncate", inode.number)
        if fault is not None:
            raise OSError(fault.number or errno.EIO, os.strerror(fault.number or errno.EIO))
        inode.pages = {page for page in inode.pages if page * PAGE < length}
        if not inode.meaningless:
            op = Op("truncate", inode.number, call.site, length=length)
            self._change(op, lambda: resize(inode.content, length))

    def fallocate(self, fd: int, mode: int, offset: int, length: int) -> None:
        inode = self._descriptors[fd]
        kind = "punch" if mode & FALLOC_PUNCH_HOLE else "allocate"
        call, fault = self._ask(kind, inode.number)
        if fault is not None:
            raise OSError(fault.number or errno.EIO, os.strerror(fault.number or errno.EIO))
        if kind == "punch":
            inode.pages -= set(range(-(-offset // PAGE), (offset + length) // PAGE))
        else:
            self._take_space(inode, offset, length)
        if not inode.meaningless:
            op = Op(kind, inode.number, call.site, offset=offset, length=length)
            self._change(op, lambda: apply_to(inode.content, op))

    def fdatasync(self, fd: int) -> None:
        self.fsync(fd)

    def fsync(self, fd: int) -> None:
        inode = self._descriptors[fd]
        call, fault = self._ask("sync", inode.number)
        if self.left_out is not None and self.left_out(call):
            return
        op = Op("sync", inode.number, call.site)
        self.log.append(("begin", op))
        op.failed = fault is not None
        op.ended = True
        self.log.append(("end", op))
        if fault is not None:
            raise OSError(fault.number or errno.EIO, os.strerror(fault.number or errno.EIO))

    # -- directories ---------------------------------------------------------------------------------------------

    def make_directories(self, path: str, mode: int) -> list[str]:
        return []

    def try_out(self, directory: int, size_bytes: int) -> Trial:
        return Trial()

    def file_system(self, fd: int) -> str:
        return "one in memory"

    def identity(self, fd: int, name: str = "") -> tuple[int, int]:
        return 0, 0

    def is_removed(self, fd: int) -> bool:
        return False

    def check_writable(self, fd: int) -> None:
        pass

    def listdir(self, fd: int) -> list[str]:
        return list(self._descriptors[fd].entries)

    def mkdir(self, name: str, mode: int = 0o777, *, dir_fd: int) -> None:
        directory = self._descriptors[dir_fd]
        if name in directory.entries:
            raise FileExistsError(errno.EEXIST, "exists", name)
        self._new(directory, name, is_directory=True)

    def rename(self, old: str, new: str, *, src_dir_fd: int, dst_dir_fd: int) -> None:
        directory = self._descriptors[dst_dir_fd]
        number = directory.entries[old]
        self._entry_change(directory, "link", new, number, lambda: directory.entries.update({new: number}))
        self._entry_change(directory, "unlink", old, number, lambda: directory.entries.pop(old))

    def unlink(self, name: str, *, dir_fd: int) -> None:
        directory = self._descriptors[dir_fd]
        if name not in directory.entries:
            raise FileNotFoundError(errno.ENOENT, "no such file", name)
        number = directory.entries[name]
        self._entry_change(directory, "unlink", name, number, lambda: directory.entries.pop(name))

    def rmdir(self, name: str, *, dir_fd: int) -> None:
        directory = self._descriptors[dir_fd]
        if self._inodes[directory.entries[name]].entries:
            raise OSError(errno.ENOTEMPTY, "not empty", name)
        self.unlink(name, dir_fd=dir_fd)

    # -- the catalog ---------------------------------------------------------------------------------------------

    def connect(self, path: str) -> sqlite3.Connection:
        connection = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None, factory=_Connection)
        connection.disk = self
        if self.database is not None:
            connection.deserialize(self.database)
        return connection

    def _begin(self) -> None:
        fault = self._fault_of("begin", 0)
        if fault is not None:
            raise _database_error(fault)

    def _commit(self, connection: "_Connection") -> sqlite3.Cursor:
        call, fault = self._ask("commit", 0)
        op = Op("commit", 0, call.site)
        if fault is not None:
            # SQLite takes the transaction back, but after a crash it may be found in the log all the same.
            op.failed = True
            op.database = _image_after(connection)
        else:
            cursor = connection.commit_really()
            if self.left_out is not None and self.left_out(call):
                return cursor
            op.database = connection.serialize()
        self.log.append(("begin", op))
        op.ended = True
        self.log.append(("end", op))
        if fault is not None:
            raise _database_error(fault)
        self.database = op.database
        return cursor


class _Connection(sqlite3.Connection):
    """Each commit is an event in the disk's log."""

    disk: Disk

    def execute(self, statement: str, *arguments: Any) -> sqlite3.Cursor:
        if statement == "BEGIN IMMEDIATE":
            self.disk._begin()
            self._before = self.total_changes
        elif statement == "COMMIT" and (self.total_changes != self._before or self.disk.database is None):
            return self.disk._commit(self)
        return super().execute(statement, *arguments)

    def commit_really(self) -> sqlite3.Cursor:
        return super().execute("COMMIT")


def _image_after(connection: sqlite3.Connection) -> bytes:
    """The database as it would be had the open transaction been committed."""
    return bytes(connection.serialize())


def _database_error(fault: Fault) -> sqlite3.OperationalError:
    full = fault.number in (errno.ENOSPC, errno.EDQUOT)
    error = sqlite3.OperationalError("database or disk is full" if full else "disk I/O error")
    error.sqlite_errorcode = sqlite3.SQLITE_FULL if full else sqlite3.SQLITE_IOERR
    return error
