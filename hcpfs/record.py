"""How a mount was made, left in /run/hcpfs (of root) while the daemon lives, for `hcpfs recover` after its death.

One small JSON file for each mount point, removed at a clean umount. It is a convenience: whoever cannot write it says
so and goes on without.
"""

import fcntl
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from xxhash import xxh3_64_hexdigest


def _place() -> str:
    """A user who is not root has a place of his own: where his session keeps such things, or in his home."""
    if os.geteuid() == 0:
        return "/run/hcpfs"
    session = os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.geteuid()}"
    return os.path.join(session if os.path.isdir(session) else os.path.expanduser("~/.local/state"), "hcpfs")


DIRECTORY = _place()
_DEAD = ("X", "Z")


@dataclass
class Record:
    """A mount: its daemon, and the words for `hcpfs` that make it again."""

    mountpoint: str
    arguments: list[str]
    images: list[str]  #: the names in live/
    pid: int = 0
    started: int = 0  #: when the daemon began, in clock ticks since the boot: a pid alone may be somebody else's by now
    above: dict[str, Any] = field(default_factory=dict)  #: what a recovery took down and has not put back

    @property
    def is_alive(self) -> bool:
        """Whether the daemon still runs."""
        state, started = _state(f"/proc/{self.pid}")
        return state not in _DEAD and started == self.started

    @property
    def lingers(self) -> bool:
        """Whether the daemon or a thread of it is still there: one that waits in the kernel outlives a SIGKILL."""
        if _state(f"/proc/{self.pid}")[1] != self.started:
            return False
        with suppress(FileNotFoundError):
            return any(_state(str(task))[0] not in _DEAD for task in Path(f"/proc/{self.pid}/task").iterdir())
        return False


def of_this_process(mountpoint: str, arguments: list[str], images: list[str]) -> Record:
    """The record of a mount that this process serves."""
    return Record(mountpoint, arguments, images, os.getpid(), _state("/proc/self")[1])


def _state(process: str) -> tuple[str, int]:
    """The state of a process or thread, and when it began; X and -1 when it is gone."""
    try:
        text = Path(process, "stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return "X", -1
    fields = text.rpartition(")")[2].split()  # from the third on; the second, the command, may have blanks in it
    return fields[0], int(fields[19])


def write(record: Record) -> None:
    """Leave the record, in place of an older one for the mount point. Raises OSError."""
    name = _name(record.mountpoint)
    new = f"{name}.{os.getpid()}"
    with _directory() as directory:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(new, flags, 0o600, dir_fd=directory), "w", encoding="ascii") as file:
            json.dump(asdict(record), file)
        os.replace(new, name, src_dir_fd=directory, dst_dir_fd=directory)


def read(mountpoint: str) -> Record | None:
    """The record for the mount point; None when there is none that can be trusted and read."""
    with suppress(OSError), _directory() as directory:
        return _load(directory, _name(mountpoint))
    return None


def others(mountpoint: str) -> list[Record]:
    """The records for all other mount points."""
    with suppress(OSError), _directory() as directory:
        names = [name for name in os.listdir(directory) if name.endswith(".json") and name != _name(mountpoint)]
        return [record for name in names if (record := _load(directory, name)) is not None]
    return []


def remove(mountpoint: str, pid: int) -> None:
    """Remove the record of that daemon; a later daemon's for the mount point stays. Raises OSError."""
    with _directory() as directory:
        found = _load(directory, _name(mountpoint))
        if found is not None and found.pid == pid:
            os.unlink(_name(mountpoint), dir_fd=directory)


@contextmanager
def recovering() -> Iterator[None]:
    """One recovery at a time: the second waits, and then finds nothing to do. Raises OSError."""
    with _directory() as directory:
        fcntl.flock(directory, fcntl.LOCK_EX)
        yield


def _name(mountpoint: str) -> str:
    return f"{xxh3_64_hexdigest(os.fsencode(mountpoint))}.json"


@contextmanager
def _directory() -> Iterator[int]:
    """The directory, made when missing, as a descriptor. What is in it is run as root, so nobody else may write."""
    with suppress(FileExistsError):
        os.makedirs(DIRECTORY, 0o700)
    fd = os.open(DIRECTORY, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        kind = os.fstat(fd)
        if kind.st_uid != os.geteuid() or stat.S_IMODE(kind.st_mode) & 0o077:
            raise PermissionError(f"{DIRECTORY} is not only ours: it must have our owner and mode 0700")
        yield fd
    finally:
        os.close(fd)


def _load(directory: int, name: str) -> Record | None:
    try:
        with os.fdopen(os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory), "rb") as file:
            record = Record(**json.load(file))
    except (OSError, ValueError, TypeError):
        return None
    return record if _name(record.mountpoint) == name else None
