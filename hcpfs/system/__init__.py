"""What the kernel and the machine tell us and do for us: mounts, block devices, namespaces, processes, the terminal."""
