"""Rescue: losses that can be taken back, as the write that they were recorded for never reached the device.

A chunk that can be neither kept nor read is recorded as lost before it is overwritten (I1). When the write fails too,
the device may still have the old bytes; once it can be read there, they are preserved after all. Proof is that each
sector differs from what was written to it since, by any write that failed or may be under way: a write that reached the
device in part shows in the sectors that it reached, and where a sector is equal, be it by chance, the loss stays. What
is preserved so is a copy, so it does not matter what a late write does to the device afterwards. # I4

All of it is in memory: after the process has ended, a loss stays.
"""

from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple

import trio
from pyroaring import BitMap64
from xxhash import xxh3_64_digest

from cow.buffer.contents import Contents
from cow.geometry import CHUNK_BYTES, Run
from cow.layers.layer import Layer

SECTOR_BYTES = 512  # what a write leaves whole, old or new
MOST_CHUNKS = 1024  # that are remembered
MOST_SLICES = 32  # of a chunk: what was written to it, cut at sectors


class _Slice(NamedTuple):
    """What was written to some of a sector: where in the chunk, and the checksum of it."""

    start: int
    end: int
    digest: bytes


class Losses:
    """The chunks of an origin that were lost and that no write has reached, for all that is known. Trio thread only."""

    def __init__(self) -> None:
        self.chunks = BitMap64()
        self.arrived = trio.Event()  #: fires when there are some
        self._layers: dict[int, Layer] = {}  #: that lost them
        self._written: dict[int, set[_Slice]] = {}

    def add(self, layer: Layer, chunks: BitMap64) -> None:
        """They were lost by the layer, durably, and are not overwritten yet."""
        for chunk in chunks:
            if len(self._layers) >= MOST_CHUNKS:
                return
            self._layers[chunk], self._written[chunk] = layer, set()
            self.chunks.add(chunk)
        self.arrived.set()

    def forget(self, chunks: Iterable[int]) -> None:
        """They are overwritten, or kept, or nobody knows: what is lost stays so."""
        for chunk in chunks:
            self._layers.pop(chunk, None)
            self._written.pop(chunk, None)
            self.chunks.discard(chunk)
        if not self.chunks:
            self.arrived = trio.Event()

    def layer_of(self, chunk: int) -> Layer | None:
        """Which layer lost a chunk; None when it is not here."""
        layer = self._layers.get(chunk)
        return layer if layer is not None and chunk in layer.lost else None

    def begin(self, contents: Contents) -> None:
        """Contents are about to be written."""
        for chunk in self.chunks & contents.chunks() if self.chunks else ():
            found = self._written[chunk]
            for offset, data in contents.pieces(Run(chunk, 1)):
                found |= _slices(offset - chunk * CHUNK_BYTES, data)
            if len(found) > MOST_SLICES:
                self.forget([chunk])

    def end(self, contents: Contents, left: Contents) -> None:
        """They were written, save what is left."""
        if self.chunks:
            self.forget((self.chunks & contents.chunks()) - left.chunks())

    def is_untouched(self, chunk: int, content: bytes) -> bool:
        """Whether what was read of a chunk before now, past every cache, is what was there before all writes to it."""
        return all(xxh3_64_digest(content[one.start : one.end]) != one.digest for one in self._written[chunk])


def _slices(start: int, data: bytes) -> set[_Slice]:
    end = start + len(data)
    cuts = [start, *range((start // SECTOR_BYTES + 1) * SECTOR_BYTES, end, SECTOR_BYTES), end]
    return {
        _Slice(one, next_one, xxh3_64_digest(data[one - start : next_one - start])) for one, next_one in pairwise(cuts)
    }
