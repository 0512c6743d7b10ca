"""Stores with bytes that nobody of ours wrote: opened and read, they give what is right, or an error with a sentence.

Every class of damage that a disk, a restore from two backups or a careless hand makes: bits and bytes flipped, ranges
zeroed or random, files cut short, extended, missing, swapped, copied over another; and numbers huge, negative or zero
with the checksum over them made right again, which must be refused or answered without a crash and without memory.
"""

import random
import sqlite3
import struct
from collections import Counter
from collections.abc import Callable
from itertools import product

from xxhash import xxh3_64_digest

from cow.errors import CowError
from cow.records.journal import SECTOR_BYTES, SECTOR_PAYLOAD_BYTES
from tests.crash.disk import SOURCE_INODE, STORE_INODE, Disk, State, empty_state
from tests.crash.harness import CONTENT, ViolationError
from tests.crash.oracle import Oracle, Versions
from tests.crash.workloads import OPERATIONS, SIZE, Session, Workload, prepare

WORKLOAD: Workload = (
    *("create", "write live chunks", "write chunks of the oldest", "sync the newest"),
    *("write bytes of the newest", "rename", "checkpoint", "idle", "create", "write live chunks"),
)
HOSTILE = [0, 1, 2**31, 2**32 - 1, 2**47, 2**62, 2**63 - 1, 2**64 - 1]
CHUNK = 4096


async def make_store(*, clean: bool) -> tuple[State, Oracle]:
    """A store in use, after a clean stop or after a kill, and what it holds."""
    disk = Disk(empty_state(CONTENT))
    session = Session(disk, Oracle(Versions(CONTENT)))
    try:
        await prepare(session)
        for name in WORKLOAD:
            await OPERATIONS[name](session)
        for name in session.oracle.snapshots:
            await session.sync_snapshot(name)
        if clean:
            await session.stop()
    finally:
        await session.kill()
    return disk.settled(), session.oracle


class Corruptor:
    """Makes damaged copies of a state. `resealed` ones have checksums that are right again."""

    def __init__(self, state: State, random_: random.Random, *, clean: bool) -> None:
        self._state = state
        self._random = random_
        self._paths: dict[int, tuple[int, str]] = {}
        self._paths = {
            inode: (directory, name)
            for directory, entries in state.directories.items()
            for name, inode in entries.items()
            if inode in state.files and name not in ("lock", "reserve", "catalog.sqlite")
        }
        self._classes: dict[str, Callable[[], State]] = {
            "flip a bit": self._flip,
            "change bytes": self._change,
            "random range": self._random_range,
            "cut short": self._cut_short,
            "extend": self._extend,
            "remove": self._remove,
            "remove the journal": lambda: self._remove("journal."),
            "swap": self._swap,
            "copy over": self._copy_over,
            "swap layers": self._swap_layers,
            "zero a record": self._zero_record,
            "catalog: flip a bit": self._catalog_flip,
            "catalog: random range": self._catalog_range,
            "catalog: cut short": self._catalog_cut,
            "catalog: edited": self._catalog_edited,
            "resealed journal": self._resealed_journal,
        }
        if any(name == "map" for _, name in self._paths.values()):
            self._classes["resealed map"] = self._resealed_map
            self._classes["flip a bit of a map"] = self._flip_map
        if clean:
            # After a kill the end of the journal may be zeroes: then the disk lost what it had acknowledged, which
            # nothing on the same disk can tell.
            self._classes["zero a range"] = self._zero

    def damaged(self) -> tuple[str, State]:
        """One more damaged state, and what was done to it."""
        what = self._random.choice(list(self._classes))
        return what, self._classes[what]()

    def _file(self, kind: str = "") -> int:
        return self._random.choice([inode for inode, (_, name) in self._paths.items() if name.startswith(kind)])

    def _with(self, inode: int, content: bytes) -> State:
        return State({**self._state.files, inode: content}, self._state.directories, self._state.catalog)

    def _place(self, content: bytes) -> int:
        """Somewhere in the file, more often where it matters."""
        used = [at for at in range(0, len(content), 64) if any(content[at : at + 64])] or [0]
        return min(len(content) - 1, self._random.choice(used) + self._random.randrange(64))

    def _flip(self) -> State:
        inode = self._file()
        content = bytearray(self._state.files[inode])
        if content:
            content[self._place(content)] ^= 1 << self._random.randrange(8)
        return self._with(inode, bytes(content))

    def _flip_map(self) -> State:
        """Where the sets are: most other sets are sets too."""
        inode = self._file("map")
        content = bytearray(self._state.files[inode])
        content[self._random.randrange(48, len(content) - 8)] ^= 1 << self._random.randrange(3)
        return self._with(inode, bytes(content))

    def _change(self) -> State:
        inode = self._file()
        content = bytearray(self._state.files[inode])
        for _ in range(self._random.randint(1, 8)):
            if content:
                content[self._place(content)] = self._random.randrange(256)
        return self._with(inode, bytes(content))

    def _random_range(self) -> State:
        inode = self._file()
        content = bytearray(self._state.files[inode])
        length = self._random.choice((8, 512, CHUNK))
        at = self._place(content) // 8 * 8 if content else 0
        content[at : at + length] = self._random.randbytes(min(length, max(0, len(content) - at)))
        return self._with(inode, bytes(content))

    def _zero(self) -> State:
        inode = self._file()
        content = bytearray(self._state.files[inode])
        at = self._place(content) // 512 * 512 if content else 0
        content[at : at + CHUNK] = bytes(min(CHUNK, max(0, len(content) - at)))
        return self._with(inode, bytes(content))

    def _cut_short(self) -> State:
        inode = self._file()
        content = self._state.files[inode]
        return self._with(inode, content[: self._random.randrange(len(content) + 1)])

    def _extend(self) -> State:
        inode = self._file()
        return self._with(inode, self._state.files[inode] + self._random.randbytes(self._random.choice((1, 512, 9000))))

    def _remove(self, kind: str = "") -> State:
        directory, name = self._paths[self._file(kind)]
        entries = {key: value for key, value in self._state.directories[directory].items() if key != name}
        return State(self._state.files, {**self._state.directories, directory: entries}, self._state.catalog)

    def _swap(self) -> State:
        first, second = self._file(), self._file()
        files = {
            **self._state.files, first: self._state.files[second], second: self._state.files[first]
        }  # fmt: skip
        return State(files, self._state.directories, self._state.catalog)

    def _swap_layers(self) -> State:
        """Chunks with their checksums, in the place of another layer's."""
        layers = sorted(number for number, entries in self._state.directories.items() if "data.0000" in entries)
        first, second = (self._state.directories[number] for number in self._random.sample(layers, 2))
        files = dict(self._state.files)
        for name in ("data.0000", "sums"):
            files[first[name]], files[second[name]] = files[second[name]], files[first[name]]
        return State(files, self._state.directories, self._state.catalog)

    def _zero_record(self) -> State:
        """A sector of the journal that others follow: that it is missing shows."""
        inode = self._file("journal.")
        content = bytearray(self._state.files[inode])
        used = [at for at in range(0, len(content), SECTOR_BYTES) if any(content[at : at + SECTOR_BYTES])]
        if len(used) > 1:
            at = self._random.choice(used[:-1])
            content[at : at + SECTOR_BYTES] = bytes(SECTOR_BYTES)
        return self._with(inode, bytes(content))

    def _copy_over(self) -> State:
        return self._with(self._file(), self._state.files[self._file()])

    def _catalog(self, content: bytes | None) -> State:
        return State(self._state.files, self._state.directories, content)

    def _catalog_flip(self) -> State:
        content = bytearray(self._state.catalog or b"")
        content[self._place(content)] ^= 1 << self._random.randrange(8)
        return self._catalog(bytes(content))

    def _catalog_range(self) -> State:
        content = bytearray(self._state.catalog or b"")
        at = self._place(content)
        length = self._random.choice((4, 64, CHUNK))
        content[at : at + length] = self._random.randbytes(min(length, len(content) - at))
        return self._catalog(bytes(content))

    def _catalog_cut(self) -> State:
        content = self._state.catalog or b""
        return self._catalog(content[: self._random.randrange(len(content) // CHUNK) * CHUNK] or None)

    def _catalog_edited(self) -> State:
        """By somebody with a tool of his own: sound, and wrong."""
        edit = self._random.choice(
            [
                "UPDATE layers SET snapshot = (SELECT max(id) FROM snapshots)",
                "DELETE FROM layers WHERE id = (SELECT max(id) FROM layers WHERE role = 'preserved')",
                "UPDATE snapshots SET name = CAST('other' AS BLOB) WHERE id = (SELECT max(id) FROM snapshots)",
                "UPDATE origins SET size_bytes = -1",
                "UPDATE layers SET generation = 0",
                "UPDATE store SET value = 9223372036854775807 WHERE key = 'journal'",
                "UPDATE store SET value = 'x' WHERE key = 'uuid'",
            ]
        )
        connection = sqlite3.connect(":memory:", isolation_level=None)
        connection.deserialize(self._state.catalog or b"")
        connection.execute(edit)
        content = connection.serialize()
        connection.close()
        return self._catalog(content)

    def _resealed_journal(self) -> State:
        inode = self._file("journal.")
        content = bytearray(self._state.files[inode])
        number = int(self._paths[inode][1].split(".")[1])
        used = [at for at in range(0, len(content), SECTOR_BYTES) if any(content[at : at + SECTOR_BYTES])]
        at = self._random.choice(used)
        field = at + 8 + 4 * self._random.randrange(16)
        content[field : field + 8] = struct.pack("<Q", self._random.choice(HOSTILE))
        payload = bytes(content[at : at + SECTOR_PAYLOAD_BYTES])
        seal = xxh3_64_digest(payload, seed=(number << 32) + at // SECTOR_BYTES)
        content[at + SECTOR_PAYLOAD_BYTES : at + SECTOR_BYTES] = seal
        return self._with(inode, bytes(content))

    def _resealed_map(self) -> State:
        inode = self._file("map")
        content = bytearray(self._state.files[inode][:-8])
        at = self._random.randrange(8, len(content) - 8)
        content[at : at + 8] = struct.pack("<Q", self._random.choice(HOSTILE))
        return self._with(inode, bytes(content) + xxh3_64_digest(bytes(content)))


async def check_damaged(what: str, state: State, oracle: Oracle, tally: Counter[str]) -> None:
    """Open and read a damaged store. Raises ViolationError for a wrong byte, or an error that is not one of ours."""
    disk = Disk(state)
    session = Session(disk, oracle)
    resealed = what.startswith("resealed")
    try:
        await session.open()
    except (CowError, OSError) as error:
        if not str(error):
            raise ViolationError(f"{what}: refused without a sentence") from error
        tally["refused"] += 1
        return
    except Exception as error:
        raise ViolationError(f"{what}: {type(error).__name__}: {error}") from error
    try:
        for snapshot in session.store.snapshots:
            name = snapshot.name.decode()
            if name not in oracle.snapshots:
                raise ViolationError(f"{what}: there is a snapshot {name} that nobody took")
            await _read(session, name, oracle, what, resealed, tally)
    finally:
        await session.kill()
    if disk.content() != state.files[SOURCE_INODE]:
        raise ViolationError(f"{what}: the device was written to")
    assert state.directories[STORE_INODE]


async def _read(session: Session, name: str, oracle: Oracle, what: str, resealed: bool, tally: Counter[str]) -> None:
    expected = oracle.snapshots[name].latest
    for offset, is_cold in product(range(0, SIZE, CHUNK), (True, False)):
        session.disk.is_cold = is_cold
        try:
            found = await session.image(name).read_served(offset, CHUNK)
        except (CowError, OSError) as error:
            if not str(error):
                raise ViolationError(f"{what}: an error without a sentence") from error
            tally["errors"] += 1
            continue
        except Exception as error:
            raise ViolationError(f"{what}: {type(error).__name__}: {error}") from error
        if found != expected[offset : offset + CHUNK] and not resealed:
            state = session.store.find(name.encode())
            raise ViolationError(f"{what}: wrong bytes in {name} at offset {offset} ({state and state.row.state})")
        tally["right"] += 1


async def check_many(count: int, seed: int) -> Counter[str]:
    """Check `count` damaged stores; what became of them: stores opened or refused, chunks right or EIO."""
    random_ = random.Random(seed)
    made = [(*await make_store(clean=clean), clean) for clean in (True, False)]
    corruptors = [(Corruptor(state, random_, clean=clean), oracle) for state, oracle, clean in made]
    tally: Counter[str] = Counter()
    for number in range(count):
        corruptor, oracle = corruptors[number % 2]
        what, state = corruptor.damaged()
        tally[what] += 1
        await check_damaged(what, state, oracle, tally)
    return tally
