"""Programs that have our images, or devices above them, open for writing, and whether there can be others.

The kernel does not tell who has a block device open, so all processes are looked at: their descriptors, and if wanted
their mappings, which outlive the descriptor. That takes some 5 us a descriptor. No request goes to a file system.

As in hcpfs/system/users.py, files that are only in flight over a socket or registered with an io_uring, and descriptor
tables of single threads, do not show.
"""

import os
import threading
import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from hcpfs.system import users

_FIRST_PID_NAMESPACE = 0xEFFFFFFC  # PROC_PID_INIT_INO
_INIT = "1"  # it may have capabilities that we lack, so that we may not look; it writes to no disk itself
_MOST_NAMED = 4
_AGAIN_SECONDS = 0.02  # until a process that could not be looked at is looked at once more
_SECONDS = 3.0  # to look at all processes; one whose memory is locked may take for ever
# No need to ask what these are. All other paths may lead to a device, also outside of /dev.
_HARMLESS = ("/dev/null", "/dev/pts/", "/dev/tty", "/dev/urandom", "/dev/random", "/dev/zero", "/memfd:", "/proc/")


class Wanted(NamedTuple):
    """What is looked for: files by device and inode, block devices by number."""

    files: list[tuple[int, int]]
    blocks: list[int]


class Found(NamedTuple):
    """Sentences: which programs have something of it open for writing, and why some may be overlooked."""

    writers: list[str]
    unseen: list[str]


class Search:
    """A look at all processes, in a thread of its own."""

    def __init__(self, wanted: Wanted, *, mappings: bool = False) -> None:
        self._files = {tuple(file) for file in wanted.files}
        self._blocks = set(wanted.blocks)
        self._mappings = mappings
        self._writers: list[str] = []
        self._unseen: list[str] = []
        self._thread = threading.Thread(target=self._look, daemon=True)  # killed with us, wherever it waits
        self._thread.start()

    def found(self) -> Found:
        """What was found; waits for the end of the look, for a limited time."""
        self._thread.join(_SECONDS)
        unseen = list(self._unseen)
        if self._thread.is_alive():
            unseen.append(f"not all processes could be looked at within {_SECONDS:g} s")
        return Found(list(self._writers), unseen)

    def _look(self) -> None:
        try:
            if os.stat("/proc/self/ns/pid").st_ino != _FIRST_PID_NAMESPACE:
                self._unseen.append("hcpfs is in a pid namespace, from which not all processes can be seen")
            refused = [name for name in self._look_at() if self._stays_closed(name)]
        except OSError as error:
            self._unseen.append(f"the processes cannot be looked at: {error.strerror}")
            return
        if refused:
            who = ", ".join(f"{users.program_of(int(name))} (process {name})" for name in refused[:_MOST_NAMED])
            self._unseen.append(f"hcpfs may not see what {len(refused)} processes have open: {who}")

    def _stays_closed(self, name: str) -> bool:
        """Whether a process still may not be looked at: one that just begins or ends may not, for a moment."""
        time.sleep(_AGAIN_SECONDS)
        return bool(self._look_at([name]))

    def _look_at(self, names: Iterable[str] | None = None) -> list[str]:
        """Look at these processes, or at all. Returns those that we may not look at."""
        refused = []
        own = str(os.getpid())
        for name in os.listdir("/proc") if names is None else names:
            if not name.isdecimal() or name == own:
                continue
            try:
                written = next(self._written_by(name), None)
            except PermissionError:
                if name != _INIT:
                    refused.append(name)
                continue
            if written is not None:
                program = users.program_of(int(name))
                self._writers.append(f"{program} (process {name}) has {written} open for writing")
        return refused

    def _written_by(self, process: str) -> Iterator[str]:
        directory = f"/proc/{process}/fd"
        try:
            numbers = os.listdir(directory)
        except FileNotFoundError:
            return  # gone meanwhile
        for number in numbers:
            link = f"{directory}/{number}"
            shown = _shown(link)
            if self._is_wanted(link, shown) and _is_writable(process, number):
                yield shown
        if self._mappings:
            yield from self._mapped_by(process)

    def _mapped_by(self, process: str) -> Iterator[str]:
        try:
            with open(f"/proc/{process}/maps", "rb", buffering=0) as file:
                maps = file.readall()
        except (FileNotFoundError, ProcessLookupError):
            return
        if b" rw-s " not in maps:
            return
        for line in maps.splitlines():
            place, permissions, *_ = line.split(maxsplit=2)
            if permissions == b"rw-s":
                first, last = (part.lstrip(b"0") or b"0" for part in place.split(b"-"))
                link = f"/proc/{process}/map_files/{first.decode()}-{last.decode()}"
                shown = _shown(link)
                if self._is_wanted(link, shown):
                    yield shown

    def _is_wanted(self, link: str, shown: str) -> bool:
        if not shown.startswith("/") or shown.startswith(_HARMLESS):
            return False
        try:
            known = users.known_of(link)
        except OSError:
            return False  # closed meanwhile
        return known.block_device in self._blocks or (known.device, known.inode) in self._files


def _shown(link: str) -> str:
    try:
        return os.readlink(link)
    except PermissionError:
        raise
    except OSError:  # closed meanwhile
        return ""


def _is_writable(process: str, number: str) -> bool:
    try:
        with open(f"/proc/{process}/fdinfo/{number}", "rb") as file:
            flags = next(int(line.split()[1], 8) for line in file if line.startswith(b"flags:"))
    except (OSError, StopIteration):
        return False  # closed meanwhile
    return flags & os.O_ACCMODE != os.O_RDONLY and not flags & os.O_PATH
