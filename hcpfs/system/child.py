"""Work in a child process, of which this one may learn that it was killed.

Who maps a file is killed when the file is cut meanwhile (SIGBUS, mmap(2)); SQLite maps a file of each database in
write-ahead mode. What others do to a file that is none of ours must not end us.
"""

import os
import pickle
import signal
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def in_child(function: Callable[[], T]) -> T:
    """What the function returns, or raises, in a copy of this process; both must be such that they can be pickled.

    Only while this process has one thread: fork(2). Raises ChildProcessError when the child was killed.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with os.fdopen(writing, "wb") as pipe:
                pickle.dump(_outcome(function), pipe)
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        raise ChildProcessError(f"the process that did it was ended by {signal.Signals(os.WTERMSIG(status)).name}")
    if not answer:
        raise ChildProcessError("the process that did it ended without an answer")
    value, error = pickle.loads(answer)
    if error is not None:
        raise error
    result: T = value
    return result


def _outcome(function: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return function(), None
    except Exception as error:
        return None, error
