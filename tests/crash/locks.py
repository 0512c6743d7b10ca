"""Which locks of the engine are taken while which others are held, seen in a run."""

import linecache
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any
from unittest.mock import patch

import trio

_MADE = re.compile(r"self\.(\w+)[^=]*=\s*(?:trio|threading)\.Lock\(\)")
Taken = set[tuple[str, str]]  #: (held, taken while it is)


def _name_of(frame: FrameType) -> str | None:
    """`Class._lock` for a lock that the engine is about to make there; None for those of others."""
    if frame.f_globals.get("__name__", "").partition(".")[0] != "cow":
        return None
    found = _MADE.search(linecache.getline(frame.f_code.co_filename, frame.f_lineno))
    assert found is not None, f"a lock without a name: {frame.f_code.co_filename}, line {frame.f_lineno}"
    return f"{type(frame.f_locals['self']).__name__}.{found[1]}"


class _Watched:
    """A threading.Lock that tells when it is taken and given back."""

    def __init__(self, name: str, watch: "_Watch") -> None:
        self._name, self._watch = name, watch
        self._lock = _REAL()

    def __enter__(self) -> None:
        self._watch.takes(self._name)
        self._lock.acquire()
        self._watch.held_here.append(self._name)

    def __exit__(self, *_: object) -> None:
        self._watch.held_here.remove(self._name)
        self._lock.release()


class _Watch:
    def __init__(self) -> None:
        self.taken: Taken = set()
        self.names: set[str] = set()
        self._threads = threading.local()
        self._locks: list[tuple[trio.Lock, str]] = []

    @property
    def held_here(self) -> list[str]:
        """The locks of threads that this thread holds."""
        held: list[str] = self._threads.__dict__.setdefault("held", [])
        return held

    def made(self, lock: trio.Lock, name: str) -> None:
        self._locks.append((lock, name))
        self.names.add(name)

    def takes(self, name: str) -> None:
        """The running task, or this thread, asks for a lock."""
        held = list(self.held_here)
        if trio.lowlevel.in_trio_task():
            task = trio.lowlevel.current_task()
            held += [other for lock, other in self._locks if lock.statistics().owner is task]
        self.taken |= {(other, name) for other in held}

    def name_of(self, lock: trio.Lock) -> str | None:
        return next((name for one, name in self._locks if one is lock), None)


_REAL = threading.Lock


@contextmanager
def watched() -> Iterator[_Watch]:
    """Within the block the engine's locks are watched, of all stores that are opened in it.

    What a task holds while a thread works for it is seen where blocking calls are made in the thread of the loop, as
    `small_and_deterministic` has it.
    """
    watch = _Watch()
    make, acquire, acquire_nowait = trio.Lock.__init__, trio.Lock.acquire, trio.Lock.acquire_nowait

    def made(self: trio.Lock, *arguments: Any) -> None:
        make(self, *arguments)
        name = _name_of(sys._getframe(1))
        if name is not None:
            watch.made(self, name)

    def asked(real: Callable[[trio.Lock], Any]) -> Callable[[trio.Lock], Any]:
        def ask(self: trio.Lock) -> Any:
            name = watch.name_of(self)
            if name is not None and self.statistics().owner is not trio.lowlevel.current_task():
                watch.takes(name)
            return real(self)

        return ask

    def made_for_threads() -> Any:
        name = _name_of(sys._getframe(1))
        if name is None:
            return _REAL()
        watch.names.add(name)
        return _Watched(name, watch)

    with (
        patch.object(trio.Lock, "__init__", made),
        patch.object(trio.Lock, "acquire", asked(acquire)),
        patch.object(trio.Lock, "acquire_nowait", asked(acquire_nowait)),
        patch.object(threading, "Lock", made_for_threads),
    ):
        yield watch
