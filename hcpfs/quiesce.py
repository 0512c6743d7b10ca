"""Quiescing: what is done on the outside so that an image needs no journal recovery.

Before the engine holds writes: have the kernel write back what it caches of `live/` (mmap), find the file systems that
are mounted from loop devices on `live/`, and freeze them, which makes them write out and pause. After the hold they are
thawed, in every outcome (see hcpfs/freezer.py). A failure here never fails the snapshot: it is then crash-consistent,
as after a power cut, and its `info` says so and why.
"""

import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

import trio

from cow.store import Evidence

FREEZE_SECONDS = 10.0
WRITE_BACK_SECONDS = 30.0
_DIED = "the freezer process died"


class Freezer:
    """The daemon's end of the freezer process. One request at a time."""

    def __init__(self) -> None:
        self._process: trio.Process | None = None
        self._turn = trio.Lock()
        self._received = b""
        self._given_up = False
        self._finding = trio.CancelScope()

    async def start(self) -> None:
        """Have the process running."""
        if self._process is None or self._process.poll() is not None:
            self._received = b""
            self._process = await trio.lowlevel.open_process(
                [sys.executable, "-m", "hcpfs.freezer"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd="/"
            )

    async def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer of the process that was started. Raises BrokenResourceError when it died."""
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

    async def find(self, mountpoint: str, inodes: dict[str, int]) -> tuple[list[str], list[str]]:
        """Have cached writes to the images written back; the file systems mounted from them, and notes on failures."""
        async with self._turn:
            try:
                with trio.fail_after(0 if self._given_up else WRITE_BACK_SECONDS) as self._finding:
                    await self.start()
                    answer = await self._ask({"find": inodes, "mountpoint": mountpoint})
            except (trio.TooSlowError, trio.BrokenResourceError) as error:
                await self.stop()
                within = "before hcpfs was stopped" if self._given_up else f"within {WRITE_BACK_SECONDS:g} s"
                late = f"cached writes were not written back {within}"
                return [], [late if isinstance(error, trio.TooSlowError) else str(error)]
        return answer["mounted"], answer["notes"]

    def give_up(self) -> None:
        """The mount will answer nobody any more, and so the process neither: nothing is found from now on."""
        self._given_up = True
        self._finding.cancel()

    @asynccontextmanager
    async def frozen(self, paths: Iterable[str], seconds: float) -> AsyncIterator[dict[str, Any]]:
        """Freeze the file systems around the block, for at most `seconds`.

        Yields the freezer's answer; after the block its `late` says, in a sentence, when it may have ended before.
        When the answer does not come in time nothing counts as frozen, and whatever it froze is thawed as soon as the
        kernel lets go of it. When the freezer dies what it froze is thawed by another one, which cannot tell whether
        somebody else had frozen it before: that ends too.
        """
        paths = list(paths)
        async with self._turn:
            answer: dict[str, Any] = {"frozen": [], "refused": {}}
            try:
                with trio.fail_after(seconds):
                    await self.start()
                    answer = await self._ask({"freeze": paths, "seconds": seconds})
            except trio.TooSlowError:
                answer["refused"] = dict.fromkeys(paths, f"it did not freeze within {seconds:g} s")
                await self.stop()
            except trio.BrokenResourceError as error:
                answer["refused"] = dict.fromkeys(paths, str(error))
                await self._rescue(paths, seconds)
            try:
                yield answer
            finally:
                with trio.CancelScope(shield=True):
                    await self._thaw(answer, seconds)

    async def _thaw(self, answer: dict[str, Any], seconds: float) -> None:
        if not answer["frozen"]:
            return
        late = f"the file system was thawed after {seconds:g} s, before the end"
        try:
            with trio.fail_after(seconds):
                reply = await self._ask({"thaw": True})
                answer["late"] = late if reply["late"] else ""
        except trio.TooSlowError:
            await self.stop()  # the broken pipe makes it thaw
            answer["late"] = late
        except trio.BrokenResourceError as error:
            answer["late"] = f"{error} before the end"
            await self._rescue(answer["frozen"], seconds)

    async def _rescue(self, paths: list[str], seconds: float) -> None:
        """Have another freezer thaw what the one that died had frozen."""
        await self.stop()
        try:
            with trio.move_on_after(seconds, shield=True) as waiting:
                await self.start()
                await self._ask({"rescue": paths})
        finally:
            if waiting.cancelled_caught:
                await self.stop()

    async def stop(self) -> None:
        """Break the pipe: the process thaws what is frozen, and ends."""
        process, self._process = self._process, None
        if process is not None and process.stdin is not None:
            await process.stdin.aclose()

    async def end(self) -> None:
        """Stop, and wait for the process to be gone."""
        process = self._process
        await self.stop()
        if process is not None:
            with trio.move_on_after(FREEZE_SECONDS):
                await process.wait()


class Quiescer:
    """Quiesces the live images of one mount. `inodes` has them by their path below the mount point."""

    def __init__(self, mountpoint: str, inodes: dict[str, int], freezer: Freezer, freeze_seconds: float) -> None:
        self._mountpoint = mountpoint
        self._inodes = inodes
        self._freezer = freezer
        self._freeze_seconds = freeze_seconds

    async def find(self) -> tuple[list[str], list[str]]:
        """Have cached writes written back; the file systems mounted from the live images, and notes on what failed."""
        return await self._freezer.find(self._mountpoint, self._inodes)

    @asynccontextmanager
    async def quiesce(self) -> AsyncIterator[Evidence]:
        """Around the hold. Yields the evidence for `info`; `quiesced` is yes, no or nothing-mounted."""
        mounted, notes = await self.find()
        if not mounted:
            yield _evidence("no" if notes else "nothing-mounted", notes)
            return
        began = time.perf_counter_ns()
        async with self._freezer.frozen(mounted, self._freeze_seconds) as answer:
            freeze_us = (time.perf_counter_ns() - began) // 1000
            notes += [f"{path} was not frozen: {reason}" for path, reason in answer["refused"].items()]
            evidence = _evidence("no" if notes else "yes", notes)
            evidence["frozen"] = " ".join(path.replace(" ", "\\040") for path in answer["frozen"])
            evidence["freeze_us"] = str(freeze_us)
            yield evidence
        if answer.get("late"):
            evidence["quiesced"] = "no"
            evidence["quiesce_note"] = answer["late"]


def _evidence(quiesced: str, notes: list[str]) -> Evidence:
    evidence = {"quiesced": quiesced}
    if notes:
        evidence["quiesce_note"] = "; ".join(notes)
    return evidence
