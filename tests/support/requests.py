"""FUSE requests as the kernel sends them, an open file, and a fast path between two sockets.

The kernel and libfuse are the other ends of the sockets, which keep messages whole as /dev/fuse does.
"""

import errno
import os
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import trio

from cow.buffer.memory import Memory
from hcpfs.daemon.fastpath import FastPath
from hcpfs.daemon.protocol import Opcode

GETATTR = 3  # one of those that libfuse answers
HEADER = struct.Struct("=IIQQIIIHH")
NUMBER = 7  # of the open file


def request(opcode: int, unique: int, body: bytes = b"") -> bytes:
    return HEADER.pack(HEADER.size + len(body), opcode, unique, 1, 0, 0, 4242, 0, 0) + body


def read(unique: int, offset: int, size: int, number: int = NUMBER) -> bytes:
    return request(Opcode.READ, unique, struct.pack("=QQIIQII", number, offset, size, 0, 0, 0, 0))


def write(unique: int, offset: int, data: bytes) -> bytes:
    return request(Opcode.WRITE, unique, struct.pack("=QQIIQII", NUMBER, offset, len(data), 0, 0, 0, 0) + data)


def fsync(unique: int) -> bytes:
    return request(Opcode.FSYNC, unique, struct.pack("=QII", NUMBER, 0, 0))


class File:
    """An open file that can make everybody wait."""

    def __init__(self) -> None:
        self.content = bytearray(os.urandom(8192))
        self.nowait = True
        self.goes_on = trio.Event()
        self.waiting = 0
        self.syncs = 0
        self.keeps = False  #: the memory of what is written
        self.kept: list[Memory] = []
        self.error: Exception | None = None

    def read_nowait(self, offset: int, length: int, into: memoryview) -> bytes | None:
        if self.error is not None:
            raise self.error
        return bytes(self.content[offset : offset + length]) if self.nowait else None

    async def read_waiting(self, offset: int, length: int) -> bytes:
        await self._wait()
        return bytes(self.content[offset : offset + length])

    def write_nowait(self, offset: int, data: bytes | memoryview, memory: Memory | None = None) -> int | None:
        if not self.nowait:
            return None
        if self.keeps and memory is not None:
            memory.keep()
            self.kept.append(memory)
        self.content[offset : offset + len(data)] = data
        return len(data)

    async def write_waiting(self, offset: int, data: bytes, memory: Memory | None = None) -> int:
        await self._wait()
        self.content[offset : offset + len(data)] = data
        return len(data)

    async def sync(self) -> None:
        if not self.nowait:
            await self._wait()
        self.syncs += 1

    async def _wait(self) -> None:
        self.waiting += 1
        await self.goes_on.wait()
        if self.error is not None:
            raise self.error


class Scene:
    """A fast path at work, its kernel and its libfuse."""

    def __init__(self) -> None:
        kind = socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK
        self.kernel, self.at_kernel = socket.socketpair(socket.AF_UNIX, kind)
        self.libfuse, self.at_libfuse = socket.socketpair(socket.AF_UNIX, kind)
        for end in (self.kernel, self.at_kernel, self.libfuse, self.at_libfuse):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
        self.file = File()
        self.unmounted = trio.Event()
        self.path = FastPath(
            self.at_kernel.fileno(), self.at_libfuse, {NUMBER: self.file}, self._errno_of, self.unmounted.set
        )
        self.failed: list[tuple[str, Exception]] = []

    def _errno_of(self, name: str, error: Exception) -> int:
        self.failed.append((name, error))
        return errno.ENOSPC

    async def answer(self, end: socket.socket | None = None) -> tuple[int, int, bytes]:
        """The next one: the unique number, the error, the rest."""
        message = await self.message(self.kernel if end is None else end)
        length, error, unique = struct.unpack_from("=IiQ", message)
        assert length == len(message)
        return unique, error, message[16:]

    async def message(self, end: socket.socket) -> bytes:
        with trio.fail_after(20):
            while True:
                try:
                    return end.recv(4 << 20)
                except BlockingIOError:
                    await trio.lowlevel.wait_readable(end)

    def is_silent(self, end: socket.socket) -> bool:
        try:
            end.recv(1)
        except BlockingIOError:
            return True
        return False

    def close(self) -> None:
        for end in (self.kernel, self.at_kernel, self.libfuse, self.at_libfuse):
            end.close()


@asynccontextmanager
async def serving() -> AsyncIterator[Scene]:
    scene = Scene()
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(scene.path.serve)
            yield scene
            scene.path.end()
    finally:
        scene.close()


def shows(test: Callable[[Scene], Awaitable[None]]) -> None:
    async def main() -> None:
        with trio.fail_after(60):
            async with serving() as scene:
                await test(scene)

    trio.run(main)
