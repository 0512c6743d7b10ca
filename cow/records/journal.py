"""The journal: the one place where a commit becomes durable.

A commit is one record, appended and synced. It says which chunks a layer now holds, with their checksums; the
layer's own index files (`sums`, `map`) follow lazily and are made durable by a checkpoint, after which the journal
starts afresh in a new file. Recovery replays the files in order; replaying twice gives the same result.

Every 512-byte sector carries its own checksum, and a new file is all zeroes. So after a crash each sector is valid,
or was never written, and everything else is damage: a torn append cannot be mistaken for a flipped bit, nor a flipped
bit for a torn append. The bytes are described in FORMAT.md.

This module does not know layers or snapshots. It has no lock: the caller serialises `append` and `start_file`.
"""

import re
import struct
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from itertools import chain
from typing import NamedTuple

from xxhash import xxh3_64_digest

from cow.disk.directory import Directory
from cow.disk.file import File
from cow.disk.passing import raise_if_passing, stays
from cow.errors import CowError
from cow.geometry import Run

SECTOR_BYTES = 512
SECTOR_PAYLOAD_BYTES = SECTOR_BYTES - 8
FILE_BYTES = 4 << 20
FILE_MAGIC = b"HCPFSJNL"
RECORD_MAGIC = b"HCPFSREC"
_FILE_HEADER = struct.Struct("<8sI16sQQ")  # magic, format, store uuid, number, first sequence
_RECORD_HEADER = struct.Struct("<8sQIIQQQ")  # magic, sequence, kind, runs, layer, time_ns, bytes of the record
_ZERO_SECTOR = bytes(SECTOR_BYTES)
_DAMAGED = b"damaged"
_LOGICAL_BLOCK_BYTES = 4096  #: the largest there is; an unreadable block costs no others
_PREFIX = "journal."


class Kind(IntEnum):
    """What a record says about its chunks."""

    PRESERVED = 1  # the origin's old bytes, with their checksums, are durable in the layer
    DELTA = 2  # a snapshot's own writes, with their checksums, are durable in the layer
    INTENT = 3  # chunks that the layer held are being overwritten in place: their checksums may not match
    LOST = 4  # chunks that the layer should have are lost: readers get EIO


_WITH_SUMS = {Kind.PRESERVED, Kind.DELTA}


class JournalDamagedError(CowError):
    """A sector of the journal is neither valid nor unwritten, or a committed record is missing."""


@dataclass(frozen=True)
class Record:
    """One commit: `runs` of `layer`, at `time_ns`. `sums` has 8 bytes a chunk, none for INTENT and LOST."""

    kind: Kind
    layer: int
    time_ns: int
    runs: Sequence[Run]
    sums: bytes = b""

    def encode(self, sequence: int) -> bytes:
        """The record's bytes, not yet cut into sectors."""
        body = struct.pack(f"<{2 * len(self.runs)}Q", *chain.from_iterable(self.runs)) + self.sums
        header = _RECORD_HEADER.pack(
            RECORD_MAGIC, sequence, self.kind, len(self.runs), self.layer, self.time_ns, len(body)
        )
        return header + body


def is_journal(name: str) -> bool:
    """Whether the name is that of a journal file."""
    return re.fullmatch(r"journal\.[0-9]{8,9}", name, re.ASCII) is not None


def _seal(payload: bytes, number: int, sector: int) -> bytes:
    return payload + xxh3_64_digest(payload, seed=(number << 32) + sector)


def _sectors_of(encoded_bytes: int) -> int:
    return -(-encoded_bytes // SECTOR_PAYLOAD_BYTES)


class Journal:
    """The journal files in a store's directory; appends go to the newest.

    A `Journal` is first replayed with `replay`, then writes to a file made by `start_file`: a file of an earlier
    run is never appended to.
    """

    def __init__(self, directory: Directory, store_uuid: bytes, expected: int = 0) -> None:
        """`expected`: the file with this number, or a newer one, must exist; 0 when none needs to."""
        self._directory = directory
        self._expected = expected
        self._uuid = store_uuid
        self._numbers = sorted(int(name.removeprefix(_PREFIX)) for name in directory.names() if is_journal(name))
        self._newest = self._numbers[-1] if self._numbers else 0
        self._file: File | None = None
        self._next_sector = 0
        self._sequence = 1
        self._broken: str | None = None
        self._without_header: int | None = None  #: the newest file, when its header failed: `start_file` retries it

    @property
    def numbers(self) -> list[int]:
        """The numbers of the journal files that exist, oldest first."""
        return list(self._numbers)

    @property
    def is_in_memory(self) -> bool:
        """Whether its files never wait for a disk."""
        return self._directory.is_in_memory

    @property
    def is_removed(self) -> bool:
        """Whether somebody removed the present file."""
        return self._file is not None and self._file.is_removed

    @property
    def is_broken(self) -> bool:
        """Whether an append failed since the last `start_file`, so that recovery may or may not find it."""
        return self._broken is not None

    def has_room(self, records: Sequence[Record]) -> bool:
        """Whether the present file can take the records; none can after a failed append."""
        if self._file is None or self._broken is not None:
            return False
        sectors = sum(_sectors_of(_RECORD_HEADER.size + 16 * len(record.runs) + len(record.sums)) for record in records)
        return (self._next_sector + sectors) * SECTOR_BYTES <= FILE_BYTES

    def append(self, records: Sequence[Record]) -> None:
        """Append the records and sync: all of them are durable on return.

        After an error this file takes no more: whether the failed append is on the disk is unknown. The next
        `start_file` makes it void, and the records can be appended there anew.
        """
        if self._file is None or self._broken is not None:
            raise CowError(f"the journal in {self._directory.label} is closed after an error: {self._broken}")
        sealed = bytearray()
        for number, record in enumerate(records):
            encoded = record.encode(self._sequence + number)
            for start in range(0, len(encoded), SECTOR_PAYLOAD_BYTES):
                payload = encoded[start : start + SECTOR_PAYLOAD_BYTES].ljust(SECTOR_PAYLOAD_BYTES, b"\0")
                sealed += _seal(payload, self._numbers[-1], self._next_sector + len(sealed) // SECTOR_BYTES)
        if self._next_sector * SECTOR_BYTES + len(sealed) > FILE_BYTES:
            raise CowError(f"{len(records)} records do not fit into {self._file.label}")  # nothing beyond is ever read
        try:
            self._file.pwrite(bytes(sealed), self._next_sector * SECTOR_BYTES)
            self._file.sync()
        except OSError as error:
            self._broken = f"{error.strerror} at sector {self._next_sector} of {self._file.label}"
            raise
        self._sequence += len(records)
        self._next_sector += len(sealed) // SECTOR_BYTES

    def start_file(self, records: Sequence[Record] = ()) -> list[int]:
        """Begin a new, preallocated file with `records` in it; durable on return.

        Returns the numbers of the older files; they are needed until a checkpoint covers them (`retire`). Records in
        them with the sequence number of the first one here, or a later one, are void.
        On an error the present file stays in use, unless an append failed or the new file may have got its header.
        """
        number = self._without_header or self._newest + 1
        older = [one for one in self._numbers if one != number]
        name = f"{_PREFIX}{number:08d}"
        file = self._directory.open(name, create=True)
        try:
            file.allocate(FILE_BYTES)
            file.sync()  # so that a short file that has a header was truncated by somebody
            self._directory.sync()
        except OSError:
            file.close()
            if self._without_header is None:
                with suppress(OSError):  # else it is overwritten later; recovery skips a file without a header
                    self._directory.unlink(name)
            raise
        header = _FILE_HEADER.pack(FILE_MAGIC, 1, self._uuid, number, self._sequence)
        try:
            file.pwrite(_seal(header.ljust(SECTOR_PAYLOAD_BYTES, b"\0"), number, 0), 0)
            file.sync()
        except OSError as error:
            file.close()
            self._add(number)
            self._without_header = number
            self._broken = f"{error.strerror} in the header of {name}"  # if it is on the disk, it ends the older files
            raise
        self.close()
        self._file, self._next_sector, self._broken, self._without_header = file, 1, None, None
        self._add(number)
        if records:
            self.append(records)
        return older

    def _add(self, number: int) -> None:
        if number != self._newest:
            self._numbers.append(number)
            self._newest = number

    def retire(self, numbers: Sequence[int]) -> None:
        """Remove older files after a checkpoint; durable on return."""
        for number in sorted(numbers):
            self._directory.unlink(f"{_PREFIX}{number:08d}")
            self._numbers.remove(number)
            self._directory.sync()  # one by one: a gap between files that a crash leaves would look like damage

    def close(self) -> None:
        """Close the present file. All its records are durable already."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def replay(self) -> Iterator[Record]:
        """Yield every durable record of all files, oldest first. Called once, before the first `start_file`.

        Raises JournalDamagedError where a record that was committed cannot be read.
        """
        self._sequence = yield from self._all_records()

    def records(self) -> Iterator[Record]:
        """Yield the records once more. No append may be in flight. Raises JournalDamagedError as `replay` does."""
        yield from self._all_records()

    def _all_records(self) -> Generator[Record, None, int]:
        """Yield the records, and return the number of the next one."""
        sequence = 1
        waiting: _Content | None = None  # the header of the next file tells how far a file is valid
        for number in self._numbers:
            content = self._read_file(number)
            if content is None:
                continue
            if waiting is not None:
                sequence = yield from _records_of(waiting, content.sequence)
                if sequence != content.sequence:
                    raise JournalDamagedError(
                        f"{content.label} begins with record {content.sequence}, and {sequence} is missing"
                    )
            waiting = content
        if waiting is not None:
            sequence = yield from _records_of(waiting, None)
        found = 0 if waiting is None else waiting.number
        if found < self._expected:
            raise JournalDamagedError(
                f"journal file {self._expected} in {self._directory.label}, or a newer one, is missing or empty"
            )
        return sequence

    def _read_file(self, number: int) -> "_Content | None":
        """A file's sectors and its first record's number; None after a crash while it was created."""
        file = self._directory.open(f"{_PREFIX}{number:08d}")
        try:
            content = _read_what_can_be(file)
        finally:
            file.close()
        sectors = [_open_sector(content, number, sector) for sector in range(len(content) // SECTOR_BYTES)]
        if sectors and sectors[0] is _DAMAGED:
            raise _damaged_sector(file.label, 0)
        if not sectors or not sectors[0]:
            if any(one is not None for one in sectors):
                raise JournalDamagedError(f"{file.label} has no header; its records cannot be trusted")
            return None  # nothing was ever committed to it
        magic, format_number, uuid, found_number, sequence = _FILE_HEADER.unpack_from(sectors[0])
        if (magic, format_number, uuid, found_number) != (FILE_MAGIC, 1, self._uuid, number):
            raise JournalDamagedError(f"{file.label} belongs to another store or place")
        if len(content) < FILE_BYTES:
            raise JournalDamagedError(f"{file.label} was cut short, to {len(content)} bytes")
        return _Content(file.label, sectors, sequence, number)


class _Content(NamedTuple):
    """A journal file with a header: what its sectors say, and its first record's number.

    A sector is None when it was never written, and `_DAMAGED` when it does not match its checksum.
    """

    label: str
    sectors: list[bytes | None]
    sequence: int
    number: int


def _records_of(content: _Content, limit: int | None) -> Generator[Record, None, int]:
    """Yield the records of a file with numbers below `limit`, and return the number after the last."""
    sectors, sequence = content.sectors, content.sequence
    at = 1
    kinds: set[int] = set()
    while at < len(sectors) and sequence != limit:
        taken = _read_record(content, at, sequence)
        if taken is None:
            break
        record, used = taken
        kinds.add(record.kind)
        yield record
        sequence += 1
        at += used
    # Each record is appended by itself (`Commits`) and synced, so only the last can be torn: a later one shows that one
    # went missing. The sectors from `limit` on are of an append that failed, and may be anything. The INTENTs that a
    # file begins with are one append of several records; if there is nothing else, it was the last.
    missing = False
    for sector in range(at, len(sectors)) if sequence != limit else ():
        if sectors[sector] is _DAMAGED:
            raise _damaged_sector(content.label, sector)
        header = _record_header(sectors[sector])
        if header is not None and header[1] > sequence:
            missing = True
            kinds.add(header[2])
    if missing and kinds != {Kind.INTENT}:
        raise JournalDamagedError(f"{content.label}: record {sequence} at sector {at} is missing")
    return sequence


def _read_what_can_be(file: File) -> bytes:
    """A journal file's content, with invalid bytes for blocks that cannot be read, which may not be needed.

    Raises MayPassError, and OSError when it is not about a sector.
    """
    what = f"{file.label} cannot be read"
    try:
        return file.pread(FILE_BYTES, 0)
    except OSError as error:
        raise_if_passing(error, what)
        size = min(FILE_BYTES, file.size_bytes)
    content = bytearray()
    for offset in range(0, size, _LOGICAL_BLOCK_BYTES):
        length = min(_LOGICAL_BLOCK_BYTES, size - offset)
        try:
            content += stays(partial(file.pread, length, offset), what)
        except OSError:
            content += b"\xff" * length
    return bytes(content)


def _open_sector(content: bytes, number: int, sector: int) -> bytes | None:
    """The sector's payload, None when it was never written, or `_DAMAGED`."""
    raw = content[sector * SECTOR_BYTES : (sector + 1) * SECTOR_BYTES]
    if raw == _ZERO_SECTOR:
        return None
    payload = raw[:SECTOR_PAYLOAD_BYTES]
    return payload if _seal(payload, number, sector) == raw else _DAMAGED


def _damaged_sector(label: str, sector: int) -> JournalDamagedError:
    return JournalDamagedError(f"{label}: sector {sector} cannot be read, or does not match its checksum")


def _record_header(payload: bytes | None) -> tuple[bytes, int, int, int, int, int, int] | None:
    if payload is None or not payload.startswith(RECORD_MAGIC):
        return None
    fields: tuple[bytes, int, int, int, int, int, int] = _RECORD_HEADER.unpack_from(payload)
    return fields


def _read_record(content: _Content, at: int, sequence: int) -> tuple[Record, int] | None:
    """The record that starts at sector `at` and the sectors it takes; None when it is not there in full."""
    sectors = content.sectors
    if sectors[at] is _DAMAGED:
        raise _damaged_sector(content.label, at)
    header = _record_header(sectors[at])
    if header is None or header[1] != sequence:
        return None
    _, _, kind, run_count, layer, time_ns, body_bytes = header
    used = _sectors_of(_RECORD_HEADER.size + body_bytes)
    payloads = sectors[at : at + used]
    if _DAMAGED in payloads:
        raise _damaged_sector(content.label, at + payloads.index(_DAMAGED))
    if len(payloads) < used or None in payloads:
        return None
    body = b"".join(payload for payload in payloads if payload is not None)[_RECORD_HEADER.size :][:body_bytes]
    if kind not in set(Kind) or 16 * run_count > len(body):
        raise JournalDamagedError(f"record {sequence} makes no sense (kind {kind}, {run_count} runs)")
    numbers = struct.unpack_from(f"<{2 * run_count}Q", body)
    runs = [Run(first, count) for first, count in zip(numbers[::2], numbers[1::2], strict=True)]
    sums = body[16 * run_count :]
    if len(sums) != (8 * sum(run.chunks for run in runs) if kind in _WITH_SUMS else 0):
        raise JournalDamagedError(f"record {sequence} has {len(sums)} bytes of checksums, which do not fit its runs")
    return Record(Kind(kind), layer, time_ns, runs, sums), used
