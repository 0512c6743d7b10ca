"""Rescue: losses that can be taken back, because the write that they were recorded for never reached the device.

A chunk that cannot be read, or not be kept, is recorded as lost before it is overwritten (I1). When the write fails
too, the device may still have the old bytes; once they can be read there, they are preserved after all. The proof is
that each sector differs from what was written to it since, by any write that failed or may be under way: a partial
write shows in the sectors that it reached, and where a sector is equal, even by chance, the loss stays. What is
rescued is a copy, so it does not matter what a late write does to the device afterwards. # I4

All of this is in memory only: once the process has ended, a loss is final.
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

SECTOR_BYTES = 512  # a write leaves a sector whole, old or new
MOST_CHUNKS = 1024  # remembered at most
MOST_SLICES = 32  # remembered of a chunk: what was written to it, cut at sectors


class _Slice(NamedTuple):
    """What was written to a sector or a part of it: where in the chunk, and its checksum."""

    start: int
    end: int
    digest: bytes


class Losses:
    """The lost chunks of an origin that, as far as is known, no write has reached. Trio thread only."""

    def __init__(self) -> None:
        self.chunks = BitMap64()
        self.arrived = trio.Event()  #: fires when there are some
        self._layers: dict[int, Layer] = {}  #: the one that lost each chunk
        self._written: dict[int, set[_Slice]] = {}

    def add(self, layer: Layer, chunks: BitMap64) -> None:
        """Note chunks that the layer has lost, durably, and that are not overwritten yet."""
        for chunk in chunks:
            if len(self._layers) >= MOST_CHUNKS:
                return
            self._layers[chunk], self._written[chunk] = layer, set()
            self.chunks.add(chunk)
        self.arrived.set()

    def forget(self, chunks: Iterable[int]) -> None:
        """Forget chunks that are overwritten, or kept, or in an unknown state: what is lost stays lost."""
        for chunk in chunks:
            self._layers.pop(chunk, None)
            self._written.pop(chunk, None)
            self.chunks.discard(chunk)
        if not self.chunks:
            self.arrived = trio.Event()

    def layer_of(self, chunk: int) -> Layer | None:
        """The layer that lost a chunk; None when it is not remembered, or not lost to that layer any more."""
        layer = self._layers.get(chunk)
        return layer if layer is not None and chunk in layer.lost else None

    def begin(self, contents: Contents) -> None:
        """Note contents that are about to be written."""
        for chunk in self.chunks & contents.chunks() if self.chunks else ():
            found = self._written[chunk]
            for offset, data in contents.pieces(Run(chunk, 1)):
                found |= _slices(offset - chunk * CHUNK_BYTES, data)
            if len(found) > MOST_SLICES:
                self.forget([chunk])

    def end(self, contents: Contents, left: Contents) -> None:
        """Note that the contents were written, except what is `left`."""
        if self.chunks:
            self.forget((self.chunks & contents.chunks()) - left.chunks())

    def is_untouched(self, chunk: int, content: bytes) -> bool:
        """Whether `content`, read earlier and past every cache, is what the chunk had before all writes to it."""
        return all(xxh3_64_digest(content[one.start : one.end]) != one.digest for one in self._written[chunk])


def _slices(start: int, data: bytes) -> set[_Slice]:
    end = start + len(data)
    cuts = [start, *range((start // SECTOR_BYTES + 1) * SECTOR_BYTES, end, SECTOR_BYTES), end]
    return {
        _Slice(one, next_one, xxh3_64_digest(data[one - start : next_one - start])) for one, next_one in pairwise(cuts)
    }
