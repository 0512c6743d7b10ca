"""The daemon's end of the freezer process (hcpfs/quiesce/freezer.py): starting it, asking it, giving it up.

The daemon never depends on an answer. When one does not come in time the snapshot is not quiesced, the process is
abandoned, and the next request starts another one.
"""

import json
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import trio

from hcpfs.quiesce.reaching import Target
from hcpfs.quiesce.usage import Usage
from hcpfs.quiesce.writers import Wanted

FREEZE_SECONDS = 10.0
WRITE_BACK_SECONDS = 30.0
_DIED = "the freezer process died"


class _NoAnswerError(Exception):
    """The freezer process did not answer; the text says why."""


class Freezer:
    """The daemon's end of the freezer process. One request at a time."""

    def __init__(self) -> None:
        self._process: trio.Process | None = None
        self._turn = trio.Lock()
        self._received = b""
        self._given_up = False
        self._asking = trio.CancelScope()

    async def start(self) -> None:
        """Start the process, unless it runs."""
        if self._process is None or self._process.poll() is not None:
            self._received = b""
            self._process = await trio.lowlevel.open_process(
                [sys.executable, "-m", "hcpfs.quiesce.freezer"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd="/"
            )

    async def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer of the running process. Raises BrokenResourceError when it has died."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            await process.stdin.send_all(json.dumps(request).encode() + b"\n")
        except trio.BrokenResourceError as error:
            raise trio.BrokenResourceError(_DIED) from error
        while b"\n" not in self._received:
            received = await process.stdout.receive_some()
            if not received:
                raise trio.BrokenResourceError(_DIED)
            self._received += received
        line, _, self._received = self._received.partition(b"\n")
        reply: dict[str, Any] = json.loads(line)
        return reply

    async def write_back(self, mountpoint: str, inodes: dict[str, int]) -> list[str]:
        """Have cached writes to the images and to the devices on them written back; notes on failures."""
        try:
            answer = await self._ask_in_time({"write_back": inodes, "mountpoint": mountpoint})
        except _NoAnswerError as error:
            return [f"cached writes were not written back: {error}"]
        notes: list[str] = answer["notes"]
        return notes

    async def look(self, mountpoint: str, inodes: dict[str, int], writable: dict[str, int]) -> Usage:
        """Who uses the images. `writable`: how many open handles can write to each."""
        request = {"look": inodes, "mountpoint": mountpoint, "writable": writable}
        try:
            return Usage.from_json(await self._ask_in_time(request))
        except _NoAnswerError as error:
            return Usage(unknown=[f"who uses the images is not known: {error}"])

    async def _ask_in_time(self, request: dict[str, Any]) -> dict[str, Any]:
        async with self._turn:
            try:
                with trio.fail_after(0 if self._given_up else WRITE_BACK_SECONDS) as self._asking:
                    await self.start()
                    return await self._ask(request)
            except trio.BrokenResourceError as error:
                await self.stop()
                raise _NoAnswerError(str(error)) from error
            except trio.TooSlowError as error:
                await self.stop()
                within = "before hcpfs was stopped" if self._given_up else f"within {WRITE_BACK_SECONDS:g} s"
                raise _NoAnswerError(f"no answer {within}") from error

    def give_up(self) -> None:
        """Ask nothing from now on: when the mount stops answering, the process waits for it in vain."""
        self._given_up = True
        self._asking.cancel()

    @asynccontextmanager
    async def frozen(
        self, targets: Sequence[Target], seconds: float, wanted: Wanted | None = None
    ) -> AsyncIterator[dict[str, Any]]:
        """Freeze the file systems around the block, for at most `seconds`; meanwhile look for programs with `wanted`.

        Yields the freezer's answer. After the block its `late` is a sentence if the freeze may have ended before the
        block did, and `writers` and `unseen` are what the search found. When the answer does not come in time nothing
        counts as frozen, and what was frozen is thawed as soon as the kernel returns from it. When the freezer dies
        another one thaws what it froze; it cannot tell a freeze by somebody else, and ends that, too.
        """
        targets = list(targets)
        async with self._turn:
            answer: dict[str, Any] = {"frozen": {}, "refused": {}, "late": "", "writers": [], "unseen": []}
            try:
                with trio.fail_after(seconds):
                    await self.start()
                    answer |= await self._ask({"freeze": targets, "seconds": seconds, "wanted": wanted})
            except trio.TooSlowError:
                names = (target.name for target in targets)
                answer["refused"] = dict.fromkeys(names, f"it did not freeze within {seconds:g} s")
                await self.stop()
            except trio.BrokenResourceError as error:
                answer["refused"] = dict.fromkeys((target.name for target in targets), str(error))
                await self._rescue(targets, seconds)
            try:
                yield answer
            finally:
                with trio.CancelScope(shield=True):
                    await self._thaw(answer, targets, seconds)

    async def _thaw(self, answer: dict[str, Any], targets: list[Target], seconds: float) -> None:
        if not answer["frozen"]:
            return
        late = f"the file system was thawed after {seconds:g} s, before the end"
        try:
            with trio.fail_after(seconds):
                reply = await self._ask({"thaw": True})
                answer |= reply | {"late": late if reply["late"] else ""}
        except trio.TooSlowError:
            await self.stop()  # the broken pipe makes it thaw
            answer["late"] = late
        except trio.BrokenResourceError as error:
            answer["late"] = f"{error} before the end"
            await self._rescue([target for target in targets if target.name in answer["frozen"]], seconds)

    async def _rescue(self, targets: list[Target], seconds: float) -> None:
        """Start another freezer, and have it thaw what the dead one had frozen."""
        await self.stop()
        try:
            with trio.move_on_after(seconds, shield=True) as waiting:
                await self.start()
                await self._ask({"rescue": targets})
        finally:
            if waiting.cancelled_caught:
                await self.stop()

    async def stop(self) -> None:
        """Break the pipe: the process thaws what is frozen, and ends."""
        process, self._process = self._process, None
        if process is not None and process.stdin is not None:
            await process.stdin.aclose()

    async def end(self) -> None:
        """Stop, and wait until the process has ended, for at most `FREEZE_SECONDS`."""
        process = self._process
        await self.stop()
        if process is not None:
            with trio.move_on_after(FREEZE_SECONDS):
                await process.wait()
