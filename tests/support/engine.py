"""Runs the engine on a trio thread of its own, for tests that are not async themselves."""

import os
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
import trio

from cow.config import Source
from cow.events import Event
from cow.opening import open_store
from cow.store.store import Store

T = TypeVar("T")

#: Marks of a test in tests/cow that makes sense one way only. In memory short work is done on the engine's own thread,
#: which stands still while a test holds such work up.
on_a_disk = pytest.mark.parametrize("in_memory", [False], ids=["disk"], indirect=True)
in_memory = pytest.mark.parametrize("in_memory", [True], ids=["memory"], indirect=True)


class _KilledError(Exception):
    """Stands for a kill: nothing of a clean stop is done."""


class Engine:
    """An open store. `call` runs an async function of it; `close` stops clean, `kill` does not."""

    def __init__(self, path: str, sources: Sequence[Source], **options: Any) -> None:
        self._path, self._sources, self._options = path, sources, options
        self.events: list[Event] = []  #: that were told
        self.findings: list[str] = []
        self.store: Store
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self._killed = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._ready.wait()
        if self._failure is not None:
            self._thread.join()
            raise self._failure

    def _run(self) -> None:
        try:
            trio.run(self._main)
        except* _KilledError:
            pass
        except* BaseException as group:
            error: BaseException = group
            while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
                error = error.exceptions[0]
            self._failure = error
        finally:
            self._ready.set()

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._stop = trio.Event()
        async with open_store(self._path, self._sources, tell=self.events.append, **self._options) as opened:
            self.store = opened.store
            self.findings = opened.findings
            self.was_clean = opened.was_clean
            self._ready.set()
            await self._stop.wait()
            if self._killed:
                raise _KilledError

    def call(self, function: Callable[..., Awaitable[T]], *arguments: Any) -> T:
        return trio.from_thread.run(function, *arguments, trio_token=self._token)

    @property
    def troubles(self) -> list[str]:
        """The sentences of what was told."""
        return [str(event) for event in self.events]

    @property
    def is_open(self) -> bool:
        return self._thread.is_alive()

    def close(self) -> None:
        trio.from_thread.run_sync(self._stop.set, trio_token=self._token)
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    def kill(self) -> None:
        self._killed = True
        self.close()


@contextmanager
def engines(place: Path, size: int, **always: Any) -> Iterator[Callable[..., Engine]]:
    """What opens a store for a `disk.img` of random bytes, both in `place`; what is still open at the end is killed."""
    (place / "disk.img").write_bytes(os.urandom(size))
    opened: list[Engine] = []

    def start(**options: Any) -> Engine:
        source = Source(b"disk.img", str(place / "disk.img"))
        opened.append(Engine(str(place / "store"), [source], **{**always, **options}))
        return opened[-1]

    yield start
    for engine in opened:
        if engine.is_open:
            engine.kill()
