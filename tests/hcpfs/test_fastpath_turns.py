"""The fast path and time: who is waited for awake, who asleep, and that nobody has to wait for somebody else."""

import math
import socket
import struct
from collections.abc import Callable

import pytest
import trio
import trio.testing

from hcpfs.daemon import fastpath
from tests.support.inside import is_patient, poll_of, polls_with
from tests.support.requests import GETATTR, Scene, fsync, read, request, shows


def test_others_run_after_so_much_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests without end, that take a quarter of the time each."""
    clock = _Clock()
    monkeypatch.setattr(fastpath, "time", clock)
    monkeypatch.setattr(fastpath, "MOST_SECONDS", 4 * _Clock.step)

    async def test(scene: Scene) -> None:
        requests, turns = 0, 0

        def read_nowait(offset: int, length: int, into: memoryview) -> bytes:
            nonlocal requests
            requests += 1
            scene.kernel.send(read(requests, 0, 1))
            return b"x"

        monkeypatch.setattr(scene.file, "read_nowait", read_nowait)
        scene.kernel.send(read(0, 0, 1))
        while requests < 1000:
            await trio.lowlevel.checkpoint()
            turns += 1
            while not scene.is_silent(scene.kernel):
                pass
        assert 1000 / 6 < turns < 1000 / 2

    shows(test)


class _Clock:
    """Stands still but for a step a look. At the time `due`, if any, a request arrives."""

    step = 0.001

    def __init__(self) -> None:
        self.now = 0.0
        self.due = math.inf
        self.arrive: Callable[[], object] = lambda: None

    def monotonic(self) -> float:
        self.now += self.step
        if self.now >= self.due:
            self.due = math.inf
            self.arrive()
        return self.now


def test_who_asks_again_soon_is_waited_for_awake(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = _Clock()
    sleeps: list[float] = []  # when
    lasting = 0.0  # seconds, of a sleep
    real = trio.lowlevel.wait_readable

    async def wait_readable(what: int | socket.socket) -> None:
        if isinstance(what, int):
            sleeps.append(clock.now)
        await real(what)
        clock.now += lasting

    monkeypatch.setattr(trio.lowlevel, "wait_readable", wait_readable)
    monkeypatch.setattr(fastpath, "time", clock)
    monkeypatch.setattr(fastpath, "MOST_SECONDS", 3600.0)
    monkeypatch.setattr(fastpath, "PATIENCE_SECONDS", 1.0)

    async def test(scene: Scene) -> None:
        nonlocal lasting

        async def ask_when_all_sleep() -> None:
            await trio.testing.wait_all_tasks_blocked()
            scene.kernel.send(read(1, 0, 1))
            await scene.answer()
            await trio.testing.wait_all_tasks_blocked()

        clock.arrive = lambda: scene.kernel.send(read(2, 0, 1))
        await trio.testing.wait_all_tasks_blocked()
        assert len(sleeps) == 1, "at first it sleeps"
        clock.due = clock.now + 0.5
        woken = clock.now
        await ask_when_all_sleep()
        assert (await scene.answer())[0] == 2, "the next one comes in time"
        assert len(sleeps) == 2
        assert sleeps[-1] - woken > 1.5, "and the one after it does not"
        lasting = 5.0
        woken = clock.now
        await ask_when_all_sleep()
        assert len(sleeps) == 3
        assert sleeps[-1] - woken < 5.5, "after a long sleep nobody stays awake for another"

    shows(test)


def test_who_asks_again_a_little_later_is_waited_for_without_trio(monkeypatch: pytest.MonkeyPatch) -> None:
    sleeps = 0
    real = trio.lowlevel.wait_readable

    async def wait_readable(what: int | socket.socket) -> None:
        nonlocal sleeps
        sleeps += isinstance(what, int)
        await real(what)

    monkeypatch.setattr(trio.lowlevel, "wait_readable", wait_readable)
    monkeypatch.setattr(fastpath, "DOZE_MILLISECONDS", 60_000)

    async def test(scene: Scene) -> None:
        scene.kernel.send(read(1, 0, 1))  # arrives before it sleeps
        poll = poll_of(scene.path)
        asked = 0

        class Poll:
            def poll(self, milliseconds: int) -> list[tuple[int, int]]:
                nonlocal asked
                asked += 1
                if asked <= 5:
                    scene.kernel.send(read(1 + asked, 0, 1))
                return poll.poll(milliseconds if asked <= 5 else 0)

        polls_with(scene.path, Poll())
        assert [(await scene.answer())[0] for _ in range(6)] == [1, 2, 3, 4, 5, 6]
        await trio.testing.wait_all_tasks_blocked()
        assert (asked, sleeps) == (6, 1)

    shows(test)


def test_while_a_request_waits_for_something_nobody_sleeps_without_trio() -> None:
    async def test(scene: Scene) -> None:
        class Poll:
            def poll(self, milliseconds: int) -> list[tuple[int, int]]:
                return pytest.fail("nothing else can run now")

        await trio.testing.wait_all_tasks_blocked()
        polls_with(scene.path, Poll())
        scene.file.nowait = False
        scene.kernel.send(fsync(1))
        await trio.testing.wait_all_tasks_blocked()
        polls_with(scene.path)
        scene.file.goes_on.set()
        assert (await scene.answer())[0] == 1

    shows(test)


def test_a_processor_that_others_want_is_left_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = _Clock()
    monkeypatch.setattr(fastpath, "time", clock)
    monkeypatch.setattr(fastpath, "MOST_SECONDS", 3600.0)
    monkeypatch.setattr(fastpath, "PATIENCE_SECONDS", 1.0)
    monkeypatch.setattr(fastpath, "CROWDED_SECONDS", 100.0)

    async def test(scene: Scene) -> None:
        async def seconds_awake(unique: int) -> float:
            await trio.testing.wait_all_tasks_blocked()
            scene.kernel.send(read(unique, 0, 1))
            began = clock.now
            await scene.answer()
            await trio.testing.wait_all_tasks_blocked()
            return clock.now - began

        def take_the_processor() -> None:
            clock.now += 2.0

        assert await seconds_awake(1) > 1.0, "undisturbed it stays awake for the next"
        clock.due, clock.arrive = clock.now + 0.5, take_the_processor
        assert await seconds_awake(2) < 3.0, "not any more when it notices"
        assert await seconds_awake(3) < 0.5, "nor for a while after that"
        clock.now += 100.0
        await seconds_awake(4)
        assert await seconds_awake(5) > 1.0

    shows(test)


def test_while_libfuse_has_a_request_nobody_stays_awake_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = _Clock()
    monkeypatch.setattr(fastpath, "time", clock)
    for name in ("MOST_SECONDS", "MOST_SECONDS_PASSED", "PATIENCE_SECONDS"):
        monkeypatch.setattr(fastpath, name, 1000.0)

    async def test(scene: Scene) -> None:
        await trio.testing.wait_all_tasks_blocked()
        is_patient(scene.path, 1000.0)
        began = clock.now
        scene.kernel.send(request(GETATTR, 83))
        await scene.message(scene.libfuse)
        scene.libfuse.send(struct.pack("=IiQ", 16, 0, 83))
        assert await scene.answer() == (83, 0, b"")
        assert clock.now - began < 1.0

    shows(test)


def test_others_run_sooner_while_libfuse_has_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is answered amid requests without end, within a few of them."""
    clock = _Clock()
    monkeypatch.setattr(fastpath, "time", clock)
    monkeypatch.setattr(fastpath, "MOST_SECONDS", 1000.0)
    monkeypatch.setattr(fastpath, "MOST_SECONDS_PASSED", 4 * _Clock.step)

    async def test(scene: Scene) -> None:
        requests = 0

        def read_nowait(offset: int, length: int, into: memoryview) -> bytes:
            nonlocal requests
            requests += 1
            if requests == 100:
                scene.kernel.send(request(GETATTR, 84))
            if requests < 1000:
                scene.kernel.send(read(1000 + requests, 0, 1))
            return b"x"

        monkeypatch.setattr(scene.file, "read_nowait", read_nowait)
        scene.kernel.send(read(1000, 0, 1))
        await scene.message(scene.libfuse)
        assert 100 <= requests < 120

    shows(test)
