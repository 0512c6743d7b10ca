"""The fingerprint of an origin: the checksums of the chunks in its first MiB, to tell it from another device.

The head changes in normal use (superblocks are there), so a chunk of it is marked in the catalog before it is first
overwritten, and a marked chunk no longer counts. A clean stop takes the fingerprint anew.
"""

from xxhash import xxh3_64_digest

from cow.device import OriginDevice
from cow.geometry import CHUNK_BYTES, Run

HEAD_BYTES = 1 << 20
HEAD_CHUNKS = HEAD_BYTES // CHUNK_BYTES
MASK_BYTES = HEAD_CHUNKS // 8


class Fingerprint:
    """`sums`: 8 bytes a chunk of the head. `written`: a bit a chunk, little-endian, set when it does not count."""

    def __init__(self, sums: bytes, written: bytes = bytes(MASK_BYTES)) -> None:
        self.sums = sums
        self._written = int.from_bytes(written, "little")

    @classmethod
    def of(cls, device: OriginDevice) -> "Fingerprint":
        """Read the device's head and take its fingerprint."""
        head = device.pread(min(HEAD_BYTES, device.size_bytes), 0)
        chunks = (head[start : start + CHUNK_BYTES] for start in range(0, len(head), CHUNK_BYTES))
        return cls(b"".join(map(xxh3_64_digest, chunks)))

    @property
    def written(self) -> bytes:
        """The mask of the chunks that no longer count."""
        return self._written.to_bytes(MASK_BYTES, "little")

    def marked(self, run: Run) -> bytes | None:
        """The mask with `run` in it, or None when it is there already. The caller stores it before `mark`."""
        wanted = self._written | _bits(run)
        return None if wanted == self._written else wanted.to_bytes(MASK_BYTES, "little")

    def mark(self, mask: bytes) -> None:
        """Take over a mask that is durable."""
        self._written |= int.from_bytes(mask, "little")

    def matches(self, present: "Fingerprint") -> bool:
        """Whether the chunks that count are what they were."""
        if len(self.sums) != len(present.sums):
            return False
        return all(
            self.sums[chunk * 8 : chunk * 8 + 8] == present.sums[chunk * 8 : chunk * 8 + 8]
            for chunk in range(len(self.sums) // 8)
            if not self._written >> chunk & 1
        )


def _bits(run: Run) -> int:
    end = min(run.end, HEAD_CHUNKS)
    return (1 << end) - (1 << run.first) if run.first < end else 0
