"""What is printed for people: escaped, so that no name can control their terminal and no locale makes us fail.

And the descriptor of standard error: libraries write to 2 as they please, so the log has a descriptor of its own.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import TextIOWrapper

from cow.errors import WAY


def prepare() -> None:
    """Have characters escaped that the encoding of standard output and standard error lacks.

    A standard stream that the caller closed becomes /dev/null. Otherwise the next file that is opened would get its
    number, and what a library writes there would go into a store.
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
    """Standard error by a descriptor of its own, which `standard_error_diverted` leaves alone."""
    return open(os.dup(2), "w", encoding="utf-8", errors="backslashreplace", buffering=1)


@contextmanager
def standard_error_diverted() -> Iterator[Callable[[], str]]:
    """Collect what is written to descriptor 2 within the block: libfuse and fusermount3 tell a failure nowhere else.

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
    """The text with all that is not printable escaped: line breaks, escape sequences, marks of direction.

    Bytes of a path that are not UTF-8 (os.fsdecode) are escaped, too.
    """
    return "".join(one if one.isprintable() else _escaped(one) for one in text)


def _escaped(one: str) -> str:
    return one.encode("unicode_escape").decode("ascii")


def say(sentence: str) -> None:
    """One line on standard output."""
    print(plain(sentence), flush=True)


def complain(sentence: str) -> None:
    """One line on standard error, after the program's name; each way to go on that it names on a line of its own."""
    lines = [plain(part) for part in sentence.split(WAY)]
    print(f"hcpfs: {WAY.join(lines)}", file=sys.stderr, flush=True)
