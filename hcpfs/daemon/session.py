"""The session with the kernel: mounted by pyfuse3, served by it and by the fast path.

The seam: all that libfuse does with its descriptor of /dev/fuse is to read whole requests and write whole answers. So
after the mount its descriptor number is given to one end of a socket, and the fast path is at the other end. Before the
unmount libfuse gets its descriptor back. Where that descriptor cannot be found, or the socket's buffers cannot hold the
longest message, pyfuse3 serves alone, with its plain loop.
"""

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pyfuse3
import trio

from hcpfs.daemon.fastpath import FastPath
from hcpfs.daemon.operations import Operations
from hcpfs.daemon.protocol import MOST_REQUEST_BYTES

_DEVICE = "/dev/fuse"
_SO_SNDBUFFORCE = 32  # asm-generic/socket.h: beyond net.core.wmem_max

log = logging.getLogger("hcpfs")


class Session:
    """The one mount of this process."""

    def __init__(self, operations: Operations, mountpoint: str, options: set[str]) -> None:
        """Mount. Raises RuntimeError when that fails."""
        self._operations = operations
        before = _descriptors()
        pyfuse3.init(operations, mountpoint, options)
        found = _descriptors() - before
        self._descriptor = found.pop() if len(found) == 1 else None  #: libfuse's

    async def serve(self) -> None:
        """Serve until the unmount or `terminate`."""
        if self._descriptor is None or (ends := _socket_pair()) is None:
            log.warning("libfuse's descriptor is not found, or net.core.wmem_max too low: requests take the slow path")
            await pyfuse3.main()
            return
        with _taken_over(self._descriptor, *ends) as (kernel, libfuse):
            tree = self._operations.tree
            reads = tree.store.reads
            fast_path = FastPath(kernel, libfuse, tree.handles, self._operations.errno_of, terminate, reads)
            tree.forget_cached = fast_path.forget_cached
            async with trio.open_nursery() as nursery:
                nursery.start_soon(fast_path.serve)
                try:
                    await pyfuse3.main()
                finally:
                    fast_path.end()

    def close(self) -> None:
        """Unmount, unless it is unmounted already."""
        pyfuse3.close(unmount=True)


@contextmanager
def _taken_over(descriptor: int, ours: socket.socket, theirs: socket.socket) -> Iterator[tuple[int, socket.socket]]:
    """Make `descriptor` one end of a socket within the block. Yields what it was before, and the other end."""
    with ours, theirs:
        kernel = os.dup(descriptor)
        try:
            os.set_blocking(kernel, False)
            os.dup2(theirs.fileno(), descriptor, inheritable=False)
            yield kernel, ours
        finally:
            os.dup2(kernel, descriptor, inheritable=False)
            os.close(kernel)  # with a copy open, the unmount would wait for an answer


def _socket_pair() -> tuple[socket.socket, socket.socket] | None:
    """A socket pair that keeps message boundaries and has room for the longest message; None where not permitted."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    for end in ends:
        try:
            end.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, MOST_REQUEST_BYTES)
        except PermissionError:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MOST_REQUEST_BYTES)
    if all(end.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) >= 2 * MOST_REQUEST_BYTES for end in ends):
        return ends
    for end in ends:
        end.close()
    return None


def terminate() -> None:
    """End the session, as an unmount does. Requests under way are answered."""
    pyfuse3.terminate()


def _descriptors() -> set[int]:
    """The descriptors of the FUSE device that this process has."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}") == _DEVICE:
                found.add(int(name))
        except FileNotFoundError:
            pass  # that of the listing itself
    return found
