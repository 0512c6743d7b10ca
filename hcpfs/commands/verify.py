"""`hcpfs verify`."""

import io
import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import click
from rich.console import Console
from rich.progress import DownloadColumn
from rich.progress import Progress as RichProgress

from cow.errors import CowError
from cow.scrub import Finding, Progress, scrub_store
from hcpfs.commands.asking import status_at
from hcpfs.commands.saying import Sentence, sentence_of
from hcpfs.options import STORES
from hcpfs.system import beneath, terminal

DAMAGED, REPAIRED = 3, 4  # exit codes


@click.command()
@click.argument("place", metavar="STORE|MOUNTPOINT")
@click.option("--repair", is_flag=True, help="Give up what cannot be used, and say what was lost.")
def verify(place: str, repair: bool) -> None:
    """Read all that is kept and check it: a STORE that is not in use, or the one at a MOUNTPOINT.

    Names each damaged run of chunks and the snapshots that read it. Exit code: 0, all is well; 3, something is damaged;
    4, it was, and --repair gave it up, so that reading it is an error and the rest can be relied on; 1, it could not be
    checked.
    """
    path = beneath.real_path(place)
    mounted = any(mount.mountpoint == path for mount in beneath.mounts())
    path = path if mounted else os.path.abspath(place)
    try:
        steps = _verify_mounted(path, repair) if mounted else scrub_store(path, repair=repair, elsewhere=STORES)
        found = list(_show_progress(steps))
    except (CowError, OSError) as error:
        raise Sentence(f"{path} could not be checked: {sentence_of(error)}") from error
    left = [finding for finding in found if not finding.repaired]
    if found:
        terminal.say(f"{len(found)} things were found, {len(found) - len(left)} of them repaired by giving them up")
        sys.exit(DAMAGED if left else REPAIRED)
    terminal.say("all is well")


def _show_progress(steps: Iterable[Progress | Finding]) -> Iterator[Finding]:
    """Print the findings as they come, above a progress bar when it is for a person."""
    console = Console(stderr=True, markup=False, highlight=False)
    with RichProgress(*RichProgress.get_default_columns(), DownloadColumn(), console=console, transient=True) as bar:
        task = bar.add_task("reading")
        for step in steps:
            if isinstance(step, Finding):
                terminal.say(step.sentence)
                yield step
            else:
                bar.update(task, completed=step.done_bytes, total=step.total_bytes)


def _verify_mounted(path: str, repair: bool) -> Iterator[Progress | Finding]:
    status_at(path)
    with Path(path, ".repair" if repair else ".verify").open("rb", buffering=0) as lines:
        ended = False
        for line in io.BufferedReader(lines, 1 << 16):
            said = json.loads(line)
            if "finding" in said:
                yield Finding(said["finding"], said["repaired"])
            elif "done" in said:
                yield Progress(said["done"], said["total"])
            ended = "end" in said
    if not ended:
        raise Sentence(f"the check of {path} ended early: is it being unmounted?")
