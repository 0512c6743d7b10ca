"""Asking what may never answer: a mount whose daemon is dead or hangs, and loop devices on it.

A process that waits for a FUSE daemon may be unkillable until the connection is aborted, so a child asks, with a time
limit. The abort goes through the kernel's fusectl file system and fails all requests that wait.
"""

import enum
import errno
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from hcpfs.system import aside

_CACHED_SECONDS = 1.5  # for up to 1 s the kernel answers from what it remembers of a file, also when its daemon is dead
_DEAD = (errno.ENOTCONN, errno.ECONNABORTED)
_TRY = "import fcntl, os, sys\ntry:\n    {}\nexcept OSError as error:\n    sys.exit(error.errno)"
_READ = _TRY.format("os.read(os.open(sys.argv[1], os.O_RDONLY), 1)")
_LOOP_STATUS = _TRY.format("fcntl.ioctl(os.open(sys.argv[1], os.O_RDONLY | os.O_NONBLOCK), 0x4C05, bytes(232))")
_LOOP_FILE = "import struct\n" + _TRY.format(
    "status = fcntl.ioctl(os.open(sys.argv[1], os.O_RDONLY | os.O_NONBLOCK), 0x4C05, bytes(232))\n"
    "    print(*struct.unpack_from('QQ', status), file=sys.stderr)"
)


class Answer(enum.Enum):
    """What became of a question."""

    ANSWERS = enum.auto()
    DEAD = enum.auto()
    HANGS = enum.auto()


def ask(mountpoint: str, seconds: float) -> Answer:
    """Whether the daemon of the hcpfs at `mountpoint` answers within `seconds`."""
    return _in_a_child(_READ, os.path.join(mountpoint, "status"), seconds)


def ask_loop(path: str, seconds: float) -> Answer:
    """Whether the file system of the loop device's file answers within `seconds`."""
    deadline = time.monotonic() + _CACHED_SECONDS
    while (answer := _in_a_child(_LOOP_STATUS, path, seconds)) is Answer.ANSWERS and time.monotonic() < deadline:
        time.sleep(0.1)
    return answer


def loop_file(path: str, seconds: float) -> tuple[int, int] | None:
    """Device and inode number of a loop device's file; None when its file system does not answer within `seconds`."""
    code, said = attempt([sys.executable, "-I", "-S", "-c", _LOOP_FILE, path], seconds)
    numbers = said.split()
    return (int(numbers[0]), int(numbers[1])) if code == 0 and len(numbers) == 2 else None


def _in_a_child(program: str, path: str, seconds: float) -> Answer:
    code, _ = attempt([sys.executable, "-I", "-S", "-c", program, path], seconds)
    if code is None:
        return Answer.HANGS
    return Answer.DEAD if code in _DEAD else Answer.ANSWERS


def attempt(command: Sequence[str], seconds: float | None) -> tuple[int | None, str]:
    """Run a command, for at most `seconds` if given.

    Returns its exit code, or None when it did not end, and what it wrote to standard error. One that waits in the
    kernel and cannot be killed is abandoned.
    """
    child = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )
    assert child.stderr is not None
    with child.stderr:
        try:
            code = child.wait(seconds)
        except subprocess.TimeoutExpired:
            child.kill()
            with suppress(subprocess.TimeoutExpired):
                child.wait(1)
            return None, f"it did not end within {seconds:g} s"
        return code, child.stderr.read().decode(errors="replace").strip()


def abort(device: int) -> None:
    """Abort the FUSE connection of the mount with that device number: waiting requests fail. Raises OSError."""
    with _fusectl() as directory, suppress(FileNotFoundError):  # it is gone already
        fd = os.open(f"{os.minor(device)}/abort", os.O_WRONLY | os.O_CLOEXEC, dir_fd=directory)
        with os.fdopen(fd, "w") as file:
            file.write("1")


def connections() -> set[int]:
    """The minor numbers of all FUSE file systems, also of those that are mounted nowhere any more.

    A connection's directory exists as long as its file system (fuse_ctl_remove_conn in the kernel). Raises OSError.
    """
    with _fusectl() as directory:
        return {int(name) for name in os.listdir(directory)}


@contextmanager
def _fusectl() -> Iterator[int]:
    """A descriptor of the kernel's fusectl file system, whether or not it is mounted somewhere."""
    directory = aside.mount("fusectl")
    try:
        yield directory
    finally:
        os.close(directory)
