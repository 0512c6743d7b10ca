"""Other mount namespaces: finding them, what is mounted in them, mounting and unmounting there.

A child enters one (setns(2)) and makes the system calls itself, so no program of a container is run. A namespace may
have no process: a descriptor or a bind mount of its nsfs file keeps it, too, and leads into it.
"""

import errno
import os
import select
import signal
from collections.abc import Callable, Iterator
from typing import NamedTuple

from hcpfs.system import aside, beneath, libc, users

_CLONE_NEWNS = 0x20000
_SECONDS = 10.0


class Namespace(NamedTuple):
    """A mount namespace. `handle` is a path of its nsfs file, `words` say who keeps it."""

    inode: int
    handle: str
    words: str


class Survey(NamedTuple):
    """All mounts that can be seen, our own namespace's first, and the other namespaces by inode."""

    mounts: list[beneath.Mount]
    others: dict[int, Namespace]

    def of_device(self, device: int) -> list[beneath.Mount]:
        """The mounts of one file system."""
        return [mount for mount in self.mounts if mount.device == device]

    def where(self, mount: beneath.Mount) -> str:
        """Such as `/srv`, or `/srv in the mount namespace of sleep (process 12)`."""
        other = self.others.get(mount.namespace)
        return mount.mountpoint if other is None else f"{mount.mountpoint} in {other.words}"


def survey() -> Survey:
    """Look into every mount namespace, also into those that have no process."""
    mounts = beneath.all_mounts()
    own = mounts[0].namespace
    others: dict[int, Namespace] = {}
    for mount in mounts:
        if mount.namespace not in others and mount.namespace != own:
            words = f"the mount namespace of {users.program_of(mount.pid)} (process {mount.pid})"
            others[mount.namespace] = Namespace(mount.namespace, f"/proc/{mount.pid}/ns/mnt", words)
    for kept in _kept(mounts):
        if kept.inode in others or kept.inode == own:
            continue
        try:
            mounts += beneath.parse_mounts(enter(kept.handle, _own_mountinfo), kept.inode)
        except OSError:
            continue  # it is gone, or not ours to look at
        others[kept.inode] = kept
    return Survey(mounts, others)


def _kept(mounts: list[beneath.Mount]) -> Iterator[Namespace]:
    """The namespaces that are kept by a bind mount or a descriptor of their nsfs file."""
    for mount in mounts:
        if mount.filesystem == "nsfs" and (inode := _inode(mount.root)) is not None:
            handle = f"/proc/{mount.pid}/root{mount.mountpoint}"
            yield Namespace(inode, handle, f"a mount namespace without a process, kept by the file {mount.mountpoint}")
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            numbers = os.listdir(f"/proc/{pid}/fd")
        except OSError:
            continue
        for number in numbers:
            handle = f"/proc/{pid}/fd/{number}"
            try:
                inode = _inode(os.readlink(handle))
            except OSError:
                continue
            if inode is not None:
                who = f"{users.program_of(int(pid))} (process {pid})"
                yield Namespace(inode, handle, f"a mount namespace without a process, kept by a descriptor of {who}")


def _inode(shown: str) -> int | None:
    return int(shown[5:-1]) if shown.startswith("mnt:[") and shown.endswith("]") else None


def _own_mountinfo(proc: int) -> bytes:
    file = os.open("self/mountinfo", os.O_RDONLY | os.O_CLOEXEC, dir_fd=proc)
    with os.fdopen(file, "rb") as lines:
        return lines.read()


def unmount(namespace: Namespace, mountpoint: str, device: int, *, lazily: bool = False) -> None:
    """Unmount the file system in the namespace, if it is there. Raises OSError: EBUSY when in use, or not on top."""

    def act(proc: int) -> bytes:
        there = [one for one in beneath.parse_mounts(_own_mountinfo(proc)) if one.mountpoint == mountpoint]
        if all(one.device != device for one in there):
            return b""
        if there[-1].device != device:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        libc.unmount(mountpoint, lazily=lazily)
        return b""

    enter(namespace.handle, act)


def move_into(namespace: Namespace, tree: int, mountpoint: str) -> None:
    """Attach a detached mount (open_tree(2)), given by its descriptor, at a path in the namespace. Raises OSError."""

    def act(proc: int) -> bytes:
        aside.put_back(tree, mountpoint)
        return b""

    enter(namespace.handle, act)


def enter(handle: str, action: Callable[[int], bytes]) -> bytes:
    """Call the action in a child in the namespace, with a descriptor of our own /proc; what it returned.

    Raises OSError: the action's, or ETIMEDOUT when it takes too long.
    """
    namespace = os.open(handle, os.O_RDONLY | os.O_CLOEXEC)
    proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        _act(namespace, proc, writing, action)
    for fd in (namespace, proc, writing):
        os.close(fd)
    with os.fdopen(reading, "rb", buffering=0) as pipe:
        answer = b""
        while select.select([pipe], [], [], _SECONDS)[0]:
            part = pipe.read(1 << 16)
            if not part:
                break
            answer += part
        else:
            os.kill(child, signal.SIGKILL)  # one that waits in the kernel is left to itself
            raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
    os.waitpid(child, 0)
    number = int.from_bytes(answer[:4], "little")
    if number or len(answer) < 4:
        raise OSError(number or errno.EIO, os.strerror(number or errno.EIO))
    return answer[4:]


def _act(namespace: int, proc: int, writing: int, action: Callable[[int], bytes]) -> None:
    """In the child; does not return."""
    try:
        try:
            libc.enter(namespace, _CLONE_NEWNS)
            answer = bytes(4) + action(proc)
        except OSError as error:
            answer = (error.errno or errno.EIO).to_bytes(4, "little")
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(answer)
    finally:
        os._exit(0)
