"""The process's memory: locked, so that it is never paged out (I10), and kept by malloc."""

import resource
from pathlib import Path

from hcpfs.system.libc import libc

MCL_ONFAULT = 4
_MCL_CURRENT, _MCL_FUTURE = 1, 2
_CAP_IPC_LOCK = 14  # <linux/capability.h>
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # mallopt(3)
_KEPT_BYTES = 24 << 20  # about one filling of a buffer
_MOST_HEAP_BYTES = 4 << 20  # of one allocation; a request has 1 MiB


def keep_memory() -> None:
    """Have malloc keep the memory of freed buffers, because they are filled again at once, and use one heap.

    Otherwise the kernel gives each buffer's pages anew, one fault at a time. Call before the first thread starts.
    """
    if hasattr(libc, "mallopt"):  # glibc's
        libc.mallopt(_M_ARENA_MAX, 1)
        libc.mallopt(_M_MMAP_THRESHOLD, _MOST_HEAP_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def lock_memory(flags: int = 0) -> bool:
    """Lock present and future memory, with further flags of mlockall(2); whether that was permitted.

    Not done under a limit (RLIMIT_MEMLOCK): once it is reached, every allocation and every new thread would fail.
    """
    if resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] != resource.RLIM_INFINITY and not _has_capability(_CAP_IPC_LOCK):
        return False
    return bool(libc.mlockall(_MCL_CURRENT | _MCL_FUTURE | flags) == 0)


def _has_capability(number: int) -> bool:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return bool(int(lines["CapEff"], 16) >> number & 1)
