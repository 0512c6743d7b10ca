"""The catalog's checksum: what changed its rows behind our back is noticed, and a transaction costs what it changes."""

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from xxhash import xxh3_128_digest

from cow.disk.directory import Directory
from cow.durable.space import CATALOG_BYTES
from cow.errors import RefusedError
from cow.records import rowsum
from cow.records.catalog import FILE_NAME, Catalog, CatalogError
from cow.records.rows import OriginRow, State
from tests.support.inside import count_steps

TABLES = ["store", "origins", "snapshots", "evidence", "layers"]
EDITED = "do not match their checksum"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A store's directory, with a catalog in which everything happened that can happen."""
    with _opened(tmp_path) as catalog:
        catalog.add_origins([OriginRow(0, b"a", b"/a", 1 << 20, 1), OriginRow(0, b"b", b"/b\xff", 1 << 20, 2)])
        rows = [_take(catalog, b"s%d" % number) for number in range(6)]
        catalog.set_state(rows[0], State.DAMAGED, "a reason with \0 and \udcff and ä")
        catalog.delete_snapshot(rows[1], rows[0])
        catalog.give_up_snapshot(rows[2], None, "no room")
        catalog.rename_snapshot(rows[3], b"\xffother")
        catalog.suspect_snapshots(rows[3:5], "the device was changed")
        catalog.suspect_snapshots(rows[4:], "once more")  # the evidence of one of them is there already
        catalog.finish_snapshot(rows[5], {"quiesced": "no", "more": ""})  # replaces
        catalog.record_saved([(layer.id, 7) for layer in catalog.layers()[::2]])
        catalog.remove_layer(catalog.layers()[0].id)
        catalog.set_fingerprint(1, rows[5], b"\0" * 8)
        catalog.set_setting("journal", 3)
        catalog.set_setting("journal", 4)
        catalog.set_setting("clean", 0)
        with pytest.raises(CatalogError):
            catalog.rename_snapshot(rows[4], b"\xffother")
        catalog.record_clean_stop([(1, b"/elsewhere", 3)], {"device.1": "facts"})
    return tmp_path


@contextmanager
def _opened(place: Path, *, repair: bool = False) -> Iterator[Catalog]:
    with closing(Directory.open_path(str(place))) as directory, closing(Catalog(directory, repair=repair)) as catalog:
        yield catalog


def _take(catalog: Catalog, name: bytes) -> int:
    row, _ = catalog.add_snapshot(name, 5)
    catalog.finish_snapshot(row.id, {"quiesced": "yes", "held_us": "12"})
    return row.id


def _database(place: Path) -> closing[sqlite3.Connection]:
    return closing(sqlite3.connect(place / FILE_NAME, isolation_level=None))


def _contents(place: Path) -> list[tuple[Any, ...]]:
    with _database(place) as database:
        return [(table, *row) for table in TABLES for row in database.execute(f"SELECT * FROM {table}")]


def _digest(place: Path) -> bytes:
    with _database(place) as database:
        [(digest,)] = database.execute("SELECT digest FROM checksum").fetchall()
    assert isinstance(digest, bytes)
    return digest


def test_the_checksum_is_what_the_format_says(place: Path) -> None:
    sums = [xxh3_128_digest(repr(row).encode("utf-8", "backslashreplace")) for row in _contents(place)]
    assert _digest(place) == (sum(int.from_bytes(one, "big") for one in sums) % 2**128).to_bytes(16, "big")
    with _opened(place) as catalog:
        assert catalog.snapshots()[0].reason.startswith("a reason with \0 and ")
        assert catalog.problems() == []


NO_SUM = "UPDATE checksum SET digest = 'x'"
EDITS = [
    # changed
    "UPDATE layers SET snapshot = (SELECT max(id) FROM snapshots) WHERE id = (SELECT min(id) FROM layers)",
    "UPDATE layers SET generation = generation + 1 WHERE id = (SELECT max(id) FROM layers)",
    "UPDATE snapshots SET state = 'valid' WHERE id = 1",
    "UPDATE snapshots SET name = CAST(name AS TEXT) WHERE id = 1",
    "UPDATE evidence SET value = 'No' WHERE value = 'no'",
    "UPDATE origins SET fingerprint_of = 0",
    "UPDATE store SET value = 'x' WHERE key = 'uuid'",
    "UPDATE store SET value = CAST(value AS TEXT) WHERE key = 'journal'",
    # exchanged
    "UPDATE origins SET path = (SELECT path FROM origins AS other WHERE other.id != origins.id)",
    "UPDATE layers SET generation = 7 - generation WHERE snapshot = 6",
    # removed
    *(f"DELETE FROM {table} WHERE rowid = (SELECT max(rowid) FROM {table})" for table in TABLES),
    *(f"DELETE FROM {table}" for table in TABLES[1:]),  # with all of `store` there is no format either
    # added
    "INSERT INTO store VALUES (NULL, 1)",
    "INSERT INTO origins (name, path, size_bytes, modified_ns) VALUES ('c', '', 0, 0)",
    "INSERT INTO snapshots (name, created_ns, state) VALUES ('c', 0, 'valid')",
    "INSERT INTO evidence VALUES (1, 'c', 'd')",
    "INSERT INTO layers (origin, snapshot, role) SELECT origin, snapshot, role FROM layers LIMIT 1",
    # the checksum itself
    "UPDATE checksum SET digest = zeroblob(16)",
    NO_SUM,
    "DELETE FROM checksum",
    "INSERT INTO checksum SELECT digest FROM checksum",
]


@pytest.mark.parametrize("edit", EDITS)
def test_i4_rows_that_were_changed_are_noticed(place: Path, edit: str) -> None:
    with _database(place) as database:
        assert database.execute(edit).rowcount
    with pytest.raises(RefusedError, match=EDITED), _opened(place):
        pass
    with _opened(place, repair=True) as catalog:
        assert EDITED in catalog.repaired
        assert catalog.problems() == [], "rows of one that is gone are gone too"
        assert {row.snapshot for row in catalog.layers()} <= {row.id for row in catalog.snapshots()}
        catalog.set_setting("journal", 5)
    with _opened(place), _database(place) as database:
        assert set(database.execute("SELECT state FROM snapshots")) <= {(State.INVALID,)}


@pytest.mark.parametrize("edit", [edit for edit in EDITS if edit != NO_SUM])
def test_i4_what_comes_after_a_change_behind_our_back_does_not_hide_it(place: Path, edit: str) -> None:
    """Also where it is the very row that was changed."""
    with _opened(place) as catalog:
        snapshots, layers = catalog.snapshots(), catalog.layers()
        with _database(place) as database:
            assert database.execute(edit).rowcount
        for row in snapshots:
            catalog.set_state(row.id, State.DAMAGED, "worse")
        catalog.record_saved([(layer.id, 9) for layer in layers])
        catalog.set_setting("journal", 5)
        catalog.delete_snapshot(_take(catalog, b"new"), None)
    with pytest.raises(RefusedError, match=EDITED), _opened(place):
        pass


def test_nothing_is_committed_where_the_checksum_is_none(place: Path) -> None:
    with _opened(place) as catalog:
        with _database(place) as database:
            database.execute(NO_SUM)
        with pytest.raises(CatalogError):
            catalog.set_setting("journal", 5)
        assert catalog.setting("journal") == 4


def test_i4_older_pages_among_newer_ones_are_noticed(place: Path, tmp_path: Path) -> None:
    """Or they say the same."""
    with _database(place) as database:
        page_bytes = int(database.execute("PRAGMA page_size").fetchone()[0])
    older = (place / FILE_NAME).read_bytes()
    with _opened(place) as catalog:
        _take(catalog, b"new")
        catalog.delete_snapshot(catalog.snapshots()[0].id, None)
        catalog.set_setting("journal", 5)
    newer, contents = (place / FILE_NAME).read_bytes(), _contents(place)
    noticed = 0
    for at in range(0, len(older), page_bytes):
        page = older[at : at + page_bytes]
        if page == newer[at : at + page_bytes]:
            continue
        (place / FILE_NAME).write_bytes(newer[:at] + page + newer[at + page_bytes :])
        try:
            with _opened(place):
                pass
        except RefusedError:
            noticed += 1
        else:
            assert _contents(place) == contents
    assert noticed >= len(TABLES)


def test_a_transaction_that_fails_leaves_the_checksum_as_it_was(place: Path) -> None:
    before = _digest(place)
    with _opened(place) as catalog:
        with pytest.raises(CatalogError):
            catalog.add_origins([OriginRow(0, name, b"/", 0, 0) for name in (b"new", b"a")])  # which is there
        assert _digest(place) == before
        catalog.set_setting("journal", 4)  # as it was
        assert _digest(place) == before
        catalog.set_setting("journal", 5)
        assert _digest(place) != before
    with _opened(place) as catalog:
        assert catalog.setting("journal") == 5


TRANSACTIONS: list[Callable[[Catalog, int], object]] = [
    lambda catalog, snapshot: catalog.add_snapshot(b"new", 5),
    lambda catalog, snapshot: catalog.finish_snapshot(snapshot, {"quiesced": "no"}),
    lambda catalog, snapshot: catalog.rename_snapshot(snapshot, b"renamed"),
    lambda catalog, snapshot: catalog.set_state(snapshot, State.DAMAGED, "a test"),
    lambda catalog, snapshot: catalog.record_saved([(2 * snapshot, 9)]),
    lambda catalog, snapshot: catalog.remove_layer(2 * snapshot - 1),
    lambda catalog, snapshot: catalog.set_fingerprint(1, snapshot, b"fingerprint"),
    lambda catalog, snapshot: catalog.suspect_snapshots([snapshot], "a test"),
    lambda catalog, snapshot: catalog.give_up_snapshot(snapshot - 1, snapshot - 2, "a test"),
    lambda catalog, snapshot: catalog.delete_snapshot(snapshot, snapshot - 2),
    lambda catalog, snapshot: catalog.set_setting("journal", 9),
    lambda catalog, snapshot: catalog.record_clean_stop([(1, b"/a", 9)], {}),
]


def _work(place: Path, snapshots: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, int]]:
    """Of each transaction: the rows that are summed, and the steps of SQLite's virtual machine."""
    rows = steps = 0
    real = rowsum.row_sum

    def row_sum(*arguments: Any) -> int:
        nonlocal rows
        rows += 1
        return real(*arguments)

    def step() -> None:
        nonlocal steps
        steps += 1

    monkeypatch.setattr(rowsum, "row_sum", row_sum)
    place.mkdir()
    with _opened(place) as catalog:
        catalog.add_origins([OriginRow(0, b"a", b"/a", 1 << 20, 1)])
        taken = [_take(catalog, b"s%d" % number) for number in range(snapshots)]
        count_steps(catalog, step)
        for transaction in TRANSACTIONS:
            rows = steps = 0
            transaction(catalog, taken[-1])
            yield rows, steps
    monkeypatch.undo()


def test_the_work_of_a_transaction_does_not_grow_with_the_snapshots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = list(_work(tmp_path / "few", 4, monkeypatch))
    many = list(_work(tmp_path / "many", 400, monkeypatch))
    assert few == many
    assert all(rows and steps for rows, steps in few)


def test_i6_the_write_ahead_log_starts_over(tmp_path: Path) -> None:
    with _opened(tmp_path) as catalog:
        catalog.add_origins([OriginRow(0, b"a", b"/a", 1 << 20, 1)])
        row = _take(catalog, b"0")
        for number in range(1, 300):
            catalog.rename_snapshot(row, b"%d" % number)
        assert (tmp_path / f"{FILE_NAME}-wal").stat().st_size < CATALOG_BYTES // 2
