"""A checksum of the rows of database tables, updated row by row: the cost of a change does not depend on their number.

It is the sum, modulo 2^128, of the XXH3-128 of each row. An inserted row is added, a deleted one subtracted, and an
updated one both; so equal rows count, and their order does not. All rows are read only to check it, or make it anew.

SQLite itself reports the changes, by triggers on this connection that are not part of the database: no statement can
forget its rows, not even a cascade or a REPLACE. A row is subtracted as it is found, and the sum is changed as it is
found: rows that were damaged meanwhile do not become right by later changes, and the next check notices them.

The caller ensures that nobody else uses the connection. Errors are SQLite's.
"""

import sqlite3
from collections.abc import Sequence

from xxhash import xxh3_128_intdigest

_MODULUS = 1 << 128
_BYTES = 16

Value = int | float | str | bytes | None


def row_sum(table: str, values: Sequence[Value]) -> int:
    """The term that one row adds to the sum."""
    return xxh3_128_intdigest(repr((table, *values)).encode("utf-8", "backslashreplace"))


class RowSum:
    """The checksum of `tables`. It is stored in a table of its own, `checksum`: the column `digest` of the only row."""

    def __init__(self, connection: sqlite3.Connection, tables: Sequence[str]) -> None:
        self._connection = connection
        self._tables = tables
        self._change = 0  #: of the sum by the open transaction

    def is_right(self) -> bool:
        """Whether the checksum matches the rows."""
        return self._connection.execute("SELECT digest FROM checksum").fetchall() == [(_digest(self._counted()),)]

    def make_anew(self) -> None:
        """Compute it from the rows as they are, whatever it was. Part of the open transaction; before `follow`."""
        self._connection.execute("DELETE FROM checksum")
        self._connection.execute("INSERT INTO checksum VALUES (?)", (_digest(self._counted()),))

    def follow(self) -> None:
        """Track each change from now on. Called once."""
        self._connection.execute("PRAGMA recursive_triggers=ON")  # else REPLACE does not report what it deletes
        self._connection.execute("PRAGMA temp_store=MEMORY")  # the triggers must need no file: it may be on an image
        self._connection.create_function("row_changes", -1, self._row_changes)
        self._connection.create_function("changed", 1, self._changed)
        for table in self._tables:
            columns = self._columns(table)
            gone, come = (
                f"row_changes({sign}, '{table}', {', '.join(f'{row}.{column}' for column in columns)})"
                for sign, row in ((-1, "OLD"), (1, "NEW"))
            )
            for event, told in {"INSERT": come, "DELETE": gone, "UPDATE": f"{gone}, {come}"}.items():
                self._connection.execute(
                    f"CREATE TEMP TRIGGER {table}_{event} AFTER {event} ON main.{table} BEGIN SELECT {told}; END"
                )

    def begin(self) -> None:
        """A transaction begins; the changes of an earlier one, which may not have committed, are forgotten."""
        self._change = 0

    def write(self) -> None:
        """Add the open transaction's changes to the checksum, as the last part of it."""
        if self._change:
            self._connection.execute("UPDATE checksum SET digest = changed(digest)")

    def _row_changes(self, sign: int, table: str, *values: Value) -> None:
        self._change += sign * row_sum(table, values)

    def _changed(self, digest: bytes) -> bytes:
        return _digest(int.from_bytes(digest, "big") + self._change)

    def _counted(self) -> int:
        found = 0
        for table in self._tables:
            columns = ", ".join(self._columns(table))
            for row in self._connection.execute(f"SELECT {columns} FROM {table} NOT INDEXED"):
                found += row_sum(table, row)
        return found

    def _columns(self, table: str) -> list[str]:
        return [row[1] for row in self._connection.execute(f"PRAGMA main.table_info({table})")]


def _digest(total: int) -> bytes:
    return (total % _MODULUS).to_bytes(_BYTES, "big")
