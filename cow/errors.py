"""Every error that the engine raises: an errno for the caller, a sentence for the user.

The sentence names what failed, where, and what to do. Each class stands for one row of the table of errors
in hcpfs/REFERENCE.md; the file system hands `errno` to the kernel and keeps the sentence for `status`.
"""

import errno as _errno

WAY = "\n  "  #: precedes each way to go on, in a sentence that lists several


def counted(count: int, noun: str) -> str:
    """A count with its noun, such as `1 snapshot` and `2 snapshots`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def printable(name: bytes) -> str:
    """A name from the file system as text that is safe to print: bytes that are not UTF-8 are escaped."""
    return name.decode("utf-8", "backslashreplace")


def without_surrogates(text: str) -> str:
    """The sentence, which may contain a path that is not UTF-8 (os.fsdecode), as text that can be encoded."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


class CowError(Exception):
    """Base class of the engine's errors. `str()` of one is its sentence."""

    errno: int = _errno.EIO


class NotFoundError(CowError):
    """No snapshot of that name."""

    errno = _errno.ENOENT


class NameTakenError(CowError):
    """A snapshot of that name exists."""

    errno = _errno.EEXIST


class BadNameError(CowError):
    """The name has a control character, a slash or a leading dot, or is empty."""

    errno = _errno.EINVAL


class NameTooLongError(CowError):
    """The name is over 255 bytes."""

    errno = _errno.ENAMETOOLONG


class SnapshotBusyError(CowError):
    """An image of the snapshot is open."""

    errno = _errno.EBUSY


class PastEndError(CowError):
    """A write beyond the image's end; ENOSPC, as on a block device."""

    errno = _errno.ENOSPC


class StoreFullError(CowError):
    """The file system that holds the store has no space left."""

    errno = _errno.ENOSPC


class QuotaError(CowError):
    """The store would pass its quota."""

    errno = _errno.EDQUOT


class ReadOnlyError(CowError):
    """The store was opened read-only."""

    errno = _errno.EROFS


class StoreGoneError(CowError):
    """The store was removed, moved or made read-only while in use."""

    errno = _errno.ESTALE


class NoMemoryError(CowError):
    """There was no memory, or no thread, for the request. Nothing was lost."""

    errno = _errno.ENOMEM


class DamagedError(CowError):
    """Bytes of the store do not match their checksum, or are missing."""


class LostError(CowError):
    """Old bytes that could not be kept when the origin overwrote them, or that a repair gave up."""


class SuspectError(CowError):
    """The device was changed while hcpfs was not running, so what a snapshot reads from it may be wrong."""


class InvalidSnapshotError(CowError):
    """The snapshot was given up; its `info` says why."""


class SyncError(CowError):
    """A sync failed earlier; what it covered may be lost, so no later sync of that file can succeed (I3)."""


class HoldTimeoutError(CowError):
    """Writes in flight did not end in time, so no instant could be taken."""

    errno = _errno.ETIMEDOUT


class RefusedError(CowError):
    """The store or the source cannot be opened as asked. Nothing was changed."""

    errno = _errno.EBUSY


class MayPassError(RefusedError):
    """An error that may be gone on the next attempt, so nothing was given up because of it."""

    errno = _errno.EIO
