"""`python -m hcpfs` is `hcpfs`."""

from hcpfs.cli import main

main()
