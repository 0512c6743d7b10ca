"""The daemon: its start, its session with the kernel, its end, and what other processes can tell of it."""
