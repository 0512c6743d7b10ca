"""The fast path: what it answers itself, what it passes on, and that nothing is lost by waiting."""

import errno
import os
import socket
import struct

import pytest
import trio
import trio.testing

from hcpfs.daemon import fastpath
from hcpfs.daemon.protocol import MOST_DATA_BYTES, Opcode
from tests.support.requests import GETATTR, NUMBER, Scene, fsync, read, request, shows, write


def test_reads_writes_and_syncs_are_answered_here() -> None:
    async def test(scene: Scene) -> None:
        scene.kernel.send(read(11, 100, 50))
        assert await scene.answer() == (11, 0, bytes(scene.file.content[100:150]))
        scene.kernel.send(write(12, 8000, b"x" * 100))
        assert await scene.answer() == (12, 0, struct.pack("=II", 100, 0))
        assert scene.file.content[8000:8100] == b"x" * 100
        scene.kernel.send(fsync(13))
        assert await scene.answer() == (13, 0, b"")
        assert scene.file.syncs == 1
        assert scene.is_silent(scene.libfuse)

    shows(test)


def test_the_others_are_passed_on_whole_and_so_are_their_answers() -> None:
    async def test(scene: Scene) -> None:
        asked = request(GETATTR, 21, os.urandom(5000))
        scene.kernel.send(asked)
        assert await scene.message(scene.libfuse) == asked
        for answer in (struct.pack("=IiQ", 16 + 100_000, 0, 1) + bytes(100_000), struct.pack("=IiQ", 16, -2, 21)):
            scene.libfuse.send(answer)
            assert await scene.message(scene.kernel) == answer

    shows(test)


def test_libfuse_gets_all_requests_also_when_it_is_slow() -> None:
    async def test(scene: Scene) -> None:
        scene.at_libfuse.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        for unique in range(200):
            scene.kernel.send(request(GETATTR, unique, bytes(100)))
        await trio.testing.wait_all_tasks_blocked()
        found = [struct.unpack_from("=8xQ", await scene.message(scene.libfuse))[0] for _ in range(200)]
        assert found == list(range(200))

    shows(test)


def test_what_needs_no_answer_gets_none() -> None:
    async def test(scene: Scene) -> None:
        for opcode in (Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT):
            scene.kernel.send(request(opcode, 31, bytes(16)))
        scene.kernel.send(read(32, 0, 1))
        assert (await scene.answer())[0] == 32
        assert scene.is_silent(scene.libfuse)

    shows(test)


def test_the_kernel_is_not_told_to_send_more_than_fits() -> None:
    """The answer to INIT, with a libfuse that would take 16 MiB, and one that takes 128 KiB."""

    async def test(scene: Scene) -> None:
        for asked, told in ((16 << 20, MOST_DATA_BYTES), (128 << 10, 128 << 10)):
            scene.kernel.send(request(Opcode.INIT, 1, bytes(64)))
            assert len(await scene.message(scene.libfuse)) == 104
            scene.libfuse.send(struct.pack("=IiQIIIIHHI", 80, 0, 1, 7, 38, 131072, 0, 12, 9, asked) + bytes(40))
            answer = await scene.message(scene.kernel)
            assert struct.unpack_from("=HHI", answer, 32) == (12, 9, told)
            assert len(answer) == 80

    shows(test)


def test_an_error_becomes_the_errno() -> None:
    async def test(scene: Scene) -> None:
        scene.kernel.send(read(41, 0, 1, number=NUMBER + 1))
        assert await scene.answer() == (41, -errno.ENOSPC, b"")
        scene.file.error = OSError("a bad sector")
        scene.kernel.send(read(42, 0, 1))
        assert await scene.answer() == (42, -errno.ENOSPC, b"")
        scene.file.nowait = False
        scene.file.goes_on.set()
        scene.kernel.send(write(43, 0, b"x"))
        assert await scene.answer() == (43, -errno.ENOSPC, b"")
        scene.kernel.send(fsync(44))
        assert await scene.answer() == (44, -errno.ENOSPC, b"")
        assert [name for name, _ in scene.failed] == ["read", "read", "write", "fsync"]
        scene.file.error = None
        scene.kernel.send(fsync(45))
        assert await scene.answer() == (45, 0, b"")

    shows(test)


def test_a_request_that_waits_keeps_no_other_waiting_and_loses_nothing_to_it() -> None:
    async def test(scene: Scene) -> None:
        before = bytes(scene.file.content)
        scene.file.nowait = False
        scene.kernel.send(write(51, 0, b"first"))
        scene.kernel.send(fsync(52))
        scene.kernel.send(read(53, 100, 50))
        await trio.testing.wait_all_tasks_blocked()
        assert scene.file.waiting == 3
        scene.file.nowait = True
        for unique in range(60, 90):
            scene.kernel.send(write(unique, 4096, b"later" * 20))
            assert (await scene.answer())[0] == unique
        scene.file.goes_on.set()
        answers = {unique: rest for unique, error, rest in [await scene.answer() for _ in range(3)] if not error}
        assert answers == {51: struct.pack("=II", 5, 0), 52: b"", 53: before[100:150]}
        assert scene.file.content[:5] == b"first"

    shows(test)


def test_long_writes_that_wait_keep_their_bytes_while_others_come() -> None:
    async def test(scene: Scene) -> None:
        length = fastpath.LONG_BYTES
        for _ in range(2):  # with memory that was lent before, too
            content = os.urandom(3 * length)
            scene.file.nowait, scene.file.goes_on = False, trio.Event()
            for number in range(3):
                scene.kernel.send(write(number, number * length, content[number * length :][:length]))
            await trio.testing.wait_all_tasks_blocked()
            scene.file.nowait = True
            for unique in range(60, 70):
                scene.kernel.send(write(unique, 4 * length, b"later" * (length // 5)))
                assert (await scene.answer())[0] == unique
            scene.file.goes_on.set()
            assert {(await scene.answer())[:2] for _ in range(3)} == {(0, 0), (1, 0), (2, 0)}
            assert scene.file.content[: 3 * length] == content

    shows(test)


def test_memory_that_is_kept_stays_as_it_is_until_it_is_released() -> None:
    async def test(scene: Scene) -> None:
        length = fastpath.LONG_BYTES
        for _ in range(2):  # with memory that was kept before, too
            scene.file.keeps = True
            contents = [os.urandom(length) for _ in range(3)]
            for content in contents:
                scene.kernel.send(write(50, 0, content))
                assert (await scene.answer())[:2] == (50, 0)
            scene.file.keeps = False
            for unique in range(60, 70):
                scene.kernel.send(write(unique, 0, b"later" * (length // 5)))
                assert (await scene.answer())[0] == unique
            assert [bytes(memory.view[:length]) for memory in scene.file.kept] == contents
            while scene.file.kept:
                scene.file.kept.pop().release()

    shows(test)


def test_a_short_write_is_no_reason_to_keep_memory() -> None:
    async def test(scene: Scene) -> None:
        scene.file.keeps = True
        scene.kernel.send(write(50, 0, bytes(fastpath.LONG_BYTES - 1)))
        assert (await scene.answer())[0] == 50
        assert not scene.file.kept

    shows(test)


def test_no_more_tasks_wait_than_allowed_and_the_rest_is_served_after_them() -> None:
    async def test(scene: Scene) -> None:
        scene.file.nowait = False
        count = 3 * fastpath.MOST_TASKS
        for unique in range(count):
            scene.kernel.send(read(unique, 0, 1))
        await trio.testing.wait_all_tasks_blocked()
        assert scene.file.waiting == fastpath.MOST_TASKS
        scene.file.goes_on.set()
        assert {(await scene.answer())[0] for _ in range(count)} == set(range(count))

    shows(test)


def test_at_the_end_what_was_taken_is_answered() -> None:
    async def main() -> None:
        scene = Scene()
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(scene.path.serve)
                scene.file.nowait = False
                scene.kernel.send(read(71, 0, 1))
                await trio.testing.wait_all_tasks_blocked()
                scene.libfuse.send(struct.pack("=IiQ", 16, 0, 72))
                scene.path.end()
                scene.kernel.send(read(73, 0, 1))
                scene.file.goes_on.set()
            assert {(await scene.answer())[0] for _ in range(2)} == {71, 72}
            assert scene.is_silent(scene.kernel), "what came later was not taken"
        scene.close()

    trio.run(main)


@pytest.mark.parametrize("busy", [False, True], ids=["while it waits", "while it works"])
def test_the_unmount_is_told(busy: bool) -> None:
    async def test(scene: Scene) -> None:
        if busy:
            scene.kernel.send(read(81, 0, 1))
        else:
            await trio.testing.wait_all_tasks_blocked()
        scene.kernel.shutdown(socket.SHUT_WR)
        await scene.unmounted.wait()

    shows(test)


def test_the_unmount_is_told_when_the_connection_is_aborted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel says ECONNABORTED to who has just begun to read then, which a socket does not."""
    real = os.readv

    def readv(fd: int, buffers: list[bytearray]) -> int:
        length = real(fd, buffers)
        raise OSError(errno.ECONNABORTED, f"aborted, {length} bytes are lost")

    monkeypatch.setattr(os, "readv", readv)

    async def test(scene: Scene) -> None:
        scene.kernel.send(read(82, 0, 1))
        await scene.unmounted.wait()

    shows(test)


def test_an_answer_that_the_kernel_refuses_fails_its_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.writev

    def writev(fd: int, parts: list[bytes]) -> int:
        if struct.unpack_from("=8xQ", parts[0]) == (88,) and len(parts) > 1:
            raise OSError(errno.EINVAL, "refused")
        return real(fd, parts)

    monkeypatch.setattr(os, "writev", writev)

    async def test(scene: Scene) -> None:
        scene.kernel.send(read(88, 0, 1))
        assert await scene.answer() == (88, -errno.EIO, b"")
        scene.kernel.send(read(89, 0, 1))
        assert (await scene.answer())[:2] == (89, 0)

    shows(test)


def test_an_answer_that_nobody_waits_for_any_more_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who had asked was interrupted: the kernel says ENOENT then, which a socket does not."""
    real = os.writev

    def writev(fd: int, parts: list[bytes]) -> int:
        if struct.unpack_from("=8xQ", parts[0]) == (91,):
            raise OSError(errno.ENOENT, "gone")
        return real(fd, parts)

    monkeypatch.setattr(os, "writev", writev)

    async def test(scene: Scene) -> None:
        scene.kernel.send(read(91, 0, 1))
        scene.kernel.send(read(92, 0, 1))
        assert (await scene.answer())[0] == 92

    shows(test)
