"""The store: how its parts are put together; taking, renaming and deleting snapshots; the clean close.

It is opened by cow/opening.py. What it hands out (`Store.origins`, `Store.snapshots`, their images) is used on the
trio thread of the caller. Its parts know each other in one direction, in the order in which `Store` makes them.

States of a snapshot, and who makes each step:

    (none) --create_snapshot--> pending --create_snapshot--> valid
    pending --recovery, or an error in create_snapshot--> (none)
    valid --read of a bad chunk, or chunks lost (store/damage.py)--> damaged
    damaged --lost chunks were rescued (store/damage.py)--> valid
    valid, damaged --the device was changed while hcpfs was not running (store/loading.py)--> suspect
    valid, damaged, suspect --no room, or nothing can be recorded (store/removal.py)--> invalid
    all but pending --delete_snapshot--> (none)
"""

import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import trio

from cow.bell import Bell
from cow.config import OnFull
from cow.disk.directory import Directory
from cow.disk.ring import Reads
from cow.disk.source import OriginDevice
from cow.durable.commits import Commits
from cow.durable.preserver import Preserver, is_full
from cow.durable.space import Space
from cow.errors import (
    CowError,
    InvalidSnapshotError,
    LostError,
    NameTakenError,
    NotFoundError,
    ReadOnlyError,
    SnapshotBusyError,
    StoreFullError,
    printable,
)
from cow.events import Tell
from cow.images.delta import Delta
from cow.images.gate import Gate
from cow.images.image import Image
from cow.images.origin import Origin
from cow.images.origins import Origins
from cow.images.reading import tell_of
from cow.images.recognition import gather
from cow.images.view import View
from cow.layers.layer import Layer, inodes
from cow.offload import offload
from cow.records.catalog import Catalog
from cow.records.elsewhere import Elsewhere
from cow.records.facts import facts_key
from cow.records.journal import Journal
from cow.records.rows import OriginRow, Role, SnapshotRow, State
from cow.store import loading
from cow.store.damage import Damage
from cow.store.disposal import Disposal
from cow.store.flatten import Flattener
from cow.store.housekeeping import Housekeeping
from cow.store.inventory import Inventory
from cow.store.presence import Presence
from cow.store.removal import Removal
from cow.store.snapshot import Snapshot, check_name

DRAIN_SECONDS = 30.0

Evidence = dict[str, str]
Quiesce = Callable[[], AbstractAsyncContextManager[Evidence]]


@asynccontextmanager
async def nothing_to_quiesce() -> AsyncIterator[Evidence]:
    """The `quiesce` of a store none of whose origins is mounted."""
    yield {"quiesced": "no"}


class OnDisk(NamedTuple):
    """What a store has on disk. Its opener opens and closes it."""

    directory: Directory
    layers_directory: Directory
    catalog: Catalog
    journal: Journal
    elsewhere: Elsewhere | None  #: the second place, for what the store itself cannot record any more


@dataclass(frozen=True)
class Settings:
    """How a store is used, as `open_store` was told."""

    on_full: OnFull
    write_behind: bool
    read_only: bool
    read_suspect: bool


class Store:
    """An open store. Made by `open_store`."""

    def __init__(
        self, on_disk: OnDisk, space: Space, settings: Settings, tell: Tell, reads: Reads | None = None
    ) -> None:
        self.space = space
        self.reads = reads  #: for `Handle.begin_read`; None where reads have to be waited for in threads
        self.settings = settings
        self.path = on_disk.directory.label
        self._catalog = catalog = on_disk.catalog
        self._tell = tell
        self._tasks: trio.Nursery | None = None  #: of `run`
        self._abandoned: set[Snapshot] = set()  #: those that could not be taken, and have to be removed again
        self._gate = Gate()
        self._due = due = Bell()  #: rung when the housekeeping has something to do
        self.inventory = Inventory(on_disk.directory, on_disk.layers_directory)
        self.presence = Presence(on_disk.directory, on_disk.journal, self.inventory)
        self._commits = Commits(on_disk.journal, self.inventory, space.reserve, catalog, due.ring)
        self.disposal = Disposal(self.inventory, space, due, tell)
        self._flattener = Flattener(catalog, self._commits, self.inventory, space, self.disposal, tell)
        self._removal = Removal(catalog, on_disk.elsewhere, self.inventory, space, self.disposal, tell)
        self.damage = Damage(catalog, self._commits, self.inventory, due, tell)
        self._preserver = Preserver(self._commits, space, self._removal, self.damage, settings.on_full)
        chores = [self.damage.record, self._take_fingerprints]
        self.housekeeping = Housekeeping(self._commits, self.disposal, space, self._removal, chores, due, tell)

    # -- what there is -------------------------------------------------------------------------------------------

    @property
    def origins(self) -> Origins:
        """The live devices, in the order of the store's sources."""
        return self.inventory.origins

    @property
    def snapshots(self) -> list[Snapshot]:
        """All snapshots that exist for users, oldest first."""
        return self.inventory.snapshots

    def find(self, name: bytes) -> Snapshot | None:
        """The snapshot of that name."""
        return self.inventory.find(name)

    def by_id(self, number: int) -> Snapshot | None:
        """The snapshot of that id."""
        return self.inventory.by_id(number)

    # -- snapshots -----------------------------------------------------------------------------------------------

    async def create_snapshot(self, name: bytes, quiesce: Quiesce = nothing_to_quiesce) -> Snapshot:
        """Take a snapshot of all origins at one instant. It is durable and complete on return. # I5

        `quiesce` is entered before writes are held back and left right after; the evidence it yields goes into `info`.
        Raises the errors of names, ReadOnlyError, StoreFullError, StoreGoneError, HoldTimeoutError, and OSError when an
        origin cannot be synced; the snapshot does not exist then.
        """
        check_name(name)
        if self.settings.read_only:
            raise ReadOnlyError("mounted read-only: mount without the option ro to take snapshots")
        await self._remove_abandoned()
        self._check_name_is_free(name)
        await offload(self.presence.check, here=self.inventory.layers_directory.is_in_memory)
        await self.space.check_for_snapshot()
        self.inventory.check_open_files()
        snapshot: Snapshot | None = None
        try:
            async with quiesce() as evidence:
                await self.origins.drain(DRAIN_SECONDS)  # most of it before writes are held
                began = time.perf_counter_ns()
                async with self._gate.hold(DRAIN_SECONDS):
                    await self.origins.drain(DRAIN_SECONDS)
                    async with self.inventory.lock:
                        self._check_name_is_free(name)
                        snapshot = await self._open_epoch(name)
                evidence["held_us"] = str((time.perf_counter_ns() - began) // 1000)
            # What was acknowledged before the instant is part of the snapshot, and must survive a power loss.
            for origin in self.origins:
                await origin.sync()
            async with self.inventory.lock:
                await self._finish(snapshot, evidence)
        except BaseException:
            if snapshot is not None:
                snapshot.abandoned = True
                self._abandoned.add(snapshot)
            with trio.CancelScope(shield=True):
                await self._remove_abandoned()
            raise
        return snapshot

    async def _remove_abandoned(self) -> None:
        """Remove snapshots that could not be taken, also those whose removal failed before."""
        for snapshot in list(self._abandoned):
            async with self.inventory.lock:
                if self.inventory.get(snapshot.id) is snapshot:
                    await self._removal.delete(snapshot)
            self._abandoned.discard(snapshot)

    async def _finish(self, snapshot: Snapshot, evidence: Evidence) -> None:
        if snapshot.row.state != State.PENDING:
            raise StoreFullError(f"the snapshot could not be kept: {snapshot.row.reason}")
        await trio.to_thread.run_sync(self._catalog.finish_snapshot, snapshot.id, evidence)
        snapshot.row.evidence.update(evidence)
        snapshot.row.state = State.VALID
        layers = (layer for origin in self.origins for layer in origin.epochs.layers_for(snapshot.id))
        if any(layer.lost for layer in layers):  # since its epoch began
            self.damage.find_lost()
        self._due.ring()
        self.inventory.changed.ring()

    def _check_name_is_free(self, name: bytes) -> None:
        if self.inventory.is_taken(name):
            raise NameTakenError(f"there is a snapshot {printable(name)} already: choose another name")

    async def _open_epoch(self, name: bytes) -> Snapshot:
        row, layer_rows = await trio.to_thread.run_sync(self._catalog.add_snapshot, name, time.time_ns())
        # atomic: no trio checkpoint. Between the transaction and here no write is let in.
        made = list(zip(layer_rows, self.inventory.make_layers(layer_rows), strict=True))
        preserved = {of.origin: layer for of, layer in made if of.role == Role.PRESERVED}
        deltas = {of.origin: layer for of, layer in made if of.role == Role.DELTA}
        for origin in self.origins:
            origin.epochs.open_epoch(row.id, preserved[origin.id])
        snapshot = self._snapshot_of(row, deltas)
        self.inventory.add(snapshot)
        return snapshot

    def _snapshot_of(self, row: SnapshotRow, deltas: Mapping[int, Layer]) -> Snapshot:
        images = [self._image(origin, row, deltas[origin.id]) for origin in self.origins]
        if self._tasks is not None:
            for image in images:
                self._tasks.start_soon(image.run)
        return Snapshot(row, images)

    def _image(self, origin: Origin, row: SnapshotRow, delta_layer: Layer) -> Image:
        view = View(origin, row.id, row.created_ns, delta_layer)
        if row.doubted_from is not None:
            view.doubt(row.doubted_from, is_refused=not self.settings.read_suspect)
        delta = Delta(view, self._commits, partial(self.damage.found, row.id))
        return Image(view, delta, self.space, self._tell, write_behind=self.settings.write_behind)

    async def rename_snapshot(self, old: bytes, new: bytes) -> None:
        """Rename a snapshot, durably. Raises NotFoundError, NameTakenError and the errors of names. # I5"""
        check_name(new)
        async with self.inventory.lock:
            snapshot = self._get(old)
            if old == new:
                return
            self._check_name_is_free(new)
            self._check_writable()
            await trio.to_thread.run_sync(self._catalog.rename_snapshot, snapshot.id, new)
            self.inventory.rename(snapshot, new)

    async def delete_snapshot(self, name: bytes) -> None:
        """Delete a snapshot, durably; its space comes back soon after. # I5

        Raises NotFoundError, and SnapshotBusyError while one of its images is open.
        """
        async with self.inventory.lock:
            snapshot = self._get(name)
            self._check_writable()
            if snapshot.is_open:
                raise SnapshotBusyError(
                    f"snapshot {printable(name)} is in use: close its image (unmount it, losetup -d) and try again"
                )
            await self._removal.delete(snapshot)

    def _get(self, name: bytes) -> Snapshot:
        found = self.find(name)
        if found is None:
            raise NotFoundError(f"there is no snapshot {printable(name)}")
        return found

    def _check_writable(self) -> None:
        if self.settings.read_only:
            raise ReadOnlyError("mounted read-only: mount without the option ro to change snapshots")

    async def catalog_problems(self) -> list[str]:
        """What is wrong with the catalog, in sentences; all its rows are summed anew."""
        return await trio.to_thread.run_sync(self._catalog.problems)

    # -- housekeeping --------------------------------------------------------------------------------------------

    async def checkpoint(self) -> None:
        """Start a new journal file; what came before is saved into the layers by the housekeeping."""
        await self._commits.checkpoint()

    async def _take_fingerprints(self) -> None:
        """Put the fingerprint of the newest snapshot into the catalog. It stays right until that snapshot goes."""
        newest = self.inventory.trusted[-1].id if self.inventory.trusted else 0
        for origin in self.origins if newest and not self.settings.read_only else ():
            if origin.fingerprint_of != newest:
                fingerprint = await trio.to_thread.run_sync(origin.fingerprint)
                if not any(fingerprint):
                    return  # nothing could be read: the device is away, and the chores come again
                if self.inventory.get(newest) is None:
                    return  # it went meanwhile; the chores come again
                await trio.to_thread.run_sync(self._catalog.set_fingerprint, origin.id, newest, fingerprint)
                origin.fingerprint_of = newest
                origin.superblock = await trio.to_thread.run_sync(origin.device.superblock)

    # -- opening and closing -------------------------------------------------------------------------------------

    def open_origins(self, rows: Sequence[OriginRow], devices: Sequence[OriginDevice]) -> None:
        """Take over the devices, in the order of the catalog's rows. Called once, by the opener."""
        for row, device in zip(rows, devices, strict=True):
            self.origins.append(
                Origin(
                    row,
                    device,
                    self._gate,
                    self._preserver,
                    self._tell,
                    # Where a full store stops the writer, the writer has to wait for the error.
                    write_behind=self.settings.write_behind and self.settings.on_full is not OnFull.BLOCK_WRITES,
                    store_is_in_memory=self.inventory.layers_directory.is_in_memory,
                )
            )

        per_layer = [inodes(origin.chunks) for origin in self.origins]
        self.space.inodes.expect(
            2 * sum(per_layer), len(self.origins), lambda: len(self.inventory.layers) * max(per_layer)
        )

    def load(self, layers: Mapping[int, Layer]) -> None:
        """Put together the snapshots from the layers that recovery found, by id. Called once, by the opener.

        Raises RefusedError when the catalog does not make sense.
        """
        self.disposal.punch_later(loading.load(self.inventory, self._catalog, layers, self._snapshot_of))
        if any(layer.lost for layer in layers.values()):
            self.damage.find_lost()
        self.inventory.changed.ring()

    async def run(self) -> None:
        """The store's background work; runs until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._preserver.run)
            nursery.start_soon(self.housekeeping.run)
            nursery.start_soon(self.origins.run)
            if self.reads is not None:
                nursery.start_soon(tell_of, self.reads)
            if not self.settings.read_only:
                nursery.start_soon(self._flattener.run)
            self._tasks = nursery
            for image in self.inventory.images:
                nursery.start_soon(image.run)

    async def drain(self) -> None:
        """Make all acknowledged writes durable, before `run` ends. The origins come first. # I8

        Raises the first error, after every device and image has been tried: none pays for another. # I9
        """
        failures = await self._sync_all()
        if any(is_full(error) for error in failures):
            with self.space.reserve.in_need() as let_go:
                await trio.to_thread.run_sync(let_go)
                told_once = [error for error in failures if isinstance(error, LostError)]
                failures = told_once + await self._sync_all()
        if failures:
            raise failures[0]

    async def _sync_all(self) -> list[Exception]:
        failures: list[Exception] = []

        async def attempt(sync: Callable[[], Awaitable[None]]) -> None:
            try:
                await sync()
            except InvalidSnapshotError:
                pass  # given up meanwhile, which is an event of its own
            except (CowError, OSError) as error:
                failures.append(error)

        for origin in self.origins if not self.settings.read_only else ():
            await attempt(origin.sync)
        for image in list(self.inventory.images):
            if image.view.is_usable:
                await attempt(image.sync)
        return failures

    async def close(self) -> None:
        """Record a clean stop, and what the devices are known by.

        Called after `drain`, when `run` has ended and no call is under way. Raises when that cannot be done; the next
        opening recovers then.
        """
        with self.space.reserve.in_need() as let_go:
            await trio.to_thread.run_sync(let_go)
            await self._commits.checkpoint()
            await self.housekeeping.do_all(closing=True)
            stopped = [(one.id, os.fsencode(one.device.label), one.modified_ns) for one in self.origins]
            facts = {facts_key(one.id): await trio.to_thread.run_sync(gather, one) for one in self.origins}
            settings = {key: one.to_text() for key, one in facts.items()}
            await trio.to_thread.run_sync(self._catalog.record_clean_stop, stopped, settings)

    async def suspect(self, reason: str) -> None:
        """Record that what is on a device may be wrong for all snapshots. Called before anybody uses them."""
        await loading.suspect(self.inventory, self._catalog, reason, read_suspect=self.settings.read_suspect)

    def close_files(self) -> None:
        """Close the layers' files, whatever happened before."""
        self.inventory.close_files()
        self.disposal.close_files()
