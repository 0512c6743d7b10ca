"""The command line: `hcpfs mount`, `umount` and so on; and `hcpfs SOURCE MOUNTPOINT -o ...`, as mount(8) calls it."""

import os
import sys
from typing import NoReturn

import click

from hcpfs import __version__
from hcpfs.commands.ls import ls
from hcpfs.commands.mount import mount
from hcpfs.commands.recover import recover
from hcpfs.commands.umount import umount
from hcpfs.commands.verify import verify
from hcpfs.system import terminal


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="hcpfs %(version)s")
def cli() -> None:
    """Copy-on-write snapshots of block devices, as files.

    \b
      hcpfs mount /dev/sdb1 /mnt/hcp      serve the device
      mkdir /mnt/hcp/snaps/monday         take a snapshot, now
      cp /mnt/hcp/snaps/monday/sdb1.img . back it up
      rmdir /mnt/hcp/snaps/monday         drop it
      hcpfs umount /mnt/hcp               stop; the snapshots stay
      hcpfs recover /mnt/hcp              after the daemon's death: serve again

    From the mount on, use the device through /mnt/hcp/live/sdb1.img only, for example with
    `mount -o loop /mnt/hcp/live/sdb1.img /srv`.
    """


for _command in (ls, mount, recover, umount, verify):
    cli.add_command(_command)


def main() -> NoReturn:
    """Run the command line. Without a command it is a mount, as mount(8) calls `hcpfs SOURCE MOUNTPOINT -o ...`."""
    words = sys.argv[1:]
    if len(words) >= 2 and words[0] not in cli.commands and _may_be_source(words[0]):
        words.insert(0, "mount")
    terminal.prepare()
    try:
        cli.main(args=words, prog_name="hcpfs")
    except OSError as error:  # what else can fail says so where it does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or what is left fails again at the exit
        terminal.complain(f"{error.filename or 'standard output'} cannot be used: {error.strerror}")
        sys.exit(1)
    raise AssertionError("click exits")


def _may_be_source(word: str) -> bool:
    """Rather than a command that is mistyped."""
    return not word.startswith("-") and ("/" in word or "=" in word or os.path.exists(word))
