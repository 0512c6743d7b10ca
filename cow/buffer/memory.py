"""Memory that a write was received in, which may be kept instead of copied, and given back; and what to say of none."""

from collections.abc import Callable


class Memory:
    """A piece of memory, and how many need what is in it. `on_free` is told when nobody does any more."""

    def __init__(self, view: memoryview, on_free: Callable[["Memory"], None]) -> None:
        self.view = view
        self._on_free = on_free
        self._users = 0

    @property
    def is_kept(self) -> bool:
        """Whether it may not be used for something else."""
        return self._users > 0

    def keep(self) -> None:
        """Need it, until as many calls of `release`."""
        self._users += 1

    def release(self) -> None:
        """Undo one `keep`."""
        self._users -= 1
        if not self._users:
            self._on_free(self)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it says that this process got no memory, or no thread, which needs some."""
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
