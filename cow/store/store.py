"""The store: what there is, taking, renaming and deleting snapshots, loading them, and the clean close.

It is opened by cow/opening.py. What it gives out (`Store.origins`, `Store.snapshots`, their images) is used on the
trio thread of the caller.

States of a snapshot, and who makes each step:

    (none) --create_snapshot--> pending --create_snapshot--> valid
    pending --recovery, or an error in create_snapshot--> (none)
    valid --read of a bad chunk, or chunks lost (store/damage.py)--> damaged
    valid, damaged --the device was changed while nobody looked: suspect--> suspect
    valid, damaged, suspect --no room, or nothing can be recorded (store/removal.py)--> invalid
    all but pending --delete_snapshot--> (none)
"""

import os
import resource
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from functools import partial

import trio

from cow.clock import after
from cow.disk.directory import Directory
from cow.disk.source import OriginDevice
from cow.durable.commits import Commits
from cow.durable.preserver import OnFull, Preserver, is_full
from cow.durable.space import Space
from cow.errors import (
    CowError,
    InvalidSnapshotError,
    LostError,
    NameTakenError,
    NotFoundError,
    ReadOnlyError,
    RefusedError,
    SnapshotBusyError,
    StoreFullError,
    printable,
)
from cow.events import Tell
from cow.images.gate import Gate
from cow.images.image import Image
from cow.images.origin import Origin, drop_shadowed
from cow.images.origins import Origins
from cow.images.recognition import facts_key, gather
from cow.layers.layer import OTHER_OPEN_FILES, Layer, inodes, open_files
from cow.offload import offload
from cow.records.catalog import DOUBTED_FROM, Catalog, LayerRow, OriginRow, Role, SnapshotRow, State
from cow.records.elsewhere import Elsewhere
from cow.records.journal import Journal
from cow.store.damage import Damage
from cow.store.flatten import Flattener
from cow.store.housekeeping import Housekeeping
from cow.store.presence import Presence
from cow.store.removal import Removal
from cow.store.snapshot import Snapshot, check_name

DRAIN_SECONDS = 30.0
NO_LAYER = 0  # an id that the catalog never gives
TRUSTED = (State.VALID, State.DAMAGED)

Evidence = dict[str, str]
Quiesce = Callable[[], AbstractAsyncContextManager[Evidence]]


@asynccontextmanager
async def nothing_to_quiesce() -> AsyncIterator[Evidence]:
    """The `quiesce` of a store whose origins nobody has mounted."""
    yield {"quiesced": "no"}


class Store:
    """An open store. Made by `open_store`."""

    def __init__(
        self,
        catalog: Catalog,
        journal: Journal,
        directory: Directory,
        layers_directory: Directory,
        space: Space,
        elsewhere: Elsewhere | None,
        *,
        on_full: OnFull,
        write_behind: bool,
        read_only: bool,
        read_suspect: bool,
        tell: Tell,
    ) -> None:
        self.space = space
        self.on_full = on_full
        self.read_only = read_only
        self._write_behind = write_behind
        self._tasks: trio.Nursery | None = None  #: of `run`
        self._read_suspect = read_suspect
        self.origins = Origins()
        self.path = directory.label
        self._tell = tell
        self._catalog = catalog
        self._layers_directory = layers_directory
        self._layers: dict[int, Layer] = {}  #: by id; guarded by `_layout`
        self._snapshots: dict[int, Snapshot] = {}  #: by id, so oldest first; guarded by `_layout`
        self._named: dict[bytes, Snapshot] = {}  #: the same by name
        self._abandoned: set[Snapshot] = set()  #: those of them that could not be taken
        self.presence = Presence(directory, layers_directory, journal, self._layers.values)
        self._layout = trio.Lock()  #: guards snapshots, groups and layers against two changes at once
        self._gate = Gate()
        self.housekeeping = Housekeeping(layers_directory, space, self._layers, tell)
        self._commits = Commits(
            journal, self._layers.values, self.housekeeping.keep_checkpoint, space.in_need, catalog.record_saved,
            self._settled,
        )  # fmt: skip
        self._flattener = Flattener(
            catalog, self._commits, space, self.housekeeping, self._layout, self.origins, self._layers,
            lambda: any(one.row.state is State.SUSPECT for one in self._snapshots.values()), tell,
        )  # fmt: skip
        self.damage = Damage(catalog, self._commits, self.housekeeping, self._layout, self._snapshots, tell)
        self._removal = Removal(
            catalog, space, self.housekeeping, self._flattener, elsewhere, self._layout, self._snapshots, self._layers,
            tell,
        )  # fmt: skip
        self._preserver = Preserver(
            self._commits,
            on_full,
            space.room,
            self._removal.make_room,
            space.let_inodes_go,
            self._removal.give_up,
            self.damage.lost,
            self.damage.rescued,
        )
        chores = [self.damage.record, self._take_fingerprints]
        self.housekeeping.serve(self._commits, chores, self._removal.give_up_readers)

    # -- what there is -------------------------------------------------------------------------------------------

    @property
    def snapshots(self) -> list[Snapshot]:
        """All snapshots that exist for users, oldest first."""
        return [one for one in self._snapshots.values() if one.exists]

    def find(self, name: bytes) -> Snapshot | None:
        """The snapshot of that name."""
        found = self._named.get(name)
        return found if found is not None and found.exists else None

    def by_id(self, number: int) -> Snapshot | None:
        """The snapshot of that id."""
        found = self._snapshots.get(number)
        return found if found is not None and found.exists else None

    # -- snapshots -----------------------------------------------------------------------------------------------

    async def create_snapshot(self, name: bytes, quiesce: Quiesce = nothing_to_quiesce) -> Snapshot:
        """Take a snapshot of all origins at one instant. It is durable and complete on return. # I5

        `quiesce` is entered before writes are held and left right after; the evidence it yields goes into `info`.
        Raises the errors of names, ReadOnlyError, StoreFullError, HoldTimeoutError, and OSError where an
        origin cannot be synced; the snapshot does not exist then.
        """
        check_name(name)
        if self.read_only:
            raise ReadOnlyError("mounted read-only: mount without the option ro to take snapshots")
        await self._remove_abandoned()
        self._check_name_is_free(name)
        await offload(self.presence.check, here=self._layers_directory.is_in_memory)
        await self.space.check_for_snapshot()
        self._check_open_files()
        snapshot: Snapshot | None = None
        try:
            async with quiesce() as evidence:
                await self.origins.drain(DRAIN_SECONDS)  # most of it before writes are held
                began = time.perf_counter_ns()
                async with self._gate.hold(DRAIN_SECONDS):
                    await self.origins.drain(DRAIN_SECONDS)
                    async with self._layout:
                        self._check_name_is_free(name)
                        snapshot = await self._open_epoch(name)
                evidence["held_us"] = str((time.perf_counter_ns() - began) // 1000)
            # What was acknowledged before the instant is part of the snapshot, and must not be lost with the power.
            for origin in self.origins:
                await origin.sync()
            async with self._layout:
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
        """Take back snapshots that could not be taken, also those where an error kept us from it before."""
        for snapshot in list(self._abandoned):
            async with self._layout:
                if snapshot.id in self._snapshots:
                    await self._remove(snapshot)
            self._abandoned.discard(snapshot)

    async def _finish(self, snapshot: Snapshot, evidence: Evidence) -> None:
        if snapshot.row.state != State.PENDING:
            raise StoreFullError(f"the snapshot could not be kept: {snapshot.row.reason}")
        await trio.to_thread.run_sync(self._catalog.finish_snapshot, snapshot.id, evidence)
        snapshot.row.evidence.update(evidence)
        snapshot.row.state = State.VALID
        layers = (layer for origin in self.origins for layer in origin.layers_for(snapshot.id))
        if any(layer.lost for layer in layers):  # since its epoch began
            self._tell_lost()
        self.housekeeping.wake()
        self._flattener.wake()

    def _check_open_files(self) -> None:
        """Raise StoreFullError when the files of one snapshot more might be too many for this process."""
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        needed = self._most_open_files + 2 * sum(open_files(origin.chunks) for origin in self.origins)
        if limit != resource.RLIM_INFINITY and needed > limit:
            raise StoreFullError(
                f"{len(self._snapshots)} snapshots, and one more, may need {needed} open files, and this process may "
                f"open {limit}: rmdir snapshots, or raise its limit (ulimit -n, LimitNOFILE=) and mount again"
            )

    @property
    def _most_open_files(self) -> int:
        """How many files are open when all layers have all theirs."""
        return OTHER_OPEN_FILES + sum(open_files(layer.chunks) for layer in self._layers.values())

    def _check_name_is_free(self, name: bytes) -> None:
        if name in self._named:
            raise NameTakenError(f"there is a snapshot {printable(name)} already: choose another name")

    async def _open_epoch(self, name: bytes) -> Snapshot:
        row, layer_rows = await trio.to_thread.run_sync(self._catalog.add_snapshot, name, time.time_ns())
        # atomic: no checkpoint. Between the commit and here no write is let in.
        self._make_layers(layer_rows)
        preserved = {layer.origin: self._layers[layer.id] for layer in layer_rows if layer.role == Role.PRESERVED}
        deltas = {layer.origin: self._layers[layer.id] for layer in layer_rows if layer.role == Role.DELTA}
        for origin in self.origins:
            origin.open_epoch(row.id, preserved[origin.id])
        return self._add(row, deltas)

    def _make_layers(self, rows: Sequence[LayerRow]) -> None:
        chunks = {origin.id: origin.chunks for origin in self.origins}
        for row in rows:
            self._layers[row.id] = Layer(self._layers_directory, row.id, chunks[row.origin])

    def _add(self, row: SnapshotRow, deltas: dict[int, Layer]) -> Snapshot:
        images = [
            Image(
                origin,
                row.id,
                row.created_ns,
                deltas[origin.id],
                self._commits,
                self.space,
                partial(self.damage.found, row.id),
                self._tell,
                doubted_from=None if self._read_suspect else row.doubted_from,
                write_behind=self._write_behind,
            )
            for origin in self.origins
        ]
        for image in images:
            image.is_doubted = row.doubted_from is not None
        if self._tasks is not None:
            for image in images:
                self._tasks.start_soon(image.run)
        self._snapshots[row.id] = self._named[row.name] = Snapshot(row, images)
        return self._snapshots[row.id]

    async def rename_snapshot(self, old: bytes, new: bytes) -> None:
        """Rename a snapshot, durably. Raises NotFoundError, NameTakenError and the errors of names. # I5"""
        check_name(new)
        async with self._layout:
            snapshot = self._get(old)
            if old == new:
                return
            self._check_name_is_free(new)
            self._check_writable()
            await trio.to_thread.run_sync(self._catalog.rename_snapshot, snapshot.id, new)
            snapshot.row.name = new
            self._named[new] = self._named.pop(old)

    async def delete_snapshot(self, name: bytes) -> None:
        """Delete a snapshot, durably; its space comes back soon after. # I5

        Raises NotFoundError, and SnapshotBusyError while one of its images is open.
        """
        async with self._layout:
            snapshot = self._get(name)
            self._check_writable()
            if snapshot.is_open:
                raise SnapshotBusyError(
                    f"snapshot {printable(name)} is in use: close its image (unmount it, losetup -d) and try again"
                )
            await self._remove(snapshot)

    def _get(self, name: bytes) -> Snapshot:
        found = self.find(name)
        if found is None:
            raise NotFoundError(f"there is no snapshot {printable(name)}")
        return found

    def _check_writable(self) -> None:
        if self.read_only:
            raise ReadOnlyError("mounted read-only: mount without the option ro to change snapshots")

    async def _remove(self, snapshot: Snapshot) -> None:
        await self._removal.delete(snapshot)
        del self._snapshots[snapshot.id], self._named[snapshot.name]

    async def catalog_problems(self) -> list[str]:
        """What is wrong with the catalog, in sentences; all its rows are counted anew."""
        return await trio.to_thread.run_sync(self._catalog.problems)

    def is_in_use(self, layer: Layer) -> bool:
        """Whether the layer still belongs to some snapshot."""
        return self._layers.get(layer.id) is layer

    @asynccontextmanager
    async def _settled(self, layer: Layer) -> AsyncIterator[None]:
        """While no image writes to the layer."""
        images = (image for one in self._snapshots.values() for image in one.images)
        image = next((one for one in images if one.delta is layer), None)
        async with image.settled() if image is not None else nullcontext():
            yield

    # -- housekeeping --------------------------------------------------------------------------------------------

    async def checkpoint(self) -> None:
        """Start a new journal file; what came before is saved into the layers by the housekeeping."""
        await self._commits.checkpoint()

    async def _take_fingerprints(self) -> None:
        """Have the fingerprint of the newest snapshot in the catalog. It stays right until that snapshot goes."""
        newest = next((one.id for one in reversed(self._snapshots.values()) if one.row.state in TRUSTED), 0)
        for origin in self.origins if newest and not self.read_only else ():
            if origin.fingerprint_of != newest:
                fingerprint = await trio.to_thread.run_sync(origin.fingerprint)
                if not any(fingerprint):
                    return  # nothing could be read: the device is away, and the chores come again
                if newest not in self._snapshots:
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
                    read_only=self.read_only,
                    # Where a full store stops the writer, the writer has to be there to be told.
                    write_behind=self._write_behind and self.on_full is not OnFull.BLOCK_WRITES,
                    store_is_in_memory=self._layers_directory.is_in_memory,
                )
            )

        per_layer = [inodes(origin.chunks) for origin in self.origins]
        self.space.inodes.expect(2 * sum(per_layer), len(self.origins), lambda: len(self._layers) * max(per_layer))

    def load(self, layers: dict[int, Layer]) -> None:
        """Put together the snapshots from what recovery found. Called once, by the opener.

        Raises RefusedError when the catalog does not make sense.
        """
        self._layers.update(layers)
        rows_of: defaultdict[int, list[LayerRow]] = defaultdict(list)  # by snapshot
        for layer_row in self._catalog.layers():
            rows_of[layer_row.snapshot].append(layer_row)
        for row in self._catalog.snapshots():
            own = rows_of[row.id]
            if row.state != State.INVALID:
                for origin in self.origins:
                    self._load_group(origin, row, own)
            # An invalid snapshot may have no layers any more; its images are listed all the same, and read EIO.
            deltas = {origin.id: Layer(self._layers_directory, NO_LAYER, origin.chunks) for origin in self.origins}
            deltas.update({layer.origin: layers[layer.id] for layer in own if layer.role == Role.DELTA})
            self._add(row, deltas)
        if any(layer.lost for layer in layers.values()):
            self._tell_lost()
        self.housekeeping.wake()

    def _tell_lost(self) -> None:
        counts: Counter[int] = Counter()
        for origin in self.origins:
            for number, lost in origin.lost():
                image = self._snapshots[number].image(origin.name)
                counts[number] += len(image.lost_of(lost)) if image is not None else 0
        for number, count in counts.items():
            if count:
                self.damage.mark([number], f"{count} chunks were lost; they read EIO, and the rest stays readable")

    def _load_group(self, origin: Origin, row: SnapshotRow, own: list[LayerRow]) -> None:
        preserved = [
            self._layers[layer.id] for layer in own if layer.role == Role.PRESERVED and layer.origin == origin.id
        ]
        if not preserved or not any(layer.role == Role.DELTA and layer.origin == origin.id for layer in own):
            raise RefusedError(
                f"the catalog of {self.path} lacks the layers of snapshot {printable(row.name)}: it was edited or is "
                f"damaged; restore it from a backup"
            )
        origin.open_epoch(row.id, preserved[0])
        for layer in preserved[1:]:
            shadowed = drop_shadowed(origin.group_of(row.id).layers, layer)
            if shadowed:
                self.housekeeping.punch_later([(layer, shadowed)])
            origin.add_layer(row.id, layer)

    async def run(self) -> None:
        """The store's background work; runs until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._preserver.run)
            nursery.start_soon(self.housekeeping.run)
            nursery.start_soon(self.origins.run)
            if not self.read_only:
                nursery.start_soon(self._flattener.run)
            self._tasks = nursery
            for snapshot in self._snapshots.values():
                for image in snapshot.images:
                    nursery.start_soon(image.run)

    async def drain(self) -> None:
        """Make all that was acknowledged durable, before `run` ends. The origins come first. # I8

        Raises what a disk says, when it has been tried with every device and image: none pays for another. # I9
        """
        failures = await self._sync_all()
        if any(is_full(error) for error in failures):
            with self.space.in_need() as let_go:
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
                pass  # given up meanwhile, of which it is told otherwise
            except (CowError, OSError) as error:
                failures.append(error)

        for origin in self.origins if not self.read_only else ():
            await attempt(origin.sync)
        for image in [image for snapshot in self._snapshots.values() for image in snapshot.images]:
            if image.is_usable:
                await attempt(image.sync)
        return failures

    async def close(self) -> None:
        """Record a clean stop, and what the devices are known by. After `drain`; `run` has ended, no call is under way.

        Raises where that cannot be done; the next opening recovers then.
        """
        with self.space.in_need() as let_go:
            await trio.to_thread.run_sync(let_go)
            await self._commits.checkpoint()
            await self.housekeeping.do_all(closing=True)
            stopped = [(one.id, os.fsencode(one.device.label), one.modified_ns) for one in self.origins]
            facts = {facts_key(one.id): await trio.to_thread.run_sync(gather, one) for one in self.origins}
            settings = {key: one.to_text() for key, one in facts.items()}
            await trio.to_thread.run_sync(self._catalog.record_clean_stop, stopped, settings)

    async def suspect(self, reason: str) -> None:
        """Record that what is on a device may be wrong for all snapshots. Before anybody uses them.

        What is preserved from now on may be wrong for them too, and right for newer ones: it goes into new layers.
        """
        trusted = [one for one in self._snapshots.values() if one.row.state in TRUSTED]
        if not trusted:
            return
        rows = await trio.to_thread.run_sync(self._catalog.suspect_snapshots, [one.id for one in trusted], reason)
        self._make_layers(rows)
        added = {row.origin: self._layers[row.id] for row in rows}
        for origin in self.origins:
            origin.add_layer(origin.groups[-1].snapshot, added[origin.id])
            origin.modified_ns = after(origin.modified_ns)
        for snapshot in trusted:
            snapshot.row.state, snapshot.row.reason = State.SUSPECT, reason
            snapshot.row.evidence.setdefault(DOUBTED_FROM, str(rows[0].id))
            for image in snapshot.images:
                image.is_doubted = True
                image.doubted_from = None if self._read_suspect else snapshot.row.doubted_from

    def close_files(self) -> None:
        """Close the layers' files, whatever came before."""
        for layer in self._layers.values():
            layer.close()
        self.housekeeping.close_files()
