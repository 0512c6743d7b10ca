"""The file system: a control tree in FUSE over the copy-on-write engine in `cow`, and its command line."""

__version__ = "0.1.0"
