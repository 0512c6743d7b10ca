"""Running the daemon in the background: the caller waits until the mount is usable, or gets the reason why not.

The daemon is a new process in a session of its own, with nothing of the caller's but a pipe. It writes one line to the
pipe: `ready`, or the sentence that says why it gave up.
"""

import logging
import logging.handlers
import os
import queue
import subprocess
import sys
from collections.abc import Sequence

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
        os.write(ready_fd, sentence.encode("utf-8", "replace"))
        os.close(ready_fd)


def log_to(store: str | None) -> logging.handlers.QueueListener:
    """Set up logging: to standard error, or to a bounded file in the store (2 MiB at most).

    The records are written by a thread, so that the loop never waits for the log's disk. The store must exist.
    """
    target: logging.Handler = logging.StreamHandler()
    if store is not None:
        path = os.path.join(store, LOG_NAME)
        target = logging.handlers.RotatingFileHandler(
            path, maxBytes=_LOG_BYTES, backupCount=1, errors="backslashreplace"
        )
    target.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    waiting: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    root.addHandler(logging.handlers.QueueHandler(waiting))
    listener = logging.handlers.QueueListener(waiting, target)
    listener.start()
    return listener
