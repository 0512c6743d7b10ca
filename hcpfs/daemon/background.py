"""Running the daemon in the background: the caller waits until the mount is usable, or gets the reason why not.

The daemon is a new process in a session of its own, with nothing of the caller's but a pipe. It writes lines of JSON to
it: `{"note": sentence}` for what a person must know, and at the end `{"ready": true}` or `{"refused": sentence}`.
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
    """Start `hcpfs ARGUMENTS` as a daemon. None when the mount is usable, else the sentence that says why not."""
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
    """Listen at the reading end of the pipe until the daemon has answered, and close it.

    Returns as `run_in_background`.
    """
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
    """Who started this process and waits for its answer, at the writing end of the pipe; with None nobody does."""

    def __init__(self, ready_fd: int | None) -> None:
        self._fd = ready_fd

    def note(self, sentence: str) -> None:
        """Tell what a person must know of this start; nothing once it is answered."""
        self._say("note", sentence)

    def ready(self) -> None:
        """The mount is usable. Once."""
        self._say("ready", True)
        self._end()

    def refuse(self, sentence: str) -> None:
        """There is no mount, and this is why; nothing once it is answered."""
        self._say("refused", sentence)
        self._end()

    def _say(self, key: str, value: object) -> None:
        if self._fd is not None:
            with suppress(BrokenPipeError):  # who went away while it starts finds it served, or not
                os.write(self._fd, json.dumps({key: value}).encode() + b"\n")

    def _end(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


class _LogFile(logging.handlers.RotatingFileHandler):
    """A bounded log in the store's directory, whatever was put in its place, and whatever becomes of the path."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        path = f"/proc/self/fd/{directory.fd}/{LOG_NAME}"  # for the renames of the base class
        super().__init__(path, maxBytes=_LOG_BYTES, backupCount=1, errors="backslashreplace")

    def _open(self) -> TextIOWrapper:
        file = self._directory.open(LOG_NAME, create=True)
        fcntl.fcntl(file.fd, fcntl.F_SETFL, os.O_APPEND)
        return open(file.fd, "a", encoding="utf-8", errors=self.errors)

    def doRollover(self) -> None:  # noqa: N802 - the name of the base class
        """Put a full log aside; where that cannot be done its contents go."""
        with suppress(OSError):
            super().doRollover()
            return
        self.stream = self._open()
        self.stream.truncate(0)


class _OneLine(logging.Formatter):
    """A record is a line, whatever names stand in it; what follows of an exception are lines of their own."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the name of the base class
        """The line."""
        return plain(super().formatMessage(record))


class Log:
    """The process's log: to standard error, or to a bounded file in the store (2 MiB at most).

    What is said before `begin` is kept for it, and lost when it never comes: where no store is made, no log is left.
    The records are written by a thread, so that the loop never waits for the log's disk.
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
        """Write what there is and what comes; once. The directory must stay open.

        Raises RefusedError when something else than a regular file of ours stands in the log's place.
        """
        target: logging.Handler = logging.StreamHandler(own_standard_error()) if store is None else _LogFile(store)
        target.setFormatter(_OneLine("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self._listener = logging.handlers.QueueListener(self._waiting, target)
        self._listener.start()

    @property
    def has_begun(self) -> bool:
        """Whether it is written somewhere."""
        return self._listener is not None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        logging.getLogger().removeHandler(self._handler)
        if self._listener is not None:
            self._listener.stop()
