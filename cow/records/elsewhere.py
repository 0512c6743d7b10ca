"""The second place for the one record that must not fail: that snapshots were given up.

When the store's disk takes no more writes, old bytes cannot be preserved, and that cannot be recorded in the store
either. The origin must not be stopped for that (I8). So the record goes into a small file in a directory that should be
on another disk; the next opening of the store reads it first. # I1

One file is named after the store's UUID and holds one decimal number: the snapshots up to this id are given up. Another
file holds tokens: each opening of the store leaves one there and the same one in the catalog. After a crash it shows
that this is the directory that would have the record (entry/secondplace.py).
"""

from contextlib import suppress

from cow.disk.directory import Directory
from cow.errors import RefusedError

_MOST_BYTES = 20
_TOKEN_BYTES = 32  # hexadecimal digits
_MOST_TOKENS = 16  # copies of a store share one UUID, and may be in use at once


class Elsewhere:
    """The records of one store."""

    def __init__(self, directory: Directory, store_uuid: str) -> None:
        self._directory = directory
        self._name = f"given-up.{store_uuid}"
        self.label = directory.label
        self.session_name = f"session.{store_uuid}"

    def at(self, directory: Directory) -> "Elsewhere":
        """The records of the same store in another directory."""
        return Elsewhere(directory, self._name.removeprefix("given-up."))

    def record(self, newest: int) -> None:
        """Record that the snapshots up to `newest` are given up; durable on return. Raises OSError."""
        self._replace(self._name, b"%-20d" % newest)

    def _replace(self, name: str, content: bytes) -> None:
        new_name = f"{name}.new"
        file = self._directory.open(new_name, create=True)
        try:
            file.truncate(0)
            file.pwrite(content, 0)
            file.sync()
        finally:
            file.close()
        self._directory.rename(new_name, name)
        self._directory.sync()

    def read(self) -> int:
        """The id up to which snapshots were given up; 0 when none were.

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
        """Remove the record once the store has it. A missing one is fine."""
        self._remove(self._name)

    def _remove(self, name: str) -> None:
        try:
            self._directory.unlink(name)
        except FileNotFoundError:
            return
        self._directory.sync()

    # -- sessions ------------------------------------------------------------------------------------------------

    def has_session(self, token: str) -> bool:
        """Whether an opening with that token used this directory. Raises OSError when that cannot be read."""
        return token in self._tokens()

    def begin_session(self, token: str) -> None:
        """Leave a token; durable on return. Raises OSError; the other tokens are kept then."""
        self._write_tokens([token, *self._tokens()][:_MOST_TOKENS])

    def end_session(self, token: str) -> None:
        """Remove a token, after a clean stop. Raises OSError."""
        left = [one for one in self._tokens() if one != token]
        if left:
            self._write_tokens(left)
        else:
            self._remove(self.session_name)

    def _write_tokens(self, tokens: list[str]) -> None:
        try:
            self._replace(self.session_name, "".join(f"{one}\n" for one in tokens).encode())
        except OSError:
            with suppress(OSError):
                self._directory.unlink(f"{self.session_name}.new")
            raise

    def _tokens(self) -> list[str]:
        try:
            file = self._directory.open(self.session_name)
        except FileNotFoundError:
            return []
        try:
            return file.pread(_MOST_TOKENS * (_TOKEN_BYTES + 1), 0).decode("ascii", "replace").split()
        finally:
            file.close()
