"""Telling errors that may pass from errors that stay, before anything is recorded for good.

An opening gives up what cannot be read, so that the rest can be used. An error that is gone a moment later is no reason
for that, so the call is retried; nor are too many open files, or a lack of memory: the opening is refused then, and the
next one finds everything as it was.
"""

import errno
import time
from collections import deque
from collections.abc import Callable
from typing import TypeVar

from cow.errors import MayPassError

# What a disk, or a driver that acts as one, returns for a sector that it cannot read or write. No other errno is about
# a sector.
BAD_SECTOR = {
    errno.EIO,
    errno.ENODATA,
    errno.EREMOTEIO,
    errno.EILSEQ,
    errno.EBADMSG,
    errno.EUCLEAN,
    errno.ETIMEDOUT,
}
NO_ROOM = {errno.ENOSPC, errno.EDQUOT}  # errors that have a sentence of their own
TRIES = 3
PAUSE_SECONDS = 0.3  # between two tries
MOST_PAUSES = 16  # in a minute
_FORGET_SECONDS = 60.0

T = TypeVar("T")
_pauses: deque[float] = deque(maxlen=MOST_PAUSES)  #: the times of the latest


def stays(call: Callable[[], T], what: str) -> T:
    """The result of `call`, which is retried after a pause while it fails as at a bad sector. Blocks.

    Raises the OSError when it stays, FileNotFoundError and the errors of a full disk at once, and MayPassError for all
    others; its sentence begins with `what`, which says what cannot be done.
    """
    for tries_left in reversed(range(TRIES)):
        try:
            return call()
        except OSError as error:
            raise_if_passing(error, what)
            if not tries_left or error.errno not in BAD_SECTOR:
                raise
        pause()
    raise AssertionError  # not reached


def pause() -> None:
    """Give an error a moment to pass. Blocks, but not when there are so many errors that the pauses would take long."""
    now = time.monotonic()
    if len(_pauses) < MOST_PAUSES or now - _pauses[0] > _FORGET_SECONDS:
        _pauses.append(now)
        time.sleep(PAUSE_SECONDS)


def raise_if_passing(error: Exception, what: str) -> None:
    """Raise MayPassError for an OSError that is not about a sector, nor a lack of room, nor a missing file."""
    if not isinstance(error, OSError) or error.errno in BAD_SECTOR | NO_ROOM | {errno.ENOENT}:
        return
    raise MayPassError(
        f"{what} ({error.strerror or error}): nothing was given up for it, as that may pass. See to it (open files, "
        f"memory, whether the disk is there and takes writes), and try again"
    ) from error
