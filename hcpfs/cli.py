"""The command line: `hcpfs mount`, `umount` and so on; and `hcpfs SOURCE MOUNTPOINT -o ...`, as mount(8) calls it."""

import errno
import io
import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NoReturn

import click
from rich.console import Console
from rich.progress import DownloadColumn
from rich.progress import Progress as RichProgress
from rich.table import Table

from cow.errors import CowError
from cow.opening import claim_directory
from cow.records.catalog import FILE_NAME
from cow.scrub import Finding, Progress, scrub_store
from hcpfs import __version__
from hcpfs.daemon import background, stores, unmount, unprivileged
from hcpfs.daemon.record import Record
from hcpfs.daemon.supervisor import Supervisor
from hcpfs.options import STORES, Accept, MountOptions, UsageError, accepting, apply_options, parse_size, parse_source
from hcpfs.recover import leftovers, recover
from hcpfs.recover.rebuild import Voice
from hcpfs.system import beneath, terminal
from hcpfs.tree.text import path_in

DAMAGED, REPAIRED = 3, 4  # exit codes of verify
STILL_AT_WORK = 2  # exit code of umount
_WIDE = 10_000  # columns of what is no terminal


_ACCEPT = click.option(
    "--accept", multiple=True, type=click.Choice([one.value for one in Accept]), metavar="WHAT",
    help="Go on although it is refused for that. quota: at the next write it may cost snapshots. changed: "
    "the device was changed while hcpfs was not running; its snapshots become suspect. unchanged: it was written to, "
    "and has what it had.",
)  # fmt: skip


class _Sentence(click.ClickException):
    """An error as one sentence on standard error."""

    def show(self, file: Any = None) -> None:
        terminal.complain(self.message)


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


def _of_mount_8(command: Callable[..., None]) -> Callable[..., None]:
    """The options with which mount(8) calls a program that is installed as /sbin/mount.TYPE."""
    for flags in (("-r", "read_only"), ("-f", "--fake", "fake")):
        command = click.option(*flags, is_flag=True, hidden=True)(command)
    for flag in ("-n", "-s", "-v", "-w"):  # no mtab, sloppy, verbose, read-write: nothing to be done about them
        command = click.option(flag, f"_{flag[1]}", is_flag=True, hidden=True, expose_value=False)(command)
    command = click.option("-t", "_type", hidden=True, expose_value=False)(command)
    return click.option("-N", "namespace", hidden=True)(command)


@cli.command()
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE... MOUNTPOINT")
@click.option("--store", metavar="DIR", help="Where old bytes are kept. Default: a folder below /var/lib/hcpfs.")
@click.option("--quota", metavar="SIZE", help="The most that the store may take, such as 20G. Default: no limit.")
@click.option("--sync", is_flag=True, help="Keep no writes in memory while their old bytes are preserved.")
@click.option("--foreground", is_flag=True, help="Stay in the foreground and log to standard error.")
@click.option(
    "-o", "options", multiple=True, metavar="OPT,...",
    help="store=DIR, quota=SIZE, on_full=drop-oldest|lose-chunks|block-writes, source=[NAME=]PATH, ro, read_suspect, "
    "sync, allow_other, uid=N, gid=N, mode=OCTAL, freeze=SECONDS, accept=WHAT+....",
)  # fmt: skip
@_ACCEPT
@click.option("--recover", "recovering", is_flag=True, help="If a daemon died there, do what hcpfs recover does.")
@click.option("--ready-fd", type=int, hidden=True)
@_of_mount_8
def mount(
    sources: tuple[str, ...],
    store: str | None,
    quota: str | None,
    sync: bool,
    foreground: bool,
    options: tuple[str, ...],
    accept: tuple[str, ...],
    recovering: bool,
    ready_fd: int | None,
    read_only: bool,
    fake: bool,
    namespace: str | None,
) -> None:
    """Serve SOURCE..., block devices or image files, at MOUNTPOINT.

    A SOURCE may be NAME=PATH; else its image is called after its base name, with .img. Several SOURCEs are one
    consistency group: one mkdir takes a snapshot of all of them at the same instant. Returns when the mount is usable.
    """
    supervisor = Supervisor()  # before there are children
    try:
        wanted = _mount_options(sources, store, quota, options)
        if namespace is not None:
            raise UsageError(f"-N {namespace} is not known here: nsenter --mount={namespace} hcpfs mount ...")
        wanted.sync |= sync
        wanted.read_only |= read_only
        wanted.foreground |= foreground
        wanted.accept |= {Accept(word) for word in accept}
        unprivileged.check(wanted)
        for note in stores.check_no_other(wanted) if ready_fd is None else ():
            _note(note)
    except (UsageError, CowError) as error:
        raise _Sentence(str(error)) from error
    if fake:
        return
    if os.geteuid() != 0 and ready_fd is None:
        terminal.complain(unprivileged.NOTE)
    if recovering:
        record = Record(wanted.mountpoint, wanted.arguments(), wanted.image_names)
        try:
            voice = Voice(terminal.say, terminal.complain)
            done = recover.recover_and_mount(record, wanted.accept, voice, foreground=wanted.foreground)
        except (CowError, OSError) as error:
            raise _Sentence(_sentence(error)) from error
        if done is not None and not wanted.foreground:
            sys.exit(done)
        ready_fd = done
    if ready_fd is None:
        _tidy(wanted.mountpoint)
    if ready_fd is None and not wanted.foreground:
        sentence = background.run_in_background([*wanted.arguments(), *accepting(wanted.accept)], _note)
        if sentence is not None:
            raise _Sentence(sentence)
        return
    _serve(wanted, ready_fd, supervisor)


def _sentence(error: CowError | OSError) -> str:
    """The error in words, without the number and the quotes of Python."""
    if isinstance(error, OSError) and error.strerror is not None and error.filename is not None:
        return f"{os.fsdecode(error.filename)} cannot be used: {error.strerror}"
    return str(error)


def _tidy(mountpoint: str) -> None:
    with suppress(OSError):  # who may not, or has no such directory, leaves none either
        leftovers.tidy(but=mountpoint)


def _note(sentence: str) -> None:
    terminal.complain(f"note: {sentence}")


def _mount_options(
    sources: tuple[str, ...], store: str | None, quota: str | None, options: tuple[str, ...]
) -> MountOptions:
    if "" in (*sources, store):
        raise UsageError("a SOURCE, the MOUNTPOINT or the store is empty: an unset variable, perhaps?")
    wanted = MountOptions(mountpoint=beneath.real_path(sources[-1]))
    wanted.sources = [parse_source(source) for source in sources[:-1]]
    apply_options(wanted, options)
    if store is not None:
        wanted.store = store
    if quota is not None:
        wanted.quota_bytes = parse_size(quota)
    if not wanted.sources:
        raise UsageError("name at least one SOURCE and the MOUNTPOINT: hcpfs mount /dev/sdb1 /mnt/hcp")
    return wanted


def _serve(wanted: MountOptions, ready_fd: int | None, supervisor: Supervisor) -> None:
    # The other commands need no pyfuse3, and start faster without it.
    from hcpfs.daemon.mount import Start, check, serve

    os.umask(0o077)
    caller = background.Caller(ready_fd)
    with ExitStack() as stack:
        log = stack.enter_context(background.Log())

        def begin_log() -> None:
            if not log.has_begun:
                store = claim_directory(wanted.store_path, create=False)
                stack.callback(store.close)
                try:
                    log.begin(store)
                except OSError as error:
                    path = f"{store.label}/{background.LOG_NAME}"
                    caller.note(f"there is no log, as {path} cannot be opened ({error.strerror})")

        try:
            if wanted.foreground:
                log.begin(None)
            check(wanted)
            if os.path.lexists(os.path.join(wanted.store_path, FILE_NAME)):
                begin_log()  # else it is left to the opening to make a store, where one can be
            serve(wanted, Start(caller.ready, caller.note, begin_log), supervisor)
        except (CowError, OSError) as error:
            sentence = _sentence(error)
            logging.getLogger("hcpfs").error("%s", sentence)
            caller.refuse(sentence)
            raise _Sentence(sentence) from error
        except Exception as error:
            logging.getLogger("hcpfs").exception("a defect of hcpfs ended it; please report it")
            caller.refuse(f"a defect of hcpfs: {error!r}; please report it")
            raise


@cli.command("recover")
@click.argument("mountpoint")
@click.option("--force", is_flag=True, help="Also when the daemon is alive but does not answer: end it.")
@click.option("--no-mount", is_flag=True, help="Set the loop devices up again, but mount nothing on them.")
@_ACCEPT
def recover_command(mountpoint: str, force: bool, no_mount: bool, accept: tuple[str, ...]) -> None:
    """Get MOUNTPOINT going again after its daemon died.

    Unmounts what sat on its images and detaches their loop devices, clears the dead mount, serves it again as before,
    sets the loop devices up again and mounts what it had unmounted. Everything that was flushed is there.

    Exits with 0 when everything is back, with 1 when it refused or the daemon did not start, with 2 when the mount is
    served again but something that sat on it is not back.
    """
    path = beneath.real_path(mountpoint)
    try:
        voice, accepted = Voice(terminal.say, terminal.complain), {Accept(word) for word in accept}
        sys.exit(recover.recover(path, accepted, voice, force=force, mount_again=not no_mount))
    except (CowError, OSError) as error:
        raise _Sentence(_sentence(error)) from error


@cli.command()
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
    status = _read_status(path)
    try:
        unmount.unmount(path, int(status["pid"]), path_in(status["store"]), terminal.say, timeout)
    except ProcessLookupError as error:
        raise _dead(path) from error
    except unmount.StillAtWorkError as error:
        terminal.complain(str(error))
        sys.exit(STILL_AT_WORK)
    except (CowError, OSError) as error:
        raise _Sentence(_sentence(error)) from error


@cli.command("ls")
@click.argument("mountpoint")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_snapshots(mountpoint: str, as_json: bool) -> None:
    """List the snapshots at MOUNTPOINT."""
    path = beneath.real_path(mountpoint)
    _read_status(path)
    found = []
    for name in sorted(os.listdir(os.path.join(os.fsencode(path), b"snaps"))):
        try:
            text = Path(os.fsdecode(os.path.join(os.fsencode(path), b"snaps", name, b"info"))).read_bytes()
        except FileNotFoundError:
            continue  # removed meanwhile
        except OSError as error:
            raise _Sentence(f"{path} cannot be read: {error.strerror}") from error
        found.append({"name": name.decode("utf-8", "backslashreplace"), **_parse(text)})
    found.sort(key=lambda one: one["created"])
    if as_json:
        print(json.dumps(found, indent=2))
        return
    rows = [
        (
            *(terminal.plain(one["name"]), one["created"][:19] + "Z", one["state"], one.get("quiesced", "-")),
            *(_human(int(one[key])) for key in ("size", "preserved_bytes", "written_bytes")),
        )
        for one in found
    ]
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("NAME", overflow="fold", min_width=8)
    for place, title in enumerate(("CREATED", "STATE", "QUIESCED", "SIZE", "PRESERVED", "WRITTEN"), 1):
        width = max(len(title), *(len(row[place]) for row in rows)) if rows else None  # the name alone is broken
        table.add_column(title, min_width=width, justify="right" if place > 3 else "left")
    for row in rows:
        table.add_row(*row)
    Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else _WIDE).print(table)


@cli.command()
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
        raise _Sentence(f"{path} could not be checked: {_sentence(error)}") from error
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
    _read_status(path)
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
        raise _Sentence(f"the check of {path} ended early: is it being unmounted?")


def _parse(text: bytes) -> dict[str, str]:
    pairs = (line.partition(" ") for line in text.decode("utf-8", "backslashreplace").splitlines())
    return {key: value for key, _, value in pairs}


def _human(count: int) -> str:
    size = float(count)
    for unit in ("B", "K", "M", "G"):
        if size < 1024:
            return f"{size:.0f}{unit}" if unit == "B" or size >= 10 else f"{size:.1f}{unit}"
        size /= 1024
    return f"{size:.1f}T"


def _read_status(path: str) -> dict[str, str]:
    try:
        kinds = [mount.filesystem for mount in beneath.mounts() if mount.mountpoint == path]
        if kinds and kinds[-1] == beneath.FILESYSTEM_TYPE:
            return _parse(Path(path, "status").read_bytes())
    except OSError as error:
        if error.errno == errno.ENOTCONN:
            raise _dead(path) from error
        raise _Sentence(f"{path} cannot be read: {error.strerror}") from error
    raise _Sentence(f"no hcpfs is mounted at {path}")


def _dead(path: str) -> _Sentence:
    return _Sentence(f"the daemon of {path} is dead: hcpfs recover {path} gets it going again")


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
