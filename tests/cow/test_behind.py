"""Write-behind: what waits in memory reads as if it were on the device, gets there in order, is never forgotten."""

import errno
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from cow.buffer.behind import MOST_CHUNKS, Behind, Unwritten, write_out
from cow.buffer.contents import Contents, overlaid
from cow.buffer.memory import Memory
from cow.disk.source import OriginDevice
from cow.events import Event
from cow.geometry import CHUNK_BYTES
from cow.offload import MOST_CHUNKS_HERE

SIZE = 64 * CHUNK_BYTES + 1536


def _not_heard(event: Event) -> None:
    pytest.fail(f"told without a reason: {event}")


async def _put(behind: Behind, offset: int, data: bytes) -> None:
    await behind.room()
    behind.put(offset, data)


class _Held:
    """Takes its time before it writes to the device: the buffer stays as it is until `let_go`."""

    def __init__(self, device: OriginDevice) -> None:
        self._device = device
        self.let_go = trio.Event()
        self.asked: list[set[int]] = []

    async def take(self, contents: Contents) -> Unwritten:
        self.asked.append(set(contents.chunks()))
        await self.let_go.wait()
        return write_out(self._device, contents)


@pytest.fixture
def device(tmp_path: Path) -> Iterator[OriginDevice]:
    (tmp_path / "disk.img").write_bytes(os.urandom(SIZE))
    device = OriginDevice.open_path(str(tmp_path / "disk.img"))
    yield device
    device.close()


@pytest.mark.parametrize("seed", range(8))
def test_what_is_buffered_is_read_back_byte_for_byte_and_reaches_the_device(device: OriginDevice, seed: int) -> None:
    random_ = random.Random(seed)

    async def main() -> None:
        held = _Held(device)
        behind = Behind("it", held.take, _not_heard)
        content = bytearray(device.pread(SIZE, 0))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(behind.run)
            for number in range(120):
                offset = random_.randrange(SIZE)
                data = random_.randbytes(min(random_.choice([1, 512, 4096, 5000, 20000, 100_000]), SIZE - offset))
                await _put(behind, offset, data)
                content[offset : offset + len(data)] = data
                start = random_.randrange(SIZE)
                length = random_.randint(1, SIZE - start)
                read = overlaid(device.pread(length, start), start, behind.pieces(start, length))
                assert read == content[start : start + length]
                if number == 60:  # from here on there is a part on its way, and a part that gathers
                    await trio.testing.wait_all_tasks_blocked(0.1)
            assert len(held.asked) == 1
            held.let_go.set()
            await behind.drain()
            assert behind.chunks == 0
            assert device.pread(SIZE, 0) == content
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_nothing_reaches_the_device_before_it_is_taken(device: OriginDevice) -> None:
    async def main() -> None:
        held = _Held(device)
        behind = Behind("it", held.take, _not_heard)
        before = device.pread(SIZE, 0)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(behind.run)
            await _put(behind, 100, b"x" * CHUNK_BYTES)
            nursery.start_soon(behind.drain)
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert held.asked == [{0, 1}]
            assert device.pread(SIZE, 0) == before
            held.let_go.set()
            await behind.drain()
            assert device.pread(SIZE, 0) != before
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_a_drain_of_what_is_on_its_way_takes_nothing_after_it(device: OriginDevice) -> None:
    async def main() -> None:
        held = _Held(device)
        behind = Behind("it", held.take, _not_heard)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(behind.run)
            await _put(behind, 0, b"x" * CHUNK_BYTES)
            await trio.testing.wait_all_tasks_blocked(0.1)
            nursery.start_soon(behind.drain)
            await trio.testing.wait_all_tasks_blocked(0.1)
            held.let_go.set()
            await trio.testing.wait_all_tasks_blocked(0.1)
            assert held.asked == [{0}]
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_a_sync_takes_what_gathers_there_itself(device: OriginDevice) -> None:
    async def take(contents: Contents) -> Unwritten:
        return write_out(device, contents)

    async def main() -> None:
        behind = Behind("it", take, _not_heard)
        await _put(behind, 100, b"x" * CHUNK_BYTES)
        await behind.flush()  # nobody runs it
        assert behind.chunks == 0
        assert device.pread(CHUNK_BYTES, 100) == b"x" * CHUNK_BYTES

    trio.run(main)


def test_a_sync_waits_for_what_somebody_else_takes_there(device: OriginDevice) -> None:
    async def main() -> None:
        held = _Held(device)
        behind = Behind("it", held.take, _not_heard)
        done = list[int]()

        async def sync(number: int) -> None:
            await behind.flush()
            done.append(number)

        async with trio.open_nursery() as nursery:
            await _put(behind, 0, b"x" * CHUNK_BYTES)
            nursery.start_soon(sync, 1)
            await trio.testing.wait_all_tasks_blocked()
            await _put(behind, CHUNK_BYTES, b"y" * CHUNK_BYTES)
            nursery.start_soon(sync, 2)
            nursery.start_soon(sync, 3)
            await trio.testing.wait_all_tasks_blocked()
            assert held.asked == [{0}]
            assert done == []
            held.let_go.set()
        assert held.asked == [{0}, {1}], "each once"
        assert sorted(done) == [1, 2, 3]
        assert device.pread(2 * CHUNK_BYTES, 0) == b"x" * CHUNK_BYTES + b"y" * CHUNK_BYTES

    trio.run(main)


def test_i6_in_memory_whoever_finds_the_buffer_full_empties_it(device: OriginDevice) -> None:
    taken = list[int]()

    async def take(contents: Contents) -> Unwritten:
        taken.append(len(contents))
        return write_out(device, contents)

    async def main() -> None:
        behind = Behind("it", take, _not_heard, is_in_memory=True)
        for chunk in range(3 * MOST_CHUNKS_HERE):
            await _put(behind, chunk * CHUNK_BYTES, bytes(CHUNK_BYTES))
        assert taken == [MOST_CHUNKS_HERE] * 2
        assert behind.chunks == MOST_CHUNKS_HERE

    trio.run(main)


def test_i6_a_full_buffer_keeps_writers_waiting(device: OriginDevice) -> None:
    async def main() -> None:
        held = _Held(device)
        behind = Behind("it", held.take, _not_heard)
        written, more = 0, trio.Event()

        async def write() -> None:
            nonlocal written
            while True:
                await _put(behind, written * CHUNK_BYTES, bytes(CHUNK_BYTES))
                written += 1
                if written > 2 * MOST_CHUNKS:
                    more.set()
                await trio.lowlevel.checkpoint()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(behind.run)
            nursery.start_soon(write)
            with trio.fail_after(60):
                await trio.testing.wait_all_tasks_blocked(0.5)
            assert written <= 2 * MOST_CHUNKS
            held.let_go.set()
            with trio.fail_after(60):
                await more.wait()
            nursery.cancel_scope.cancel()

    trio.run(main)


class _Fails:
    """Makes writes to some chunks of a device fail."""

    def __init__(self, device: OriginDevice) -> None:
        self.chunks: set[int] = set()
        self._pwrite = device.pwrite
        device.pwrite, device.pwritev = self.pwrite, self.pwritev

    def pwrite(self, data: bytes, offset: int) -> None:
        if self.chunks & set(range(offset // CHUNK_BYTES, (offset + len(data) - 1) // CHUNK_BYTES + 1)):
            raise OSError(errno.EIO, "Input/output error")
        self._pwrite(data, offset)

    def pwritev(self, parts: list[bytes | memoryview], offset: int) -> None:
        self.pwrite(b"".join(parts), offset)


def test_i3_what_the_device_did_not_take_fails_each_sync_until_it_does(device: OriginDevice) -> None:
    fails, told = _Fails(device), list[Event]()

    async def take(contents: Contents) -> Unwritten:
        return write_out(device, contents)

    async def main() -> None:
        behind = Behind("it", take, told.append)
        content = bytearray(device.pread(SIZE, 0))

        async def write(offset: int, data: bytes) -> None:
            await _put(behind, offset, data)
            content[offset : offset + len(data)] = data

        def read() -> bytes:
            return overlaid(device.pread(SIZE, 0), 0, behind.pieces(0, SIZE))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(behind.run)
            fails.chunks = {3, 5}
            await write(CHUNK_BYTES, b"a" * 6 * CHUNK_BYTES)
            await write(9 * CHUNK_BYTES + 7, b"b" * 90)
            for _ in range(2):
                with pytest.raises(OSError, match="still in memory") as raised:
                    await behind.drain()
                assert raised.value.errno == errno.EIO
                assert read() == content
            assert behind.chunks == 2, "the rest of it is where it belongs"
            assert len(told) == 1
            await write(3 * CHUNK_BYTES + 100, b"c" * 50)  # over what waits
            with pytest.raises(OSError, match="still in memory"):
                await behind.drain()
            assert read() == content
            fails.chunks = set()
            await behind.drain()
            assert device.pread(SIZE, 0) == content
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_i8_one_chunk_that_is_not_taken_does_not_fill_the_buffer(device: OriginDevice) -> None:
    """Long writes go on, over and beside a bad sector; only a sync tells of it."""
    fails, told = _Fails(device), list[Event]()
    fails.chunks = {3}
    length = 64

    async def take(contents: Contents) -> Unwritten:
        return write_out(device, contents)

    async def main() -> None:
        behind = Behind("it", take, told.append)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(behind.run)
            for _ in range(3 * MOST_CHUNKS // length):
                await _put(behind, 0, bytes(length * CHUNK_BYTES))
            with pytest.raises(OSError, match="still in memory"):
                await behind.drain()
            assert behind.chunks == 1
            fails.chunks = set()
            await behind.drain()
            nursery.cancel_scope.cancel()

    trio.run(main)
    assert len(told) == 1


def test_i6_long_writes_fill_the_buffer_by_what_they_keep_in_memory() -> None:
    length, counts, back = 256, list[int](), list[Memory]()

    async def take(contents: Contents) -> Unwritten:
        raise AssertionError("nothing is to be taken")

    async def main() -> None:
        behind = Behind("it", take, _not_heard, counts.append)
        for first in range(MOST_CHUNKS // length):
            assert not behind.is_full
            memory = Memory(memoryview(bytearray(length * CHUNK_BYTES)), back.append)
            behind.put(first * length * CHUNK_BYTES, memory.view[: 16 * CHUNK_BYTES], memory)
        assert behind.is_full
        assert sum(counts) == MOST_CHUNKS
        assert not back
        behind.forget()
        assert sum(counts) == 0
        assert len(back) == MOST_CHUNKS // length

    trio.run(main)


def test_in_memory_long_writes_gather_while_the_earlier_ones_are_taken(device: OriginDevice) -> None:
    """And the memory of a write comes back when it is where it belongs, not before."""
    length, back = 32 * CHUNK_BYTES, list[Memory]()

    async def main() -> None:
        held = _Held(device)
        behind = Behind("it", held.take, _not_heard, is_in_memory=True)

        def put(offset: int, content: bytes) -> None:
            memory = Memory(memoryview(bytearray(content * length)), back.append)
            behind.put(offset, memory.view, memory)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(behind.run)
            put(0, b"a")
            await trio.testing.wait_all_tasks_blocked()
            assert held.asked == [set(range(32))], "at once: no more is waited for"
            put(length, b"b")
            behind.put(100, b"c" * length)
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert len(held.asked) == 1
            assert not back
            held.let_go.set()
            await behind.drain()
            assert len(back) == 2
            assert device.pread(2 * length, 0) == b"a" * 100 + b"c" * length + b"b" * (length - 100)
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_i3_a_long_write_that_is_not_taken_stays_and_its_memory_comes_back(device: OriginDevice) -> None:
    fails, back = _Fails(device), list[Memory]()
    fails.chunks = {3}

    async def take(contents: Contents) -> Unwritten:
        return write_out(device, contents)

    async def main() -> None:
        behind = Behind("it", take, lambda sentence: None)
        memory = Memory(memoryview(bytearray(os.urandom(20 * CHUNK_BYTES))), back.append)
        content = bytes(memory.view)
        behind.put(0, memory.view, memory)
        with pytest.raises(OSError, match="still in memory"):
            await behind.flush()
        assert back == [memory]
        memory.view[:] = bytes(len(content))  # it is used for something else
        assert behind.chunks == 1
        assert overlaid(device.pread(len(content), 0), 0, behind.pieces(0, len(content))) == content
        fails.chunks = set()
        await behind.flush()
        assert device.pread(len(content), 0) == content

    trio.run(main)


def test_a_device_that_takes_nothing_fails_the_writer_when_the_buffer_is_full(device: OriginDevice) -> None:
    fails = _Fails(device)
    fails.chunks = set(range(4 * MOST_CHUNKS))

    async def take(contents: Contents) -> Unwritten:
        return write_out(device, contents)

    async def main() -> None:
        behind = Behind("it", take, lambda sentence: None)

        async def write_much() -> None:
            for chunk in range(4 * MOST_CHUNKS):
                await _put(behind, chunk * CHUNK_BYTES, bytes(CHUNK_BYTES))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(behind.run)
            with pytest.raises(OSError, match="still in memory"):
                await write_much()
            assert behind.chunks <= 3 * MOST_CHUNKS
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_i6_the_buffer_is_full_while_what_was_not_taken_is_tried_again() -> None:
    """Else each attempt would let as much again into memory."""
    attempts = list[trio.Event]()

    async def take(contents: Contents) -> Unwritten:
        attempts.append(trio.Event())
        await attempts[-1].wait()
        raise OSError(errno.EIO, "no")

    async def main() -> None:
        behind = Behind("it", take, lambda sentence: None)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(behind.run)
            behind.put(0, bytes(MOST_CHUNKS * CHUNK_BYTES))
            await trio.testing.wait_all_tasks_blocked()
            attempts[0].set()
            await trio.testing.wait_all_tasks_blocked()
            assert behind.is_full

            async def write() -> None:
                with pytest.raises(OSError, match="still in memory"):
                    await behind.room()

            nursery.start_soon(write)
            await trio.testing.wait_all_tasks_blocked()
            assert len(attempts) == 2
            assert behind.is_full, "also for who finds the other half of the buffer empty"
            nursery.start_soon(write)
            await trio.testing.wait_all_tasks_blocked()
            attempts[1].set()
            await trio.testing.wait_all_tasks_blocked()
            assert behind.chunks == MOST_CHUNKS
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_a_drain_after_a_sync_does_not_wait_for_more_to_come(device: OriginDevice) -> None:
    async def take(contents: Contents) -> Unwritten:
        return write_out(device, contents)

    async def main() -> None:
        behind = Behind("it", take, _not_heard)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(behind.run)
            await _put(behind, 0, b"a" * CHUNK_BYTES)
            await trio.testing.wait_all_tasks_blocked()
            await behind.flush()
            await _put(behind, 0, b"b" * CHUNK_BYTES)
            began = trio.current_time()
            await behind.drain()
            assert trio.current_time() == began
            nursery.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
