"""What the kernel and the machine tell, and do for us: mounts, loop devices, namespaces, processes, the terminal."""
