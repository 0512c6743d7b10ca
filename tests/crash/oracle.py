"""What must be found after a power cut: the contents that each image may have, sector by sector, and the names.

An image may show each 512-byte sector as it was at the last flush, or as any write since left it. A snapshot that is
being taken, dropped or renamed is there before or after, never between.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

from tests.crash.cut import SECTOR

T = TypeVar("T")


@dataclass(frozen=True)
class Versions:
    """An image: its content at the last flush, and what was written since, in order."""

    flushed: bytes
    since: tuple[tuple[int, bytes], ...] = ()
    loose: bool = False  #: some of `since` may or may not be there, even without a crash, and no sync settles it

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
        wrong = {at for at in wrong if found[at : at + SECTOR] not in self._possible(at)}
        return f"the sectors at {sorted(wrong)} are none of what was written there" if wrong else None

    def _possible(self, at: int) -> list[bytes]:
        """What the sector at that offset may be: the flushed version, and each that came of a write to the last.

        When it is open what the last was, each that came of a write to any.
        """
        versions = [self.flushed[at : at + SECTOR]]
        for offset, data in self.since:
            start, end = max(offset, at), min(offset + len(data), at + SECTOR)
            if start < end:
                part = data[start - offset : end - offset]
                before = versions if self.loose else versions[-1:]
                versions = [*versions, *(one[: start - at] + part + one[end - at :] for one in before)]
        return versions


@dataclass(frozen=True)
class Oracle:
    """`live` and the snapshots, and what is under way, or failed, so that it may have happened or not.

    Compared by identity: each is a moment.
    """

    live: Versions
    snapshots: Mapping[str, Versions] = field(default_factory=dict)
    maybe_made: Mapping[str, Versions] = field(default_factory=dict)
    maybe_dropped: frozenset[str] = frozenset()
    maybe_renamed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  #: what each may be called now
    may_be_clean: bool = True

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other

    def expect(self, names: set[str]) -> dict[str, Versions]:
        """The snapshots that must be there, given the names that are. Raises AssertionError when those are wrong."""
        wanted = dict(self.snapshots)
        wanted.update({name: versions for name, versions in self.maybe_made.items() if name in names})
        for old, perhaps in self.maybe_renamed.items():
            for new in names.intersection(perhaps) if old in wanted and old not in names else ():
                wanted[new] = wanted.pop(old)
        for name in self.maybe_dropped - names:
            wanted.pop(name, None)
        assert names == set(wanted), f"there are the snapshots {sorted(names)}, and there must be {sorted(wanted)}"
        return wanted

    # -- what has begun, and what has ended ----------------------------------------------------------------------

    def making(self, name: str, made: Versions) -> "Oracle":
        return replace(self, maybe_made={**self.maybe_made, name: made})

    def made(self, name: str, made: Versions, live: Versions) -> "Oracle":
        snapshots = {**self.snapshots, name: made}
        return replace(self, snapshots=snapshots, maybe_made=_without(self.maybe_made, name), live=live)

    def dropping(self, name: str) -> "Oracle":
        return replace(self, maybe_dropped=self.maybe_dropped | {name})

    def dropped(self, name: str) -> "Oracle":
        return replace(self, snapshots=_without(self.snapshots, name), maybe_dropped=self.maybe_dropped - {name})

    def renaming(self, old: str, new: str) -> "Oracle":
        perhaps = (*self.maybe_renamed.get(old, ()), new)
        return replace(self, maybe_renamed={**self.maybe_renamed, old: perhaps})

    def renamed(self, old: str, new: str) -> "Oracle":
        snapshots = {new if name == old else name: versions for name, versions in self.snapshots.items()}
        dropped = frozenset(new if name == old else name for name in self.maybe_dropped)
        return replace(
            self, snapshots=snapshots, maybe_dropped=dropped, maybe_renamed=_without(self.maybe_renamed, old)
        )

    def wrote(self, name: str, versions: Versions) -> "Oracle":
        return replace(self, snapshots={**self.snapshots, name: versions})


def _without(held: Mapping[str, T], name: str) -> dict[str, T]:
    return {key: value for key, value in held.items() if key != name}
