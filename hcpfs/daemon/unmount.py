"""Unmounting: what is in the way is named before anything is unmounted, and every wait says what it waits for.

A mount namespace that was copied from ours (unshare, a container, a service with private mounts) has a copy of the
mount, and the daemon lives as long as that does. Where nobody uses the copy, and mount propagation does not unmount it,
it is unmounted here.
"""

import os
import select
import subprocess
import time
from collections.abc import Callable

from cow.errors import RefusedError
from hcpfs.daemon import background, stores
from hcpfs.system import beneath, namespaces, users
from hcpfs.system.namespaces import Survey
from hcpfs.system.words import listed

_PATIENCE_SECONDS = 2.0  # for users that are about to end: a loop device that was just detached, a scan by udev
_FIRST_WORD_SECONDS, _WORD_SECONDS = 2.0, 5.0
_KEPT_SECONDS = 15.0
_POLL_SECONDS = 0.1


class StillAtWorkError(Exception):
    """The mount is unmounted, and its daemon has not ended. The text says why, and what to do."""


def unmount(path: str, pid: int, store: str, say: Callable[[str], None], seconds: float) -> None:
    """Unmount the hcpfs at `path`. Returns when its daemon, process `pid`, has ended clean.

    Raises RefusedError when something is in the way, with nothing unmounted, or when the daemon did not end clean;
    StillAtWorkError when it has not ended within `seconds`; ProcessLookupError when the daemon is dead.
    """
    daemon = os.pidfd_open(pid)
    try:
        device = [mount for mount in beneath.mounts() if mount.mountpoint == path][-1].device
        _refuse_what_is_in_the_way(path, device)
        _unmount_copies(path, device, say)
        _unmount_here(path, device, say)
        _wait(daemon, pid, device, path, say, seconds)
    finally:
        os.close(daemon)
    if not stores.stopped_clean(store):
        raise RefusedError(
            f"the daemon ended, but not clean; the next mount recovers. Its log says why: "
            f"{os.path.join(store, background.LOG_NAME)}"
        )


def _refuse_what_is_in_the_way(path: str, device: int) -> None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while found := in_the_way(path, device, namespaces.survey()):
        if time.monotonic() >= deadline:
            raise RefusedError(
                f"{path} is in use, and nothing was unmounted. In the way: {listed(found)}. Unmount and detach "
                f"what sits on it (umount, losetup -d), end those programs, and try again"
            )
        time.sleep(_POLL_SECONDS)


def in_the_way(path: str, device: int, survey: Survey) -> list[str]:
    """What keeps the file system in use, in words. Copies of the mount in other namespaces are not named."""
    shown = survey.of_device(device)
    found = [users.loop_words(state) for state, _ in users.loops_of(device, {mount.mountpoint for mount in shown})]
    for mount in shown:
        if not _goes(mount, path, survey):
            found.append(f"another mount of it at {survey.where(mount)}")
        inside = [one for one in survey.mounts if (one.parent, one.namespace) == (mount.id, mount.namespace)]
        found += [f"{one.filesystem} mounted in it at {survey.where(one)}" for one in inside if one.device != device]
    found += [f"{user.words}, {_HOW.get(user.how, user.how)}" for user in users.of_file_system(device)]
    return found + [f"the NFS export of {one}" for one in users.exports(path)]


_HOW = {
    "writing": "which has a file open for writing",
    "reading": "which has a file or directory open",
    "cwd": "whose current directory it is",
    "root": "whose root directory it is",
    "exe": "which runs a program from it",
    "mapping": "which has a file mapped",
}


def _goes(mount: beneath.Mount, path: str, survey: Survey) -> bool:
    """Whether it is the mount itself, or a copy that was made with a namespace, which shows all of it."""
    if mount.namespace in survey.others:
        return mount.root == "/"
    return mount.mountpoint == path


def _unmount_copies(path: str, device: int, say: Callable[[str], None]) -> None:
    survey = namespaces.survey()
    for mount in survey.of_device(device):
        if mount.namespace not in survey.others:
            continue
        try:
            namespaces.unmount(survey.others[mount.namespace], mount.mountpoint, mount.device)
        except OSError as error:
            raise RefusedError(
                f"{path} is not unmounted: its copy at {survey.where(mount)} cannot be unmounted ({error.strerror}); "
                f"end what runs there"
            ) from error
        say(f"unmounted its copy at {survey.where(mount)}")


def _unmount_here(path: str, device: int, say: Callable[[str], None]) -> None:
    command = ["umount", path] if os.geteuid() == 0 else ["fusermount3", "-u", path]
    while any(mount.mountpoint == path and mount.device == device for mount in beneath.mounts()):
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"LC_ALL": "C"},  # what it says is looked at
        )
        waiting = _Waiting(say)
        words = f"process {child.pid} unmounts {path}: the kernel writes back what it caches"
        while True:
            try:
                _, said = child.communicate(timeout=_POLL_SECONDS)
                break
            except subprocess.TimeoutExpired:
                waiting.say(words.__str__)
        if child.returncode != 0:
            found = in_the_way(path, device, namespaces.survey())
            if not found and "busy" in said:
                found = ["something that does not show: a file on its way between processes, perhaps"]
            who = f". In the way: {listed(found)}" if found else ""
            raise RefusedError(f"{path} cannot be unmounted: {said.strip().rstrip('.')}{who}")


def _wait(daemon: int, pid: int, device: int, path: str, say: Callable[[str], None], seconds: float) -> None:
    waiting = _Waiting(say)
    while not select.select([daemon], [], [], _POLL_SECONDS)[0]:
        kept = (waiting.is_time or waiting.seconds >= seconds) and _is_served(pid)

        def words(kept: bool = kept) -> str:
            if not kept:
                return f"the daemon (process {pid}) writes to its disks what it holds, and closes the store"
            found = in_the_way(path, device, namespaces.survey())
            return f"the file system is still in use by {listed(found) or 'something that does not show'}"

        waiting.say(words)
        if waiting.seconds >= (min(seconds, _KEPT_SECONDS) if kept else seconds):
            raise StillAtWorkError(
                f"{path} is unmounted, but after {waiting.seconds:.0f} s {words()}. It ends by itself when that is "
                f"over; until then the devices are not released"
            )


def _is_served(pid: int) -> bool:
    """Whether the file system still exists: the daemon closes its /dev/fuse when it is gone."""
    try:
        return any(os.readlink(f"/proc/{pid}/fd/{number}") == "/dev/fuse" for number in os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return False


class _Waiting:
    """Says every few seconds what is waited for."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._began = time.monotonic()
        self._next = _FIRST_WORD_SECONDS

    @property
    def seconds(self) -> float:
        """For how long."""
        return time.monotonic() - self._began

    @property
    def is_time(self) -> bool:
        """Whether the next word is due."""
        return self.seconds >= self._next

    def say(self, words: Callable[[], str]) -> None:
        """Say the words when they are due."""
        if self.is_time:
            self._say(f"waiting, {self.seconds:.0f} s so far: {words()}")
            self._next = self.seconds + _WORD_SECONDS
