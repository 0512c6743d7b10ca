"""Receive buffers that may be retained instead of copied; and the errors of a process that gets no memory."""

from collections.abc import Callable


class Memory:
    """A reference-counted receive buffer. `on_free` is called when the last reference goes."""

    def __init__(self, view: memoryview, on_free: Callable[["Memory"], None]) -> None:
        self.view = view
        self._on_free = on_free
        self._users = 0

    @property
    def is_kept(self) -> bool:
        """Whether there is a reference, so that it must not be reused."""
        return self._users > 0

    def keep(self) -> None:
        """Take a reference; dropped by `release`."""
        self._users += 1

    def release(self) -> None:
        """Drop a reference."""
        self._users -= 1
        if not self._users:
            self._on_free(self)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error says that this process got no memory, or no thread, which needs memory."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "start new thread" in str(error))


def out_of_memory(error: BaseException) -> str:
    """The same in words."""
    if isinstance(error, MemoryError):
        return (
            "this process got no memory for it, and nothing was lost: raise its limit (ulimit -v, MemoryMax=), or give "
            "the machine more, and try again"
        )
    return (
        "this process may start no more threads, and nothing was lost: raise its limit (ulimit -u, TasksMax=), and "
        "try again"
    )
