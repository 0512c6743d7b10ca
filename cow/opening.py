"""Opening a store: who may, which devices belong to it, recovery, and the clean close. # I7

`open_store` is the engine's front door. Everything that does not fit is refused here, each with its own sentence,
before anything is written: a store in use, of a newer format, made for other devices, or on devices that changed.
"""

import os
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import NamedTuple

import trio

from cow import trial
from cow.catalog import FILE_NAME, Catalog, OriginRow, State
from cow.device import FULL, SYSTEM, Directory, Io, OriginDevice
from cow.elsewhere import Elsewhere
from cow.errors import CowError, RefusedError, StoreFullError, printable
from cow.fingerprint import compare, sampled
from cow.footing import WHY_NOT_MADE, check_file_system, check_open_files, check_source_limits, largest_file_bytes
from cow.forecast import check_quota
from cow.inodes import is_spare
from cow.journal import is_journal
from cow.layer import Layer
from cow.origin import Origin
from cow.preserver import OnFull
from cow.recovery import open_journal, recover
from cow.space import RESERVE_BYTES, RESERVE_NAME, Space, hold_inodes_back, keep_for_opening, let_all_go, let_inodes_go
from cow.store import Store


class Source(NamedTuple):
    """What to take snapshots of: the image's name and the path of the device or file."""

    name: bytes
    path: str


@dataclass
class Opened:
    """An open store, and what its opening found: sentences, empty after a clean stop."""

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
    accept_quota: bool = False,
    elsewhere: str | None = None,
    on_trouble: Callable[[str], None] = lambda sentence: None,
    io: Io = SYSTEM,
) -> AsyncIterator[Opened]:
    """Open the store at `path`, made when missing, with its sources, and recover it.

    At the end of the block everything is made durable and a clean stop is recorded; after an exception in the block
    only the files are closed, as after a kill. `on_trouble` gets a sentence for what nobody is told by an errno.
    `elsewhere` is a directory, best on another disk, for the record that snapshots were given up (cow/elsewhere.py).
    With `write_behind` a write to an origin is acknowledged before its old bytes are preserved, and may be lost with
    the process until a sync; not so under the policy block-writes, whose errors are for the writer.
    With `read_suspect` snapshots can be read although their device was changed meanwhile.
    A quota lower than the last one, so that the next write may cost snapshots, is refused unless `accept_quota`.
    Raises RefusedError, or OSError when something cannot be opened; a store that was made by it is gone again then, and
    so it is when the block is left with a RefusedError.
    """
    with ExitStack() as stack:
        new = NewStore()
        directory, catalog = await trio.to_thread.run_sync(lambda: open_directory(path, io, stack, create=new))
        devices = await trio.to_thread.run_sync(_open_devices, sources, io, read_only, stack)
        await trio.to_thread.run_sync(_check_limits, directory, sources, devices, new.is_new, read_only)
        rows, was_clean = await trio.to_thread.run_sync(_match, catalog, path, sources, devices)
        layers_directory = directory.subdirectory("layers", create=True)
        stack.callback(layers_directory.close)
        check_open_files(layers_directory, (device.size_bytes for device in devices))
        await trio.to_thread.run_sync(layers_directory.sync)  # entries that a killed process made are there to stay
        space = Space(directory, layers_directory, quota_bytes, on_trouble)
        journal = open_journal(directory, catalog)
        stack.callback(journal.close)
        second_place = await trio.to_thread.run_sync(_open_elsewhere, elsewhere, catalog, io, on_trouble, stack)
        recovered = await trio.to_thread.run_sync(recover, catalog, journal, layers_directory, second_place)
        store = Store(
            catalog, journal, directory, layers_directory, space, second_place,
            on_full=on_full, write_behind=write_behind, read_only=read_only, read_suspect=read_suspect,
            on_trouble=on_trouble,
        )  # fmt: skip
        stack.callback(store.close_files)
        store.open_origins(rows, devices)
        _load(store, recovered.layers, stack)
        for origin, row in zip(store.origins, rows, strict=True):
            recovered.findings += await _check_fingerprint(store, origin, row)
        await space.count()
        if not read_only:
            await trio.to_thread.run_sync(check_quota, store, catalog, accept_quota)
        catalog.set_setting("clean", 0)
        await store.housekeeping.hold_back()
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


async def _drain(store: Store) -> Exception | None:
    """Empty the buffers, while there is still who does it. What a device says of it, when it does not take all."""
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
    """A store that this opening makes, if it is one: it does not outlive a refusal."""

    def __init__(self) -> None:
        self.is_new = False
        self._keep = False

    @contextmanager
    def kept_unless_refused(self) -> Iterator[None]:
        """Around its use."""
        self._keep = True
        try:
            yield
        except RefusedError:
            self._keep = False
            raise

    def take_back(self, directory: Directory) -> None:
        """Remove what was made, if it shall not be kept. It has no snapshots, and nobody else has it open."""
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
            directory.sync()  # what belongs to a catalog may not be there without it
            for name in last:
                if name in names:
                    directory.unlink(name)
        directory.unmake()


def open_directory(
    path: str, io: Io, stack: ExitStack, *, create: NewStore | None = None, repair: bool = False
) -> tuple[Directory, Catalog]:
    """Open the store's directory and its catalog, and lock it; made when missing, with `create`, which is told so.

    What is opened is closed with `stack`. Raises RefusedError when it is in use, writable by others, or no store.
    """
    directory = claim_directory(path, io, create=create is not None)
    stack.callback(directory.close)
    if create is not None:
        stack.callback(directory.unmake)  # of what is empty
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
    # On a full disk the catalog alone needs some of what is held back. It is again afterwards, also after a refusal.
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
    """Open the directory of a store, or, with `create`, of one to be; made when missing.

    Raises RefusedError when it cannot be one, or is not ours alone: others can write it, or it holds other things. Then
    it is as it was: it may be somebody's home, or /etc.
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
    """Refuse what would fail in the middle of a write one day."""
    if not read_only:
        check_file_system(directory, largest_file_bytes(device.size_bytes for device in devices), is_new=is_new)
        check_source_limits(
            (source.path, device.size_bytes)
            for source, device in zip(sources, devices, strict=True)
            if not device.is_block
        )


def _open_devices(sources: Sequence[Source], io: Io, read_only: bool, stack: ExitStack) -> list[OriginDevice]:
    names = [source.name for source in sources]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise RefusedError(f"two sources are called {printable(twice)}: name them apart with NAME=PATH")
    devices = []
    for source in sources:
        device = OriginDevice.open_path(source.path, io, read_only=read_only)
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
    if not was_clean:
        for row in rows.values():
            row.modified_ns = time.time_ns()  # unknown: what was written before the crash may be newer than recorded
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
        change = "grew" if device.size_bytes > row.size_bytes else "shrank"
        raise RefusedError(
            f"{device.label} {change} from {row.size_bytes} to {device.size_bytes} bytes since the store {path} was "
            f"made: give it its old size, or use another store"
        )


def _open_elsewhere(
    path: str | None, catalog: Catalog, io: Io, on_trouble: Callable[[str], None], stack: ExitStack
) -> Elsewhere | None:
    """None where the directory cannot be made or opened: the store can do without, as long as its disk takes writes."""
    if path is None:
        return None
    sentence = (
        f"should the disk of the store take no writes one day, writes to the source will fail as well, as that cannot "
        f"be recorded in {path}"
    )
    try:
        directory = Directory.open_path(path, io, create=True)
    except OSError as error:
        if error.errno not in FULL | WHY_NOT_MADE.keys():
            raise
        on_trouble(f"{sentence} ({error.strerror}): have it there, and writable")
        return None
    stack.callback(directory.close)
    stack.callback(directory.unmake)
    if directory.is_read_only:
        on_trouble(f"{sentence}, which is on a read-only file system: mount that read-write")
    directory.check_ours()  # who could write there could give up snapshots, or hide that some were
    return Elsewhere(directory, str(catalog.setting("uuid")))


async def _check_fingerprint(store: Store, origin: Origin, row: OriginRow) -> list[str]:
    """Whether the device is the one that the snapshots were taken of, and was left alone meanwhile.

    Raises RefusedError when it is another one. When it was changed the snapshots become suspect.
    """
    known = store.by_id(row.fingerprint_of)
    if known is None or not known.usable:
        return []
    now = await trio.to_thread.run_sync(origin.fingerprint)
    found = compare(sampled(origin.size_bytes), row.fingerprint, now, lambda chunk: not origin.knows(chunk))
    if found.is_another_device:
        raise RefusedError(
            f"{origin.device.label} is not the device that the store {store.path} was made for: none of what was "
            f"sampled is on it. Name the right device, or another store"
        )
    if not found.changed or known.row.state is State.SUSPECT:  # of which it has been said
        return []
    places = ", ".join(f"{run.offset}+{run.length}" for run in found.changed[:8])
    sentence = (
        f"{origin.device.label} was changed while hcpfs was not running (seen at {places}): what snapshots read from "
        f"it may be wrong"
    )
    await store.suspect(sentence)
    return [sentence]
