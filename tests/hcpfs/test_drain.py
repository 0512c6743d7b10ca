"""The drained session loop: what is ready is served at once, and nothing else has to wait for long."""

import math
import os
from collections.abc import Callable, Iterator

import pyfuse3
import pytest
import trio
import trio.testing

from hcpfs import drain


@pytest.fixture
def ready() -> Iterator[int]:
    """A descriptor that always has something to read, as /dev/fuse under full load."""
    reading, writing = os.pipe()
    os.write(writing, b"x")
    yield reading
    os.close(reading)
    os.close(writing)


def _turns_of_others(fd: int, requests: int) -> int:
    """How often another task runs while so many requests are waited for."""

    async def main() -> int:
        turns = 0

        async def other() -> None:
            nonlocal turns
            while True:
                await trio.lowlevel.checkpoint()
                turns += 1

        with drain.drained():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(other)
                for _ in range(requests):
                    await pyfuse3.trio.lowlevel.wait_readable(fd)
                nursery.cancel_scope.cancel()
        return turns

    return trio.run(main)


def test_others_run_after_so_many_requests(ready: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drain, "MOST_SECONDS", 3600.0)
    turns = _turns_of_others(ready, 50 * drain.MOST_REQUESTS)
    assert 45 <= turns <= 55


def test_others_run_after_so_much_time(ready: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that take a millisecond each."""
    now = 0.0

    def monotonic() -> float:
        nonlocal now
        now += 0.001
        return now

    monkeypatch.setattr(drain.time, "monotonic", monotonic)
    turns = _turns_of_others(ready, 300)
    assert turns >= 90


def test_a_request_that_comes_later_is_waited_for() -> None:
    reading, writing = os.pipe()

    async def main() -> list[str]:
        told = []

        async def request() -> None:
            await trio.testing.wait_all_tasks_blocked()
            told.append("arrives")
            os.write(writing, b"x")

        with drain.drained():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(request)
                await pyfuse3.trio.lowlevel.wait_readable(reading)
                told.append("is served")
        return told

    assert trio.run(main) == ["arrives", "is served"]
    os.close(reading)
    os.close(writing)


class _Clock:
    """Stands still but for a millisecond a look. At the time `due`, if any, a request arrives."""

    def __init__(self, request: Callable[[], object]) -> None:
        self.now = 0.0
        self.due = math.inf
        self._request = request

    def monotonic(self) -> float:
        self.now += 0.001
        if self.now >= self.due:
            self.due = math.inf
            self._request()
        return self.now


def test_who_asks_again_soon_is_waited_for_awake(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    clock = _Clock(lambda: os.write(writing, b"x"))
    sleeps: list[float] = []  # when
    lasting = 0.0
    real = trio.lowlevel.wait_readable

    async def wait_readable(fd: int) -> None:
        sleeps.append(clock.now)
        clock.now += lasting
        os.write(writing, b"x")
        await real(fd)

    monkeypatch.setattr(trio.lowlevel, "wait_readable", wait_readable)
    monkeypatch.setattr(drain, "time", clock)
    monkeypatch.setattr(drain, "MOST_SECONDS", 3600.0)
    monkeypatch.setattr(drain, "PATIENCE_SECONDS", 1.0)

    async def main() -> None:
        nonlocal lasting

        async def serve() -> float:
            began = clock.now
            await pyfuse3.trio.lowlevel.wait_readable(reading)
            os.read(reading, 1)
            return began

        with drain.drained():
            await serve()
            assert len(sleeps) == 1, "at first it sleeps"
            clock.due = clock.now + 0.5
            await serve()
            assert len(sleeps) == 1, "the next one comes in time"
            lasting = 5.0
            began = await serve()
            assert len(sleeps) == 2, "the next one does not"
            assert sleeps[-1] - began > 1.0
            began = await serve()
            assert len(sleeps) == 3, "and so nobody stays awake for another"
            assert sleeps[-1] - began < 0.1

    trio.run(main)
    os.close(reading)
    os.close(writing)


@pytest.mark.parametrize("blocked", [True, False], ids=["while it waits", "while others run"])
def test_the_end_of_the_session_is_seen(blocked: bool) -> None:
    reading, writing = os.pipe()

    async def main() -> None:
        async def close() -> None:
            if blocked:
                await trio.testing.wait_all_tasks_blocked()
            pyfuse3.trio.lowlevel.notify_closing(reading)

        with drain.drained(), trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(close)
                with pytest.raises(trio.ClosedResourceError):
                    await pyfuse3.trio.lowlevel.wait_readable(reading)

    trio.run(main)
    os.close(reading)
    os.close(writing)


def test_one_reads_at_a_time() -> None:
    async def main() -> None:
        inside = 0
        with drain.drained():
            lock = pyfuse3.trio.Lock()

            async def reader() -> None:
                nonlocal inside
                for _ in range(20):
                    async with lock:
                        inside += 1
                        try:
                            assert inside == 1
                            await trio.lowlevel.checkpoint()
                        finally:
                            inside -= 1

            async with trio.open_nursery() as nursery:
                for _ in range(5):
                    nursery.start_soon(reader)
                # One that is cancelled in the queue leaves the others their turn.
                with trio.move_on_after(0):
                    await reader()

    trio.run(main)


def test_a_pyfuse3_without_the_seam_keeps_its_own_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(pyfuse3, "trio")
    with drain.drained():
        assert not hasattr(pyfuse3, "trio")


def test_afterwards_all_is_as_it_was() -> None:
    with drain.drained():
        assert pyfuse3.trio is not trio
        assert pyfuse3.trio.open_nursery is trio.open_nursery
    assert pyfuse3.trio is trio
