"""Open files, as the requests of the kernel use them."""

import errno
import json
import time
from typing import Protocol

from cow.buffer.memory import Memory
from cow.errors import CowError
from cow.scrub import Finding, OpenScrub

_SCRUB_LINE_SECONDS = 0.3
READ_ONLY_TEXT = "status, info and lost can only be read"


class NotPermittedError(CowError):
    """The tree has a fixed shape: only mkdir, rmdir and rename in snaps/, and writes to images."""

    errno = errno.EPERM


class Handle(Protocol):
    """An open file."""

    def read_nowait(self, offset: int, length: int, into: memoryview) -> bytes | memoryview | None:
        """Read, where that needs no waiting, else None; short only at the end.

        What is returned may be a view of `into`, which is best as long as the engine's `covering_bytes(length)`.
        """

    async def read_waiting(self, offset: int, length: int) -> bytes | bytearray:
        """Read what could not be had without waiting."""

    def write_nowait(self, offset: int, data: bytes | memoryview, memory: Memory | None = None) -> int | None:
        """Write, where that needs no waiting, else None; short only at the end.

        `data` may be a view of `memory`, which may be kept for longer; other views are not.
        """

    async def write_waiting(self, offset: int, data: bytes | memoryview, memory: Memory | None = None) -> int:
        """Write what could not be written without waiting. A view's memory stays as it is until the return."""

    async def sync(self) -> None:
        """Make writes durable."""


class ReadOnly:
    """An open file that is no image."""

    def read_nowait(self, offset: int, length: int, into: memoryview) -> bytes | None:
        """Nothing is had without waiting."""
        return None

    def write_nowait(self, offset: int, data: bytes | memoryview, memory: Memory | None = None) -> int | None:
        """Nothing is written."""
        return None

    async def write_waiting(self, offset: int, data: bytes | memoryview, memory: Memory | None = None) -> int:
        """Raise NotPermittedError."""
        raise NotPermittedError(READ_ONLY_TEXT)

    async def sync(self) -> None:
        """There is nothing to be made durable."""


class Text(ReadOnly):
    """An open `status`, `info` or `lost`: the text as it was at the open. `modified_ns` is when it became so."""

    def __init__(self, content: bytes, modified_ns: int) -> None:
        self.content = content
        self.modified_ns = modified_ns
        self.used = time.monotonic()  #: when it was opened or last read

    async def read_waiting(self, offset: int, length: int) -> bytes:
        """A part of the text."""
        self.used = time.monotonic()
        return self.content[offset : offset + length]


class Scrub(ReadOnly):
    """An open `.verify` or `.repair`: reading it does the work, and gives a line of JSON for each finding and so often.

    `{"done": bytes, "total": bytes}`, `{"finding": sentence, "repaired": bool}`, and at last `{"end": true}`.
    """

    def __init__(self, scrub: OpenScrub) -> None:
        self._scrub = scrub
        self._text = b""
        self._ended = False

    async def read_waiting(self, offset: int, length: int) -> bytes:
        """The next lines, when all before them was read."""
        if offset == len(self._text) and not self._ended:
            self._text += await self._more()
        return self._text[offset : offset + length]

    async def _more(self) -> bytes:
        lines: list[dict[str, object]] = []
        deadline = time.monotonic() + _SCRUB_LINE_SECONDS
        while time.monotonic() < deadline:
            found = await self._scrub.step()
            if found is None:
                self._ended = True
                lines.append({"end": True})
                break
            for one in found:
                if isinstance(one, Finding):
                    lines.append({"finding": one.sentence, "repaired": one.repaired})
                elif not lines or "done" not in lines[-1]:
                    lines.append({"done": one.done_bytes, "total": one.total_bytes})
                else:
                    lines[-1] = {"done": one.done_bytes, "total": one.total_bytes}
        return "".join(json.dumps(line) + "\n" for line in lines).encode()
