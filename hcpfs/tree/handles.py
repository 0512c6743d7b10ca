"""Open files, as the kernel's requests use them."""

import errno
import json
import time

from cow.buffer.memory import Memory
from cow.errors import CowError
from cow.images.handle import Handle
from cow.scrub import Finding, OpenScrub

_SCRUB_LINE_SECONDS = 0.3
READ_ONLY_TEXT = "texts can only be read"


class NotPermittedError(CowError):
    """The shape of the tree is fixed: there are mkdir, rmdir and rename in snaps/, and writes to images."""

    errno = errno.EPERM


class ReadOnly(Handle):
    """An open file that is not an image."""

    def read_nowait(self, offset: int, length: int, into: memoryview) -> bytes | None:
        """None: nothing is read without waiting."""
        return None

    def write_nowait(self, offset: int, data: bytes | memoryview, memory: Memory | None = None) -> int | None:
        """None: nothing is written."""
        return None

    async def write_waiting(self, offset: int, data: bytes | memoryview, memory: Memory | None = None) -> int:
        """Raise NotPermittedError."""
        raise NotPermittedError(READ_ONLY_TEXT)

    async def sync(self) -> None:
        """Do nothing: there is nothing to be made durable."""


class Text(ReadOnly):
    """An open text file: the text as it was at the open. `modified_ns` is when it last changed."""

    def __init__(self, content: bytes, modified_ns: int) -> None:
        self.content = content
        self.modified_ns = modified_ns
        self.used = time.monotonic()  #: when it was opened or last read

    async def read_waiting(self, offset: int, length: int) -> bytes:
        """A part of the text."""
        self.used = time.monotonic()
        return self.content[offset : offset + length]


class Scrub(ReadOnly):
    """An open `.verify` or `.repair`. Reading it does the check, and gives lines of JSON.

    `{"finding": sentence, "repaired": bool}` for each finding, `{"done": bytes, "total": bytes}` every
    `_SCRUB_LINE_SECONDS`, and at last `{"end": true}`.
    """

    def __init__(self, scrub: OpenScrub) -> None:
        self._scrub = scrub
        self._text = b""
        self._ended = False

    async def read_waiting(self, offset: int, length: int) -> bytes:
        """The next lines, once all before them has been read."""
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
