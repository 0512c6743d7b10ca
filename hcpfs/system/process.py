"""What the daemon asks of the kernel for itself, to serve disks under memory pressure (I10)."""

import ctypes
import os
import resource
from pathlib import Path

from cow.disk.limits import raise_limit
from hcpfs.system.libc import libc
from hcpfs.system.memory import MCL_ONFAULT, lock_memory

_PR_SET_IO_FLUSHER = 57
_OOM_SCORE_ADJ = -900


def harden() -> list[str]:
    """Lock memory, become an I/O flusher, avoid the OOM killer, allow many files.

    Call before the first thread starts: the flusher flag is per thread and inherited. Returns what was not permitted,
    in words; it is not needed for correctness, but prevents deadlock and death when memory is short.
    """
    refused = []
    for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE, resource.RLIMIT_AS, resource.RLIMIT_MEMLOCK):
        raise_limit(kind)
    if not lock_memory(MCL_ONFAULT):
        refused.append("lock memory (CAP_IPC_LOCK, or ulimit -l unlimited)")
    if libc.prctl(_PR_SET_IO_FLUSHER, 1, 0, 0, 0) != 0:
        refused.append(f"set PR_SET_IO_FLUSHER ({os.strerror(ctypes.get_errno())})")
    try:
        Path("/proc/self/oom_score_adj").write_text(str(_OOM_SCORE_ADJ))
    except OSError as error:
        refused.append(f"lower oom_score_adj ({error.strerror})")
    return refused
