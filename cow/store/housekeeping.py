"""Housekeeping: what a store does in the background, and once more when it stops.

Save checkpoints and drop the journal files that they make needless, remove the directories of layers that are gone,
punch out what nobody reads, fill up the reserve, count the space. All of it can be stopped anywhere and done again.
"""

import errno
import functools
import math
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence

import trio
from pyroaring import BitMap64

from cow.disk.directory import Directory
from cow.durable.commits import Checkpoint, Commits
from cow.durable.space import Space
from cow.errors import CowError
from cow.events import Tell, Trouble
from cow.layers.layer import Layer, pinned
from cow.layers.layerfiles import remove_layer_directory

MOST_WAITING_JOURNALS = 8  # 32 MiB that could not be dropped
RETRY_SECONDS = 1.0  # for what was in use


class Housekeeping:
    """Trio thread only. `layers` are the store's, by id."""

    def __init__(
        self,
        layers_directory: Directory,
        space: Space,
        layers: Mapping[int, Layer],
        tell: Tell,
    ) -> None:
        self._layers_directory = layers_directory
        self.label = layers_directory.label  #: of the store's layers, for messages
        self._space = space
        self._layers = layers
        self._tell = tell
        self._commits: Commits
        self._more: Sequence[Callable[[], Awaitable[None]]]
        self._on_unsavable: Callable[[Layer, Exception], Awaitable[None]]
        self._checkpoints: list[Checkpoint] = []
        self._punches: list[tuple[Layer, BitMap64]] = []
        self._dropped: dict[str, Layer] = {}  #: layers that the catalog has forgotten, by directory name
        self._files = trio.Lock()  #: guards the layers' directories: maps are saved in them, and they are removed
        self._due = trio.Event()
        self._is_kept_waiting = False  #: whether something was not done, as a thread was using its layer
        self._told_of_punching = False

    def serve(
        self,
        commits: Commits,
        more: Sequence[Callable[[], Awaitable[None]]],
        on_unsavable: Callable[[Layer, Exception], Awaitable[None]],
    ) -> None:
        """Take over the commits whose checkpoints are saved here. Called once.

        `more` are further chores, done with the others. `on_unsavable` gives up what needs a layer that could not be
        saved for long.
        """
        self._commits, self._more, self._on_unsavable = commits, more, on_unsavable

    def keep_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Have a checkpoint saved."""
        self._checkpoints.append(checkpoint)
        self.wake()

    def punch_later(self, punches: Iterable[tuple[Layer, BitMap64]]) -> None:
        """Have chunks punched out that nobody reads any more."""
        self._punches += punches
        self.wake()

    def drop(self, layer: Layer) -> None:
        """Have a layer's files removed, which the catalog does not name any more."""
        layer.close()
        self._dropped[layer.name] = layer
        self.wake()

    def wake(self) -> None:
        """There is something to do."""
        self._due.set()

    async def run(self) -> None:
        """Do what is due until cancelled. Errors are told and not raised: nothing is lost by a chore not done."""
        while True:
            with trio.move_on_after(RETRY_SECONDS if self._is_kept_waiting else math.inf):
                await self._due.wait()
            self._due = trio.Event()
            self._is_kept_waiting = False
            try:
                await self.do_all()
            except (CowError, OSError) as error:
                self._tell(
                    Trouble(
                        f"housekeeping of the store {self._layers_directory.label} failed, nothing is lost: {error}"
                    )
                )

    async def do_all(self, *, closing: bool = False) -> None:
        """Do all that is due. What fails keeps nothing else from being done, and is tried again the next time.

        Raises the first OSError or CowError at the end.
        """
        failures: list[Exception] = []
        fill_up: Callable[[], Awaitable[None]] = functools.partial(self._fill_up, closing)
        chores = [self._save, self.sweep, self._punch, *self._more, fill_up, self._space.keep_up]
        for chore in chores:
            try:
                await chore()
            except (CowError, OSError) as error:
                failures.append(error)
        if failures:
            raise failures[0]

    async def _fill_up(self, closing: bool) -> None:
        if not self._space.holding_back and not closing:
            await self.hold_back()

    async def _save(self) -> None:
        """Save the checkpoints that wait, as one. Where that fails for long the layer in question is given up. # I6"""
        while self._checkpoints:
            checkpoint = functools.reduce(Checkpoint.merged, self._checkpoints)
            self._checkpoints = []
            try:
                async with self._files:
                    with self._space.changing_layers():
                        await self._space.see_through(functools.partial(self._commits.save, checkpoint))
            except BaseException as error:
                self._checkpoints.insert(0, checkpoint)
                if (
                    isinstance(error, (CowError, OSError))
                    and checkpoint.unsaved is not None
                    and len(checkpoint.journals) > MOST_WAITING_JOURNALS
                ):
                    await self._on_unsavable(checkpoint.unsaved, error)
                raise

    async def _punch(self) -> None:
        failures: list[Exception] = []
        for punch in list(self._punches):
            layer, chunks = punch
            if layer.files.pins:  # who reads there may have looked before the chunks were moved to another layer
                self._is_kept_waiting = True
                continue
            if layer.id in self._layers:
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
                    f"the file system of {self._layers_directory.label} cannot punch holes, so some of what deleted "
                    f"snapshots took comes back with the last of them only: have the store on ext4 or XFS"
                )
            )

    async def sweep(self) -> None:
        """Remove the directories of dropped layers that no thread works in any more; recovery removes any others."""
        failures: list[Exception] = []
        async with self._files:
            for name, layer in list(self._dropped.items()):
                if layer.files.pins:
                    self._is_kept_waiting = True
                    continue
                with self._space.changing_layers():
                    try:
                        await trio.to_thread.run_sync(remove_layer_directory, self._layers_directory, name)
                    except (CowError, OSError) as error:
                        failures.append(error)
                        continue
                del self._dropped[name]
        if failures:
            raise failures[0]

    async def hold_back(self) -> None:
        """Fill up the reserve, as far as there is room."""
        if not await trio.to_thread.run_sync(self._space.hold_back):
            self._tell(
                Trouble(
                    f"the disk of the store {self._layers_directory.label} is full, its reserve too: make room on it "
                    f"(space, or inodes)"
                )
            )

    def close_files(self) -> None:
        """Close the files of layers that are still to be removed."""
        for layer in self._dropped.values():
            layer.close()
