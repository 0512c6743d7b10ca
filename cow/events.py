"""Events: what happens to a store and its snapshots that no caller is told by an errno, for whoever listens.

An event is told where it happens, by a plain call on the trio thread: a listener returns at once, does not wait and
does not raise. `str()` of an event is its sentence for people, with what to do where something can be done. What else
a listener may want to tell apart stands in the event's own fields.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from cow.errors import printable


@dataclass(frozen=True)
class Event(ABC):
    """Something that a person should know of."""

    @abstractmethod
    def __str__(self) -> str: ...


Tell = Callable[[Event], None]


def nobody(event: Event) -> None:
    """The listener of a store to which nobody listens."""


@dataclass(frozen=True)
class Trouble(Event):
    """Something could not be done, and is tried again or left; nothing is lost by it yet."""

    sentence: str

    def __str__(self) -> str:
        return self.sentence


@dataclass(frozen=True)
class Filling(Event):
    """The store has come to one of the marks at which it warns. `used_percent` is of bytes or of inodes."""

    store: str  #: its directory
    used_percent: int
    fullness: str  #: how full it is of what, in words
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
    """A damaged snapshot has again all that it lacked."""

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
