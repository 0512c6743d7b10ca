"""The journal: what was committed is found again, what was torn is not, and damage is told from both."""

import errno
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from cow.disk.directory import Directory
from cow.disk.io import Io
from cow.errors import CowError
from cow.geometry import Run
from cow.records.journal import (
    FILE_BYTES,
    SECTOR_BYTES,
    SECTOR_PAYLOAD_BYTES,
    Journal,
    JournalDamagedError,
    Kind,
    Record,
    _seal,
)
from tests.support.inside import appending_to, broken

UUID = bytes(range(16))


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Directory]:
    directory = Directory.open_path(str(tmp_path))
    yield directory
    directory.close()


def _record(layer: int, chunks: int = 1) -> Record:
    return Record(Kind.PRESERVED, layer, 1000 + layer, [Run(7, chunks), Run(1 << 40, 1)], bytes(8 * (chunks + 1)))


def _write(directory: Directory, *records: Record) -> Path:
    journal = Journal(directory, UUID)
    journal.start_file()
    for record in records:
        journal.append([record])
    journal.close()
    return Path(directory.label, f"journal.{journal.numbers[-1]:08d}")


def _replay(directory: Directory) -> list[Record]:
    return list(Journal(directory, UUID).replay())


def _change(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def _flip(path: Path, offset: int) -> None:
    _change(path, offset, bytes([path.read_bytes()[offset] ^ 0x10]))


def test_replays_what_was_appended(directory: Directory) -> None:
    records = [_record(1), _record(2, 500), Record(Kind.INTENT, 3, 5, [Run(0, 9)])]
    _write(directory, *records)
    assert _replay(directory) == records


def test_replays_several_files_in_order(directory: Directory) -> None:
    journal = Journal(directory, UUID)
    assert journal.start_file() == []
    journal.append([_record(1)])
    assert journal.start_file([_record(2)]) == [1]
    journal.append([_record(3)])
    journal.close()
    assert [record.layer for record in _replay(directory)] == [1, 2, 3]


def test_goes_on_after_files_were_retired(directory: Directory) -> None:
    journal = Journal(directory, UUID)
    journal.start_file()
    journal.append([_record(1)])
    journal.retire(journal.start_file())
    journal.append([_record(2)])
    journal.close()
    assert [record.layer for record in _replay(directory)] == [2]


@pytest.mark.parametrize("sectors_written", range(9))
def test_a_torn_last_record_is_not_there(directory: Directory, sectors_written: int) -> None:
    """Whatever subset of its sectors reached the disk; here: all but one."""
    path = _write(directory, _record(1), _record(2, 500))
    _change(path, (2 + sectors_written) * SECTOR_BYTES, bytes(SECTOR_BYTES))
    assert _replay(directory) == [_record(1)]


@pytest.mark.parametrize("place", [0, 40, 503, 504, 511])
@pytest.mark.parametrize("sector", [0, 1, 2, 5])
def test_i4_a_flipped_bit_is_damage(directory: Directory, sector: int, place: int) -> None:
    path = _write(directory, _record(1), _record(2, 500))
    _flip(path, sector * SECTOR_BYTES + place)
    with pytest.raises(JournalDamagedError, match=f"sector {sector}"):
        _replay(directory)


def test_i4_a_flipped_bit_in_unwritten_space_is_damage(directory: Directory) -> None:
    path = _write(directory, _record(1))
    _flip(path, FILE_BYTES - 100)
    with pytest.raises(JournalDamagedError):
        _replay(directory)


def test_i4_a_lost_committed_record_is_damage(directory: Directory) -> None:
    path = _write(directory, _record(1), _record(2), _record(3))
    _change(path, 2 * SECTOR_BYTES, bytes(SECTOR_BYTES))
    with pytest.raises(JournalDamagedError, match="record 2 at sector 2 is missing"):
        _replay(directory)


def test_i4_a_lost_file_is_damage(directory: Directory) -> None:
    journal = Journal(directory, UUID)
    for layer in (1, 2, 3):
        journal.start_file([_record(layer)])
    journal.close()
    directory.unlink("journal.00000002")
    with pytest.raises(JournalDamagedError, match="2 is missing"):
        _replay(directory)


def test_i4_a_file_of_another_store_is_damage(directory: Directory) -> None:
    _write(directory, _record(1))
    with pytest.raises(JournalDamagedError, match="another store"):
        list(Journal(directory, bytes(16)).replay())


def test_a_file_whose_making_was_interrupted_is_empty(directory: Directory) -> None:
    _write(directory, _record(1))
    Path(directory.label, "journal.00000002").write_bytes(bytes(1 << 16))
    assert _replay(directory) == [_record(1)]


def test_knows_when_a_record_needs_a_new_file(directory: Directory) -> None:
    journal = Journal(directory, UUID)
    journal.start_file()
    large = _record(1, 200_000)
    appended = 0
    while journal.has_room([large]):
        journal.append([large])
        appended += 1
    journal.close()
    assert appended == 2
    assert len(_replay(directory)) == 2


def test_after_a_failed_append_a_new_file_makes_it_void(directory: Directory) -> None:
    """Whether the failed record is on the disk is unknown, so it counts neither way, and its number is used again."""
    journal = Journal(directory, UUID)
    journal.start_file()
    journal.append([_record(1)])
    with (
        open("/dev/full", "r+b", buffering=0) as full,  # takes no byte
        appending_to(journal, full.fileno()),
        pytest.raises(OSError, match="No space left"),
    ):
        journal.append([_record(2)])
    assert not journal.has_room([_record(3)])
    with pytest.raises(CowError, match="closed after an error"):
        journal.append([_record(3)])

    other = Journal(directory, UUID)  # as if the failed append had reached the disk after all
    encoded = _sealed_record(_record(2), sequence=2, number=1, sector=2)
    path = Path(directory.label, "journal.00000001")
    with path.open("r+b") as file:
        file.seek(2 * SECTOR_BYTES)
        file.write(encoded)
    assert list(other.replay()) == [_record(1), _record(2)]
    assert journal.start_file() == [1]
    journal.append([_record(3)])
    journal.close()
    assert _replay(directory) == [_record(1), _record(3)]


def test_what_a_failed_append_left_may_be_anything(directory: Directory) -> None:
    """A newer file makes it void; what came before it still has to be right."""
    journal = Journal(directory, UUID)
    journal.start_file()
    journal.append([_record(1)])
    broken(journal)
    journal.start_file()
    journal.append([_record(2)])
    journal.close()
    first = Path(directory.label, "journal.00000001")
    _change(first, 2 * SECTOR_BYTES, b"torn" * 50)
    assert _replay(directory) == [_record(1), _record(2)]
    _change(first, SECTOR_BYTES, b"torn" * 50)
    with pytest.raises(JournalDamagedError, match="sector 1"):
        _replay(directory)


@pytest.mark.parametrize(("number", "offset", "counts"), [(1, 1 << 20, False), (1, 5 * 512, True), (2, 1 << 20, True)])
def test_i4_a_sector_that_cannot_be_read_is_damage_where_it_counts(
    tmp_path: Path, number: int, offset: int, counts: bool
) -> None:
    class Unreadable(Io):
        def pread(self, fd: int, length: int, start: int) -> bytes:
            if start <= offset < start + length and os.readlink(f"/proc/self/fd/{fd}").endswith(f"{number}"):
                raise OSError(errno.EIO, "unreadable")
            return os.pread(fd, length, start)

    records = [_record(one) for one in range(1, 16)]
    with closing(Directory.open_path(str(tmp_path), Unreadable())) as directory:
        journal = Journal(directory, UUID)
        journal.start_file()
        journal.append(records[:14])
        journal.start_file()
        journal.append(records[14:])
        journal.close()
        if counts:
            with pytest.raises(JournalDamagedError, match="cannot be read"):
                _replay(directory)
        else:
            assert _replay(directory) == records


def _sealed_record(record: Record, *, sequence: int, number: int, sector: int) -> bytes:
    return _seal(record.encode(sequence).ljust(SECTOR_PAYLOAD_BYTES, b"\0"), number, sector)


def test_a_file_that_could_not_be_finished_is_passed_over(directory: Directory) -> None:
    """The header comes last: before it nothing counts, and the file before goes on."""
    journal = Journal(directory, UUID)
    journal.start_file()
    journal.append([_record(1)])
    Path(directory.label, "journal.00000002").write_bytes(bytes(1 << 16))
    journal.append([_record(2)])
    assert journal.start_file() == [1]
    journal.append([_record(3)])
    journal.close()
    assert _replay(directory) == [_record(1), _record(2), _record(3)]


def test_of_several_intents_that_a_new_file_begins_with_a_crash_may_leave_any(directory: Directory) -> None:
    """They are one append, the only one of several records: a gap among them is no damage."""
    intents = [Record(Kind.INTENT, layer, 1000, [Run(7, 1)]) for layer in range(3)]
    for missing in range(3):
        journal = Journal(directory, UUID)
        list(journal.replay())
        journal.start_file(intents)
        journal.close()
        path = Path(directory.label, f"journal.{journal.numbers[-1]:08d}")
        _change(path, (1 + missing) * SECTOR_BYTES, bytes(SECTOR_BYTES))
        assert _replay(directory) == intents[:missing]
        journal = Journal(directory, UUID)
        list(journal.replay())
        journal.start_file()
        journal.append([_record(9)])
        assert list(Journal(directory, UUID).replay()) == [*intents[:missing], _record(9)]
        journal.retire(journal.numbers)
        journal.close()


def test_a_gap_among_intents_that_something_was_committed_after_is_damage(directory: Directory) -> None:
    journal = Journal(directory, UUID)
    journal.start_file([Record(Kind.INTENT, layer, 1000, [Run(7, 1)]) for layer in range(3)])
    journal.append([_record(9)])
    journal.close()
    _change(Path(directory.label, "journal.00000001"), 2 * SECTOR_BYTES, bytes(SECTOR_BYTES))
    with pytest.raises(JournalDamagedError, match="record 2 at sector 2 is missing"):
        _replay(directory)
