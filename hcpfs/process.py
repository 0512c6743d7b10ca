"""What the daemon asks for itself: of the kernel, to serve disks under memory pressure (I10), and of libc."""

import ctypes
import os
import resource
from pathlib import Path

from cow.disk.limits import raise_limit

_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4
_PR_SET_IO_FLUSHER = 57
_OOM_SCORE_ADJ = -900
_CAP_IPC_LOCK = 14  # <linux/capability.h>
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # mallopt(3)
_KEPT_BYTES = 24 << 20  # about one filling of a buffer
_MOST_HEAP_BYTES = 4 << 20  # of one allocation; a request has 1 MiB

_libc = ctypes.CDLL(None, use_errno=True)


def harden() -> list[str]:
    """Lock memory, become an I/O flusher, avoid the OOM killer, allow many files.

    Call before the first thread starts: the flusher flag is per thread and inherited. Returns what was not permitted,
    as sentences; none of it is needed for correctness, only against deadlock and death when memory is short.
    """
    refused = []
    for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE, resource.RLIMIT_AS, resource.RLIMIT_MEMLOCK):
        raise_limit(kind)
    if not lock_memory(_MCL_ONFAULT):
        refused.append("lock memory (CAP_IPC_LOCK, or ulimit -l unlimited)")
    if _libc.prctl(_PR_SET_IO_FLUSHER, 1, 0, 0, 0) != 0:
        refused.append(f"set PR_SET_IO_FLUSHER ({os.strerror(ctypes.get_errno())})")
    try:
        Path("/proc/self/oom_score_adj").write_text(str(_OOM_SCORE_ADJ))
    except OSError as error:
        refused.append(f"lower oom_score_adj ({error.strerror})")
    return refused


def keep_memory() -> None:
    """Have malloc keep what is freed of buffers, which are filled again at once, and one heap for all threads.

    Else each filling is fetched from the kernel anew, page by page. Call before the first thread starts.
    """
    if hasattr(_libc, "mallopt"):  # glibc's
        _libc.mallopt(_M_ARENA_MAX, 1)
        _libc.mallopt(_M_MMAP_THRESHOLD, _MOST_HEAP_BYTES)
        _libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def lock_memory(flags: int = 0) -> bool:
    """Lock memory, with more flags of mlockall(2), where that is permitted without a limit. Whether it was.

    With a limit (RLIMIT_MEMLOCK) all memory and threads that come later would be refused as soon as it is reached.
    """
    if resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] != resource.RLIM_INFINITY and not _has_capability(_CAP_IPC_LOCK):
        return False
    return bool(_libc.mlockall(_MCL_CURRENT | _MCL_FUTURE | flags) == 0)


def _has_capability(number: int) -> bool:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return bool(int(lines["CapEff"], 16) >> number & 1)
