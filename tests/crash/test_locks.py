"""The engine's locks are taken in one order, the one of the table in cow/DESIGN.md: nobody waits in a circle."""

import re
from itertools import islice
from pathlib import Path

import pytest

import cow
from tests.crash.disk import Disk, empty_state
from tests.crash.harness import CONTENT, SPLIT, record, run
from tests.crash.locks import Taken, watched
from tests.crash.mutations import HUNTS
from tests.crash.workloads import short_workloads
from tests.support.engine import engines

_SHARE = 25  #: every so many of the short workloads


def _order() -> list[str]:
    """The locks of the table, the outermost first."""
    text = (Path(cow.__file__).parent / "DESIGN.md").read_text()
    section = text.partition("\n## Locks\n")[2].partition("\n## ")[0]
    return re.findall(r"^\| `(\w+\.\w+)` \|", section, re.MULTILINE)


def _wrong(taken: Taken) -> list[str]:
    order = _order()
    return [f"{inner} while {outer} is held" for outer, inner in taken if order.index(outer) >= order.index(inner)]


def test_i10_locks_are_taken_in_the_order_of_the_table() -> None:
    with watched() as watch:
        for number, workload in enumerate([*HUNTS, *islice(short_workloads(), 0, None, _SHARE)]):
            contents = (CONTENT[:SPLIT], CONTENT[SPLIT:]) if number % 3 == 2 else (CONTENT,)
            try:
                run(record, workload, Disk(empty_state(*contents), in_memory=number % 2 == 1))
            except ValueError:  # those that look into an image are for one disk
                run(record, workload, Disk(empty_state(CONTENT)))
    assert watch.names <= set(_order())
    assert len(watch.taken) > 20
    assert _wrong(watch.taken) == []


def test_i10_so_they_are_where_snapshots_are_given_up_for_room(tmp_path: Path) -> None:
    size = 24 << 20
    with watched() as watch, engines(tmp_path, size, quota_bytes=32 << 20) as start:
        engine = start()
        for number in range(3):
            engine.call(engine.store.create_snapshot, b"%d" % number)
            for offset in range(0, size, 1 << 20):
                engine.call(engine.store.origins[0].write, offset, bytes([number]) * (1 << 20))
            engine.call(engine.store.origins[0].sync)
        assert any("was given up" in trouble for trouble in engine.troubles)
        engine.close()
    assert ("Preserver._turn", "Inventory.lock") in watch.taken
    assert _wrong(watch.taken) == []


def test_a_lock_that_is_taken_the_wrong_way_round_is_noticed() -> None:
    first, second = _order()[:2]
    assert _wrong({(second, first)}) == [f"{first} while {second} is held"]
    with pytest.raises(ValueError, match="not in list"):
        _wrong({(first, "Engine.no_such_lock")})
