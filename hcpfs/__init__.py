"""The file system: a control tree in FUSE over the copy-on-write engine in `cow`, and its command line."""

from importlib.metadata import version

__version__ = version("hcpfs")
