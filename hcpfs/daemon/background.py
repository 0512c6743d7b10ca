"""Running the daemon in the background: the caller waits until the mount is usable, or gets the reason why not.

The daemon is a new process in a session of its own that inherits one end of a pipe and nothing else. It writes lines of
JSON there: `{"note": sentence}` for what a person must know, and finally `{"ready": true}` or `{"refused": sentence}`.
"""

import fcntl
import json
import logging
import logging.handlers
import os
import queue
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from io import TextIOWrapper
from types import TracebackType
from typing import Self

from cow.disk.directory import Directory
from hcpfs.system.terminal import own_standard_error, plain

LOG_NAME = "hcpfs.log"
_LOG_BYTES = 1 << 20


def run_in_background(arguments: Sequence[str], on_note: Callable[[str], None]) -> str | None:
    """Start `hcpfs ARGUMENTS` as a daemon. Returns None once the mount is usable, else a sentence that says why not."""
    reading, writing = os.pipe()
    try:
        subprocess.Popen(
            [sys.executable, "-m", "hcpfs", *arguments, "--ready-fd", str(writing)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(writing,),
            start_new_session=True,
            cwd="/",
        )
    except OSError as error:
        os.close(reading)
        return f"the daemon cannot be started ({error}): see what this process may use (ulimit -a)"
    finally:
        os.close(writing)
    return hear(reading, on_note)


def hear(reading: int, on_note: Callable[[str], None]) -> str | None:
    """Read from the pipe until the daemon has answered, and close it. Returns the same as `run_in_background`."""
    refused: str | None = "the daemon ended without a word; run it with --foreground to see why"
    with os.fdopen(reading, "r", encoding="utf-8", errors="replace") as pipe:
        for line in pipe:
            said = json.loads(line)
            if "note" in said:
                on_note(said["note"])
            else:
                refused = said.get("refused")
    return refused


class Caller:
    """The process that waits for our answer, at the other end of the pipe; nobody waits where `ready_fd` is None."""

    def __init__(self, ready_fd: int | None) -> None:
        self._fd = ready_fd

    def note(self, sentence: str) -> None:
        """Tell what a person must know of this start. Does nothing once the answer was given."""
        self._say("note", sentence)

    def ready(self) -> None:
        """Answer that the mount is usable. To be called once."""
        self._say("ready", True)
        self._end()

    def refuse(self, sentence: str) -> None:
        """Answer that there is no mount, and why. Does nothing once the answer was given."""
        self._say("refused", sentence)
        self._end()

    def _say(self, key: str, value: object) -> None:
        if self._fd is not None:
            with suppress(BrokenPipeError):  # the caller has gone, and sees for itself
                os.write(self._fd, json.dumps({key: value}).encode() + b"\n")

    def _end(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


class _LogFile(logging.handlers.RotatingFileHandler):
    """A bounded log in the store's directory, which is known by its descriptor, so its path does not matter."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        path = f"/proc/self/fd/{directory.fd}/{LOG_NAME}"  # for the renames of the base class
        super().__init__(path, maxBytes=_LOG_BYTES, backupCount=1, errors="backslashreplace")

    def _open(self) -> TextIOWrapper:
        file = self._directory.open(LOG_NAME, create=True)
        fcntl.fcntl(file.fd, fcntl.F_SETFL, os.O_APPEND)
        return open(file.fd, "a", encoding="utf-8", errors=self.errors)

    def doRollover(self) -> None:  # noqa: N802 - the name of the base class
        """Rename a full log; where that fails, empty it."""
        with suppress(OSError):
            super().doRollover()
            return
        self.stream = self._open()
        self.stream.truncate(0)


class _OneLine(logging.Formatter):
    """A record is one line, whatever names it has; the traceback of an exception follows in lines of its own."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the name of the base class
        """The line."""
        return plain(super().formatMessage(record))


class Log:
    """The process's log: to standard error, or to a bounded file in the store (2 MiB at most).

    Records from before `begin` are kept for it, and lost when it is never called: where no store is made, no log is
    left. A thread writes the records, so the loop never waits for the log's disk.
    """

    def __enter__(self) -> Self:
        self._waiting: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
        self._handler = logging.handlers.QueueHandler(self._waiting)
        self._listener: logging.handlers.QueueListener | None = None
        root = logging.getLogger()
        root.setLevel(logging.INFO)
        root.addHandler(self._handler)
        return self

    def begin(self, store: Directory | None) -> None:
        """Write what was logged and what will be, to a file in the directory, which must stay open, or standard error.

        To be called once. Raises RefusedError when something other than a regular file of ours is in the log's place.
        """
        target: logging.Handler = logging.StreamHandler(own_standard_error()) if store is None else _LogFile(store)
        target.setFormatter(_OneLine("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self._listener = logging.handlers.QueueListener(self._waiting, target)
        self._listener.start()

    @property
    def has_begun(self) -> bool:
        """Whether `begin` was called."""
        return self._listener is not None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        logging.getLogger().removeHandler(self._handler)
        if self._listener is not None:
            self._listener.stop()
