"""Opening a store: who may open it, which devices belong to it, recovery, and the clean close. # I7

`open_store` is the engine's front door. Whatever does not fit is refused here, with a sentence of its own: a store that
is in use, of another format, or made for other devices, before it is recovered; and one whose devices changed, before
that is recorded.
"""

import os
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field

import trio

from cow.config import OnFull, Source
from cow.disk import trial
from cow.disk.directory import Directory
from cow.disk.io import FULL, SYSTEM, Io
from cow.disk.source import OriginDevice
from cow.disk.superblock import SuperblockOf, no_superblock
from cow.durable.inodes import is_spare
from cow.durable.recovery import open_journal, recover
from cow.durable.reserve import (
    RESERVE_BYTES,
    RESERVE_NAME,
    hold_inodes_back,
    keep_for_opening,
    let_all_go,
    let_inodes_go,
)
from cow.durable.space import Space
from cow.entry.admission import admit
from cow.entry.footing import WHY_NOT_MADE, check_file_system, check_open_files, check_source_limits, largest_file_bytes
from cow.entry.forecast import check_quota
from cow.entry.secondplace import open_second_place
from cow.errors import CowError, RefusedError, StoreFullError, printable
from cow.events import Tell, nobody
from cow.layers.layer import Layer
from cow.records.catalog import FILE_NAME, Catalog
from cow.records.journal import is_journal
from cow.records.rows import OriginRow
from cow.store.store import OnDisk, Settings, Store


@dataclass
class Opened:
    """An open store, and the sentences that tell what its opening found."""

    store: Store
    was_clean: bool
    findings: list[str] = field(default_factory=list)


@asynccontextmanager
async def open_store(
    path: str,
    sources: Sequence[Source],
    *,
    quota_bytes: int | None = None,
    on_full: OnFull = OnFull.DROP_OLDEST,
    write_behind: bool = True,
    read_only: bool = False,
    read_suspect: bool = False,
    accept_changed: bool = False,
    accept_unchanged: bool = False,
    superblock_of: SuperblockOf = no_superblock,
    accept_quota: bool = False,
    elsewhere: str | None = None,
    tell: Tell = nobody,
    io: Io = SYSTEM,
) -> AsyncIterator[Opened]:
    """Open the store at `path` with its sources, and recover it. A missing store is created.

    At the end of the block everything is made durable and a clean stop is recorded; after an exception in the block
    only the files are closed, as after a kill. `tell` receives the events that are reported to no caller by an errno.
    `elsewhere` is a directory, best on another disk, for the record that snapshots were given up (elsewhere.py).
    If it is unknown after a crash whether some were, because this is not the directory used before, the store is
    refused or, with `read_suspect` or `accept_changed`, its snapshots become suspect.
    With `write_behind` a write to an origin is acknowledged before its old bytes are preserved, and may be lost with
    the process until a sync; but not under the policy block-writes, where the writer must get the error.
    A device that changed is refused, and nothing recorded, unless `accept_changed`: then the snapshots become suspect.
    With `read_suspect` those can be read. If no sample differs but the device was written to all the same,
    `accept_unchanged` says that its contents are what they were. `superblock_of` reads a device's UUID, for status and
    sentences. A quota lower than the last one, so that the next write may cost snapshots, is refused unless
    `accept_quota`.
    Raises RefusedError, or OSError when something cannot be opened; a store that this call created is removed then,
    and also when the block is left with a RefusedError.
    """
    with ExitStack() as stack:
        new = NewStore()
        directory, catalog = await trio.to_thread.run_sync(lambda: open_directory(path, io, stack, create=new))
        devices = await trio.to_thread.run_sync(_open_devices, sources, io, read_only, superblock_of, stack)
        await trio.to_thread.run_sync(_check_limits, directory, sources, devices, new.is_new, read_only)
        rows, was_clean = await trio.to_thread.run_sync(_match, catalog, path, sources, devices)
        layers_directory = directory.subdirectory("layers", create=True)
        stack.callback(layers_directory.close)
        check_open_files(layers_directory, (device.size_bytes for device in devices))
        await trio.to_thread.run_sync(layers_directory.sync)  # with entries that a killed process created
        space = Space(directory, layers_directory, quota_bytes, tell)
        journal = open_journal(directory, catalog)
        stack.callback(journal.close)
        second_place = await trio.to_thread.run_sync(
            lambda: open_second_place(elsewhere, path, catalog, io, stack, accept_doubt=read_suspect or accept_changed)
        )
        recovered = await trio.to_thread.run_sync(recover, catalog, journal, layers_directory, second_place.elsewhere)
        recovered.findings += second_place.findings
        on_disk = OnDisk(directory, layers_directory, catalog, journal, second_place.elsewhere)
        settings = Settings(on_full, write_behind=write_behind, read_only=read_only, read_suspect=read_suspect)
        reads = io.reads()
        store = Store(on_disk, space, settings, tell, reads)
        stack.callback(store.close_files)
        if reads is not None:
            stack.callback(reads.close)
        store.open_origins(rows, devices)
        _load(store, recovered.layers, stack)
        recovered.findings += await admit(store, catalog, rows, was_clean, accept_changed, accept_unchanged)
        await space.count()
        if not read_only:
            await trio.to_thread.run_sync(check_quota, store, catalog, accept_quota)
        catalog.set_setting("clean", 0)
        await space.reserve.refill()
        await space.measure()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.run)
            with new.kept_unless_refused():
                yield Opened(store, was_clean, [*recovered.dropped, *recovered.strays, *recovered.findings])
            left_behind = await _drain(store)
            nursery.cancel_scope.cancel()
        if left_behind is not None:
            raise left_behind
        await store.close()
        await trio.to_thread.run_sync(second_place.end, catalog)


async def _drain(store: Store) -> Exception | None:
    """Empty the buffers, while their tasks still run. Returns the error if a device does not take everything."""
    try:
        await store.drain()
    except (CowError, OSError) as error:
        return error
    return None


def _load(store: Store, layers: dict[int, Layer], stack: ExitStack) -> None:
    for layer in layers.values():
        stack.callback(layer.close)
    store.load(layers)


class NewStore:
    """Whether this opening creates the store: a store that it creates does not outlive a refusal."""

    def __init__(self) -> None:
        self.is_new = False
        self._keep = False

    @contextmanager
    def kept_unless_refused(self) -> Iterator[None]:
        """The context in which the store is used."""
        self._keep = True
        try:
            yield
        except RefusedError:
            self._keep = False
            raise

    def take_back(self, directory: Directory) -> None:
        """Remove what was created, unless it is to be kept. It has no snapshots, and nobody else has it open."""
        if self._keep or not self.is_new:
            return
        with suppress(OSError):
            names = [name for name in directory.names() if _is_ours(name)]
            if "layers" in names:
                directory.rmdir("layers")
            last = ("lock", FILE_NAME)
            for name in names:
                if name != "layers" and name not in last:
                    directory.unlink(name)
            directory.sync()  # files that belong to a catalog must not outlive it
            for name in last:
                if name in names:
                    directory.unlink(name)
        directory.unmake()


def open_directory(
    path: str, io: Io, stack: ExitStack, *, create: NewStore | None = None, repair: bool = False
) -> tuple[Directory, Catalog]:
    """Open and lock the store's directory, and open its catalog. With `create`, which notes it, a missing one is made.

    `stack` closes what is opened. Raises RefusedError when it is in use, writable by others, or no store.
    """
    directory = claim_directory(path, io, create=create is not None)
    stack.callback(directory.close)
    if create is not None:
        stack.callback(directory.unmake)  # removes empty directories only
        create.is_new = not {FILE_NAME, "layers"} & set(directory.names())
        check_file_system(directory, RESERVE_BYTES, is_new=create.is_new)
    directory.close_to_others()
    try:
        lock = directory.lock("lock")
    except BlockingIOError as error:
        raise RefusedError(f"the store {path} is in use by another hcpfs: unmount that first") from error
    stack.callback(lock.close)
    if create is not None:
        stack.callback(create.take_back, directory)
    # On a full disk even the catalog needs some of what is held back. That is held back again afterwards, even after a
    # refusal.
    if create is not None or repair:
        let_all_go(directory)
        stack.callback(keep_for_opening, directory)
    else:
        let_inodes_go(directory)
        stack.callback(hold_inodes_back, directory)
    catalog = Catalog(directory, repair=repair)
    stack.callback(catalog.close)
    directory.sync()
    return directory, catalog


def claim_directory(path: str, io: Io = SYSTEM, *, create: bool) -> Directory:
    """Open the directory of a store or, with `create`, one that shall become a store; a missing one is created then.

    Raises RefusedError when it cannot be one, or is not ours alone: others can write to it, or it holds other things.
    It is left unchanged then, because it may be somebody's home, or /etc.
    """
    directory = _open_or_make(path, io, create=create)
    try:
        names = directory.names()
        if not create and FILE_NAME not in names:
            raise RefusedError(f"{path} is not a store of hcpfs: it has no {FILE_NAME}")
        directory.check_ours()
        foreign = [name for name in names if not _is_ours(name)]
        if foreign:
            raise RefusedError(
                f"the directory {path} holds other things than a store ({printable(os.fsencode(foreign[0]))}): name an "
                f"empty or a new directory"
            )
        directory.check_ours_below()
    except (OSError, RefusedError):
        directory.unmake()
        directory.close()
        raise
    return directory


def _open_or_make(path: str, io: Io, *, create: bool) -> Directory:
    try:
        return Directory.open_path(path, io, create=create)
    except OSError as error:
        why = WHY_NOT_MADE.get(error.errno or 0)
        if error.errno in FULL:
            raise StoreFullError(
                f"the store {path} cannot be made: its file system has no room for it, no space or no inodes; make room"
            ) from error
        if not create or why is None:
            raise
        raise RefusedError(f"the store {path} cannot be made there ({error.strerror}): {why}") from error


def _is_ours(name: str) -> bool:
    return (
        name in ("lock", "layers", RESERVE_NAME, trial.NAME)
        or is_journal(name)
        or is_spare(name)
        or name.startswith((FILE_NAME, "hcpfs.log"))
    )


def _check_limits(
    directory: Directory, sources: Sequence[Source], devices: Sequence[OriginDevice], is_new: bool, read_only: bool
) -> None:
    """Refuse file systems and limits that would make a write fail some day."""
    if not read_only:
        check_file_system(directory, largest_file_bytes(device.size_bytes for device in devices), is_new=is_new)
        check_source_limits(
            (source.path, device.size_bytes)
            for source, device in zip(sources, devices, strict=True)
            if not device.is_block
        )


def _open_devices(
    sources: Sequence[Source], io: Io, read_only: bool, superblock_of: SuperblockOf, stack: ExitStack
) -> list[OriginDevice]:
    names = [source.name for source in sources]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise RefusedError(f"two sources are called {printable(twice)}: name them apart with NAME=PATH")
    devices = []
    for source in sources:
        device = OriginDevice.open_path(source.path, io, read_only=read_only, superblock_of=superblock_of)
        stack.callback(device.close)
        devices.append(device)
    return devices


def _match(
    catalog: Catalog, path: str, sources: Sequence[Source], devices: list[OriginDevice]
) -> tuple[list[OriginRow], bool]:
    """The catalog's rows for the sources, in their order, and whether the last stop was clean."""
    was_clean = catalog.setting("clean") == 1
    rows = {row.name: row for row in catalog.origins()}
    if not rows:
        _add_origins(catalog, sources, devices)
        rows = {row.name: row for row in catalog.origins()}
    wanted = {source.name for source in sources}
    if rows.keys() != wanted:
        raise RefusedError(
            f"the store {path} was made for {_listed(rows)}, and you name {_listed(wanted)}: name the same sources, or "
            f"another store"
        )
    for source, device in zip(sources, devices, strict=True):
        _check_size(rows[source.name], path, device)
    return [rows[source.name] for source in sources], was_clean


def _listed(names: object) -> str:
    return ", ".join(sorted(printable(name) for name in names))  # type: ignore[attr-defined]


def _add_origins(catalog: Catalog, sources: Sequence[Source], devices: list[OriginDevice]) -> None:
    catalog.add_origins(
        OriginRow(0, source.name, os.fsencode(source.path), device.size_bytes, device.modified_ns)
        for source, device in zip(sources, devices, strict=True)
    )


def _check_size(row: OriginRow, path: str, device: OriginDevice) -> None:
    if device.size_bytes != row.size_bytes:
        grew = device.size_bytes > row.size_bytes
        what_to_do = (
            "give it its old size"
            if grew
            else "put back what it had there (truncate alone gives zeroes, which its snapshots would read)"
        )
        raise RefusedError(
            f"{device.label} {'grew' if grew else 'shrank'} from {row.size_bytes} to {device.size_bytes} bytes since "
            f"the store {path} was made: it is another disk, or was resized. Name the right one; or {what_to_do} "
            f"(--accept unchanged then says that it has what it had); or use another store"
        )
