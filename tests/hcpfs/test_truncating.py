"""A file opened with O_TRUNC, by itself and in the fast path: what was skipped becomes zeroes, and no more."""

import os
import struct
from pathlib import Path

import pytest
import trio
import trio.testing

from cow.buffer.memory import Memory
from hcpfs.daemon.protocol import FROM_CACHE, Opcode, change_init
from hcpfs.tree.truncating import FORGETTING_SECONDS, PIECE_BYTES, Truncating, position_in
from tests.support.inside import serves
from tests.support.requests import NUMBER, Scene, fsync, request, shows

SIZE = 1 << 20


class Image:
    """An image in memory. With `slow` its writes wait for `goes_on`."""

    def __init__(self) -> None:
        self.size_bytes = SIZE
        self.old = os.urandom(SIZE)
        self.content = bytearray(self.old)
        self.slow = False
        self.goes_on = trio.Event()
        self.unreadable = False
        self.error: Exception | None = None
        self.written: list[tuple[int, int]] = []
        self.syncs = 0

    def read_nowait(self, offset: int, length: int, into: memoryview) -> bytes | None:
        if self.unreadable:
            raise OSError("it cannot be read")
        return None if self.slow else bytes(self.content[offset : offset + length])

    async def read_waiting(self, offset: int, length: int) -> bytes:
        await trio.lowlevel.checkpoint()
        return bytes(self.content[offset : offset + length])

    def write_nowait(self, offset: int, data: bytes | memoryview, memory: Memory | None = None) -> int | None:
        if self.error is not None:
            raise self.error
        if self.slow:
            return None
        self.content[offset : offset + len(data)] = data
        self.written.append((offset, len(data)))
        return len(data)

    async def write_waiting(self, offset: int, data: bytes | memoryview, memory: Memory | None = None) -> int:
        if self.slow:
            await self.goes_on.wait()
        if self.error is not None:
            raise self.error
        self.content[offset : offset + len(data)] = data
        self.written.append((offset, len(data)))
        return len(data)

    async def sync(self) -> None:
        self.syncs += 1


class Opened:
    """It, and what the kernel was told to forget."""

    def __init__(self) -> None:
        self.image = Image()
        self.forgotten: list[tuple[int, int]] = []
        self.file = Truncating(self.image, self._forget)  # type: ignore[arg-type]

    async def _forget(self, offset: int, length: int) -> None:
        self.forgotten.append((offset, length))

    async def write(self, offset: int, data: bytes) -> int:
        at_once = self.file.write_nowait(offset, data)
        return at_once if at_once is not None else await self.file.write_waiting(offset, data)


def test_what_was_skipped_reads_as_zeroes_and_the_rest_stays() -> None:
    async def main() -> None:
        opened = Opened()
        await opened.write(1000, b"x" * 100)
        await opened.write(300_000, b"y" * 5000)
        await opened.write(500, b"z" * 10)
        expected = bytearray(bytes(305_000) + opened.image.old[305_000:])
        expected[1000:1100], expected[300_000:305_000], expected[500:510] = b"x" * 100, b"y" * 5000, b"z" * 10
        assert opened.image.content == expected
        await opened.file.flush()
        assert opened.image.content == expected
        assert len(opened.forgotten) == 1
        offset, length = opened.forgotten[0]
        assert (offset, offset + length) == (0, 300_000)
        await opened.file.flush()
        assert len(opened.forgotten) == 1

    trio.run(main)


def test_nothing_written_changes_nothing() -> None:
    async def main() -> None:
        opened = Opened()
        await opened.file.flush()
        await opened.file.sync()
        assert opened.image.content == opened.image.old
        assert (opened.image.syncs, opened.forgotten) == (1, [])

    trio.run(main)


def test_the_own_size_makes_all_the_rest_zeroes() -> None:
    async def main() -> None:
        opened = Opened()
        await opened.write(0, b"x" * 10)
        await opened.file.extend()
        assert opened.image.content == b"x" * 10 + bytes(SIZE - 10)
        await opened.write(700_000, b"y")
        await opened.file.extend()
        assert opened.image.content == b"x" * 10 + bytes(699_990) + b"y" + bytes(SIZE - 700_001)

    trio.run(main)


@pytest.mark.parametrize("finish", ["flush", "sync"])
def test_where_the_tool_has_gone_is_zeroed_at_the_end_unless_it_writes_again(finish: str) -> None:
    async def main() -> None:
        for writes_again in (False, True):
            opened = Opened()
            await opened.write(0, b"x" * 4096)
            opened.file.claim(400_001)
            if writes_again:
                await opened.write(4096, b"y" * 10)
            assert opened.image.content[5000:] == opened.image.old[5000:]
            await getattr(opened.file, finish)()
            zeroed = 0 if writes_again else 395_000
            assert opened.image.content[5001 : 5001 + zeroed] == bytes(zeroed)
            assert opened.image.content[400_001:] == opened.image.old[400_001:]
            assert (opened.image.content[300_000:400_001] == bytes(100_001)) is not writes_again

    trio.run(main)


def test_zeroes_that_are_there_are_not_written_again() -> None:
    async def main() -> None:
        opened = Opened()
        opened.image.content[PIECE_BYTES : 5 * PIECE_BYTES] = bytes(4 * PIECE_BYTES)
        await opened.write(6 * PIECE_BYTES, b"x")
        assert opened.image.content == bytes(6 * PIECE_BYTES) + b"x" + opened.image.old[6 * PIECE_BYTES + 1 :]
        assert sum(length for _, length in opened.image.written) == 2 * PIECE_BYTES + 1

    trio.run(main)


def test_what_cannot_be_read_is_zeroed_all_the_same() -> None:
    async def main() -> None:
        opened = Opened()
        opened.image.unreadable = True
        await opened.write(500_000, b"x")
        assert opened.image.content[:500_001] == bytes(500_000) + b"x"

    trio.run(main)


def test_pieces_that_arrive_in_any_order_are_all_kept() -> None:
    """As the kernel sends a large direct write: several requests at once, each of which may have to wait."""

    async def main() -> None:
        pieces = {offset: os.urandom(100_000) for offset in range(0, 600_000, 100_000)}
        for first in (0, 500_000, 200_000):
            opened = Opened()
            opened.image.slow = True
            async with trio.open_nursery() as nursery:
                order = sorted(pieces, key=lambda offset: (offset != first, -offset))
                for offset in order:
                    nursery.start_soon(opened.write, offset, pieces[offset])
                    await trio.testing.wait_all_tasks_blocked()
                opened.image.goes_on.set()
            assert opened.image.content[:600_000] == b"".join(pieces[offset] for offset in sorted(pieces))
            assert opened.image.content[600_000:] == opened.image.old[600_000:]

    trio.run(main)


def test_a_write_that_could_be_done_at_once_waits_while_zeroes_are_written() -> None:
    async def main() -> None:
        opened = Opened()
        opened.image.slow = True
        async with trio.open_nursery() as nursery:
            nursery.start_soon(opened.write, 300_000, b"x")
            await trio.testing.wait_all_tasks_blocked()
            opened.image.slow = False
            assert opened.file.write_nowait(0, b"y" * 10) is None
            nursery.start_soon(opened.write, 0, b"y" * 10)
            await trio.testing.wait_all_tasks_blocked()
            opened.image.goes_on.set()
        assert opened.image.content[:300_001] == b"y" * 10 + bytes(299_990) + b"x"

    trio.run(main)


def test_an_error_is_the_writers_and_it_can_go_on_after_it() -> None:
    async def main() -> None:
        opened = Opened()
        opened.image.error = OSError("no room")
        for call in (lambda: opened.write(300_000, b"x"), opened.file.extend):
            with pytest.raises(OSError, match="no room"):
                await call()
        opened.file.claim(1000)
        with pytest.raises(OSError, match="no room"):
            await opened.file.flush()
        opened.image.error = None
        await opened.write(300_000, b"x")
        assert opened.image.content[:300_001] == bytes(300_000) + b"x"

    trio.run(main)


def test_beyond_the_end_nothing_is_zeroed_before_the_refusal() -> None:
    async def main() -> None:
        opened = Opened()
        opened.image.error = OSError("beyond")
        with pytest.raises(OSError, match="beyond"):
            await opened.write(SIZE, b"x")
        opened.image.error = None
        await opened.file.flush()
        assert opened.image.content == opened.image.old

    trio.run(main)


def test_the_answer_to_a_truncation_does_not_wait_for_ever_for_the_kernels_cache() -> None:
    """Pages that others have mapped and written to are let go only after the answer."""

    async def main() -> None:
        opened = Opened()

        async def never(_offset: int, _length: int) -> None:
            await trio.sleep_forever()

        opened.file = Truncating(opened.image, never)  # type: ignore[arg-type]
        began = trio.current_time()
        await opened.file.begin()
        await opened.file.extend()
        assert trio.current_time() - began == 2 * FORGETTING_SECONDS
        assert opened.image.content == bytes(SIZE)

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_the_position_of_an_open_file_is_found(tmp_path: Path) -> None:
    path = tmp_path / "d"
    path.write_bytes(b"")
    inode = path.stat().st_ino
    with path.open("rb"):
        assert position_in(os.getpid(), inode, b"d") is None  # it is open for reading only
    with path.open("wb") as file:
        file.seek(1 << 40)
        assert position_in(os.getpid(), inode, b"d") == 1 << 40
        assert position_in(os.getpid(), inode, b"other") is None
        assert position_in(os.getpid(), inode + 1, b"d") is None
    assert position_in((1 << 22) + 1, inode, b"d") is None  # there is no such process


def _write(unique: int, offset: int, data: bytes, flags: int) -> bytes:
    return request(Opcode.WRITE, unique, struct.pack("=QQIIQII", NUMBER, offset, len(data), flags, 0, 0, 0) + data)


def test_a_mapped_page_of_somebody_else_is_not_taken_for_a_write() -> None:
    """The kernel writes it back through the open file of anybody; taken for this one's, it would zero all before it."""

    async def test(scene: Scene) -> None:
        opened = Opened()
        serves(scene.path, NUMBER, opened.file)
        for slow in (False, True):
            opened.image.slow = slow
            opened.image.goes_on.set()
            scene.kernel.send(_write(1, 500_000, b"m" * 4096, FROM_CACHE))
            assert await scene.answer() == (1, 0, struct.pack("=II", 4096, 0))
            assert opened.image.content[:500_000] == opened.image.old[:500_000]
            assert opened.image.content[500_000:504_096] == b"m" * 4096
        scene.kernel.send(_write(2, 4096, b"w" * 4096, 0))
        assert await scene.answer() == (2, 0, struct.pack("=II", 4096, 0))
        assert opened.image.content[:8192] == bytes(4096) + b"w" * 4096
        assert opened.image.content[500_000:504_096] == b"m" * 4096

    shows(test)


def test_a_close_is_answered_at_once_or_with_what_went_wrong() -> None:
    async def test(scene: Scene) -> None:
        flush = struct.pack("=QIIQ", NUMBER, 0, 0, 0)
        scene.kernel.send(request(Opcode.FLUSH, 1, flush))
        assert await scene.answer() == (1, 0, b"")
        opened = Opened()
        serves(scene.path, NUMBER, opened.file)
        opened.file.claim(5000)
        scene.kernel.send(request(Opcode.FLUSH, 2, flush))
        assert await scene.answer() == (2, 0, b"")
        assert opened.image.content == bytes(5000) + opened.image.old[5000:]
        opened.file.claim(50_000)
        opened.image.error = OSError("no room")
        scene.kernel.send(request(Opcode.FLUSH, 3, flush))
        assert (await scene.answer())[1] != 0
        assert scene.failed[-1][0] == "close"
        scene.kernel.send(fsync(4))
        assert (await scene.answer())[1] != 0
        assert scene.is_silent(scene.libfuse)

    shows(test)


def test_the_kernel_is_told_to_ask_for_a_truncation_after_the_open() -> None:
    answer = bytearray(struct.pack("=IiQIIIIHHI", 80, 0, 1, 7, 31, 131072, 0xFFFFFFFF, 12, 9, 1 << 22) + bytes(40))
    change_init(answer)
    flags = struct.unpack_from("=I", answer, 28)[0]
    assert flags == 0xFFFFFFFF & ~(1 << 3)
