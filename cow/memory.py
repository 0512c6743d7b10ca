"""Memory that a write was received in, which may be kept instead of copied, and given back."""

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
