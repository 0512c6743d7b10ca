"""Reads through io_uring: the bytes, errors, the limits on what is under way, and that closing waits."""

import errno
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from cow.disk.io import Io
from cow.disk.limits import raise_limit
from cow.disk.ring import ENTRIES, SLOTS, Ring, Slot
from tests.support.inside import no_ring_for_a_moment

CHUNK = 4096
_NOT_OPEN = 1 << 20  #: more than any limit
CONTENT = os.urandom(1 << 20)


@pytest.fixture
def ring() -> Iterator[Ring]:
    ring = Ring()
    yield ring
    ring.close()


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    (tmp_path / "file").write_bytes(CONTENT)
    descriptor = os.open(tmp_path / "file", os.O_RDONLY)
    yield descriptor
    os.close(descriptor)


def _slot(ring: Ring, length: int = CHUNK) -> Slot:
    slot = ring.slot(length)
    assert slot is not None
    return slot


def _come(ring: Ring) -> None:
    """All that is under way."""

    async def main() -> None:
        ring.submit()
        with trio.fail_after(60):
            while ring.under_way:
                await ring.ready()
                ring.reap()

    trio.run(main)


def test_what_is_read_is_what_the_file_has(ring: Ring, file: int) -> None:
    found = {}
    slots = [_slot(ring) for _ in range(16)]
    for _ in range(20):  # around the queues more than once
        for number, slot in enumerate(slots):
            ring.begin(file, slot, 0, CHUNK, number * CHUNK, lambda result, n=number: found.update({n: result}))  # type: ignore[misc]
        _come(ring)
        assert found == dict.fromkeys(range(16), CHUNK)
        assert b"".join(slot.view[:CHUNK] for slot in slots) == CONTENT[: 16 * CHUNK]
        for slot in slots:
            slot.view[:] = bytes(len(slot.view))
        found.clear()


def test_a_read_goes_to_its_place_in_the_memory(ring: Ring, file: int) -> None:
    slot, results = _slot(ring), list[int]()
    for place in range(4):
        ring.begin(file, slot, place * 1024, 1024, (3 - place) * 1024, results.append)
    _come(ring)
    assert results == [1024] * 4
    assert slot.view[:CHUNK] == b"".join(CONTENT[at : at + 1024] for at in (3072, 2048, 1024, 0))


def test_the_end_of_a_file_and_errors_are_told(ring: Ring, file: int) -> None:
    slot, results = _slot(ring), list[int]()
    ring.begin(file, slot, 0, CHUNK, len(CONTENT) - 100, results.append)
    _come(ring)
    ring.begin(_NOT_OPEN, slot, 0, CHUNK, 0, results.append)
    _come(ring)
    assert results == [100, -errno.EBADF]


def test_what_is_under_way_is_bounded(ring: Ring, file: int) -> None:
    slot = _slot(ring)
    assert ring.has_room(ENTRIES)
    for _ in range(ENTRIES):
        ring.begin(file, slot, 0, CHUNK, 0, lambda _: None)
    assert not ring.has_room(1)
    _come(ring)
    assert ring.has_room(ENTRIES)


@pytest.mark.parametrize(("length", "count"), SLOTS)
def test_the_memory_is_bounded_and_used_again(ring: Ring, length: int, count: int) -> None:
    slots = [_slot(ring, length) for _ in range(count)]
    assert all(len(slot.view) >= length for slot in slots)
    assert ring.slot(length) is None
    ring.give_back(slots[0])
    assert ring.slot(length) is slots[0]


def test_there_is_no_memory_for_what_is_longer_than_any_request(ring: Ring) -> None:
    assert ring.slot(SLOTS[-1][0] + 1) is None


def test_closing_waits_for_what_is_under_way(file: int) -> None:
    ring, results = Ring(), list[int]()
    for number in range(8):
        ring.begin(file, _slot(ring), 0, CHUNK, number * CHUNK, results.append)
    ring.close()
    assert results == [CHUNK] * 8


def test_its_descriptor_may_be_any_number(file: int) -> None:
    """select(2) takes none from 1,024 on."""
    raise_limit(resource.RLIMIT_NOFILE)
    many = [os.dup(file) for _ in range(1100 - file)]
    ring, results = Ring(), list[int]()
    for one in many:
        os.close(one)
    assert ring.fileno > 1024
    ring.begin(file, _slot(ring), 0, CHUNK, 0, results.append)
    ring.close()
    assert results == [CHUNK]


def test_where_the_kernel_grants_none_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: Ring) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Ring, "__init__", refused)
    assert Io().reads() is None


def test_what_the_kernel_does_not_take_is_told_of_at_once_and_the_ring_goes_on(ring: Ring, file: int) -> None:
    """As io_uring_enter(2) fails where it gets no memory, for example: with a descriptor that is no ring."""
    slot, results = _slot(ring), list[int]()
    for number in range(3):
        ring.begin(file, slot, number * 1024, 1024, 0, results.append)
    with no_ring_for_a_moment(ring):
        ring.submit()
    assert results == [-errno.EOPNOTSUPP] * 3
    assert ring.under_way == 0
    ring.begin(file, slot, 0, CHUNK, CHUNK, results.append)
    _come(ring)
    assert results[3:] == [CHUNK]
    assert slot.view[:CHUNK] == CONTENT[CHUNK : 2 * CHUNK]
