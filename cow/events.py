"""Events: what happens to a store and its snapshots and is reported to no caller by an errno.

An event is reported where it happens, by a plain call on the trio thread: a listener returns at once, does not wait and
does not raise. `str()` of an event is its sentence for the user, with a remedy if there is one. Details by which a
listener may tell events apart are in the event's own fields.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from cow.errors import printable


@dataclass(frozen=True)
class Event(ABC):
    """Something that the user should know."""

    @abstractmethod
    def __str__(self) -> str: ...


Tell = Callable[[Event], None]


def nobody(event: Event) -> None:
    """The listener for a store that has no other."""


@dataclass(frozen=True)
class Trouble(Event):
    """Something could not be done, and is retried or left undone; nothing is lost by it yet."""

    sentence: str

    def __str__(self) -> str:
        return self.sentence


@dataclass(frozen=True)
class Filling(Event):
    """The store has reached one of the levels at which it warns. `used_percent` is of bytes or of inodes."""

    store: str  #: its directory
    used_percent: int
    fullness: str  #: in words: how full it is, and of what
    remedy: str  #: what to do, and what happens until then

    def __str__(self) -> str:
        return f"the store {self.store} is {self.fullness}: {self.remedy}"


@dataclass(frozen=True)
class Damaged(Event):
    """A snapshot lacks some chunks from now on: they were lost, or do not match their checksums."""

    snapshot: bytes  #: its name
    reason: str

    def __str__(self) -> str:
        return f"snapshot {printable(self.snapshot)} is damaged: {self.reason}"


@dataclass(frozen=True)
class Rescued(Event):
    """A damaged snapshot has again everything that it lacked."""

    snapshot: bytes

    def __str__(self) -> str:
        return (
            f"snapshot {printable(self.snapshot)} lacks nothing any more: what was recorded as lost was never "
            f"overwritten, and has been read from the device after all"
        )


@dataclass(frozen=True)
class GivenUp(Event):
    """A snapshot became invalid, so that the origin could go on."""

    snapshot: bytes
    reason: str

    def __str__(self) -> str:
        return f"snapshot {printable(self.snapshot)} was given up: {self.reason}"
