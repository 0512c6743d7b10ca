"""What is printed for people: no name steers their terminal, and no locale lacks a letter so that we fail."""

import sys

from cow.errors import WAY


def prepare() -> None:
    """Have what the encoding of standard output and standard error lacks escaped."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # closed by the caller
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


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
