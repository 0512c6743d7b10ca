"""Recovery after the daemon's death: whether there is anything to recover, and the steps in their order."""

import os
import select
import signal
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import NamedTuple

from cow.errors import RefusedError
from hcpfs.daemon import background, record
from hcpfs.daemon.record import Record
from hcpfs.options import Accept, accepting
from hcpfs.recover import leftovers
from hcpfs.recover.rebuild import Rebuild, Voice
from hcpfs.system import beneath, probe

ALL_BACK, PARTLY_BACK = 0, 2  # exit codes; 1 is a refusal
_ANSWER_SECONDS = 5.0
_END_SECONDS = 10.0


class NothingToRecoverError(RefusedError):
    """The daemon answers, or no mount is known there."""


class Trouble(NamedTuple):
    """A mount to recover. `dead` is None when it was unmounted lazily; `hangs`: its connection is to be aborted."""

    dead: beneath.Mount | None
    known: Record | None
    hangs: bool


def examine(mountpoint: str, *, force: bool) -> Trouble:
    """What is wrong at the mount point.

    Raises NothingToRecoverError when nothing is, and RefusedError when the daemon is alive and does not answer, unless
    `force` is given.
    """
    known = record.read(mountpoint)
    mounted = [mount for mount in beneath.mounts() if mount.mountpoint == mountpoint]
    if not mounted or mounted[-1].filesystem != beneath.FILESYSTEM_TYPE:
        if known is None:
            raise NothingToRecoverError(
                f"no hcpfs is mounted at {mountpoint}, and nothing is known of one that was: nothing to recover"
            )
        if known.is_alive:
            raise NothingToRecoverError(
                f"{mountpoint} was unmounted, but its daemon (process {known.pid}) is alive, and ends when nothing "
                f"uses its images any more: unmount and detach what sits on them"
            )
        return Trouble(None, known, False)
    answer = probe.ask(mountpoint, _ANSWER_SECONDS)
    if answer is probe.Answer.ANSWERS:
        raise NothingToRecoverError(f"the daemon of {mountpoint} is alive and answers: nothing to recover")
    hangs = answer is probe.Answer.HANGS
    if hangs and not force and (known is None or known.is_alive):
        who = "its daemon" if known is None else f"its daemon (process {known.pid})"
        raise RefusedError(
            f"{mountpoint} did not answer within {_ANSWER_SECONDS:g} s, but {who} may be alive and only slow: wait, or "
            f"end it and go on with --force"
        )
    return Trouble(mounted[-1], known, hangs)


def _end_the_daemon(trouble: Trouble, voice: Voice) -> None:
    """Abort the connection of a daemon that hangs, and wait until the daemon holds the devices no longer."""
    dead, known = trouble.dead, trouble.known
    if trouble.hangs and dead is not None:
        try:
            probe.abort(dead.device)
            voice.say(f"aborted the connection of {dead.mountpoint}, which did not answer")
        except OSError as error:
            voice.complain(f"the connection of {dead.mountpoint} could not be aborted: {error}")
    if known is None:
        return
    if trouble.hangs and known.is_alive:
        _kill(known)
        voice.say(f"ended its daemon, process {known.pid}")
    deadline = time.monotonic() + _END_SECONDS
    while known.lingers:
        if time.monotonic() >= deadline:
            voice.complain(f"process {known.pid}, the daemon, does not end: it may keep the devices locked")
            return
        time.sleep(0.02)


def _kill(known: Record) -> None:
    with suppress(ProcessLookupError):
        process = os.pidfd_open(known.pid)
        try:
            if known.is_alive:  # so the descriptor is of no other process
                signal.pidfd_send_signal(process, signal.SIGKILL)
                select.select([process], [], [], _END_SECONDS)
        finally:
            os.close(process)


def recover(mountpoint: str, accept: Iterable[Accept], voice: Voice, *, force: bool, mount_again: bool) -> int:
    """`hcpfs recover`; its exit code. Raises RefusedError or OSError when the mount point is not served afterwards."""
    with record.recovering():
        trouble = examine(mountpoint, force=force)
        leftovers.tidy(but=mountpoint)
        if trouble.known is None:
            raise RefusedError(
                f"the daemon of {mountpoint} is dead, but how it was mounted is not known, as {record.DIRECTORY} has "
                f"no record of it: hcpfs mount --recover SOURCE... {mountpoint}"
            )
        rebuild = _clear(trouble, trouble.known, voice)
        return _serve_and_put_back(rebuild, trouble.known, accept, voice, mount_again=mount_again)


def recover_and_mount(wanted: Record, accept: Iterable[Accept], voice: Voice, *, foreground: bool) -> int | None:
    """`hcpfs mount --recover`. Returns None when there is nothing to recover, so that it is a plain mount.

    In the background all is done on return, and the result is the exit code. In the foreground this process has to
    serve, and the result is the descriptor for `background.Caller`: another process puts back what sat on the mount
    once it is told there. Call before there are threads. Raises RefusedError and OSError.
    """
    with record.recovering():
        try:
            trouble = examine(wanted.mountpoint, force=False)
        except NothingToRecoverError:
            return None
        rebuild = _clear(trouble, wanted, voice)
        if foreground:
            return _put_back_when_served(rebuild)
        return _serve_and_put_back(rebuild, wanted, accept, voice, mount_again=True)


def _clear(trouble: Trouble, wanted: Record, voice: Voice) -> Rebuild:
    _end_the_daemon(trouble, voice)
    rebuild = Rebuild(trouble.dead, wanted, trouble.known, voice)
    rebuild.clear()
    return rebuild


def _serve_and_put_back(
    rebuild: Rebuild, wanted: Record, accept: Iterable[Accept], voice: Voice, *, mount_again: bool
) -> int:
    sentence = background.run_in_background(
        [*wanted.arguments, *accepting(accept)], lambda note: voice.complain(f"note: {note}")
    )
    if sentence is not None:
        raise RefusedError(
            f"{wanted.mountpoint} is not served again: {sentence}. When that is mended, recover once more"
        )
    voice.say(f"serving {wanted.mountpoint} again")
    return ALL_BACK if rebuild.put_back(mount_again=mount_again) else PARTLY_BACK


def _put_back_when_served(rebuild: Rebuild) -> int:
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(reading)
        os.waitpid(child, 0)
        rebuild.release()
        return writing
    # A grandchild, so that the daemon has no child that it did not start; in a session of its own, so that it does not
    # end half-way when somebody ends the daemon from a terminal.
    os.setsid()
    if os.fork():
        os._exit(0)
    os.close(writing)
    try:
        if background.hear(reading, lambda note: None) is None:  # which are in the log, on the same standard error
            rebuild.put_back(mount_again=True)
    finally:
        os._exit(0)  # nobody waits for it
