"""Events: what is told of a store, in words and in fields."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from cow.events import Damaged, Event, Filling, GivenUp, Rescued, Trouble
from cow.geometry import CHUNK_BYTES
from tests.support.engine import Engine
from tests.support.failing import BadIo, BadSectors, take, write
from tests.support.inside import give_up


@pytest.mark.parametrize(
    ("event", "sentence"),
    [
        (Trouble("it is so"), "it is so"),
        (
            Filling("/store", 81, "81 % full (81 of 100 bytes)", "remove snapshots"),
            "the store /store is 81 % full (81 of 100 bytes): remove snapshots",
        ),
        (Damaged(b"a\xff", "one chunk"), r"snapshot a\xff is damaged: one chunk"),
        (
            Rescued(b"a"),
            "snapshot a lacks nothing any more: what was recorded as lost was never overwritten, and has been read "
            "from the device after all",
        ),
        (GivenUp(b"a", "no room"), "snapshot a was given up: no room"),
    ],
)
def test_an_event_is_a_sentence_for_people(event: Event, sentence: str) -> None:
    assert str(event) == sentence


def test_a_damaged_snapshot_is_told_once_by_its_name(start: Callable[..., Engine], io: BadIo) -> None:
    engine = start()
    take(engine, b"a")
    BadSectors(io, {7})
    for byte in (b"1", b"2"):
        write(engine, engine.store.origins[0], 7, byte)
    (damaged,) = engine.events
    assert isinstance(damaged, Damaged)
    assert damaged.snapshot == b"a"
    assert damaged.reason == engine.store.snapshots[0].row.reason != ""


def test_a_snapshot_that_is_given_up_is_told_by_its_name(start: Callable[..., Engine], tmp_path: Path) -> None:
    engine = start()
    take(engine, b"a")
    take(engine, b"b")
    engine.call(engine.store.rename_snapshot, b"a", b"c")
    engine.call(engine.store.origins[0].write, 0, os.urandom(CHUNK_BYTES))
    assert engine.events == []
    engine.call(give_up, engine.store, [engine.store.snapshots[0].id], "a reason")
    assert engine.events == [GivenUp(b"c", "a reason")]
