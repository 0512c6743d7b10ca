"""Records of how mounts were made, in /run/hcpfs (for root), for `hcpfs recover` after the death of their daemon.

One small JSON file for each mount point, written when it is mounted and removed at a clean umount. It is a convenience:
a daemon that cannot write it says so and goes on. For records of mounts that are long gone see
hcpfs/recover/leftovers.py.
"""

import fcntl
import json
import os
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from xxhash import xxh3_64_hexdigest

from hcpfs.system import beneath, blocks


def _place() -> str:
    """Root's directory, or that of the user: in the runtime directory of his session, or in his home."""
    if os.geteuid() == 0:
        return "/run/hcpfs"
    session = os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.geteuid()}"
    return os.path.join(session if os.path.isdir(session) else os.path.expanduser("~/.local/state"), "hcpfs")


DIRECTORY = _place()
_DEAD = ("X", "Z")


@dataclass
class Record:
    """A mount: its daemon, and the words for `hcpfs` that mount it again."""

    mountpoint: str
    arguments: list[str]
    images: list[str]  #: the names in live/
    pid: int = 0
    started: int = 0  #: when the daemon was started, in clock ticks since the boot, because its pid may be used again
    above: dict[str, Any] = field(default_factory=dict)  #: what a recovery took down and has not put back
    # Older versions do not write these:
    boot: str = ""  #: the kernel's boot_id
    device: int = 0  #: the device number of the mount, whose minor is the number of its FUSE connection
    source: str = ""  #: what mountinfo shows as its source
    mounted_ns: int = 0  #: when the mount was seen, on the monotonic clock
    store: str = ""
    sources: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)  #: of the images, in bytes, in their order

    @property
    def is_alive(self) -> bool:
        """Whether the daemon still runs."""
        state, started = _state(f"/proc/{self.pid}")
        return state not in _DEAD and started == self.started

    @property
    def lingers(self) -> bool:
        """Whether a thread of the daemon is still there: one that waits in the kernel outlives a SIGKILL."""
        if _state(f"/proc/{self.pid}")[1] != self.started:
            return False
        with suppress(FileNotFoundError):
            return any(_state(str(task))[0] not in _DEAD for task in Path(f"/proc/{self.pid}/task").iterdir())
        return False


_FIELDS = {one.name for one in fields(Record)}


def of_this_process(
    mountpoint: str, arguments: list[str], images: list[str], store: str = "", sources: Sequence[str] = ()
) -> Record:
    """The record of a mount that this process serves; `sources` are paths, in the order of `images`. Raises OSError."""
    shown = [one for one in beneath.mounts() if one.mountpoint == mountpoint]
    return Record(
        *(mountpoint, arguments, images, os.getpid(), _state("/proc/self")[1]),
        boot=boot(),
        device=shown[-1].device if shown else 0,
        source=shown[-1].source if shown else "",
        mounted_ns=time.monotonic_ns(),
        store=store,
        sources=list(sources),
        sizes=[blocks.size_of(source) for source in sources],
    )


def boot() -> str:
    """The kernel's random id of this boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _state(process: str) -> tuple[str, int]:
    """The state of a process or thread, and its start time in clock ticks; X and -1 when it is gone."""
    try:
        text = Path(process, "stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return "X", -1
    fields = text.rpartition(")")[2].split()  # from the third on; the second, the command, may have blanks in it
    return fields[0], int(fields[19])


def write(record: Record) -> None:
    """Write the record, in place of an older one for the mount point. Raises OSError."""
    name = _name(record.mountpoint)
    new = f"{name}.{os.getpid()}"
    with _directory(make=True) as directory:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(new, flags, 0o600, dir_fd=directory), "w", encoding="ascii") as file:
            json.dump(asdict(record), file)
        os.replace(new, name, src_dir_fd=directory, dst_dir_fd=directory)


def read(mountpoint: str) -> Record | None:
    """The record for the mount point; None when there is none, or it cannot be read or trusted."""
    with suppress(OSError), _directory() as directory:
        return _load(directory, _name(mountpoint))
    return None


def others(mountpoint: str | None) -> list[Record]:
    """The records for all other mount points; for all mount points with None."""
    own = "" if mountpoint is None else _name(mountpoint)
    with suppress(OSError), _directory() as directory:
        names = [name for name in os.listdir(directory) if name.endswith(".json") and name != own]
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
    """Allow one recovery at a time. A second one waits, and finds nothing to do afterwards. Raises OSError."""
    with _directory(make=True) as directory:
        fcntl.flock(directory, fcntl.LOCK_EX)
        yield


def _name(mountpoint: str) -> str:
    return f"{xxh3_64_hexdigest(os.fsencode(mountpoint))}.json"


@contextmanager
def _directory(*, make: bool = False) -> Iterator[int]:
    """A descriptor of the directory; with `make` it is made when missing.

    Its records are run as commands, so nobody else may write there. Raises OSError.
    """
    with suppress(FileExistsError):
        if make:
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
            values = json.load(file)
            record = Record(**{name: value for name, value in values.items() if name in _FIELDS})
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    return record if _name(record.mountpoint) == name else None
