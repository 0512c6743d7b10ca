"""The second place for the one record that must not fail: that snapshots were given up.

When the store's disk takes no more writes, old bytes cannot be preserved, and that this was so cannot be recorded in
the store. To stop the origin for that would be the tail wagging the dog (I8). So the record goes into a small file in a
directory that is, one hopes, on another disk; the next opening of the store reads it first. # I1

A file is called after the store's uuid and holds one decimal number: the snapshots up to this id are given up.
"""

from cow.device import Directory
from cow.errors import RefusedError

_MOST_BYTES = 20


class Elsewhere:
    """The records of one store."""

    def __init__(self, directory: Directory, store_uuid: str) -> None:
        self._directory = directory
        self._name = f"given-up.{store_uuid}"

    def record(self, newest: int) -> None:
        """Record that the snapshots up to `newest` are given up; durable on return. Raises OSError."""
        new_name = f"{self._name}.new"
        file = self._directory.open(new_name, create=True)
        try:
            file.pwrite(b"%-20d" % newest, 0)
            file.sync()
        finally:
            file.close()
        self._directory.rename(new_name, self._name)
        self._directory.sync()

    def read(self) -> int:
        """Up to which id snapshots were given up; 0 when none were.

        Raises RefusedError when the record cannot be understood.
        """
        try:
            file = self._directory.open(self._name)
        except FileNotFoundError:
            return 0
        try:
            content = file.pread(_MOST_BYTES, 0).strip(b" \0")
        finally:
            file.close()
        if content and not content.isdigit():
            raise RefusedError(
                f"{self._directory.label}/{self._name} says which snapshots were given up, and cannot be understood: "
                f"remove it if you know that the store is good"
            )
        return int(content or b"0")

    def clear(self) -> None:
        """Forget the record, when the store has it. A missing one is fine."""
        try:
            self._directory.unlink(self._name)
        except FileNotFoundError:
            return
        self._directory.sync()
