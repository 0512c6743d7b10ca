"""The session with the kernel: mounted by pyfuse3, served by it and by the fast path.

The seam: libfuse does nothing with its descriptor of /dev/fuse but read requests and write answers, whole ones. So once
it has mounted, another descriptor takes its number: one end of a socket, at whose other end the fast path is. Before
the unmount it gets its own back. Where that descriptor is not to be found, pyfuse3 serves alone, with its plain loop.
"""

import logging
import os
import socket

import pyfuse3
import trio

from hcpfs.fastpath import FastPath
from hcpfs.operations import Operations
from hcpfs.protocol import MOST_REQUEST_BYTES

_DEVICE = "/dev/fuse"

log = logging.getLogger("hcpfs")


class Session:
    """One mount, of the process's only session."""

    def __init__(self, operations: Operations, mountpoint: str, options: set[str]) -> None:
        """Mount. Raises RuntimeError when that fails."""
        self._operations = operations
        before = _descriptors()
        pyfuse3.init(operations, mountpoint, options)
        found = _descriptors() - before
        self._descriptor = found.pop() if len(found) == 1 else None  #: libfuse's

    async def serve(self) -> None:
        """Serve until the unmount or `terminate`."""
        if self._descriptor is None:
            log.warning("libfuse's descriptor is not to be found, so that all requests take the slow path")
            await pyfuse3.main()
            return
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs:
            for end in (ours, theirs):
                end.setblocking(False)
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MOST_REQUEST_BYTES)
            kernel = os.dup(self._descriptor)
            os.set_blocking(kernel, False)
            os.dup2(theirs.fileno(), self._descriptor, inheritable=False)
            try:
                await self._serve(FastPath(kernel, ours, self._operations.tree.handles, self._operations.errno_of, pyfuse3.terminate))
            finally:
                os.dup2(kernel, self._descriptor, inheritable=False)
                os.close(kernel)  # an unmount while a copy is open would wait for an answer

    async def _serve(self, fast_path: FastPath) -> None:
        async with trio.open_nursery() as nursery:
            passing_back = trio.CancelScope()
            nursery.start_soon(fast_path.serve, passing_back)
            try:
                await pyfuse3.main()
            finally:
                fast_path.end()
                passing_back.cancel()

    def close(self) -> None:
        """Unmount, if nobody has."""
        pyfuse3.close(unmount=True)


def terminate() -> None:
    """Have the session end, as an unmount does. Requests that were taken are answered."""
    pyfuse3.terminate()


def _descriptors() -> set[int]:
    """Those that this process has of the FUSE device."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}") == _DEVICE:
                found.add(int(name))
        except FileNotFoundError:
            pass  # the listing's own
    return found
