"""Raw I/O: the system calls, and what the store and the devices are reached through."""
