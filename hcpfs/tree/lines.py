"""`key value` lines, flat-keyed as in cgroup v2: how they are written, and how they are read again."""

import re
from collections.abc import Iterable

_ESCAPES = {"\\": "\\", "n": "\n", "r": "\r"}
_ESCAPED = re.compile(r"\\([\\nr]|u[0-9a-f]{4})")


def lines(pairs: Iterable[tuple[str, object]]) -> bytes:
    """`key value` lines; what would break a line is escaped."""
    return b"".join(f"{key} {_one_line(str(value))}\n".encode("utf-8", "backslashreplace") for key, value in pairs)


def _one_line(value: str) -> str:
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")


def path_in(value: str) -> str:
    """The path that a line has as its value, with the escapes of `lines` undone."""
    return _ESCAPED.sub(lambda match: _ESCAPES.get(match[1]) or chr(int(match[1][1:], 16)), value)


def pairs(text: bytes) -> dict[str, str]:
    """The values of `key value` lines, by key; the last one of a key that stands there more than once."""
    found = (line.partition(" ") for line in text.decode("utf-8", "backslashreplace").splitlines())
    return {key: value for key, _, value in found}
