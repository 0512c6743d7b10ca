"""What was known of a device at the last clean stop, as the catalog keeps it."""

import json
from typing import NamedTuple

from cow.disk.superblock import Superblock
from cow.disk.witness import Witness


class Facts(NamedTuple):
    """What was known of a device at the last clean stop. `sample`: 8 bytes a chunk, as in fingerprint.py."""

    sample: bytes = b""
    witness: Witness | None = None
    superblock: Superblock = Superblock()

    def to_text(self) -> str:
        """The text that the catalog keeps (FORMAT.md)."""
        return json.dumps({"sample": self.sample.hex(), "witness": self.witness, "superblock": self.superblock})

    @classmethod
    def from_text(cls, text: object) -> "Facts":
        """The facts from the catalog's text; without a text nothing is known."""
        if not isinstance(text, str):
            return cls()
        values = json.loads(text)
        witness = Witness(*values["witness"]) if values["witness"] else None
        return cls(bytes.fromhex(values["sample"]), witness, Superblock(*values["superblock"]))


def facts_key(origin: int) -> str:
    """The key in the catalog's table `store` of the facts of an origin."""
    return f"device.{origin}"
