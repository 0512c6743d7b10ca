"""What the engine asks of the simulated disk: the calls, what makes them fail, and the changes that they make."""

import errno
import os
import sys
from dataclasses import dataclass
from functools import cache

import cow

_ENGINE = os.path.join(os.path.dirname(cow.__file__), "")
_WAY = {f"{_ENGINE}disk{os.sep}{name}.py" for name in ("io", "file", "directory", "source")}  #: to the disk


@dataclass(eq=False)
class Op:
    """A change. `inode` is what a sync must cover to make it durable; None of the other fields applies to all kinds."""

    kind: str  #: write, truncate, allocate, punch, link, unlink, sync, commit
    inode: int
    site: str
    offset: int = 0
    data: bytes = b""
    length: int = 0
    name: str = ""
    target: int = 0
    is_directory: bool = False  #: what `target` is
    database: bytes = b""
    ended: bool = False
    failed: bool = False

    def __str__(self) -> str:
        what = self.name or f"{self.offset}+{len(self.data) or self.length}"
        return f"{self.kind} {what} of {self.inode} by {self.site}"


@dataclass(frozen=True)
class Call:
    """A call that is about to be made, for those who decide whether it works."""

    kind: str  #: as in Op, and read, begin
    site: str
    line: int
    is_source: bool
    is_elsewhere: bool

    def __str__(self) -> str:
        return f"{self.kind} by {self.site} (line {self.line})"


class Fault(Exception):  # noqa: N818
    """What a decider raises or returns: an errno, or a transfer of only `short` bytes."""

    def __init__(self, number: int = 0, short: int | None = None) -> None:
        super().__init__(number, short)
        self.number = number
        self.short = short

    def __str__(self) -> str:
        return errno.errorcode[self.number] if self.short is None else "short"


def site_of_caller() -> tuple[str, int]:
    """The engine's function that asked, and its caller (`journal.Journal.append<commits.Commits.commit`), the line."""
    found: list[str] = []
    line = 0
    frame = sys._getframe(1)
    while frame is not None and len(found) < 2:
        name = _name_in_engine(frame.f_code.co_filename, frame.f_code.co_qualname)
        if name is not None:
            line = line or frame.f_lineno
            found.append(name)
        frame = frame.f_back
    return "<".join(found), line


@cache
def _name_in_engine(file: str, function: str) -> str | None:
    """None for what is not of the engine, or only the way from it to the disk."""
    if not file.startswith(_ENGINE) or file in _WAY or function.endswith(">"):  # such as <lambda>
        return None
    return f"{os.path.basename(file)[:-3]}.{function}"


def resize(content: bytearray, length: int) -> None:
    """Cut a file, or extend it with zeroes."""
    if length < len(content):
        del content[length:]
    else:
        content.extend(bytes(length - len(content)))


def apply_to(content: bytearray, op: Op) -> None:
    """Do what the operation does to a file's content."""
    if op.kind == "write":
        if len(content) < op.offset:
            content.extend(bytes(op.offset - len(content)))
        content[op.offset : op.offset + len(op.data)] = op.data
    elif op.kind == "truncate":
        resize(content, op.length)
    elif op.kind == "allocate":
        if len(content) < op.offset + op.length:
            resize(content, op.offset + op.length)
    elif op.kind == "punch":
        end = min(len(content), op.offset + op.length)
        if op.offset < end:
            content[op.offset : end] = bytes(end - op.offset)
