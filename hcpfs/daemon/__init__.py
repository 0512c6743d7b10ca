"""The life of a daemon: its start, the session with the kernel, its end, and what others can tell of it."""
