"""The table of open files: which process has opened what, for the few answers that depend on it.

A process is known by the number that the kernel sends with a request, which is that of the thread. Reads and writes
have none, and fstat(2) has no handle.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass

from xxhash import xxh3_64_intdigest

from cow.clock import after
from cow.images.handle import Handle
from hcpfs.tree.handles import Text
from hcpfs.tree.truncating import Truncating, position_in

HELD_SECONDS = 10.0  # a process that has not read its open text for so long is shown the present one


@dataclass(frozen=True)
class OpenFile:
    """An open file: its handle, the process that opened it, and whether for writing."""

    number: int
    inode: int
    process: int
    writable: bool


class OpenFiles:
    """All open files. Trio thread only."""

    def __init__(self) -> None:
        self.handles: dict[int, Handle] = {}  #: by number
        self._files: dict[int, OpenFile] = {}
        self._of_inode: dict[int, dict[int, OpenFile]] = {}  #: in the order of the opens
        self._next = 1

    def add(self, inode: int, handle: Handle, process: int, *, writable: bool) -> int:
        """Add an open file; returns its handle, a new number."""
        number = self._next
        self._next += 1
        self.handles[number] = handle
        self._files[number] = file = OpenFile(number, inode, process, writable)
        self._of_inode.setdefault(inode, {})[number] = file
        return number

    def remove(self, number: int) -> Handle:
        """The file with that handle was closed."""
        inode = self._files.pop(number).inode
        del self._of_inode[inode][number]
        if not self._of_inode[inode]:
            del self._of_inode[inode]
        return self.handles.pop(number)

    def _by(self, inode: int, process: int) -> Iterator[OpenFile]:
        """The open files of that inode that a process opened, the latest first."""
        files = reversed(self._of_inode.get(inode, {}).values())
        return (file for file in files if file.process == process)

    def just_opened(self, inode: int, process: int) -> OpenFile | None:
        """The file of the inode that a process opened last. None also where the process is not known."""
        return next(self._by(inode, process), None) if process else None

    def text_shown(self, inode: int, process: int) -> Text | None:
        """The text that a process is reading. Its fstat(2) has to show that one, or tar says that the file changed."""
        file = self.just_opened(inode, process)
        handle = self.handles[file.number] if file is not None else None
        return handle if isinstance(handle, Text) and time.monotonic() - handle.used < HELD_SECONDS else None

    def is_truncated(self, inode: int) -> bool:
        """Whether the inode is open with O_TRUNC, so that every look at its size should come here."""
        return any(isinstance(self.handles[number], Truncating) for number in self._of_inode.get(inode, ()))

    def note_look(self, inode: int, name: bytes, process: int) -> None:
        """A process asks for the size of an image that is open with O_TRUNC; `name` is that of the file.

        Its file position is a claim (see `Truncating.claim`), if the open file can be told: because the process opened
        it, or because it is the only one for writing.
        """
        writers = [file for file in self._of_inode[inode].values() if file.writable]
        own = writers if len(writers) == 1 else [file for file in writers if file.process == process]
        handle = self.handles[own[0].number] if len(own) == 1 else None
        if isinstance(handle, Truncating) and process:
            position = position_in(process, inode, name)
            if position is not None:
                handle.claim(position)


class TextTimes:
    """When the texts last changed as far as anybody has seen, because backup programs skip a file with its old time."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[int, int]] = {}  #: by inode: the content's hash, and the time

    def modified_ns(self, inode: int, content: bytes, since_ns: int) -> int:
        """The time of the content. `since_ns` is that of a content that nobody has seen before."""
        digest = xxh3_64_intdigest(content)
        seen = self._seen.get(inode)
        if seen is None:
            self._seen[inode] = digest, since_ns
        elif seen[0] != digest:
            self._seen[inode] = digest, after(seen[1])
        return self._seen[inode][1]

    def forget(self, inodes: range) -> None:
        """These files do not exist any more."""
        for inode in inodes:
            self._seen.pop(inode, None)
