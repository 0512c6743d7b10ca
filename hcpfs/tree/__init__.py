"""What the file system shows: the tree and its open files. Knows no pyfuse3."""
