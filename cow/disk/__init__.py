"""Raw I/O: the system calls, and the files, directories and devices that use them."""
