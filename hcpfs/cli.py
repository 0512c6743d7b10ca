"""The command line: `hcpfs mount`, `umount` and so on; and `hcpfs SOURCE MOUNTPOINT -o ...`, as mount(8) calls it."""

import importlib
import os
import sys
from typing import NoReturn

import click

from hcpfs import __version__
from hcpfs.system import terminal

_COMMANDS = ("ls", "mount", "recover", "umount", "verify")


class _Commands(click.Group):
    """Each command is in a module of its name in hcpfs/commands, which is loaded when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Their names."""
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """One of them."""
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = getattr(importlib.import_module(f"hcpfs.commands.{cmd_name}"), cmd_name)
        return command


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
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


def main() -> NoReturn:
    """Run the command line. Without a command it is a mount, as mount(8) calls `hcpfs SOURCE MOUNTPOINT -o ...`."""
    words = sys.argv[1:]
    if len(words) >= 2 and words[0] not in _COMMANDS and _may_be_source(words[0]):
        words.insert(0, "mount")
    terminal.prepare()
    try:
        try:
            cli.main(args=words, prog_name="hcpfs")
        finally:
            sys.stdout.flush()  # while its error can be told: at the exit it cannot
    except OSError as error:  # what else can fail says so where it does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or what is left fails again at the exit
        terminal.complain(f"{error.filename or 'standard output'} cannot be used: {error.strerror}")
        sys.exit(1)
    raise AssertionError("click exits")


def _may_be_source(word: str) -> bool:
    """Rather than a command that is mistyped."""
    return not word.startswith("-") and ("/" in word or "=" in word or os.path.exists(word))
