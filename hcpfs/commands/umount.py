"""`hcpfs umount`."""

import sys

import click

from cow.errors import CowError
from hcpfs.commands.asking import dead, status_at
from hcpfs.commands.saying import Sentence, sentence_of
from hcpfs.daemon import unmount
from hcpfs.system import beneath, terminal
from hcpfs.tree.lines import path_in

STILL_AT_WORK = 2  # exit code


@click.command()
@click.argument("mountpoint")
@click.option("--timeout", type=float, default=120.0, show_default=True, help="For how many seconds to wait at most.")
def umount(mountpoint: str, timeout: float) -> None:
    """Unmount MOUNTPOINT and wait until all is durable and the devices are released. The snapshots stay.

    Where something uses it, it says what and unmounts nothing. A copy of the mount that another mount namespace has,
    and that nobody uses there, is unmounted too.

    Exits with 0 when the daemon has ended clean, with 1 when it was not unmounted, or ended but not clean, with 2 when
    it is unmounted and the daemon has not ended in time; it goes on.
    """
    path = beneath.real_path(mountpoint)
    status = status_at(path)
    try:
        unmount.unmount(path, int(status["pid"]), path_in(status["store"]), terminal.say, timeout)
    except ProcessLookupError as error:
        raise dead(path) from error
    except unmount.StillAtWorkError as error:
        terminal.complain(str(error))
        sys.exit(STILL_AT_WORK)
    except (CowError, OSError) as error:
        raise Sentence(sentence_of(error)) from error
