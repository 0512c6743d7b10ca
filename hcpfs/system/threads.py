"""The threads for blocking calls, all started at the beginning and kept.

Trio starts one when none is idle, and ends it after ten idle seconds. In the middle of a write it may be impossible to
start one (RLIMIT_NPROC, the pids of a control group, address space), and old bytes could not be kept.
"""

import threading

import trio
from trio._core import _thread_cache

from cow.buffer.memory import is_out_of_memory
from cow.errors import RefusedError

_STACK_BYTES = 1 << 20
_FEWEST_THREADS = 4
_FOR_EVER_SECONDS = 1 << 30


def start_threads() -> int:
    """Start as many threads as trio's limiter has tokens, and keep them. Within `trio.run`.

    Returns how many could be started; the limiter is lowered to that. Raises RefusedError when they are too few. With a
    trio whose thread cache differs from the one known here, idle ones end after a while as usual.
    """
    limiter = trio.to_thread.current_default_thread_limiter()
    wanted, started, go_on = int(limiter.total_tokens), 0, threading.Event()
    if hasattr(_thread_cache, "IDLE_TIMEOUT"):
        _thread_cache.IDLE_TIMEOUT = _FOR_EVER_SECONDS
    threading.stack_size(_STACK_BYTES)
    try:
        for _ in range(wanted):
            trio.lowlevel.start_thread_soon(go_on.wait, lambda done: None)
            started += 1
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        limiter.total_tokens = max(1, started)
        if started < _FEWEST_THREADS:
            raise RefusedError(
                f"this process may start {started} threads, and needs {_FEWEST_THREADS} at least: raise its limits "
                f"(ulimit -u, ulimit -v, TasksMax=, MemoryMax=) and mount again"
            ) from error
    finally:
        go_on.set()
    return started
