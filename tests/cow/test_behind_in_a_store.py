"""Write-behind in a store: a sync, a snapshot and a stop find all that was acknowledged, and who writes is told."""

import errno
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import patch

import pytest
import trio
import trio.testing
from pyroaring import BitMap64

from cow.config import OnFull
from cow.errors import LostError, StoreFullError
from cow.geometry import CHUNK_BYTES
from cow.images.image import MOST_WAITING_CHUNKS, Image
from cow.images.origin import Origin
from tests.support.engine import Engine, engines, in_memory, on_a_disk
from tests.support.inside import buffer_of, delta_writes
from tests.support.sandbox import wait_until

SIZE = 64 * CHUNK_BYTES + 1536


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Engine]]:
    with engines(tmp_path, SIZE) as start:
        yield start


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


@in_memory
def test_a_sync_waits_for_nothing_but_the_calls(start: Callable[..., Engine], tmp_path: Path) -> None:
    """Neither for a thread nor for another task: it is done when it is asked."""
    engine = start()
    image, origin = _image(engine, b"a"), engine.store.origins[0]

    async def main() -> None:
        for written in (origin, image):
            for offset in (4096, 4096 + 100):
                await written.write(offset, b"x" * 5000)
                with pytest.raises(StopIteration):
                    written.sync().send(None)
                assert await written.read(offset, 5000) == b"x" * 5000

    engine.call(main)
    assert (tmp_path / "disk.img").read_bytes()[4096 + 100 :][:5000] == b"x" * 5000


def test_older_bytes_do_not_come_back_after_a_long_write(start: Callable[..., Engine], tmp_path: Path) -> None:
    (tmp_path / "disk.img").write_bytes(os.urandom((1 << 20) + 512))  # of which more is written than is put in a buffer
    engine = start()
    image, origin = _image(engine, b"a"), engine.store.origins[0]

    async def check(written: Origin | Image, begin: int, name: bytes) -> None:
        end = written.size_bytes - begin // 2
        content = bytearray(await written.read(0, written.size_bytes))

        async def write(offset: int, data: bytes) -> None:
            await written.write(offset, data)
            content[offset : offset + len(data)] = data
            assert await written.read(0, written.size_bytes) == content

        await write(begin, os.urandom(end - begin))
        await image.sync()
        await engine.store.create_snapshot(name)
        await write(40 * CHUNK_BYTES + 100, b"older" * 1000)
        await write(begin, os.urandom(end - begin))
        await written.sync()
        assert await written.read(0, written.size_bytes) == content

    engine.call(check, origin, 0, b"b")
    engine.call(check, image, 0, b"c")
    engine.call(check, image, 700, b"d")


def test_what_is_wholly_in_the_buffer_is_read_though_the_device_cannot_be(start: Callable[..., Engine]) -> None:
    engine = start()
    image, origin = _image(engine, b"a"), engine.store.origins[0]

    def fail(*arguments: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    async def main() -> None:
        for written in (image, origin):
            await written.write(4 * CHUNK_BYTES, b"x" * 3 * CHUNK_BYTES)
            with patch.multiple(origin.device, pread=fail, pread_nowait=fail, fill=fail, fill_nowait=fail):
                assert await written.read(4 * CHUNK_BYTES + 100, 2 * CHUNK_BYTES) == b"x" * 2 * CHUNK_BYTES
            assert buffer_of(written).chunks == 3  # it is there yet, so it was not read from where it belongs

    engine.call(main)


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


@on_a_disk
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
    engine.call(engine.store.damage.lose, image.delta.layer, BitMap64([3]))
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

    delta_writes(stuck, fail)
    engine.call(stuck.write, 0, b"s" * CHUNK_BYTES)
    with pytest.raises(OSError, match="still in memory"):
        engine.call(stuck.sync)
    engine.store.space.waiting_chunks += MOST_WAITING_CHUNKS
    engine.call(other.write, 0, b"o" * CHUNK_BYTES)
    engine.call(other.sync)
    assert engine.call(other.read, 0, CHUNK_BYTES) == b"o" * CHUNK_BYTES
    engine.store.space.waiting_chunks -= MOST_WAITING_CHUNKS
    delta_writes(stuck, None)
    engine.call(stuck.sync)
    assert engine.call(stuck.read, 0, CHUNK_BYTES) == b"s" * CHUNK_BYTES
