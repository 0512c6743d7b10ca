"""Running the daemon in the background: the caller waits until the mount is usable, or gets the reason why not.

The daemon is a new process in a session of its own, with nothing of the caller's but a pipe. It writes one line to the
pipe: `ready`, or the sentence that says why it gave up.
"""

import fcntl
import logging
import logging.handlers
import os
import queue
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from io import TextIOWrapper

from cow.device import Directory
from hcpfs.terminal import plain

READY = "ready"
LOG_NAME = "hcpfs.log"
_LOG_BYTES = 1 << 20


def run_in_background(arguments: Sequence[str]) -> str | None:
    """Start `hcpfs ARGUMENTS` as a daemon. None when the mount is usable, else the sentence."""
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
    finally:
        os.close(writing)
    with os.fdopen(reading, "r", encoding="utf-8", errors="replace") as pipe:
        answer = pipe.read().strip()
    if answer == READY:
        return None
    return answer or "the daemon ended without a word; run it with --foreground to see why"


def answer(ready_fd: int | None, sentence: str) -> None:
    """Tell the caller how the start ended."""
    if ready_fd is not None:
        os.write(ready_fd, sentence.encode("utf-8", "backslashreplace"))
        os.close(ready_fd)


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


def log_to(store: Directory | None) -> logging.handlers.QueueListener:
    """Set up logging: to standard error, or to a bounded file in the store (2 MiB at most).

    The records are written by a thread, so that the loop never waits for the log's disk. The directory must stay open.
    Raises RefusedError when something else than a regular file of ours stands in the log's place.
    """
    target: logging.Handler = logging.StreamHandler() if store is None else _LogFile(store)
    target.setFormatter(_OneLine("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    waiting: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    root.addHandler(logging.handlers.QueueHandler(waiting))
    listener = logging.handlers.QueueListener(waiting, target)
    listener.start()
    return listener
