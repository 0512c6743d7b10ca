"""The rows of the catalog: an origin, a snapshot and a layer, with the state of one and the role of the other."""

from dataclasses import dataclass, field
from enum import StrEnum

DOUBTED_FROM = "doubted_from_layer"  #: in the evidence of a suspect snapshot: see Catalog.suspect_snapshots


class State(StrEnum):
    """The state of a snapshot: what of it can be trusted."""

    PENDING = "pending"  # being taken; recovery drops it
    VALID = "valid"
    DAMAGED = "damaged"  # some chunks cannot be read; the others are right
    SUSPECT = "suspect"  # the device was changed while hcpfs was not running
    INVALID = "invalid"  # given up


TRUSTED = (State.VALID, State.DAMAGED)  #: states in which it is certain what is read, and what cannot be


class Role(StrEnum):
    """What a layer holds."""

    PRESERVED = "preserved"
    DELTA = "delta"


@dataclass
class OriginRow:
    """An origin as the catalog has it. `fingerprint` is that of the snapshot `fingerprint_of` (fingerprint.py)."""

    id: int
    name: bytes
    path: bytes
    size_bytes: int
    modified_ns: int
    fingerprint: bytes = b""
    fingerprint_of: int = 0


@dataclass
class SnapshotRow:
    """A snapshot as the catalog has it. Ids grow with time and are never reused."""

    id: int
    name: bytes
    created_ns: int
    state: State
    reason: str
    evidence: dict[str, str] = field(default_factory=dict)

    @property
    def doubted_from(self) -> int | None:
        """The first layer that a suspect snapshot must not trust, nor the device; None for any other snapshot."""
        return int(self.evidence.get(DOUBTED_FROM, 0)) if self.state is State.SUSPECT else None


@dataclass(frozen=True)
class LayerRow:
    """A layer, and the snapshot that it serves. Ids grow with the epochs and are never reused."""

    id: int
    origin: int
    snapshot: int
    role: Role
    generation: int = 0  #: its map has at least this one
