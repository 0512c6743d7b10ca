"""Running the daemon in the background: the caller waits until the mount is usable, or gets the reason why not.

The daemon is a new process in a session of its own, with nothing of the caller's but a pipe. It writes one line to the
pipe: `ready`, or the sentence that says why it gave up.
"""

import errno
import logging
import logging.handlers
import os
import queue
import stat
import subprocess
import sys
from collections.abc import Sequence
from io import TextIOWrapper

from cow.errors import RefusedError

READY = "ready"
LOG_NAME = "hcpfs.log"
_LOG_BYTES = 1 << 20
_NO_LOG = "{} is not a regular file; the store was tampered with: remove it"


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
        os.write(ready_fd, sentence.encode("utf-8", "replace"))
        os.close(ready_fd)


class _LogFile(logging.handlers.RotatingFileHandler):
    """A bounded log in a regular file, whatever was put in its place."""

    def _open(self) -> TextIOWrapper:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            fd = os.open(self.baseFilename, flags, 0o600)
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
                raise
            raise RefusedError(_NO_LOG.format(self.baseFilename)) from error
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise RefusedError(_NO_LOG.format(self.baseFilename))
        return open(fd, "a", encoding="utf-8", errors=self.errors)


def log_to(store: str | None) -> logging.handlers.QueueListener:
    """Set up logging: to standard error, or to a bounded file in the store (2 MiB at most).

    The records are written by a thread, so that the loop never waits for the log's disk. The store must exist.
    Raises RefusedError when something else than a regular file stands in the log's place.
    """
    target: logging.Handler = logging.StreamHandler()
    if store is not None:
        target = _LogFile(os.path.join(store, LOG_NAME), maxBytes=_LOG_BYTES, backupCount=1, errors="backslashreplace")
    target.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    waiting: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    root.addHandler(logging.handlers.QueueHandler(waiting))
    listener = logging.handlers.QueueListener(waiting, target)
    listener.start()
    return listener
