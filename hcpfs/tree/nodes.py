"""What the nodes of the tree have in common: what each can be asked, as a directory, a file or a text.

The kinds themselves stand in hcpfs/tree/kinds.py.
"""

import errno
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from cow.errors import CowError, NotFoundError
from cow.store.store import Store
from hcpfs.tree.access import Access
from hcpfs.tree.handles import Handle, Text
from hcpfs.tree.openfiles import OpenFiles, TextTimes

ROOT = 1  #: its inode
FIRST_COOKIE = 3  #: after . and ..
IMAGE_SECONDS = 1.0  #: for which attributes may be cached: st_blocks of a snapshot grows as the origin is overwritten


class DirectoryAsFileError(CowError):
    """A directory was used as a file."""

    errno = errno.EISDIR


class NotDirectoryError(CowError):
    """A file was used as a directory."""

    errno = errno.ENOTDIR


@dataclass(frozen=True)
class Attributes:
    """What stat(2) shows. `blocks` are 512 bytes each; for `valid_seconds` the kernel may say so without asking."""

    inode: int
    mode: int
    links: int
    size: int
    blocks: int
    modified_ns: int
    valid_seconds: float = IMAGE_SECONDS


class Entry(NamedTuple):
    """A directory entry; `cookie` is where a listing goes on after it."""

    name: bytes
    inode: int
    cookie: int


@dataclass
class Common:
    """What all nodes of a tree have in common."""

    store: Store
    access: Access
    open_files: OpenFiles
    text_times: TextTimes
    status: Callable[[], bytes]  #: the text of `status`
    started_ns: int
    changed_ns: int  #: when the list of snapshots last changed


class Node(ABC):
    """A file or a directory. It has no state of its own, so it can be made anew for each request."""

    def __init__(self, common: Common, inode: int) -> None:
        self._common = common
        self.inode = inode

    @abstractmethod
    async def attributes(self, process: int) -> Attributes:
        """What stat(2) shows to a process; 0 where it is not known which one asks."""

    @abstractmethod
    def open(self) -> Handle:
        """What an open gives. Raises DirectoryAsFileError."""

    def entries(self) -> Iterator[Entry]:
        """The entries of a directory in the order of their cookies. Raises NotDirectoryError."""
        raise NotDirectoryError("not a directory")

    def find(self, name: bytes) -> int:
        """The inode of a name in the directory. Raises NotFoundError and NotDirectoryError."""
        raise NotDirectoryError("not a directory")


class Directory(Node):
    """A directory; `children` has what is in it, `parent` is the inode of the directory that it is in."""

    parent = ROOT

    @property
    @abstractmethod
    def modified_ns(self) -> int:
        """When its list last changed."""

    @property
    def links(self) -> int:
        """2, and one for each directory in it."""
        return 2

    @abstractmethod
    def children(self) -> Iterator[Entry]:
        """What is listed in it, apart from . and .., with cookies from `FIRST_COOKIE` on."""

    async def attributes(self, process: int) -> Attributes:
        """Of a directory."""
        return Attributes(self.inode, self._common.access.directory_mode, self.links, 0, 0, self.modified_ns)

    def open(self) -> Handle:
        """Raise DirectoryAsFileError."""
        raise DirectoryAsFileError("a directory cannot be opened as a file")

    def entries(self) -> Iterator[Entry]:
        """The entries in the order of their cookies."""
        yield Entry(b".", self.inode, 1)
        yield Entry(b"..", self.parent, 2)
        yield from self.children()

    def find(self, name: bytes) -> int:
        """The inode of a name. Raises NotFoundError."""
        for entry in self.entries():
            if entry.name == name:
                return entry.inode
        raise NotFoundError("no such file or directory")


def numbered(named: Iterable[tuple[bytes, int]]) -> Iterator[Entry]:
    """Entries of names and inodes that are always the same."""
    return (Entry(name, inode, cookie) for cookie, (name, inode) in enumerate(named, FIRST_COOKIE))


def blocks_of(allocated_bytes: int) -> int:
    """What st_blocks says of that: 512 bytes each, in whole pages."""
    return -(-allocated_bytes // 4096) * 8


class File(Node):
    """A file that always has the same name in its directory."""

    name: ClassVar[bytes]
    number: ClassVar[int]  #: the inode's distance from that of a snapshot's directory; in the root the inode
    is_listed: ClassVar[bool] = True


class TextFile(File):
    """A file that shows a text, made when it is opened."""

    @abstractmethod
    def content(self) -> bytes:
        """The present text."""

    @property
    def since_ns(self) -> int:
        """When the text may have become what it is, where nobody has looked before."""
        return self._common.started_ns

    def open(self) -> Text:
        """The present text, which the handle keeps."""
        content = self.content()
        return Text(content, self._common.text_times.modified_ns(self.inode, content, self.since_ns))

    async def attributes(self, process: int) -> Attributes:
        """Of the text that the process is reading, else of the present one."""
        text = self._common.open_files.text_shown(self.inode, process) or self.open()
        mode, size = self._common.access.text_mode, len(text.content)
        return Attributes(self.inode, mode, 1, size, blocks_of(size), text.modified_ns, valid_seconds=0)
