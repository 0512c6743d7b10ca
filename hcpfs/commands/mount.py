"""`hcpfs mount`: in the foreground this process serves; else it starts one in the background, and waits for its answer.

The one in the background is this command too, with --ready-fd.
"""

import logging
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any

import click

from cow.errors import CowError
from cow.records.catalog import FILE_NAME
from hcpfs.commands.given import Command, mount_options, take_over
from hcpfs.commands.saying import VOICE, Sentence, note, sentence_of
from hcpfs.daemon import background, refusals, stores, unprivileged
from hcpfs.daemon.record import Record
from hcpfs.daemon.supervisor import Supervisor
from hcpfs.options import MountOptions, UsageError, accepting, apply_options, parse_source
from hcpfs.recover import leftovers, recover
from hcpfs.system import beneath, terminal


def _of_mount_8(command: Command) -> Command:
    """The options with which mount(8) calls a program that is installed as /sbin/mount.TYPE."""
    for flags in (("-r", "read_only"), ("-f", "--fake", "fake")):
        command = click.option(*flags, is_flag=True, hidden=True)(command)
    for flag in ("-n", "-s", "-v", "-w"):  # no mtab, sloppy, verbose, read-write: nothing to be done about them
        command = click.option(flag, f"_{flag[1]}", is_flag=True, hidden=True, expose_value=False)(command)
    command = click.option("-t", "_type", hidden=True, expose_value=False)(command)
    return click.option("-N", "namespace", hidden=True)(command)


@click.command()
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE... MOUNTPOINT")
@mount_options
@click.option("--recover", "recovering", is_flag=True, help="If a daemon died there, do what hcpfs recover does.")
@click.option("--ready-fd", type=int, hidden=True)
@_of_mount_8
def mount(
    sources: tuple[str, ...],
    options: tuple[str, ...],
    recovering: bool,
    ready_fd: int | None,
    read_only: bool,
    fake: bool,
    namespace: str | None,
    **given: Any,
) -> None:
    """Serve SOURCE..., block devices or image files, at MOUNTPOINT.

    A SOURCE may be NAME=PATH; else its image is called after its base name, with .img. Several SOURCEs are one
    consistency group: one mkdir takes a snapshot of all of them at the same instant. Returns when the mount is usable.
    """
    supervisor = Supervisor()  # before there are children
    try:
        wanted = _wanted(sources, options, given)
        if namespace is not None:
            raise UsageError(f"-N {namespace} is not known here: nsenter --mount={namespace} hcpfs mount ...")
        wanted.read_only |= read_only
        unprivileged.check(wanted)
        for sentence in stores.check_no_other(wanted) if ready_fd is None else ():
            note(sentence)
    except (UsageError, CowError) as error:
        raise Sentence(str(error)) from error
    if fake:
        return
    if os.geteuid() != 0 and ready_fd is None:
        terminal.complain(unprivileged.NOTE)
    if recovering:
        ready_fd = _recover(wanted)
    if ready_fd is None:
        with suppress(OSError):  # who may not, or has no such directory, leaves none either
            leftovers.tidy(but=wanted.mountpoint)
        if not wanted.foreground:
            refused = background.run_in_background([*wanted.arguments(), *accepting(wanted.accept)], note)
            if refused is not None:
                raise Sentence(refused)
            return
    _serve(wanted, ready_fd, supervisor)


def _wanted(sources: tuple[str, ...], options: tuple[str, ...], given: dict[str, Any]) -> MountOptions:
    if "" in (*sources, given["store"]):
        raise UsageError("a SOURCE, the MOUNTPOINT or the store is empty: an unset variable, perhaps?")
    wanted = MountOptions(mountpoint=beneath.real_path(sources[-1]))
    wanted.sources = [parse_source(source) for source in sources[:-1]]
    apply_options(wanted, options)
    take_over(wanted, given)
    if not wanted.sources:
        raise UsageError("name at least one SOURCE and the MOUNTPOINT: hcpfs mount /dev/sdb1 /mnt/hcp")
    return wanted


def _recover(wanted: MountOptions) -> int | None:
    """Do first what `hcpfs recover` does; in the background that is all, and this process ends.

    Returns the descriptor for `background.Caller` where this process is to serve, None when nothing was to recover.
    """
    record = Record(wanted.mountpoint, wanted.arguments(), wanted.image_names)
    try:
        done = recover.recover_and_mount(record, wanted.accept, VOICE, foreground=wanted.foreground)
    except (CowError, OSError) as error:
        raise Sentence(sentence_of(error)) from error
    if done is not None and not wanted.foreground:
        sys.exit(done)
    return done


def _serve(wanted: MountOptions, ready_fd: int | None, supervisor: Supervisor) -> None:
    # They load the engine and pyfuse3, which a process that only starts another one does without.
    from hcpfs.daemon.mount import Start, serve

    os.umask(0o077)
    caller = background.Caller(ready_fd)
    with ExitStack() as stack:
        log = stack.enter_context(background.Log())
        begin_log = _log_in_the_store(wanted.store_path, log, caller, stack)
        try:
            if wanted.foreground:
                log.begin(None)
            refusals.check(wanted)
            if os.path.lexists(os.path.join(wanted.store_path, FILE_NAME)):
                begin_log()  # else it is left to the opening to make a store, where one can be
            serve(wanted, Start(caller.ready, caller.note, begin_log), supervisor)
        except (CowError, OSError) as error:
            sentence = sentence_of(error)
            logging.getLogger("hcpfs").error("%s", sentence)
            caller.refuse(sentence)
            raise Sentence(sentence) from error
        except Exception as error:
            logging.getLogger("hcpfs").exception("a defect of hcpfs ended it; please report it")
            caller.refuse(f"a defect of hcpfs: {error!r}; please report it")
            raise


def _log_in_the_store(
    path: str, log: background.Log, caller: background.Caller, stack: ExitStack
) -> Callable[[], None]:
    """What begins the log in the store, when there is one; the directory is open until the stack ends."""

    def begin() -> None:
        from cow.opening import claim_directory  # which loads the engine, as above

        if not log.has_begun:
            store = claim_directory(path, create=False)
            stack.callback(store.close)
            try:
                log.begin(store)
            except OSError as error:
                place = f"{store.label}/{background.LOG_NAME}"
                caller.note(f"there is no log, as {place} cannot be opened ({error.strerror})")

    return begin
