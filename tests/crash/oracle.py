"""What must be found after a power cut: the contents that each image may have, sector by sector, and the names.

An image may show each 512-byte sector as it was at the last flush, or as any write since left it. A snapshot that is
being taken, dropped or renamed is there before or after, never between.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from tests.crash.cut import SECTOR


@dataclass(frozen=True)
class Versions:
    """An image: its content at the last flush, and what was written since, in order."""

    flushed: bytes
    since: tuple[tuple[int, bytes], ...] = ()
    loose: bool = False  #: whether even without a crash some of `since` may not be there

    def write(self, offset: int, data: bytes) -> "Versions":
        return replace(self, since=(*self.since, (offset, data)))

    def flush(self) -> "Versions":
        return self if self.loose else Versions(self.latest)

    @property
    def latest(self) -> bytes:
        content = bytearray(self.flushed)
        for offset, data in self.since:
            content[offset : offset + len(data)] = data
        return bytes(content)

    def mismatch(self, found: bytes) -> str | None:
        """Where `found` is none of what the image may show, in words; None when it is right."""
        if found == self.flushed:
            return None
        if len(found) != len(self.flushed):
            return f"it has {len(found)} bytes, not {len(self.flushed)}"
        wrong = {at for at in range(0, len(found), SECTOR) if found[at : at + SECTOR] != self.flushed[at : at + SECTOR]}
        content = bytearray(self.flushed)
        for offset, data in self.since:
            content[offset : offset + len(data)] = data
            wrong -= {at for at in wrong if found[at : at + SECTOR] == content[at : at + SECTOR]}
            if not wrong:
                return None
        return f"the sectors at {sorted(wrong)} are none of what was written there" if wrong else None


@dataclass(frozen=True)
class Oracle:
    """`live` and the snapshots, and the one thing that is under way. Compared by identity: each is a moment."""

    live: Versions
    snapshots: Mapping[str, Versions] = field(default_factory=dict)
    being_made: tuple[str, Versions] | None = None
    being_dropped: str | None = None
    being_renamed: tuple[str, str] | None = None
    may_be_clean: bool = True

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other

    def expect(self, names: set[str]) -> dict[str, Versions]:
        """The snapshots that must be there, given the names that are. Raises AssertionError when those are wrong."""
        wanted = dict(self.snapshots)
        if self.being_made is not None and self.being_made[0] in names:
            wanted[self.being_made[0]] = self.being_made[1]
        if self.being_dropped is not None and self.being_dropped not in names:
            del wanted[self.being_dropped]
        if self.being_renamed is not None and self.being_renamed[1] in names:
            wanted[self.being_renamed[1]] = wanted.pop(self.being_renamed[0])
        assert names == set(wanted), f"there are the snapshots {sorted(names)}, and there must be {sorted(wanted)}"
        return wanted
