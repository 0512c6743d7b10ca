"""What keeps processes that test side by side apart: the numbers of their loop devices, and their mount namespaces.

A number that a test has released and will use again must not go to another test in between; a namespace that a test
makes must not copy, and so keep busy, what another test has mounted.
"""

import ctypes
import fcntl
import functools
import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from hcpfs.daemon import record
from hcpfs.options import STORES

_FIRST_NUMBER = 64  # below are those that programs find by themselves
_NUMBERS = 32  # of one process
_MOST_PROCESSES = 64
_LOOP_CTL_ADD, _LOOP_CTL_REMOVE = 0x4C80, 0x4C81
_CLONE_NEWNS = 0x20000
_MS_REC, _MS_PRIVATE = 0x4000, 0x40000

_libc = ctypes.CDLL(None, use_errno=True)
_kept: list[socket.socket] = []


@functools.cache
def loop_numbers() -> range:
    """The numbers that are this process's until it ends, however it ends: who has the address has them."""
    address, numbers = next(_nobodys(), (None, range(0)))
    assert address is not None, f"{_MOST_PROCESSES} processes test on this machine at once"
    _kept.append(address)
    return numbers


def detach_orphans() -> None:
    """Detach the loop devices of processes that ended without doing so themselves."""
    for address, _ in _nobodys():
        address.close()


def _nobodys() -> Iterator[tuple[socket.socket, range]]:
    """The addresses that nobody has, and their numbers; no loop device with such a number has a file."""
    for place in range(_MOST_PROCESSES):
        address = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            address.bind(f"\0hcpfs-test-loops-{place}")
        except OSError:
            address.close()
            continue
        first = _FIRST_NUMBER + place * _NUMBERS
        numbers = range(first, first + _NUMBERS)
        for number in filter(is_bound, numbers):
            subprocess.run(["losetup", "-d", f"/dev/loop{number}"], check=True)
        remove_loops(numbers)
        yield address, numbers


def is_bound(number: int) -> bool:
    """Whether the loop device has a file."""
    return Path(f"/sys/block/loop{number}/loop").exists()


def free_loop() -> str:
    """A loop device of ours that has no file."""
    number = next(number for number in loop_numbers() if not is_bound(number))
    _control(_LOOP_CTL_ADD, number)
    return f"/dev/loop{number}"


def remove_loops(numbers: range | None = None) -> None:
    """Remove the loop devices with these numbers, ours by default, that have no file."""
    for number in loop_numbers() if numbers is None else numbers:
        if Path(f"/sys/block/loop{number}").exists():
            _control(_LOOP_CTL_REMOVE, number)


def _control(request: int, number: int) -> None:
    fd = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    try:
        with suppress(OSError):  # it is there already; it is in use
            fcntl.ioctl(fd, request, number)
    finally:
        os.close(fd)


def enter_own_namespace() -> None:
    """Leave the mount namespace of the others; no record of theirs, and no store of the machine's, is seen in ours.

    For the calling thread, and what it starts from then on.
    """
    _check(_libc.unshare(_CLONE_NEWNS))
    _check(_libc.mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None))
    for place in (record.DIRECTORY, STORES):
        os.makedirs(place, mode=0o700, exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=700", "hcpfs-test", place], check=True)


def _check(result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
