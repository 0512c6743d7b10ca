"""Errors that may pass, told from those that stay, before anything is recorded for good.

At an opening what cannot be read is given up, so that the rest can be used. But too many open files, no memory, or an
error that is gone a moment later are no reason to: the opening is refused then, and the next one finds all as it was.
"""

import errno
import time
from collections import deque
from collections.abc import Callable
from typing import TypeVar

from cow.errors import MayPassError

# What a disk, or what stands for one, answers for a sector that it cannot give or take. Others are not about a sector.
BAD_SECTOR = {
    errno.EIO,
    errno.ENODATA,
    errno.EREMOTEIO,
    errno.EILSEQ,
    errno.EBADMSG,
    errno.EUCLEAN,
    errno.ETIMEDOUT,
}
NO_ROOM = {errno.ENOSPC, errno.EDQUOT}  # which have a sentence of their own
TRIES = 3
PAUSE_SECONDS = 0.3  # between two of them
MOST_PAUSES = 16  # in a minute
_FORGET_SECONDS = 60.0

T = TypeVar("T")
_pauses: deque[float] = deque(maxlen=MOST_PAUSES)  #: when the latest were


def stays(call: Callable[[], T], what: str) -> T:
    """The result of `call`, which is made again after a moment while it fails as at a bad sector. Blocks.

    Raises the OSError when it stayed, FileNotFoundError and those of a full disk at once, and MayPassError for all
    others; `what` says what cannot be done then.
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
    """Give an error a moment to pass. Blocks; not where there are so many errors that this would go on for long."""
    now = time.monotonic()
    if len(_pauses) < MOST_PAUSES or now - _pauses[0] > _FORGET_SECONDS:
        _pauses.append(now)
        time.sleep(PAUSE_SECONDS)


def raise_if_passing(error: Exception, what: str) -> None:
    """Raise MayPassError for an OSError that says nothing of a sector, nor of room, nor that there is no such file."""
    if not isinstance(error, OSError) or error.errno in BAD_SECTOR | NO_ROOM | {errno.ENOENT}:
        return
    raise MayPassError(
        f"{what} ({error.strerror or error}): nothing was given up for it, as that may pass. See to it (open files, "
        f"memory, whether the disk is there and takes writes), and try again"
    ) from error
