"""The times of images: none stays what it was when the contents changed, whatever the clock does."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cow import clock
from tests.support.engine import Engine, engines
from tests.support.inside import buffer_of

SIZE = 1 << 20
SECOND_NS = 1_000_000_000


class Clock:
    """Stands in for the module `time` in cow.clock."""

    def __init__(self, now_ns: int) -> None:
        self.now_ns = now_ns

    def time_ns(self) -> int:
        return self.now_ns


@pytest.fixture
def wall(monkeypatch: pytest.MonkeyPatch) -> Clock:
    wall = Clock(1_700_000_000 * SECOND_NS)
    monkeypatch.setattr(clock, "time", wall)
    monkeypatch.setattr(clock, "_ahead_ns", 0)
    return wall


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Engine]]:
    with engines(tmp_path, SIZE) as start:
        yield start


def test_the_clock_is_followed_where_it_goes_on(wall: Clock) -> None:
    assert clock.after(wall.now_ns - 1) == wall.now_ns
    assert clock.after(0) == wall.now_ns


def test_a_clock_that_stands_or_steps_back_a_little_is_waited_for(wall: Clock) -> None:
    assert clock.after(wall.now_ns) == wall.now_ns + 1
    assert clock.after(wall.now_ns + SECOND_NS - 1) == wall.now_ns + SECOND_NS


def test_a_clock_that_was_set_back_goes_on_from_the_old_time_at_its_own_pace(wall: Clock) -> None:
    old = wall.now_ns
    wall.now_ns -= 3600 * SECOND_NS
    first = clock.after(old)
    assert first == old + SECOND_NS  # who compares whole seconds sees it
    wall.now_ns += 5 * SECOND_NS
    assert clock.after(first) == first + 5 * SECOND_NS
    wall.now_ns += 7200 * SECOND_NS
    assert clock.after(first) == wall.now_ns  # it is right again


@pytest.mark.parametrize("behind_ns", [0, 50_000_000, 86400 * SECOND_NS, 40 * 365 * 86400 * SECOND_NS])
def test_every_write_changes_the_time_also_when_the_clock_was_set_back(
    start: Callable[..., Engine], wall: Clock, behind_ns: int
) -> None:
    engine = start()
    origin = engine.store.origins[0]
    snapshot = engine.call(engine.store.create_snapshot, b"a")
    image = snapshot.images[0]
    wall.now_ns = max(image.modified_ns, origin.modified_ns) - behind_ns
    for target in (origin, image):
        seen = [target.modified_ns]
        for length in (4096, 100):  # one that needs no waiting, and one that does
            engine.call(target.write, 4096, os.urandom(length))
            seen.append(target.modified_ns)
            engine.call(target.sync)
            assert target.modified_ns == seen[-1]
        assert seen == sorted(set(seen))
    stopped = origin.modified_ns, image.modified_ns
    engine.close()
    again = start()
    assert (again.store.origins[0].modified_ns, again.store.find(b"a").images[0].modified_ns) == stopped


def test_what_a_crash_may_have_left_half_written_has_another_time(start: Callable[..., Engine], wall: Clock) -> None:
    """A chunk that is overwritten in place may be the old, the new, or neither; the clock was set back before that."""
    engine = start()
    image = engine.call(engine.store.create_snapshot, b"a").images[0]
    engine.call(image.write, 0, os.urandom(4096))
    engine.call(image.sync)
    backed_up = image.modified_ns
    wall.now_ns = backed_up - 3600 * SECOND_NS
    engine.call(image.write, 0, os.urandom(4096))
    engine.call(buffer_of(image).drain)  # with an INTENT, and no sync
    engine.kill()
    again = start()
    assert again.store.find(b"a").images[0].modified_ns > backed_up


def test_a_snapshot_in_doubt_shows_other_contents_at_another_time(start: Callable[..., Engine]) -> None:
    """With read_suspect it can be read, and what it shows may be other bytes than before, at each opening again."""
    engine = start()
    image = engine.call(engine.store.create_snapshot, b"a").images[0]
    before, live_before = image.modified_ns, engine.store.origins[0].modified_ns
    engine.call(engine.store.suspect, "for the test")
    doubted = image.modified_ns
    assert doubted > before
    assert engine.store.origins[0].modified_ns > live_before
    engine.call(engine.store.origins[0].write, 0, os.urandom(4096))
    assert image.modified_ns == doubted  # the old bytes are preserved: what it shows stays
    engine.call(image.write, 8192, os.urandom(4096))
    written = image.modified_ns
    assert written > doubted
    fresh = engine.call(engine.store.create_snapshot, b"b")
    assert fresh.images[0].modified_ns == fresh.row.created_ns  # nobody doubts that one
    engine.close()
    again = start(read_suspect=True)
    reopened = again.store.find(b"a").images[0]
    again.store.origins[0].modified_ns += SECOND_NS  # as the opening sets it where the device may have been changed
    assert reopened.modified_ns == again.store.origins[0].modified_ns > written
