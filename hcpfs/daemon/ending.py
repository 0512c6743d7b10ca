"""How the daemon ends on a signal: what sits on the images is written back first, and every wait is limited.

Before there is a mount, a signal ends the start. While the mount is served, the first signal has what sits on the
images written back (hcpfs/daemon/writeback.py), for at most `WRITE_BACK_SECONDS`, and then ends the session as an
unmount does; a second signal ends it at once. When nothing moves for `STALL_SECONDS` after the first signal (a disk
does not answer), the daemon stops waiting: it takes the mount away and exits without the clean stop.
"""

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import trio

from cow.errors import RefusedError
from hcpfs.daemon.supervisor import Supervisor
from hcpfs.system import beneath, probe

WRITE_BACK_SECONDS = 10.0
STALL_SECONDS = 30.0
_TICK_SECONDS = 1.0
_EXTENSION_USEC = 15_000_000  #: for the service manager, said with every tick
_UNMOUNT_SECONDS = 5.0
_LOG_SECONDS = 0.5  #: for the thread that writes the log

_ENDING = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGXCPU, signal.SIGPWR}
# By default they would end the process (logrotate sends USR1 to many), or stop it when it writes to its terminal.
_IGNORED = {
    *(signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM, signal.SIGVTALRM, signal.SIGPROF, signal.SIGIO),
    *(signal.SIGSTKFLT, signal.SIGTTIN, signal.SIGTTOU),
    *range(signal.SIGRTMIN, signal.SIGRTMAX + 1),
}

log = logging.getLogger("hcpfs")


@dataclass(frozen=True)
class Mounted:
    """The mount, as far as its end needs it."""

    mountpoint: str
    device: int
    images: Callable[[], Sequence[str]]  #: paths below the mount point of those that the kernel may have dirty pages of
    terminate: Callable[[], None]
    progress: Callable[[], object]  #: its value changes as long as something moves


@dataclass
class WrittenBack:
    """What became of what sat on the images."""

    done: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    under_way: list[str] = field(default_factory=list)
    ended: bool = False

    def take(self, line: bytes) -> None:
        """Add what a line of the helper says."""
        said = json.loads(line)
        if "begun" in said:
            self.under_way += said["begun"]
        elif "done" in said:
            self.under_way.remove(said["done"])
            self.done.append(said["done"])
        elif "failed" in said:
            self.under_way.remove(said["failed"])
            self.failed.append(f"{said['failed']}: {said['reason']}")
        else:
            self.ended = True

    def missing(self, why: str) -> list[str]:
        """What was not written back, each with its reason, which is `why` for what is still under way."""
        late = [f"{what}: {why}" for what in self.under_way]
        return [*self.failed, *late, *([] if self.ended or late else [f"whatever else sits there: {why}"])]


class Ending:
    """The signals of a daemon, from its start until its end."""

    def __init__(self, supervisor: Supervisor, *, foreground: bool) -> None:
        self._supervisor = supervisor
        self._foreground = foreground
        self._starting = trio.CancelScope()
        self._hurry = trio.CancelScope()
        self._mounted: Mounted | None = None
        self._phase = ""
        self.asked_by = ""  #: the name of the first signal

    async def see_to(self, life: Callable[[], Awaitable[None]]) -> None:
        """Await `life()` and handle signals meanwhile. Raises RefusedError when one came before `served`."""
        spared = self._foreground and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN  # by nohup(1)
        with trio.open_signal_receiver(*_ENDING - ({signal.SIGHUP} if spared else set()), *_IGNORED) as signals:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._listen, signals, nursery)
                with self._starting:
                    await life()
                nursery.cancel_scope.cancel()
        if self._starting.cancelled_caught:
            raise RefusedError(f"{self.asked_by} ended it before it was mounted")

    def served(self, mounted: Mounted) -> None:
        """From now on a signal ends the session."""
        self._mounted = mounted

    def enter(self, phase: str) -> None:
        """Begin a phase, in words. It is told to the service manager, and counts as progress."""
        self._phase = phase
        self._supervisor.tell(phase)

    async def _listen(self, signals: AsyncIterator[int], nursery: trio.Nursery) -> None:
        async for number in signals:
            name = signal.Signals(number).name if number < signal.SIGRTMIN else f"signal {number}"
            if number in _IGNORED:
                log.info("%s: ignored", name)
            elif self.asked_by:
                log.info("%s, a second signal: ending at once", name)
                self._hurry.cancel()
            else:
                self.asked_by = name
                self._supervisor.tell(STOPPING=1, EXTEND_TIMEOUT_USEC=_EXTENSION_USEC)
                nursery.start_soon(self._give_up_in_the_end)
                nursery.start_soon(self._end)

    async def _end(self) -> None:
        mounted = self._mounted
        if mounted is None:
            log.info("%s: giving the start up", self.asked_by)
            self._starting.cancel()
            return
        log.info("%s: writing back what sits on %s, then unmounting", self.asked_by, mounted.mountpoint)
        self.enter(f"writing back what sits on {mounted.mountpoint}")
        await self._write_back(mounted)
        self.enter(f"unmounting {mounted.mountpoint}")
        log.info("%s: unmounting", self.asked_by)
        mounted.terminate()

    async def _write_back(self, mounted: Mounted) -> None:
        found = WrittenBack()
        why = "the process for it ended early"
        with self._hurry, trio.move_on_after(WRITE_BACK_SECONDS) as time_limit:
            try:
                await _have_written_back(mounted, found)
            except (OSError, trio.BrokenResourceError) as error:
                why = str(error)
        if self._hurry.cancelled_caught:
            why = "a second signal came"
        elif time_limit.cancelled_caught:
            why = f"not within {WRITE_BACK_SECONDS:g} s"
        if found.done:
            log.info("written back: %s", ", ".join(found.done))
        if missing := found.missing(why):
            log.error("NOT written back, so what was not flushed there is lost: %s", "; ".join(missing))

    async def _give_up_in_the_end(self) -> None:
        seen, still_seconds = self._progress(), 0.0
        while still_seconds < STALL_SECONDS:
            await trio.sleep(_TICK_SECONDS)
            self._supervisor.tell(EXTEND_TIMEOUT_USEC=_EXTENSION_USEC)
            now = self._progress()
            still_seconds = still_seconds + _TICK_SECONDS if now == seen else 0.0
            seen = now
        log.error(
            "nothing has moved for %g s (%s): ending without the clean stop; what was flushed is there, and the next "
            "mount recovers. Look at the disks",
            STALL_SECONDS,
            self._phase or "the start",
        )
        if self._mounted is not None:
            await trio.to_thread.run_sync(_take_away, self._mounted)
        await trio.sleep(_LOG_SECONDS)
        os._exit(1)

    def _progress(self) -> object:
        return self._phase, None if self._mounted is None else self._mounted.progress()


async def _have_written_back(mounted: Mounted, found: WrittenBack) -> None:
    """Have the helper process write back, and note in `found` what it says. Raises OSError and BrokenResourceError."""
    request = {
        "mountpoint": mounted.mountpoint,
        "device": mounted.device,
        "images": mounted.images(),
        "seconds": WRITE_BACK_SECONDS,
    }
    process = await trio.lowlevel.open_process(
        [sys.executable, "-m", "hcpfs.daemon.writeback"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd="/",
        start_new_session=True,
    )
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        await process.stdin.send_all(json.dumps(request).encode() + b"\n")
        received = b""
        while not found.ended and (more := await process.stdout.receive_some()):
            *lines, received = (received + more).split(b"\n")
            for line in lines:
                found.take(line)
    finally:
        process.kill()  # it may wait for our answer, and ends when the connection does


def _take_away(mounted: Mounted) -> None:
    """Fail all requests that wait for an answer, and unmount."""
    if all(mount.device != mounted.device for mount in beneath.mounts()):
        return
    with suppress(OSError):
        probe.abort(mounted.device)
    command = ["umount", "--lazy", "--no-canonicalize"] if os.geteuid() == 0 else ["fusermount3", "-u", "-z"]
    probe.attempt([*command, mounted.mountpoint], _UNMOUNT_SECONDS)
