"""What a repair leaves of a damaged catalog can be used, and a catalog in use is counted anew by a verify."""

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from cow.errors import RefusedError
from cow.scrub import Finding, OpenScrub, scrub_store
from tests.support.engine import Engine
from tests.support.failing import take


def _change(place: Path, statement: str) -> None:
    with closing(sqlite3.connect(place / "store" / "catalog.sqlite", isolation_level=None)) as connection:
        connection.execute(statement)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ("UPDATE snapshots SET name = CAST(name AS TEXT) WHERE id = 1", [b"a", b"b"]),
        ("UPDATE snapshots SET name = 'b' WHERE id = 1", [b"b.1", b"b"]),
        ("UPDATE snapshots SET name = 17 WHERE id = 2", [b"a", b"17"]),
        ("UPDATE origins SET path = CAST(path AS TEXT), name = CAST(name AS TEXT)", [b"a", b"b"]),
    ],
)
def test_names_that_damage_made_text_are_bytes_after_a_repair(
    start: Callable[..., Engine], tmp_path: Path, change: str, names: list[bytes]
) -> None:
    engine = start()
    for name in (b"a", b"b"):
        take(engine, name)
    engine.close()
    _change(tmp_path, change)
    with pytest.raises(RefusedError, match="do not match their checksum"):
        start()
    found = [one for one in scrub_store(str(tmp_path / "store"), repair=True) if isinstance(one, Finding)]
    assert found
    assert all(one.repaired for one in found)
    engine = start()
    assert [one.name for one in engine.store.snapshots] == names
    for name in names:
        engine.call(engine.store.delete_snapshot, name)
    take(engine, b"new")


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE snapshots SET created_ns = 1",
        "UPDATE layers SET generation = 77 WHERE id = 1",
        "DELETE FROM evidence",
    ],
)
def test_verify_of_a_store_in_use_counts_the_rows_of_its_catalog(
    start: Callable[..., Engine], tmp_path: Path, change: str
) -> None:
    engine = start()
    take(engine, b"a")
    assert _verified(engine) == []
    _change(tmp_path, change)
    (sentence,) = _verified(engine)
    assert "do not match their checksum" in sentence
    engine.kill()


def _verified(engine: Engine) -> list[str]:
    async def verify() -> list[str]:
        scrub, found = OpenScrub(engine.store, repair=False), []
        while (steps := await scrub.step()) is not None:
            found += [step.sentence for step in steps if isinstance(step, Finding)]
        return found

    return engine.call(verify)
