"""What waits in memory: newer bytes are over older ones, nothing beside them is covered, and no memory is lost."""

import random

import pytest

from cow.buffer.contents import EXTENT_CHUNKS, Contents, Part, contents_of, overlaid
from cow.buffer.memory import Memory
from cow.geometry import CHUNK_BYTES, Run, covering

CHUNKS = 6 * EXTENT_CHUNKS
SIZE = CHUNKS * CHUNK_BYTES
EXTENT_BYTES = EXTENT_CHUNKS * CHUNK_BYTES


class _Lender:
    """Gives memory for writes, and uses what came back for something else at once."""

    def __init__(self) -> None:
        self.lent = 0

    def memory(self, content: bytes) -> Memory:
        self.lent += 1
        return Memory(memoryview(bytearray(content)), self._spoil)

    def _spoil(self, memory: Memory) -> None:
        self.lent -= 1
        memory.view[:] = b"\xff" * len(memory.view)


def _extent(random_: random.Random) -> tuple[int, bytes]:
    length = random_.choice([1, 512, CHUNK_BYTES, 3 * CHUNK_BYTES, EXTENT_BYTES, 2 * EXTENT_BYTES, 2 * EXTENT_BYTES])
    length += random_.choice([0, 0, 0, 700])
    offset = random_.randrange(SIZE - length)
    return offset - offset % random_.choice([1, 512, CHUNK_BYTES, CHUNK_BYTES, CHUNK_BYTES]), random_.randbytes(length)


def _put(contents: Contents, lender: _Lender, how: str, offset: int, data: bytes) -> None:
    if how == "kept":
        memory = lender.memory(data)
        memory.keep()
        contents.put(offset, memory.view, memory)
        memory.release()
    elif how == "copied":
        view = memoryview(bytearray(data))
        contents.put(offset, view)
        view[:] = b"\xee" * len(data)
    else:
        contents.put(offset, data)


@pytest.mark.parametrize("seed", range(12))
def test_what_was_put_in_is_there_byte_for_byte_whatever_it_overlaps(seed: int) -> None:
    random_, lender, contents = random.Random(seed), _Lender(), Contents()
    beneath, first = random_.randbytes(SIZE), random_.randbytes(EXTENT_BYTES)
    _put(contents, lender, "kept", 0, first)
    expected, written = bytearray(first + beneath[EXTENT_BYTES:]), set(range(EXTENT_CHUNKS))
    for _ in range(60):
        offset, data = _extent(random_)
        _put(contents, lender, random_.choice(["kept", "copied", "bytes"]), offset, data)
        expected[offset : offset + len(data)] = data
        run = covering(offset, len(data))
        written |= set(range(run.first, run.end))
        assert overlaid(beneath, 0, contents.pieces(Run(0, CHUNKS))) == expected
        start = random_.randrange(SIZE - 1)
        length = random_.randint(1, SIZE - start)
        run = covering(start, length)
        seen = overlaid(beneath[start : start + length], start, contents.pieces(run))
        assert seen == expected[start : start + length]
        assert set(contents.chunks()) == written
        assert len(contents) == len(written) <= contents.weight
        assert contents.holds(run) == any(contents.has(chunk) for chunk in range(run.first, run.end))
        assert all(contents.has(chunk) == (chunk in written) for chunk in range(CHUNKS))
        assert sum(len(extent.content) for extent in contents.extents) + len(contents.single) * CHUNK_BYTES == (
            len(written) * CHUNK_BYTES
        ), "no chunk is there twice"
    assert lender.lent
    contents.release()
    assert not lender.lent


@pytest.mark.parametrize("seed", range(4))
def test_the_rows_and_the_parts_are_all_there_is_to_write(seed: int) -> None:
    random_, contents = random.Random(seed), Contents()
    beneath = random_.randbytes(SIZE)
    for _ in range(12):
        contents.put(*_extent(random_))
    expected = overlaid(beneath, 0, contents.pieces(Run(0, CHUNKS)))
    filled = {
        chunk: overlaid(beneath[chunk * CHUNK_BYTES :][:CHUNK_BYTES], 0, part.pieces())
        for chunk, part in contents.parts().items()
    }
    rows = contents.rows(filled)
    assert [run for run, _ in rows] == sorted(run for run, _ in rows)
    found = bytearray(beneath)
    for run, content in rows:
        found[run.offset : run.offset + run.length] = b"".join(content) if isinstance(content, list) else content
    assert found == expected
    assert {chunk for run, _ in rows for chunk in range(run.first, run.end)} == set(contents.chunks())
    assert {chunk for run, _ in contents.rows() for chunk in range(run.first, run.end)} == (
        set(contents.chunks()) - set(filled)
    )


def test_what_was_read_from_it_stays_when_it_is_written_over_or_its_memory_is_given_back() -> None:
    lender, contents = _Lender(), Contents()
    _put(contents, lender, "kept", 0, b"a" * EXTENT_BYTES)
    pieces = list(contents.pieces(Run(0, CHUNKS)))
    contents.put(100, b"b" * 5000)
    contents.release()
    assert pieces == [(0, b"a" * EXTENT_BYTES)]


def test_a_long_write_is_one_extent_and_is_written_over_where_it_is() -> None:
    lender, contents = _Lender(), Contents()
    _put(contents, lender, "kept", 0, bytes(2 * EXTENT_BYTES))
    contents.put(3 * CHUNK_BYTES, b"x" * CHUNK_BYTES)
    contents.put(5 * CHUNK_BYTES + 1, b"y")
    contents.put(0, b"z" * EXTENT_BYTES)
    assert [extent.run for extent in contents.extents] == [Run(0, 2 * EXTENT_CHUNKS)]
    assert not contents.single
    assert contents.weight == 2 * EXTENT_CHUNKS


def test_i6_memory_counts_whole_while_a_part_of_it_is_kept() -> None:
    lender, contents = _Lender(), Contents()
    memory = lender.memory(bytes(4 * EXTENT_BYTES))
    contents.put(0, memory.view[:EXTENT_BYTES], memory)
    assert len(contents) == EXTENT_CHUNKS
    assert contents.weight == 4 * EXTENT_CHUNKS


def test_a_short_write_keeps_no_memory() -> None:
    lender, contents = _Lender(), Contents()
    _put(contents, lender, "kept", 0, b"a" * (EXTENT_BYTES - CHUNK_BYTES))
    assert lender.lent == 0
    assert overlaid(bytes(CHUNK_BYTES), 0, contents.pieces(Run(0, 1))) == b"a" * CHUNK_BYTES


def test_what_was_written_before_comes_beneath_what_there_is() -> None:
    newer, older, lender = Contents(), Contents(), _Lender()
    _put(older, lender, "kept", 0, b"o" * 2 * EXTENT_BYTES)
    older.put(2 * EXTENT_BYTES + 10, b"o" * 100)
    newer.put(100, b"n" * 50)
    newer.put(EXTENT_BYTES, b"n" * EXTENT_BYTES)
    newer.put(2 * EXTENT_BYTES + 50, b"n" * 100)
    beneath = overlaid(bytes(2 * EXTENT_BYTES + CHUNK_BYTES), 0, older.pieces(Run(0, CHUNKS)))
    expected = overlaid(beneath, 0, newer.pieces(Run(0, CHUNKS)))
    newer.put_beneath(older)
    older.release()
    assert lender.lent == 0
    assert overlaid(bytes(2 * EXTENT_BYTES + CHUNK_BYTES), 0, newer.pieces(Run(0, CHUNKS))) == expected


def test_some_chunks_alone_are_copies() -> None:
    lender, contents = _Lender(), Contents()
    _put(contents, lender, "kept", 0, b"a" * EXTENT_BYTES)
    contents.put(EXTENT_BYTES + 7, b"b")
    some = contents.only([2, EXTENT_CHUNKS])
    contents.release()
    assert set(some.chunks()) == {2, EXTENT_CHUNKS}
    assert some.single[2] == b"a" * CHUNK_BYTES
    assert isinstance(some.single[EXTENT_CHUNKS], Part)


def test_one_write_as_contents_copies_no_extent() -> None:
    data = bytearray(EXTENT_BYTES)
    contents = contents_of(0, data)
    data[:1] = b"x"
    assert contents.extents[0].content[0] == ord("x")
