"""The catalog: which origins, snapshots and layers exist, in SQLite.

Every method is one transaction with synchronous=FULL on a write-ahead log, durable on return (SQLite: "FULL
synchronous ... ensures that an operating system crash or power failure will not corrupt the database", and in WAL
mode each commit is synced). Names are BLOBs: a file name is bytes. The tables are described in FORMAT.md.

The catalog knows no chunks and no files. Calls block, and are safe from any thread.
"""

import os
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress

from cow.disk.directory import Directory
from cow.disk.file import File
from cow.errors import CowError, RefusedError, StoreFullError, without_surrogates
from cow.records.rows import DOUBTED_FROM, LayerRow, OriginRow, Role, SnapshotRow, State
from cow.records.rowsum import RowSum

FORMAT = 3
FILE_NAME = "catalog.sqlite"
_COMPANIONS = ("-wal", "-shm", "-journal")
_NO_ROOM = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_SHMSIZE, sqlite3.SQLITE_IOERR_SHMMAP}
_LOG_PAGES = 64  # the write-ahead log starts over at this size: 256 KiB, for which `space` has room
_SHARED_BYTES = 32768  # one region, enough for the index of 4,096 pages in the -wal: walformat.html of SQLite

_SCHEMA = """
CREATE TABLE store (
    key TEXT PRIMARY KEY,
    value NOT NULL
);
CREATE TABLE origins (
    id INTEGER PRIMARY KEY,
    name BLOB NOT NULL UNIQUE,
    path BLOB NOT NULL,
    size_bytes INTEGER NOT NULL,
    modified_ns INTEGER NOT NULL,
    fingerprint BLOB NOT NULL DEFAULT x'',
    fingerprint_of INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE snapshots (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    name BLOB NOT NULL UNIQUE,
    created_ns INTEGER NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('pending', 'valid', 'damaged', 'suspect', 'invalid')),
    reason TEXT NOT NULL DEFAULT ''
);
CREATE TABLE evidence (
    snapshot INTEGER NOT NULL REFERENCES snapshots (id) ON DELETE CASCADE,
    key TEXT NOT NULL,
    value TEXT NOT NULL,
    PRIMARY KEY (snapshot, key)
);
CREATE TABLE layers (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    origin INTEGER NOT NULL REFERENCES origins (id),
    snapshot INTEGER NOT NULL REFERENCES snapshots (id),
    role TEXT NOT NULL CHECK (role IN ('preserved', 'delta')),
    generation INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX layers_by_snapshot ON layers (snapshot);
CREATE TABLE checksum (
    digest BLOB NOT NULL
);
"""

# The tables that say what belongs to what: SQLite has no checksums, and a flipped bit there is a wrong answer.
_SUMMED = ("store", "origins", "snapshots", "evidence", "layers")


class CatalogError(CowError):
    """SQLite could not read or commit; nothing of the transaction is kept."""


class Catalog:
    """The catalog of a store. Created when missing.

    Raises RefusedError when the file is not a catalog, or one of another format.
    """

    def __init__(self, directory: Directory, *, repair: bool = False) -> None:
        """With `repair`, all snapshots are given up if the contents do not match their checksum; see `repaired`.

        Rows that refer to a missing row are removed then.
        """
        self.repaired = ""  #: a sentence on what was given up
        self._path = os.path.join(directory.label, FILE_NAME)
        self._lock = threading.Lock()  #: guards `_connection` and `_sum`
        present = set(directory.names())
        # SQLite opens its files by path, and follows symbolic links. So each of them is opened here first, through the
        # directory's descriptor, which refuses anything but a regular file; that they are ours alone was checked when
        # the directory was claimed. Afterwards the path must still lead to that directory, in which only we can write.
        for name in (FILE_NAME, *(f"{FILE_NAME}{suffix}" for suffix in _COMPANIONS)):
            if name == FILE_NAME or name in present:
                directory.open(name, create=True).close()
        has_contents = any(name.startswith("journal.") for name in present) or _has_layers(directory)
        self._connection = directory.io.connect(self._path)
        self._shared: File | None = None  #: SQLite's shared memory, kept open: see `_allocated_shared_memory`
        self._sum = RowSum(self._connection, _SUMMED)
        try:
            self._open(repair, has_contents)
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # a log that a killed process left only grows
            self._shared = _allocated_shared_memory(directory)
            if not directory.is_at_its_path:
                raise RefusedError(f"the store {directory.label} was moved while it was opened: try again")
        except (sqlite3.Error, CatalogError, ValueError) as error:  # ValueError: text that is not UTF-8
            self.close()
            cause = error.__cause__ if isinstance(error, CatalogError) else error
            if getattr(cause, "sqlite_errorcode", None) in _NO_ROOM:
                raise StoreFullError(f"no space left for the catalog {self._path}: make room there") from error
            raise RefusedError(
                f"{self._path} is not a catalog of hcpfs, or is damaged ({error}): name another store, or restore it "
                f"from a backup"
            ) from error
        except BaseException:
            self.close()
            raise

    def _open(self, repair: bool, has_contents: bool) -> None:
        self._connection.execute("PRAGMA journal_mode=WAL")
        self._connection.execute("PRAGMA synchronous=FULL")
        self._connection.execute("PRAGMA foreign_keys=ON")
        self._connection.execute(f"PRAGMA wal_autocheckpoint={_LOG_PAGES}")
        with self._transaction() as do:
            if not do.execute("SELECT 1 FROM sqlite_master WHERE name = 'store'").fetchone():
                if has_contents:
                    raise RefusedError(
                        f"{self._path} is missing or empty, and what belongs to one is beside it: restore it from a "
                        f"backup, or name another store; nothing was changed"
                    )
                for statement in filter(str.strip, _SCHEMA.split(";")):
                    do.execute(statement)
                do.executemany(
                    "INSERT INTO store VALUES (?, ?)",
                    [
                        ("format", FORMAT),
                        ("uuid", uuid.uuid4().hex),
                        ("created_ns", time.time_ns()),
                        ("clean", 1),
                    ],
                )
                self._sum.make_anew()
        found = self.setting("format")
        if found != FORMAT:
            raise RefusedError(
                f"the store {os.path.dirname(self._path)} has format {found}, and this hcpfs knows {FORMAT} only: use "
                f"the hcpfs that made it, or another store"
            )

        with self._transaction() as do:
            intact = self._sum.is_right()
            # Whether the indexes agree with the rows; the checksum covers the rows alone.
            intact = intact and do.execute("PRAGMA integrity_check(1)").fetchone() == ("ok",)
        if not intact:
            self._mend(repair)
        self._sum.follow()

    def _mend(self, repair: bool) -> None:
        sentence = f"the contents of {self._path} do not match their checksum: it was edited, or is damaged"
        if not repair:
            raise RefusedError(f"{sentence}; `hcpfs verify --repair` gives up its snapshots and makes the store usable")
        with self._transaction() as do:
            do.execute("UPDATE snapshots SET state = ?, reason = ?", (State.INVALID, sentence))
            # Rows that refer to a missing one would be taken for part of the catalog, and belong to nothing.
            for table, row, _, _ in do.execute("PRAGMA foreign_key_check").fetchall():
                do.execute(f"DELETE FROM {table} WHERE rowid = ?", (row,))
            _have_blobs(do)
            self._sum.make_anew()
        self.repaired = sentence

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                self._connection.execute("BEGIN IMMEDIATE")
                self._sum.begin()
                yield self._connection
                self._sum.write()
                self._connection.execute("COMMIT")
            except sqlite3.Error as error:
                if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:  # errors of the module have no code
                    raise StoreFullError(f"no space left for the catalog {self._path}: make room there") from error
                raise CatalogError(f"the catalog {self._path} failed: {error}") from error
            finally:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")

    def problems(self) -> list[str]:
        """What is wrong with the database: sentences, none when it is sound and its rows are what was written."""
        with self._transaction() as do:
            is_right = self._sum.is_right()
            found = [row[0] for row in do.execute("PRAGMA integrity_check(20)").fetchall()]
            strays = do.execute("PRAGMA foreign_key_check").fetchall()
        sentences = [f"the catalog {self._path}: {problem}" for problem in found if problem != "ok"]
        if not is_right:
            sentences.append(f"the contents of {self._path} do not match their checksum: it was edited, or is damaged")
        return sentences + [
            f"the catalog {self._path}: row {row} of {table} belongs to a row of {parent} that is missing"
            for table, row, parent, _ in strays
        ]

    def close(self) -> None:
        """Close the database; SQLite checkpoints the write-ahead log."""
        with self._lock:
            self._connection.close()
            if self._shared is not None:
                self._shared.close()
                self._shared = None

    # -- settings ------------------------------------------------------------------------------------------------

    def setting(self, key: str) -> object:
        """A value of the `store` table, None when there is none."""
        with self._transaction() as do:
            row = do.execute("SELECT value FROM store WHERE key = ?", (key,)).fetchone()
        return row[0] if row else None

    def set_setting(self, key: str, value: str | int) -> None:
        """Set a value of the `store` table."""
        with self._transaction() as do:
            do.execute("INSERT OR REPLACE INTO store VALUES (?, ?)", (key, value))

    # -- origins -------------------------------------------------------------------------------------------------

    def origins(self) -> list[OriginRow]:
        """All origins."""
        with self._transaction() as do:
            rows = do.execute(
                "SELECT id, name, path, size_bytes, modified_ns, fingerprint, fingerprint_of FROM origins ORDER BY id"
            ).fetchall()
        return [OriginRow(*row) for row in rows]

    def add_origins(self, rows: Iterable[OriginRow]) -> None:
        """Record the origins of a new store, all or none; their ids are assigned here."""
        with self._transaction() as do:
            do.executemany(
                "INSERT INTO origins (name, path, size_bytes, modified_ns) VALUES (?, ?, ?, ?)",
                [(row.name, row.path, row.size_bytes, row.modified_ns) for row in rows],
            )

    def set_fingerprint(self, origin: int, snapshot: int, fingerprint: bytes) -> None:
        """Record the origin's fingerprint, as that snapshot sees it."""
        with self._transaction() as do:
            do.execute(
                "UPDATE origins SET fingerprint = ?, fingerprint_of = ? WHERE id = ?", (fingerprint, snapshot, origin)
            )

    def record_clean_stop(self, origins: Iterable[tuple[int, bytes, int]], settings: Mapping[str, str]) -> None:
        """Record that all is durable, and for each origin (by id) its path and the time of its last write, in ns.

        `settings` are values of the `store` table.
        """
        with self._transaction() as do:
            for origin, path, modified_ns in origins:
                do.execute("UPDATE origins SET path = ?, modified_ns = ? WHERE id = ?", (path, modified_ns, origin))
            do.executemany("INSERT OR REPLACE INTO store VALUES (?, ?)", list(settings.items()))
            do.execute("INSERT OR REPLACE INTO store VALUES ('clean', 1)")

    # -- snapshots -----------------------------------------------------------------------------------------------

    def snapshots(self) -> list[SnapshotRow]:
        """All snapshots, oldest first, with their evidence."""
        with self._transaction() as do:
            rows = do.execute("SELECT id, name, created_ns, state, reason FROM snapshots ORDER BY id").fetchall()
            evidence = do.execute("SELECT snapshot, key, value FROM evidence ORDER BY rowid").fetchall()
        found = {row[0]: SnapshotRow(row[0], row[1], row[2], State(row[3]), row[4]) for row in rows}
        for snapshot, key, value in evidence:
            found[snapshot].evidence[key] = value
        return list(found.values())

    def layers(self) -> list[LayerRow]:
        """All layers, oldest first."""
        with self._transaction() as do:
            rows = do.execute("SELECT id, origin, snapshot, role, generation FROM layers ORDER BY id").fetchall()
        return [LayerRow(row[0], row[1], row[2], Role(row[3]), row[4]) for row in rows]

    def newest_layer(self) -> int:
        """The highest layer id that was ever assigned; 0 when there was none."""
        with self._transaction() as do:
            row = do.execute("SELECT seq FROM sqlite_sequence WHERE name = 'layers'").fetchone()
        return int(row[0]) if row is not None else 0

    def record_saved(self, generations: Sequence[tuple[int, int]]) -> None:
        """Record the generations, by layer, of maps that are durable. Layers that are gone are skipped."""
        with self._transaction() as do:
            do.executemany("UPDATE layers SET generation = ?2 WHERE id = ?1", generations)

    def remove_layer(self, layer: int) -> None:
        """Remove a layer whose chunks are all in other layers."""
        with self._transaction() as do:
            do.execute("DELETE FROM layers WHERE id = ?", (layer,))

    def add_snapshot(self, name: bytes, created_ns: int) -> tuple[SnapshotRow, list[LayerRow]]:
        """Record a pending snapshot with its two layers for each origin. Its epoch is open on return."""
        with self._transaction() as do:
            snapshot = do.execute(
                "INSERT INTO snapshots (name, created_ns, state) VALUES (?, ?, ?)",
                (name, created_ns, State.PENDING),
            ).lastrowid
            assert snapshot is not None
            layers = []
            for (origin,) in do.execute("SELECT id FROM origins ORDER BY id").fetchall():
                layers += [_add_layer(do, origin, snapshot, role) for role in Role]
        return SnapshotRow(snapshot, name, created_ns, State.PENDING, ""), layers

    def finish_snapshot(self, snapshot: int, evidence: Mapping[str, str]) -> None:
        """Turn a pending snapshot into a valid one, with its evidence."""
        with self._transaction() as do:
            do.execute("UPDATE snapshots SET state = ? WHERE id = ?", (State.VALID, snapshot))
            do.executemany(
                "INSERT OR REPLACE INTO evidence VALUES (?, ?, ?)",
                [(snapshot, key, without_surrogates(value)) for key, value in evidence.items()],
            )

    def rename_snapshot(self, snapshot: int, name: bytes) -> None:
        """Give a snapshot another name."""
        with self._transaction() as do:
            do.execute("UPDATE snapshots SET name = ? WHERE id = ?", (name, snapshot))

    def set_state(self, snapshot: int, state: State, reason: str) -> None:
        """Record the state of a snapshot; its layers stay as they are."""
        with self._transaction() as do:
            _set_state(do, snapshot, state, reason)

    def suspect_snapshots(self, snapshots: Sequence[int], reason: str, newest_layer: int = 0) -> list[LayerRow]:
        """Make snapshots suspect, and give the newest of them one more preserved layer for each origin.

        Old bytes that are preserved from now on go into those or into later ones, so `DOUBTED_FROM` in the evidence
        tells which layers a suspect snapshot must not trust; a value that is there already stays. New layers get ids
        higher than `newest_layer` from then on.
        """
        with self._transaction() as do:
            if not do.execute(
                "UPDATE sqlite_sequence SET seq = max(seq, ?) WHERE name = 'layers'", (newest_layer,)
            ).rowcount:
                do.execute("INSERT INTO sqlite_sequence (name, seq) VALUES ('layers', ?)", (newest_layer,))
            if not snapshots:
                return []
            origins = [row[0] for row in do.execute("SELECT id FROM origins ORDER BY id").fetchall()]
            layers = [_add_layer(do, origin, max(snapshots), Role.PRESERVED) for origin in origins]
            for snapshot in snapshots:
                _set_state(do, snapshot, State.SUSPECT, reason)
                do.execute(
                    "INSERT OR IGNORE INTO evidence VALUES (?, ?, ?)", (snapshot, DOUBTED_FROM, str(layers[0].id))
                )
        return layers

    def give_up_snapshot(self, snapshot: int, heir: int | None, reason: str) -> list[int]:
        """Make a snapshot invalid, removing its delta; its preserved layers pass to `heir`, or are removed without one.

        Returns the layers that were removed.
        """
        with self._transaction() as do:
            _set_state(do, snapshot, State.INVALID, reason)
            return _release_layers(do, snapshot, heir)

    def delete_snapshot(self, snapshot: int, heir: int | None) -> list[int]:
        """Remove a snapshot and its delta; its preserved layers pass to `heir`, or are removed without one.

        Returns the layers that were removed.
        """
        with self._transaction() as do:
            gone = _release_layers(do, snapshot, heir)
            do.execute("DELETE FROM snapshots WHERE id = ?", (snapshot,))
            return gone


def _have_blobs(do: sqlite3.Connection) -> None:
    """Turn names and paths that damage made text or numbers back into bytes; duplicates get their ids appended."""
    for table, column in (("snapshots", "name"), ("origins", "name"), ("origins", "path"), ("origins", "fingerprint")):
        odd = f"WHERE typeof({column}) != 'blob'"
        do.execute(f"UPDATE OR IGNORE {table} SET {column} = CAST({column} AS BLOB) {odd}")
        do.execute(f"UPDATE {table} SET {column} = CAST({column} || '.' || id AS BLOB) {odd}")


def _set_state(do: sqlite3.Connection, snapshot: int, state: State, reason: str) -> None:
    do.execute("UPDATE snapshots SET state = ?, reason = ? WHERE id = ?", (state, without_surrogates(reason), snapshot))


def _has_layers(directory: Directory) -> bool:
    try:
        with closing(directory.subdirectory("layers")) as layers:
            return bool(layers.names())
    except FileNotFoundError:
        return False


def _allocated_shared_memory(directory: Directory) -> File | None:
    """Leave no holes in the file that SQLite maps: on a full disk a write into one is deadly (SIGBUS, mmap(2)).

    SQLite writes one byte in 4,096, which is not enough if the blocks are smaller. The file must be closed after the
    database: closing it drops SQLite's lock on it (fcntl(2)), and the next process to open the database would truncate
    it.
    """
    try:
        file = directory.open(f"{FILE_NAME}-shm")
    except FileNotFoundError:
        return None
    with suppress(OSError):
        file.allocate(max(_SHARED_BYTES, file.size_bytes))
    return file


def _add_layer(do: sqlite3.Connection, origin: int, snapshot: int, role: Role) -> LayerRow:
    layer = do.execute(
        "INSERT INTO layers (origin, snapshot, role) VALUES (?, ?, ?)", (origin, snapshot, role)
    ).lastrowid
    assert layer is not None
    return LayerRow(layer, origin, snapshot, role)


def _release_layers(do: sqlite3.Connection, snapshot: int, heir: int | None) -> list[int]:
    if heir is not None:
        do.execute("UPDATE layers SET snapshot = ? WHERE snapshot = ? AND role = ?", (heir, snapshot, Role.PRESERVED))
    rows = do.execute("DELETE FROM layers WHERE snapshot = ? RETURNING id", (snapshot,)).fetchall()
    return [row[0] for row in rows]
