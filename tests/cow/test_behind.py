"""Write-behind: what waits in memory reads as if it were on the device, gets there in order, is never forgotten."""

import errno
import os
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import trio
import trio.testing
from pyroaring import BitMap64

from cow import OnFull, Source
from cow.behind import MOST_CHUNKS, Behind, Contents, Untaken, overlaid, write_out
from cow.device import OriginDevice
from cow.errors import LostError, StoreFullError
from cow.geometry import CHUNK_BYTES
from cow.image import MOST_WAITING_CHUNKS, Image
from cow.offload import MOST_CHUNKS_HERE
from cow.origin import Origin
from tests.support.engine import Engine
from tests.support.sandbox import wait_until

SIZE = 64 * CHUNK_BYTES + 1536


async def _put(behind: Behind, offset: int, data: bytes) -> None:
    await behind.room()
    behind.put(offset, data)


class _Held:
    """Takes its time before it writes to the device: the buffer stays as it is until `let_go`."""

    def __init__(self, device: OriginDevice) -> None:
        self._device = device
        self.let_go = trio.Event()
        self.asked: list[set[int]] = []

    async def take(self, contents: Contents) -> Untaken:
        self.asked.append(set(contents))
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
        behind = Behind("it", held.take, pytest.fail)
        content = bytearray(device.pread(SIZE, 0))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(behind.run)
            for number in range(120):
                offset = random_.randrange(SIZE)
                data = random_.randbytes(min(random_.choice([1, 512, 4096, 5000, 20000]), SIZE - offset))
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
        behind = Behind("it", held.take, pytest.fail)
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
        behind = Behind("it", held.take, pytest.fail)
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
    async def take(contents: Contents) -> Untaken:
        return write_out(device, contents)

    async def main() -> None:
        behind = Behind("it", take, pytest.fail)
        await _put(behind, 100, b"x" * CHUNK_BYTES)
        await behind.flush()  # nobody runs it
        assert behind.chunks == 0
        assert device.pread(CHUNK_BYTES, 100) == b"x" * CHUNK_BYTES

    trio.run(main)


def test_a_sync_waits_for_what_somebody_else_takes_there(device: OriginDevice) -> None:
    async def main() -> None:
        held = _Held(device)
        behind = Behind("it", held.take, pytest.fail)
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

    async def take(contents: Contents) -> Untaken:
        taken.append(len(contents))
        return write_out(device, contents)

    async def main() -> None:
        behind = Behind("it", take, pytest.fail, is_in_memory=True)
        for chunk in range(3 * MOST_CHUNKS_HERE):
            await _put(behind, chunk * CHUNK_BYTES, bytes(CHUNK_BYTES))
        assert taken == [MOST_CHUNKS_HERE] * 2
        assert behind.chunks == MOST_CHUNKS_HERE

    trio.run(main)


def test_i6_a_full_buffer_keeps_writers_waiting(device: OriginDevice) -> None:
    async def main() -> None:
        held = _Held(device)
        behind = Behind("it", held.take, pytest.fail)
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
    fails, troubles = _Fails(device), []

    async def take(contents: Contents) -> Untaken:
        return write_out(device, contents)

    async def main() -> None:
        behind = Behind("it", take, troubles.append)
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
            assert len(troubles) == 1
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
    fails, troubles = _Fails(device), list[str]()
    fails.chunks = {3}
    length = 64

    async def take(contents: Contents) -> Untaken:
        return write_out(device, contents)

    async def main() -> None:
        behind = Behind("it", take, troubles.append)
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
    assert len(troubles) == 1


def test_i6_a_long_write_counts_whole_while_a_chunk_of_it_waits() -> None:
    """Each of these leaves one chunk to see, and all of its bytes in memory."""
    length, counts = 256, list[int]()

    async def take(contents: Contents) -> Untaken:
        raise AssertionError("nothing is to be taken")

    async def main() -> None:
        behind = Behind("it", take, pytest.fail, counts.append)
        for first in range(MOST_CHUNKS // length):
            assert not behind.is_full
            behind.put(first * CHUNK_BYTES, bytes(length * CHUNK_BYTES))
        assert behind.is_full
        assert behind.chunks < 2 * length
        assert sum(counts) == MOST_CHUNKS
        behind.forget()
        assert sum(counts) == 0

    trio.run(main)


def test_a_device_that_takes_nothing_fails_the_writer_when_the_buffer_is_full(device: OriginDevice) -> None:
    fails = _Fails(device)
    fails.chunks = set(range(4 * MOST_CHUNKS))

    async def take(contents: Contents) -> Untaken:
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


# -- in a store --------------------------------------------------------------------------------------------------


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Engine]]:
    (tmp_path / "disk.img").write_bytes(os.urandom(SIZE))
    engines: list[Engine] = []

    def start(**options: object) -> Engine:
        engines.append(Engine(str(tmp_path / "store"), [Source(b"disk.img", str(tmp_path / "disk.img"))], **options))
        return engines[-1]

    yield start
    for engine in engines:
        if engine.is_open:
            engine.kill()


def _hold_preserving(engine: Engine) -> threading.Event:
    """Let the preserver wait before it reads the device."""
    origin, go_on = engine.store.origins[0], threading.Event()
    origin.device.is_in_memory = False  # it would wait on the engine's own thread
    wait_until(lambda: origin.fingerprint_of == engine.store.snapshots[-1].id, what="the fingerprint, which reads too")
    real = origin.read_chunks

    def read_chunks(*arguments: object, **options: object) -> bytes:
        go_on.wait()
        return real(*arguments, **options)

    origin.read_chunks = read_chunks
    return go_on


def test_i3_a_sync_waits_for_the_buffer(start: Callable[..., Engine], tmp_path: Path) -> None:
    engine = start()
    engine.call(engine.store.create_snapshot, b"a")
    origin = engine.store.origins[0]
    go_on = _hold_preserving(engine)
    engine.call(origin.write, 4096, b"x" * 4096)  # returns: old bytes are to be preserved first
    assert engine.call(origin.read, 4096, 4096) == b"x" * 4096
    assert origin.buffered_bytes == 4096
    with ThreadPoolExecutor() as threads:
        sync = threads.submit(engine.call, origin.sync)
        try:
            engine.call(trio.testing.wait_all_tasks_blocked, 0.1)
            assert not sync.done()
            assert (tmp_path / "disk.img").read_bytes()[4096:8192] != b"x" * 4096
        finally:
            go_on.set()
        sync.result()
    assert (tmp_path / "disk.img").read_bytes()[4096:8192] == b"x" * 4096


def test_i2_a_snapshot_has_what_was_buffered_before_it_and_an_older_one_has_not(start: Callable[..., Engine]) -> None:
    engine = start()
    older = engine.call(engine.store.create_snapshot, b"older")
    origin = engine.store.origins[0]
    before = engine.call(origin.read, 0, SIZE)
    go_on = _hold_preserving(engine)
    engine.call(origin.write, 0, b"1" * 8192)
    with ThreadPoolExecutor() as threads:
        taking = threads.submit(engine.call, engine.store.create_snapshot, b"newer")
        engine.call(trio.testing.wait_all_tasks_blocked, 0.1)
        go_on.set()
        newer = taking.result()
    engine.call(origin.write, 4096, b"2" * 8192)
    engine.call(origin.sync)
    assert engine.call(newer.images[0].read, 0, SIZE) == b"1" * 8192 + before[8192:]
    assert engine.call(older.images[0].read, 0, SIZE) == before


def test_i8_a_clean_stop_empties_the_buffer(start: Callable[..., Engine], tmp_path: Path) -> None:
    engine = start()
    engine.call(engine.store.create_snapshot, b"a")
    engine.call(engine.store.origins[0].write, 0, b"x" * SIZE)
    engine.close()
    assert (tmp_path / "disk.img").read_bytes() == b"x" * SIZE
    assert start().was_clean


@pytest.fixture
def in_memory() -> Iterator[Engine]:
    """A store over a disk of 1 MiB and a bit, both in memory."""
    with TemporaryDirectory(dir="/dev/shm") as path:
        (Path(path) / "disk.img").write_bytes(os.urandom((1 << 20) + 512))
        engine = Engine(f"{path}/store", [Source(b"disk.img", f"{path}/disk.img")])
        yield engine
        engine.kill()


def test_in_memory_a_sync_waits_for_nothing_but_the_calls(in_memory: Engine) -> None:
    """Neither for a thread nor for another task: it is done when it is asked."""
    image, origin = _image(in_memory, b"a"), in_memory.store.origins[0]

    async def main() -> None:
        for written in (origin, image):
            for offset in (4096, 4096 + 100):
                await written.write(offset, b"x" * 5000)
                with pytest.raises(StopIteration):
                    written.sync().send(None)
                assert await written.read(offset, 5000) == b"x" * 5000

    in_memory.call(main)
    assert Path(in_memory.store.origins[0].device.label).read_bytes()[4096 + 100 :][:5000] == b"x" * 5000


def test_in_memory_a_long_write_is_not_copied_and_older_bytes_do_not_come_back(in_memory: Engine) -> None:
    image, origin = _image(in_memory, b"a"), in_memory.store.origins[0]

    async def check(written: Origin | Image, begin: int, name: bytes) -> None:
        end = written.size_bytes - begin // 2
        content = bytearray(await written.read(0, written.size_bytes))

        async def write(offset: int, data: bytes) -> None:
            await written.write(offset, data)
            content[offset : offset + len(data)] = data
            assert await written.read(0, written.size_bytes) == content

        await write(begin, os.urandom(end - begin))
        assert not written._behind.chunks, "it is where it belongs"
        await image.sync()
        await in_memory.store.create_snapshot(name)
        await write(40 * CHUNK_BYTES + 100, b"older" * 1000)
        await write(begin, os.urandom(end - begin))
        await written.sync()
        assert await written.read(0, written.size_bytes) == content

    in_memory.call(check, origin, 0, b"b")
    in_memory.call(check, image, 0, b"c")
    in_memory.call(check, image, 700, b"d")


@pytest.mark.parametrize(
    "options", [{"write_behind": False}, {"on_full": OnFull.BLOCK_WRITES}], ids=["sync", "block-writes"]
)
def test_without_write_behind_a_write_returns_when_it_is_on_the_device(
    start: Callable[..., Engine], tmp_path: Path, options: dict[str, object]
) -> None:
    engine = start(**options)
    engine.call(engine.store.create_snapshot, b"a")
    engine.call(engine.store.origins[0].write, 0, b"x" * 4096)
    assert engine.store.origins[0].buffered_bytes == 0
    assert (tmp_path / "disk.img").read_bytes()[:4096] == b"x" * 4096


def test_under_block_writes_the_writer_is_told(start: Callable[..., Engine], tmp_path: Path) -> None:
    os.truncate(tmp_path / "disk.img", 64 << 20)
    engine = start(on_full=OnFull.BLOCK_WRITES, quota_bytes=32 << 20)
    engine.call(engine.store.create_snapshot, b"a")
    with pytest.raises(StoreFullError):
        _write_all(engine, engine.store.origins[0])


def _write_all(engine: Engine, origin: Origin) -> None:
    for offset in range(0, origin.size_bytes, 1 << 20):
        engine.call(origin.write, offset, b"n" * (1 << 20))


def test_i6_what_may_not_fit_together_is_kept_in_smaller_parts(start: Callable[..., Engine], tmp_path: Path) -> None:
    """A row of chunks and a far one: taken together it looks as if each needed a page of checksums of its own."""
    os.truncate(tmp_path / "disk.img", 1 << 30)
    engine = start(quota_bytes=32 << 20)
    snapshot = engine.call(engine.store.create_snapshot, b"a")
    origin = engine.store.origins[0]
    room = engine.store.space.available_bytes
    chunks = room // CHUNK_BYTES * 3 // 4
    go_on = _hold_preserving(engine)
    engine.call(origin.write, (1 << 30) - CHUNK_BYTES, b"x" * CHUNK_BYTES)
    for offset in range(0, chunks * CHUNK_BYTES, 1 << 20):
        engine.call(origin.write, offset, b"x" * (1 << 20))
    go_on.set()
    engine.call(origin.sync)
    assert snapshot.usable
    assert engine.call(snapshot.images[0].read, (1 << 30) - CHUNK_BYTES, CHUNK_BYTES) == bytes(CHUNK_BYTES)
    assert engine.call(snapshot.images[0].read, 1 << 20, 1 << 20) == bytes(1 << 20)


def _image(engine: Engine, name: bytes) -> Image:
    return engine.call(engine.store.create_snapshot, name).images[0]


def test_a_part_of_a_chunk_that_cannot_be_read_fails_the_writer_and_no_other_write(
    start: Callable[..., Engine],
) -> None:
    engine = start()
    image = _image(engine, b"a")
    engine.call(image.write, 3 * CHUNK_BYTES, b"x" * CHUNK_BYTES)
    engine.call(image.sync)
    engine.call(engine.store.damage.lose, image.delta, BitMap64([3]))
    with pytest.raises(LostError):
        engine.call(image.write, 3 * CHUNK_BYTES + 100, b"y" * 50)
    engine.call(image.write, 7 * CHUNK_BYTES + 100, b"z" * 50)
    engine.call(image.sync)
    engine.call(image.write, 3 * CHUNK_BYTES, b"w" * CHUNK_BYTES)  # the whole of it makes it readable again
    engine.call(image.sync)
    assert engine.call(image.read, 3 * CHUNK_BYTES, CHUNK_BYTES) == b"w" * CHUNK_BYTES
    assert engine.call(image.read, 7 * CHUNK_BYTES + 100, 50) == b"z" * 50


def test_i6_an_image_whose_buffer_is_stuck_keeps_no_other_waiting(start: Callable[..., Engine]) -> None:
    engine = start()
    stuck, other = _image(engine, b"stuck"), _image(engine, b"other")

    def fail(*arguments: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    stuck._write_delta = fail
    engine.call(stuck.write, 0, b"s" * CHUNK_BYTES)
    with pytest.raises(OSError, match="still in memory"):
        engine.call(stuck.sync)
    engine.store.space.waiting_chunks += MOST_WAITING_CHUNKS
    engine.call(other.write, 0, b"o" * CHUNK_BYTES)
    engine.call(other.sync)
    assert engine.call(other.read, 0, CHUNK_BYTES) == b"o" * CHUNK_BYTES
    engine.store.space.waiting_chunks -= MOST_WAITING_CHUNKS
    del stuck._write_delta
    engine.call(stuck.sync)
    assert engine.call(stuck.read, 0, CHUNK_BYTES) == b"s" * CHUNK_BYTES
