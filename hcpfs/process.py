"""What the daemon asks of the kernel for itself, so that it can serve disks under memory pressure. # I10"""

import ctypes
import os
import resource
from pathlib import Path

_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4
_PR_SET_IO_FLUSHER = 57
_OOM_SCORE_ADJ = -900

_libc = ctypes.CDLL(None, use_errno=True)


def harden() -> list[str]:
    """Lock memory, become an I/O flusher, avoid the OOM killer, allow many files.

    Call before the first thread starts: the flusher flag is per thread and inherited. Returns what was not permitted,
    as sentences; none of it is needed for correctness, only against deadlock and death when memory is short.
    """
    refused = []
    if _libc.mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT) != 0:
        refused.append(f"lock memory ({os.strerror(ctypes.get_errno())})")
    if _libc.prctl(_PR_SET_IO_FLUSHER, 1, 0, 0, 0) != 0:
        refused.append(f"set PR_SET_IO_FLUSHER ({os.strerror(ctypes.get_errno())})")
    try:
        Path("/proc/self/oom_score_adj").write_text(str(_OOM_SCORE_ADJ))
    except OSError as error:
        refused.append(f"lower oom_score_adj ({error.strerror})")
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return refused


def lock_memory() -> None:
    """Lock memory where permitted; for the freezer, which must not wait for a disk that it froze."""
    _libc.mlockall(_MCL_CURRENT | _MCL_FUTURE)
