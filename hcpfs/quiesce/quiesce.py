"""Quiescing: what is done outside of the engine so that an image needs no journal recovery, and the evidence of it.

Before the engine holds writes, the kernel is made to write back what it caches of `live/` and of the devices on it, the
users of the images are found, and their file systems are frozen: they write out what they cache, and pause. After the
hold they are thawed, whatever happens (see hcpfs/quiesce/freezer.py). A failure here never fails the snapshot: it is
crash-consistent then, as after a power cut, and its `info` says so and why.

`quiesced` is the first of these that is true:

    no               something that can write to a live image was not paused
    unknown          there may be such a thing; quiesce_note says why that cannot be told
    yes              only file systems can write to it, and they were frozen at the instant
    nothing-mounted  nothing can write to it but loop devices that nobody uses

The last two are proved: each handle that the daemon counts as able to write (hcpfs/quiesce/live.py) belongs to a loop
device, and the kernel tells what uses those (hcpfs/quiesce/usage.py). Between the look and the instant no such handle
was opened, and with nothing mounted nothing was written either.
"""

import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from cow.store.store import Evidence
from hcpfs.quiesce.helper import Freezer
from hcpfs.quiesce.live import LiveImages
from hcpfs.quiesce.usage import Usage

_RELEASE_SECONDS = 0.5  # a loop device that was just detached closes its file a moment later


class Quiescer:
    """Quiesces the live images of one mount."""

    def __init__(self, mountpoint: str, live: LiveImages, freezer: Freezer, freeze_seconds: float) -> None:
        self._mountpoint = mountpoint
        self._live = live
        self._freezer = freezer
        self._freeze_seconds = freeze_seconds

    async def write_back(self) -> list[str]:
        """Have cached writes to the live images written back; notes on what failed."""
        return await self._freezer.write_back(self._mountpoint, self._live.inodes)

    @asynccontextmanager
    async def quiesce(self) -> AsyncIterator[Evidence]:
        """Quiesce around the block. Yields the evidence for `info`, which is complete when the block has ended."""
        notes = await self.write_back()
        openings, written_ns = self._live.openings, self._live.written_ns
        usage = await self._look()
        usage.writers += notes
        evidence: Evidence = {"quiesced": "unknown"}
        if not usage.targets:
            yield evidence
            if self._live.written_ns != written_ns:
                usage.unknown.append("it was written to while the snapshot was taken, by whom is not known")
        else:
            async with self._frozen(usage, evidence):
                yield evidence
        if self._live.openings != openings:
            usage.unknown.append("a live image was opened for writing while the snapshot was taken")
        _conclude(evidence, usage)

    async def _look(self) -> Usage:
        """Who uses the images. Handles whose user does not show are given a moment to be released."""
        deadline = trio.current_time() + _RELEASE_SECONDS
        while True:
            usage = await self._freezer.look(self._mountpoint, self._live.inodes, self._live.writable)
            others = [path for path, count in self._live.writable.items() if count > usage.handles.get(path, count)]
            if not others or usage.writers:
                return usage
            if trio.current_time() >= deadline:
                usage.writers += [f"{path} is open for writing by somebody who does not show" for path in others]
                return usage
            await trio.sleep(_RELEASE_SECONDS / 20)

    @asynccontextmanager
    async def _frozen(self, usage: Usage, evidence: Evidence) -> AsyncIterator[None]:
        began = time.perf_counter_ns()
        async with self._freezer.frozen(usage.targets, self._freeze_seconds, usage.wanted) as answer:
            freeze_us = (time.perf_counter_ns() - began) // 1000
            for target in usage.targets:
                if target.name in answer["refused"]:
                    usage.writers.append(f"{target.words} was not frozen: {answer['refused'][target.name]}")
            # In the order in which they were frozen; a line each in `info`.
            evidence["frozen"] = json.dumps(list(answer["frozen"].values()))
            evidence["freeze_us"] = str(freeze_us)
            yield
        usage.writers += answer["writers"]
        usage.unknown += answer["unseen"]
        if answer["late"]:
            usage.writers.append(answer["late"])


def _conclude(evidence: Evidence, usage: Usage) -> None:
    if usage.writers:
        evidence["quiesced"] = "no"
    elif usage.unknown:
        evidence["quiesced"] = "unknown"
    else:
        evidence["quiesced"] = "yes" if usage.targets else "nothing-mounted"
    notes = dict.fromkeys([*usage.writers, *usage.unknown, *usage.notes])
    if notes:
        evidence["quiesce_note"] = "; ".join(notes)
