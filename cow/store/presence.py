"""Whether the store in use is still where it was opened, whole: somebody may have removed or moved it meanwhile.

The daemon goes on with the files that it has open, but nobody will find what it writes there: so no snapshot is taken
then, and the user is told.
"""

from cow.disk.directory import Directory
from cow.errors import StoreGoneError
from cow.records.catalog import FILE_NAME
from cow.records.journal import Journal
from cow.store.inventory import Inventory

_COPY = (
    "its snapshots are gone, wholly or in part, when it is unmounted: copy what you need of them now, from their "
    "images, then unmount, and mount with a new store"
)


class Presence:
    """Of the store in `directory`. Calls ask the file system, and wait for a disk only to read its directories."""

    def __init__(self, directory: Directory, journal: Journal, inventory: Inventory) -> None:
        self._directory = directory
        self._journal = journal
        self._inventory = inventory
        self._catalog = directory.identity(FILE_NAME)

    def check(self) -> None:
        """Raise StoreGoneError when something is amiss."""
        if trouble := self.trouble():
            raise StoreGoneError(trouble)

    def trouble(self) -> str:
        """What is amiss, in a sentence; empty when all is there."""
        label = self._directory.label
        if self._directory.is_removed:
            return f"the directory of the store, {label}, was removed while it is in use: {_COPY}"
        removed = self._removed()
        if removed:
            return f"{label}/{removed} was removed or replaced while the store is in use: {_COPY}"
        if not self._directory.is_at_its_path:
            return (
                f"{label} does not lead to the store any more: it was renamed, its file system was unmounted (umount "
                f"-l), or another one is mounted over it. The next mount would not find its snapshots: put it back"
            )
        if self._directory.is_read_only:
            return (
                f"the file system of the store {label} has become read-only: see the kernel's log for why, check it, "
                f"and mount it read-write again"
            )
        return ""

    def _removed(self) -> str:
        if self._directory.identity("layers") != self._inventory.layers_directory.own_identity:
            return "layers"
        if self._directory.identity(FILE_NAME) != self._catalog:
            return FILE_NAME
        if self._journal.is_removed:
            return "journal.*"
        return next((f"layers/{layer.name}" for layer in list(self._inventory.layers) if layer.files.are_removed), "")
