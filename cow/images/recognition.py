"""Whether a device is the one that the snapshots were taken of, and was left alone since. # I12

A path does not say what is behind it. These do: the sample as the newest snapshot sees it, which is right after a
crash too (fingerprint.py); and, from the last clean stop, the sample of the device itself, the kernel's witness of
writes (disk/witness.py), and the superblock's UUID. Where any of them speaks against the device, nothing is recorded
before the user has decided: it may be the wrong disk, and the right one may come back.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pyroaring import BitMap64

from cow.disk.superblock import Superblock
from cow.geometry import Run, chunks_in, runs_of
from cow.images.origin import Origin
from cow.records.facts import Facts
from cow.records.fingerprint import Comparison, compare, sampled

_MOST_PLACES = 4  # named in a sentence


def gather(origin: Origin) -> Facts:
    """The facts of a device as it is. Blocks; a fact that cannot be read is left unknown."""
    return Facts(origin.fingerprint(), origin.device.witness(), origin.device.superblock())


@dataclass(frozen=True)
class Verdict:
    """What speaks for a device and against it."""

    is_proved_untouched: bool  #: the kernel says that nothing was written since the clean stop
    is_another: bool  #: of the sample nothing but zeroes is as it was
    changed: list[Run]  #: where the sample differs
    is_written_to: bool  #: the kernel says that something was written
    before: Superblock
    now: Superblock

    @property
    def has_other_uuid(self) -> bool:
        """Whether the device has another superblock than it had."""
        return bool(self.before.uuid and self.now.uuid) and self.before != self.now

    def what_differs(self) -> str:
        """What differs, in words."""
        found = []
        if self.changed:
            places = ", ".join(f"{run.offset}+{run.length}" for run in self.changed[:_MOST_PLACES])
            more = len(self.changed) - _MOST_PLACES
            found.append(f"it differs at {places}{f' and {more} more places' if more > 0 else ''}")
        if self.is_written_to:
            found.append("the kernel says that it was written to")
        if self.has_other_uuid:
            found.append(f"it has {self.now}, and had {self.before}")
        return ", and ".join(found)


def judge(origin: Origin, seen: bytes, known: Facts, now: Facts, *, was_clean: bool) -> Verdict:
    """Compare a device with what is known of it.

    `seen` is the fingerprint of the newest snapshot, empty when there is none; `known` are the facts of the last clean
    stop, of which only the superblock counts when an unclean stop came since.
    """
    runs = sampled(origin.size_bytes)
    nothing = Comparison(0, [])
    by_snapshot = compare(runs, seen, now.sample, lambda chunk: not origin.epochs.knows(chunk)) if seen else nothing
    at_stop = known if was_clean else Facts()
    since_stop = compare(runs, at_stop.sample, now.sample, lambda chunk: True) if at_stop.sample else nothing
    changed = _union(by_snapshot.changed, since_stop.changed)
    same = by_snapshot.same + since_stop.same
    return Verdict(
        is_proved_untouched=now.witness is not None and now.witness == at_stop.witness and not changed,
        is_another=bool(changed) and same == 0,
        changed=changed,
        is_written_to=now.witness is not None and now.witness.contradicts(at_stop.witness),
        before=known.superblock,
        now=now.superblock,
    )


def _union(first: Sequence[Run], second: Sequence[Run]) -> list[Run]:
    both: BitMap64 = chunks_in(first) | chunks_in(second)
    return list(runs_of(both))
