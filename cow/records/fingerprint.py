"""The fingerprint of a device: checksums of a sample of chunks, as a snapshot sees them.

It tells, when the store is opened again, whether the device is the same one and was left alone meanwhile. A snapshot
never changes, so its fingerprint, once taken, stays right: a sampled chunk that no layer has preserved since must read
the same from the device, after a clean stop and after a crash alike. A chunk that was preserved does not count: what
the device has there does not matter to any snapshot.

The sample: all of the first MiB (superblocks, partition tables), the last 64 KiB, and chunks spread evenly.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pyroaring import BitMap64
from xxhash import xxh3_64_digest

from cow.geometry import CHUNK_BYTES, Run, chunks_in, chunks_of, pieces, runs_of

HEAD_CHUNKS = (1 << 20) // CHUNK_BYTES
TAIL_CHUNKS = 16
SPREAD_CHUNKS = 64
_UNKNOWN = bytes(8)  # of a chunk that could not be read; it never counts
_ZERO_SUM = xxh3_64_digest(bytes(CHUNK_BYTES))


def sampled(size_bytes: int) -> list[Run]:
    """The runs that a fingerprint of a device of that size covers, ascending."""
    chunks = chunks_of(size_bytes)
    sample = chunks_in([Run(0, min(HEAD_CHUNKS, chunks)), Run(max(0, chunks - TAIL_CHUNKS), min(TAIL_CHUNKS, chunks))])
    sample.update(chunks * place // SPREAD_CHUNKS for place in range(SPREAD_CHUNKS))
    return list(runs_of(sample))


def digests(runs: Sequence[Run], read: Callable[[Run], bytes]) -> bytes:
    """The fingerprint: 8 bytes a chunk. `read` returns the whole chunks of a run, or raises OSError."""
    found = []
    for run in runs:
        try:
            data = read(run)
        except OSError:
            found.append(_UNKNOWN if run.chunks == 1 else digests(list(pieces(run, 1)), read))
            continue
        found += [xxh3_64_digest(data[start : start + CHUNK_BYTES]) for start in range(0, run.length, CHUNK_BYTES)]
    return b"".join(found)


@dataclass(frozen=True)
class Comparison:
    """Of the sampled chunks that count: how many are as they were, and the runs that are not."""

    same: int
    changed: list[Run]

    @property
    def is_another_device(self) -> bool:
        """Whether chunks changed, and none but zeroes are as they were."""
        return bool(self.changed) and self.same == 0


def compare(runs: Sequence[Run], before: bytes, now: bytes, counts: Callable[[int], bool]) -> Comparison:
    """Compare two fingerprints; `counts` tells whether a chunk matters. Zeroes are no sign of identity."""
    same, changed = 0, BitMap64()
    for place, chunk in enumerate(chunk for run in runs for chunk in range(run.first, run.end)):
        digest, present = before[8 * place : 8 * place + 8], now[8 * place : 8 * place + 8]
        if _UNKNOWN in (digest, present) or not counts(chunk):
            continue
        if digest != present:
            changed.add(chunk)
        elif digest != _ZERO_SUM:
            same += 1
    return Comparison(same, list(runs_of(changed)))
