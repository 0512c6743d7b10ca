"""What is printed for people: no name steers their terminal, and no locale lacks a letter so that we fail.

And which descriptor standard error is: libraries write to 2 as they please, so a log has one of its own.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import TextIOWrapper

from cow.errors import WAY


def prepare() -> None:
    """Have what the encoding of standard output and standard error lacks escaped.

    A standard stream that the caller closed is /dev/null: else the next file that is opened takes its number, and
    what a library writes there goes into a store.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    sys.stdout = sys.stdout or os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", encoding="utf-8", closefd=False)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def own_standard_error() -> TextIOWrapper:
    """Standard error by a descriptor that `standard_error_diverted` leaves alone, for the rest of the process."""
    return open(os.dup(2), "w", encoding="utf-8", errors="backslashreplace", buffering=1)


@contextmanager
def standard_error_diverted() -> Iterator[Callable[[], str]]:
    """Within the block, what is written to descriptor 2: all that libfuse and fusermount3 tell of a failure.

    Yields a function that returns it, the lines joined by semicolons.
    """
    before, memory = os.dup(2), os.memfd_create("said")
    try:
        os.dup2(memory, 2)
        yield lambda: "; ".join(os.pread(memory, 4096, 0).decode(errors="backslashreplace").splitlines())
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(memory)


def plain(text: str) -> str:
    """The text with everything escaped that is no visible character: line breaks, escape sequences, marks of direction.

    What is not UTF-8 in a path (os.fsdecode) is escaped as well.
    """
    return "".join(one if one.isprintable() else _escaped(one) for one in text)


def _escaped(one: str) -> str:
    return one.encode("unicode_escape").decode("ascii")


def say(sentence: str) -> None:
    """One line on standard output."""
    print(plain(sentence), flush=True)


def complain(sentence: str) -> None:
    """One line on standard error, by this program; and the ways to go on, where it has some, on lines of their own."""
    lines = [plain(part) for part in sentence.split(WAY)]
    print(f"hcpfs: {WAY.join(lines)}", file=sys.stderr, flush=True)
