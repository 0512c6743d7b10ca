"""Disposal: frees what nobody reads any more, chunks of layers in use and the directories of dropped layers.

All of it can be stopped at any point: recovery removes what is left of dropped layers, and a chunk that is not punched
out is known to no layer that would be asked for it.
"""

import errno
from collections.abc import Iterable

import trio
from pyroaring import BitMap64

from cow.bell import Bell
from cow.durable.space import Space
from cow.errors import CowError
from cow.events import Tell, Trouble
from cow.layers.layer import Layer, pinned
from cow.layers.layerfiles import remove_layer_directory
from cow.store.inventory import Inventory


class Disposal:
    """Trio thread only. `due` rings when there is something to do."""

    def __init__(self, inventory: Inventory, space: Space, due: Bell, tell: Tell) -> None:
        self._inventory = inventory
        self.label = inventory.label  #: of the store's layers, for messages
        self._space = space
        self._due = due
        self._tell = tell
        self._punches: list[tuple[Layer, BitMap64]] = []
        self._dropped: dict[str, Layer] = {}  #: layers that the catalog has forgotten, by directory name
        self.directories = trio.Lock()  #: guards those of layers, in which maps are saved and which are removed
        self.moving = trio.Lock()  #: held while chunks are moved from layer to layer, with the files of both in use
        self._told_of_punching = False
        self.was_in_use = False  #: whether something was left alone because a thread was using its layer

    @property
    def is_punching_due(self) -> bool:
        """Whether chunks are still to be punched out."""
        return bool(self._punches)

    def punch_later(self, punches: Iterable[tuple[Layer, BitMap64]]) -> None:
        """Queue chunks that nobody reads any more, to be punched out."""
        self._punches += punches
        self._due.ring()

    def drop(self, layers: Iterable[Layer]) -> None:
        """Close layers that the catalog does not name any more, and queue their files to be removed."""
        for layer in layers:
            layer.close()
            self._dropped[layer.name] = layer
        self._due.ring()

    async def punch(self) -> None:
        """Punch out the queued chunks of layers that no thread uses. Raises the first OSError, after trying all."""
        failures: list[Exception] = []
        for punch in list(self._punches):
            layer, chunks = punch
            if layer.files.pins:  # a reader may have looked before the chunks were moved to another layer
                self.was_in_use = True
                continue
            if self._inventory.has(layer):
                with self._space.changing_layers(), pinned([layer]):
                    try:
                        await trio.to_thread.run_sync(layer.punch, chunks)
                    except OSError as error:
                        if error.errno != errno.EOPNOTSUPP:
                            failures.append(error)
                            continue
                        self._cannot_punch()
            self._punches.remove(punch)
        if failures:
            raise failures[0]

    def _cannot_punch(self) -> None:
        if not self._told_of_punching:
            self._told_of_punching = True
            self._tell(
                Trouble(
                    f"the file system of {self._inventory.label} cannot punch holes, so some of what deleted snapshots "
                    f"took comes back with the last of them only: have the store on ext4 or XFS"
                )
            )

    async def sweep(self) -> None:
        """Remove the directories of dropped layers that no thread works in any more.

        Raises the first OSError or CowError, after trying all.
        """
        failures: list[Exception] = []
        async with self.directories:
            for name, layer in list(self._dropped.items()):
                if layer.files.pins:
                    self.was_in_use = True
                    continue
                with self._space.changing_layers():
                    try:
                        await trio.to_thread.run_sync(remove_layer_directory, self._inventory.layers_directory, name)
                    except (CowError, OSError) as error:
                        failures.append(error)
                        continue
                del self._dropped[name]
        if failures:
            raise failures[0]

    def close_files(self) -> None:
        """Close the files of layers that are still to be removed."""
        for layer in self._dropped.values():
            layer.close()
