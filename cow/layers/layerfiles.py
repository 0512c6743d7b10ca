"""The open files of a layer: opened when they are needed, and kept open while a thread works on them.

Any thread may ask for a file. Pins, which the trio thread counts, say how many threads may be working: a closed layer
keeps its files until the last of them is done.
"""

import errno
import os
import stat
import threading

from cow.disk.directory import Directory
from cow.disk.file import File
from cow.disk.io import FULL
from cow.errors import CowError, SyncError

OPEN_FILES_OF_A_LAYER = 3  # its directory, the checksums, and a segment; more segments beyond a TiB
INODES_OF_A_LAYER = OPEN_FILES_OF_A_LAYER + 2  # these, its map, and for a moment a new map
NEW_MAP_NAME = "map.new"  # of a map that is not in its place yet
Key = int | str  # of a file: the number of a segment of the data, or another file's name


class LayerFiles:
    """The files in the directory `name` of `parent`, which is created with the first of them."""

    def __init__(self, parent: Directory, name: str) -> None:
        self.name = name
        self.pins = 0  #: how many threads may be working on the files
        self.opened: dict[Key, File] = {}
        self._parent = parent
        self._directory: Directory | None = None
        self._unsynced: set[int] = set()  #: segments
        self._entries_unsynced = True  #: whether files were created since its last sync, or by a killed process
        #: Serialises syncs: a second one must not return before the first has made its data durable.
        self._syncing = threading.Lock()
        self._opening = threading.Lock()  #: guards `_directory`, `opened` and what is unsynced
        self._closing = False

    @property
    def is_in_memory(self) -> bool:
        """Whether they never wait for a disk."""
        return self._parent.is_in_memory

    def file(self, key: Key, *, create: bool = False) -> File:
        """An open file. With `create` a missing one is created, else raises FileNotFoundError."""
        file = self.opened.get(key)
        if file is not None:
            return file
        with self._opening:
            if key not in self.opened:
                directory = self._open_directory(create=create)
                name = f"data.{key:04d}" if isinstance(key, int) else key
                try:
                    self.opened[key] = directory.open(name)
                except FileNotFoundError:
                    if not create:
                        raise
                    self.opened[key] = directory.open(name, create=True)
                    self._entries_unsynced = True
                    if not isinstance(key, int):
                        _hold_inode_for_map(directory)
            return self.opened[key]

    def directory(self) -> Directory:
        """The open directory. Raises FileNotFoundError before the first write."""
        with self._opening:
            return self._open_directory()

    def _open_directory(self, *, create: bool = False) -> Directory:
        if self._closing and not self.pins:
            raise CowError(f"layer {self.name} is closed")
        if self._directory is None:
            self._directory = self._parent.subdirectory(self.name, create=create)
        return self._directory

    @property
    def are_removed(self) -> bool:
        """Whether somebody removed the directory or a file in it; only open ones are looked at."""
        with self._opening:
            if self._directory is not None and self._directory.is_removed:
                return True
            return any(file.is_removed for file in self.opened.values())

    def allocated_bytes(self) -> int:
        """What the layer takes in the store. 0 before its first write."""
        try:
            return self.directory().allocated_bytes()
        except FileNotFoundError:
            return 0

    # -- syncing -------------------------------------------------------------------------------------------------

    def note_unsynced(self, segment: int) -> None:
        """Note that a segment of the data was written."""
        if segment not in self._unsynced:  # if it is in the set, its sync is still to come, after this write
            with self._opening:
                self._unsynced.add(segment)

    def sync_data(self) -> None:
        """Make all data written so far durable. The checksums become durable with the journal's record."""
        with self._syncing:
            self._sync_data()

    def _sync_data(self) -> None:
        with self._opening:
            segments, self._unsynced = self._unsynced, set()
            entries = self._entries_unsynced and self._directory is not None
            if entries:
                self._entries_unsynced = False
        try:
            for segment in segments:
                self.file(segment).sync()
            if entries and self._directory is not None:
                self._directory.sync()
        except (OSError, SyncError):
            with self._opening:
                self._unsynced |= segments
                self._entries_unsynced |= entries
            raise

    def give_up_unsynced(self) -> None:
        """After a failed sync whose chunks are durably recorded as lost: let later writes be synced again."""
        with self._opening:
            for segment in self._unsynced & self.opened.keys():
                self.opened[segment].forget_sync_failure()
            self._unsynced.clear()

    # -- closing, on the trio thread -----------------------------------------------------------------------------

    def pin(self) -> None:
        """Keep the files open while another thread works on them; undone by `unpin`."""
        self.pins += 1

    def unpin(self) -> None:
        """Undo one `pin`; the last one of a closed layer closes the files."""
        self.pins -= 1
        if self._closing and self.pins == 0:
            self.close()

    def close(self) -> None:
        """Close all files, now or when the last pin goes. Nothing is synced."""
        self._closing = True
        if self.pins:
            return
        with self._opening:
            for file in self.opened.values():
                file.close()
            self.opened.clear()
            if self._directory is not None:
                self._directory.close()
                self._directory = None


def _hold_inode_for_map(directory: Directory) -> None:
    """Create an empty `map.new`, so that the layer's first map can be saved when there are no inodes left."""
    if directory.free_inodes() is not None:
        try:
            directory.open(NEW_MAP_NAME, create=True).close()
        except OSError as error:
            if error.errno not in FULL:
                raise  # else it is as if the inode had been taken later


def remove_layer_directory(layers: Directory, name: str) -> None:
    """Delete a layer's directory and what is in it; a missing one is fine."""
    try:
        directory = layers.subdirectory(name)
    except FileNotFoundError:
        return
    try:
        for file in directory.names():
            directory.unlink(file)
    finally:
        directory.close()
    layers.rmdir(name)


def check_removable(layers: Directory, name: str) -> None:
    """Raise what `remove_layer_directory` would, as far as that can be foreseen, and remove nothing."""
    directory = layers.subdirectory(name)
    try:
        below = next((path for path, status in directory.entries_below() if stat.S_ISDIR(status.st_mode)), None)
    finally:
        directory.close()
    if below is not None:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), below)
