"""Whether a store can stand where it is put: what its file system and this process's limits must allow, in words.

All of it is checked before anything is made, so that it never costs a snapshot: a limit that shows later, in the middle
of a write to the origin, would.
"""

import errno
import os
import resource
from collections.abc import Iterable

from cow.disk.directory import Directory
from cow.disk.io import FULL
from cow.disk.limits import raise_limit
from cow.durable.reserve import RESERVE_BYTES
from cow.errors import RefusedError, StoreFullError
from cow.geometry import CHUNK_BYTES, chunks_of
from cow.layers.layer import OTHER_OPEN_FILES, SEGMENT_CHUNKS, open_files
from cow.layers.sums import SUM_BYTES

_ELSEWHERE = "put the store on ext4 or XFS, with --store DIR"
WHY_NOT_MADE = {  #: by the errno of a call that makes a file or a directory
    errno.EROFS: "it is mounted read-only, and a store is written to with -o ro, too: mount it read-write (mount -o "
    "remount,rw), or copy the store elsewhere (cp -a)",
    errno.EPERM: "the directory is immutable, or may be appended to only: chattr -i -a it",
    errno.EACCES: "you have no right to write there: do it as root, or choose a directory of yours",
}


def check_file_system(directory: Directory, largest_bytes: int, *, is_new: bool) -> None:
    """Raise RefusedError where the file system lacks what a store needs, or takes no file of `largest_bytes`.

    StoreFullError when there is no room for a new store; an existing one may be opened without.
    """
    raise_limit(resource.RLIMIT_FSIZE)
    found = directory.io.try_out(directory.fd, largest_bytes)
    where = f"the store {directory.label} cannot be used: its file system ({directory.io.file_system(directory.fd)})"
    if FULL & {found.make, found.allocate, found.grow}:
        if is_new:
            raise StoreFullError(f"{where} has no room for one: no space or no inodes are left; make room there")
        return
    if found.make in WHY_NOT_MADE:
        raise RefusedError(f"{where} takes no writes here ({os.strerror(found.make)}): {WHY_NOT_MADE[found.make]}")
    if errno.EFBIG in (found.make, found.allocate, found.grow) or found.grow == errno.EINVAL:
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        if limit != resource.RLIM_INFINITY and limit < largest_bytes:
            raise RefusedError(
                f"the store {directory.label} may need a file of {largest_bytes} bytes, and this process may write "
                f"{limit} at most: raise the limit (ulimit -f unlimited, LimitFSIZE=infinity) and mount again"
            )
        raise RefusedError(f"{where} takes no file of {largest_bytes} bytes, which this disk may need: {_ELSEWHERE}")
    if found.make:
        raise RefusedError(f"{where} fails ({os.strerror(found.make)}): see the kernel's log, or {_ELSEWHERE}")
    lacks = [
        word
        for word, is_there in (
            ("cannot hold space back (fallocate)", not found.allocate),
            ("keeps no holes in files (sparse files)", found.keeps_holes),
            ("cannot share a file in memory (mmap)", not found.map),
        )
        if not is_there
    ]
    if lacks:
        raise RefusedError(f"{where} {', and '.join(lacks)}, which a store needs: {_ELSEWHERE}")


def largest_file_bytes(device_bytes: Iterable[int]) -> int:
    """The largest file that a store for devices of these sizes may have."""
    chunks = max(map(chunks_of, device_bytes), default=0)
    return max(RESERVE_BYTES, min(chunks, SEGMENT_CHUNKS) * CHUNK_BYTES, chunks * SUM_BYTES)


def check_open_files(layers_directory: Directory, device_bytes: Iterable[int]) -> None:
    """Raise RefusedError when this process may not have the files of all layers open, which would show only later."""
    raise_limit(resource.RLIMIT_NOFILE)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    layers = len(layers_directory.names())
    each = open_files(max(map(chunks_of, device_bytes), default=0))
    needed = OTHER_OPEN_FILES + layers * each
    if limit != resource.RLIM_INFINITY and needed > limit:
        raise RefusedError(
            f"the {layers} layers in {layers_directory.label} may need {needed} open files, and this process may open "
            f"{limit}: raise its limit (ulimit -n {needed}, LimitNOFILE={needed}) and mount again; nothing was changed"
        )


def check_source_limits(paths_and_bytes: Iterable[tuple[str, int]]) -> None:
    """Raise RefusedError when this process may not write a source that is a file to its end."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    for path, size_bytes in paths_and_bytes:
        if limit != resource.RLIM_INFINITY and limit < size_bytes:
            raise RefusedError(
                f"{path} has {size_bytes} bytes, and this process may write a file up to {limit} at most: raise the "
                f"limit (ulimit -f unlimited, LimitFSIZE=infinity), or mount with -o ro"
            )
