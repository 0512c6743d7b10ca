"""`hcpfs recover`."""

import sys

import click

from cow.errors import CowError
from hcpfs.commands.given import accept_option
from hcpfs.commands.saying import VOICE, Sentence, sentence_of
from hcpfs.options import Accept
from hcpfs.recover import recover as recovery
from hcpfs.system import beneath


@click.command()
@click.argument("mountpoint")
@click.option("--force", is_flag=True, help="Also when the daemon is alive but does not answer: end it.")
@click.option("--no-mount", is_flag=True, help="Set the loop devices up again, but mount nothing on them.")
@accept_option
def recover(mountpoint: str, force: bool, no_mount: bool, accept: tuple[str, ...]) -> None:
    """Get MOUNTPOINT going again after its daemon died.

    Unmounts what sat on its images and detaches their loop devices, clears the dead mount, serves it again as before,
    sets the loop devices up again and mounts what it had unmounted. Everything that was flushed is there.

    Exits with 0 when everything is back, with 1 when it refused or the daemon did not start, with 2 when the mount is
    served again but something that sat on it is not back.
    """
    path = beneath.real_path(mountpoint)
    try:
        accepted = {Accept(word) for word in accept}
        sys.exit(recovery.recover(path, accepted, VOICE, force=force, mount_again=not no_mount))
    except (CowError, OSError) as error:
        raise Sentence(sentence_of(error)) from error
