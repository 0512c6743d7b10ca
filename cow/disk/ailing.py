"""What an error of a source means, one bad sector or a device that is away, and the sentence for it.

A chunk that cannot be read is lost to the snapshots when it is overwritten, but overwriting may repair the sector (I8).
If the device as a whole does not respond, the write would fail as well: nothing is overwritten, and everything is there
again when the device is back. So the writer gets the error then. # I1
"""

import errno
import os

from cow.disk.passing import BAD_SECTOR
from cow.disk.source import OriginDevice, SourceError
from cow.geometry import CHUNK_BYTES

_PLACES = 8  # to try, spread over the device, besides its end
_NEAR_CHUNKS = 256  # errors this close to a bad sector say nothing about the device

_MEANINGS = {
    errno.ENOSPC: "the file system that it is on is full, which is not the store's: it is a sparse file, and the write "
    "needs room there. Make room on that file system; no snapshot lost anything by it",
    errno.EDQUOT: "the quota of the file system that it is on is used up, which is not the store's: make room there; "
    "no snapshot lost anything by it",
    errno.EFBIG: "that is more than a file may have there: the file system or the limit of file sizes (ulimit -f) "
    "does not allow it",
    errno.EROFS: "it, or the file system that it is on, has become read-only: see the kernel's log for why",
    errno.EPERM: "it may not be written: it is write-protected, or was made immutable (lsattr)",
    errno.EACCES: "it may not be used so: it is write-protected, or was made read-only",
}
_OF_A_DISK = "the device or what it is on fails: see the kernel's log (dmesg), and check it"


def told(error: OSError, device: OriginDevice, image: str, action: str, offset: int | None = None) -> SourceError:
    """The error in words: which image and path, what was tried where, what it means and what to do."""
    if isinstance(error, SourceError):
        return error
    place = "" if offset is None else f" at offset {offset}"
    meaning = _MEANINGS.get(error.errno or 0, _OF_A_DISK)
    return SourceError(
        error.errno, f"image {image} ({device.label}) cannot be {action}{place} ({_words(error)}): {meaning}"
    )


def why_away(device: OriginDevice, chunk: int, error: OSError) -> OSError | None:
    """Why a chunk that cannot be read is no bad sector; None when the device responds elsewhere. Blocks.

    Reads bypass the page cache, which may have what the device no longer returns. Most places must respond, and a flush
    must work, because the data of those places may come from a cache further down.
    """
    if isinstance(error, SourceError):  # it was truncated, or is gone
        return error
    if error.errno in BAD_SECTOR:
        places = _places(chunk, -(-device.size_bytes // CHUNK_BYTES))
        silent = sum(not _answers(device, place) for place in places)
        is_answering = bool(places) and 2 * silent < len(places)
        if is_answering and _flushes(device):
            return None
        if is_answering:
            seen = "nor flushed"
        else:
            seen = f"nor {silent} of {len(places)} other places" if places else "and it has no other place to try"
    else:
        seen = "which is not what a bad sector gives"
    return _away(error, f"{device.label} cannot be read at offset {chunk * CHUNK_BYTES} ({_words(error)}), {seen}")


def check_size(device: OriginDevice) -> None:
    """`OriginDevice.check_size`, with a sentence for a file whose size cannot even be read. Raises SourceError."""
    try:
        device.check_size()
    except SourceError:
        raise
    except OSError as error:
        raise _away(error, f"{device.label} cannot be looked at ({_words(error)})") from error


def _away(error: OSError, what: str) -> SourceError:
    return SourceError(
        error.errno,
        f"{what}: the device is away. So nothing was overwritten, no snapshot lost anything. Bring it back (its cable, "
        f"its connection, what serves it), and write again; what was acknowledged and not flushed waits in memory",
    )


def _places(chunk: int, chunks: int) -> list[int]:
    others = {chunks * place // _PLACES for place in range(_PLACES)} | {chunks - 1}
    others -= {chunk}
    return sorted(one for one in others if abs(one - chunk) >= _NEAR_CHUNKS) or sorted(others)


def _answers(device: OriginDevice, chunk: int) -> bool:
    try:
        return bool(device.pread_past_cache(CHUNK_BYTES, chunk * CHUNK_BYTES))
    except OSError:
        return False


def _flushes(device: OriginDevice) -> bool:
    try:
        device.flush_by_another()
    except OSError:
        return False
    return True


def _words(error: OSError) -> str:
    return error.strerror or os.strerror(error.errno or errno.EIO)
