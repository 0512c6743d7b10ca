"""Recovery: from what is on disk after any stop to layers that know what they hold.

It runs at every opening, before anything else uses the store, and may itself be stopped at any point: the old journal
files stay until the layers are saved.
"""

import errno
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from pyroaring import BitMap64

from cow.disk.directory import Directory
from cow.disk.io import FULL
from cow.disk.passing import pause, raise_if_passing, stays
from cow.errors import CowError, MayPassError, StoreFullError, SyncError
from cow.geometry import Run, chunks_in, chunks_of
from cow.layers.layer import Layer
from cow.layers.layerfiles import check_removable, remove_layer_directory
from cow.records.catalog import Catalog
from cow.records.elsewhere import Elsewhere
from cow.records.journal import Journal, JournalDamagedError, Kind, Record
from cow.records.rows import TRUSTED, LayerRow, Role, State

_HIGHEST_ID = 1 << 48  # of a layer; whatever names a higher one is damaged


@dataclass
class Recovered:
    """The layers by id, and sentences on what was found."""

    layers: dict[int, Layer]
    findings: list[str] = field(default_factory=list)  #: what is wrong, or was
    dropped: list[str] = field(default_factory=list)  #: what was half done at the stop, and was undone
    strays: list[str] = field(default_factory=list)  #: what does not belong there and cannot be removed


def recover(catalog: Catalog, journal: Journal, layers_directory: Directory, elsewhere: Elsewhere | None) -> Recovered:
    """Drop half-taken snapshots, load the layers, replay the journal, remove what nothing refers to. Blocks.

    All effects are durable on return, and the journal has a fresh file. Raises CowError or OSError; StoreFullError when
    the disk has no room for it, although what an opening needs is held back; MayPassError for an error that is no
    reason to give anything up.
    """
    try:
        return _recover(catalog, journal, layers_directory, elsewhere)
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise StoreFullError(
            f"the disk of {layers_directory.label} is full, and to open the store takes a little room: delete "
            f"something else on that disk, or enlarge it, and try again; nothing is lost"
        ) from error


def _recover(catalog: Catalog, journal: Journal, layers_directory: Directory, elsewhere: Elsewhere | None) -> Recovered:
    dropped, findings = _drop_pending(catalog), []
    if elsewhere is not None:
        findings += _take_over_given_up(catalog, elsewhere)
    chunks = {origin.id: chunks_of(origin.size_bytes) for origin in catalog.origins()}
    layers = {row.id: Layer(layers_directory, row.id, chunks[row.origin]) for row in catalog.layers()}
    for row in catalog.layers():
        load_layer(layers[row.id], row.generation)
    recorded = {0}  # ids of layers that the journal names
    try:
        for record in journal.replay():
            recorded.add(record.layer)
            if unwritable := _apply(record, layers):
                name = layers[record.layer].name
                findings.append(
                    f"checksums of {len(unwritable)} chunks of layer {name} cannot be written: they are lost"
                )
    except JournalDamagedError as error:
        findings.append(_invalidate_all(catalog, str(error)))
    rehashed: dict[int, BitMap64] = {}
    for layer in layers.values():
        if layer.intended:
            rehashed[layer.id] = layer.intended & layer.held
            try:
                unreadable = _rehash(layer, rehashed[layer.id])
            except (OSError, SyncError) as error:
                _mark_damaged(layer, error)
                continue
            if unreadable:
                layer.lose(unreadable)
                findings.append(
                    f"{len(unreadable)} chunks of layer {layer.name} cannot be read any more: they are lost"
                )
            layer.settle()
    newest = newest_layer(layers_directory.names(), recorded)
    if doubt := layers_beyond(catalog, newest):
        findings.append(doubt)
        trusted = [row.id for row in catalog.snapshots() if row.state in TRUSTED]
        for row in catalog.suspect_snapshots(trusted, doubt, newest):
            layers[row.id] = Layer(layers_directory, row.id, chunks[row.origin])
    findings += _invalidate_unknown(catalog, layers)
    strays = _forget_dropped(catalog, layers, layers_directory)
    if not _save(layers, catalog, journal, rehashed):
        findings += _invalidate_unknown(catalog, layers)
        strays = _forget_dropped(catalog, layers, layers_directory)
    catalog.set_setting("journal", 0)
    journal.retire(journal.numbers)  # before a new one is made, which on a full disk needs their room
    journal.start_file()
    catalog.set_setting("journal", journal.numbers[-1])
    return Recovered(layers, findings, dropped, strays)


def _rehash(layer: Layer, chunks: BitMap64) -> BitMap64:
    """`Layer.rehash`; when the store fails, once more after a pause, with all that it writes written anew."""
    try:
        return layer.rehash(chunks)
    except (OSError, SyncError) as error:
        _check_stays(layer, error)
    pause()
    layer.files.give_up_unsynced()
    return layer.rehash(chunks)


def _save(layers: dict[int, Layer], catalog: Catalog, journal: Journal, rehashed: Mapping[int, BitMap64]) -> bool:
    """Save the layers. Returns whether all could be saved."""
    saved, all_saved = [], True
    for layer in layers.values():
        if layer.dirty and layer.damage is None:
            try:
                _save_layer(layer, journal, rehashed.get(layer.id, BitMap64()))
            except (OSError, SyncError, JournalDamagedError) as error:
                _mark_damaged(layer, error)
                all_saved = False
                continue
            saved.append((layer.id, layer.generation))
    catalog.record_saved(saved)
    return all_saved


def _save_layer(layer: Layer, journal: Journal, rehashed: BitMap64) -> None:
    """Save a layer; when the store fails, once more after a pause, with checksums in doubt written anew first. # I3"""
    try:
        layer.save(layer.encode_map())
        return
    except (OSError, SyncError) as error:
        _check_stays(layer, error)
    pause()
    if layer.sums.in_doubt:
        layer.files.give_up_unsynced()
        layer.announce(rehashed - layer.lost)
        records = (record for record in journal.records() if record.layer == layer.id and record.sums)
        layer.renew_sums((record.runs, record.sums) for record in records)
        layer.settle()
        layer.sums.in_doubt = False
    layer.save(layer.encode_map())


def _check_stays(layer: Layer, error: OSError | SyncError) -> None:
    """Raise the error itself when the disk is full, and MayPassError when the error is not about a sector."""
    if isinstance(error, OSError) and error.errno in FULL:
        raise error
    raise_if_passing(error, f"layer {layer.name} cannot be made durable")


def _mark_damaged(layer: Layer, error: OSError | SyncError | JournalDamagedError) -> None:
    """Mark a layer that cannot be made durable: it costs its readers, and not the store. Raises as `_check_stays`."""
    if not isinstance(error, JournalDamagedError):
        _check_stays(layer, error)
    layer.damage = f"layer {layer.name} cannot be made durable ({error}): what it holds is unknown"


def heir_of(catalog_order: Sequence[tuple[int, State]], snapshot: int) -> int | None:
    """The newest usable snapshot older than `snapshot`, from (id, state) pairs."""
    older = [number for number, state in catalog_order if number < snapshot and state != State.INVALID]
    return max(older, default=None)


def _drop_pending(catalog: Catalog) -> list[str]:
    rows = catalog.snapshots()
    order = [(row.id, row.state) for row in rows if row.state != State.PENDING]
    pending = [row for row in rows if row.state == State.PENDING]
    for row in pending:
        catalog.delete_snapshot(row.id, heir_of(order, row.id))
    return [f"snapshot {row.name!r} was being taken at the stop, and is dropped" for row in pending]


def _take_over_given_up(catalog: Catalog, elsewhere: Elsewhere) -> list[str]:
    """Record in the catalog which snapshots were given up while the store took no writes. Returns findings."""
    newest = elsewhere.read()
    if not newest:
        return []
    reason = "the store took no writes when old bytes had to be kept, so all snapshots of that time were given up"
    for row in catalog.snapshots():
        if row.id <= newest:
            catalog.set_state(row.id, State.INVALID, reason)
    try:
        elsewhere.clear()
    except OSError as error:
        if error.errno not in {errno.EROFS, *FULL}:
            raise
        return [f"{reason}; that record cannot be removed ({error}), and says nothing new the next time"]
    return [reason]


def _forget_dropped(catalog: Catalog, layers: dict[int, Layer], layers_directory: Directory) -> list[str]:
    """Forget the layers that the catalog does not name, remove their directories, and return what cannot be removed."""
    wanted = {row.id for row in catalog.layers()}
    for number in layers.keys() - wanted:
        layers.pop(number).close()
    names = {layer.name for layer in layers.values()}
    strays = []
    for name in layers_directory.names():
        if name not in names:
            try:
                remove_layer_directory(layers_directory, name)
            except (CowError, OSError) as error:
                strays.append(_stray(layers_directory, name, error))
    return strays


def _stray(layers_directory: Directory, name: str, error: Exception) -> str:
    return f"{layers_directory.label}/{name} does not belong there and cannot be removed ({error}): remove it by hand"


def strays(catalog: Catalog, layers_directory: Directory) -> list[str]:
    """What recovery could not remove; nothing is removed here."""
    wanted = {f"{row.id:016x}" for row in catalog.layers()}
    found = []
    for name in layers_directory.names():
        if name not in wanted:
            try:
                check_removable(layers_directory, name)
            except (CowError, OSError) as error:
                found.append(_stray(layers_directory, name, error))
    return found


def open_journal(directory: Directory, catalog: Catalog) -> Journal:
    """The journal of the store."""
    expected = catalog.setting("journal")
    uuid = bytes.fromhex(str(catalog.setting("uuid")))
    return Journal(directory, uuid, expected if isinstance(expected, int) else 0)


def load_layer(layer: Layer, generation: int) -> None:
    """Read a layer's map; when it cannot be read, the layer's `damage` says so. Raises MayPassError."""
    try:
        stays(lambda: layer.load(generation), f"the map of layer {layer.name} cannot be read")
    except MayPassError:
        raise
    except (OSError, CowError) as error:
        layer.damage = f"the map of layer {layer.name} cannot be read ({error}): what it holds is unknown"


def _apply(record: Record, layers: dict[int, Layer]) -> BitMap64:
    """Apply a record to its layer. Returns the chunks that are lost because their checksums cannot be written."""
    lost = BitMap64()
    layer = layers.get(record.layer)
    if layer is None:
        if record.layer > _HIGHEST_ID:
            raise JournalDamagedError(f"the journal names a layer {record.layer}, which there cannot be")
        return lost  # the layer was dropped since
    if any(run.end > layer.chunks for run in record.runs):
        raise JournalDamagedError(f"the journal names chunks beyond the device's end in layer {layer.name}")
    layer.written_ns = max(layer.written_ns, record.time_ns)
    if record.kind is Kind.LOST:
        layer.lose(chunks_in(record.runs))
        return lost
    if record.kind is Kind.INTENT:
        layer.announce(chunks_in(record.runs))
        return lost
    at = 0
    for run in record.runs:
        lost |= _write_sums(layer, run, record.sums[at : at + 8 * run.chunks])
        at += 8 * run.chunks
    layer.commit(chunks_in(record.runs) - lost)
    if lost:
        layer.lose(lost)
    return lost


def _write_sums(layer: Layer, run: Run, sums: bytes) -> BitMap64:
    """Write checksums. Returns the chunks whose slots cannot be written."""
    what = f"checksums of layer {layer.name} cannot be written"
    try:
        stays(lambda: layer.sums.write(run.first, sums), what)
    except OSError as error:
        if error.errno in FULL:
            raise
        if run.chunks == 1:
            return BitMap64([run.first])
        return BitMap64.union(
            *(_write_sums(layer, Run(run.first + at, 1), sums[8 * at : 8 * at + 8]) for at in range(run.chunks))
        )
    return BitMap64()


def _invalidate_unknown(catalog: Catalog, layers: dict[int, Layer]) -> list[str]:
    """Invalidate the snapshots that read a layer of unknown contents: right bytes cannot be told from wrong. # I4"""
    damaged = [(row, damage) for row in needed_layers(catalog) if (damage := layers[row.id].damage) is not None]
    for row, damage in damaged:
        for snapshot in catalog.snapshots():
            if row.role == Role.PRESERVED and snapshot.id <= row.snapshot and snapshot.state != State.INVALID:
                catalog.set_state(snapshot.id, State.INVALID, damage)
    for row, damage in damaged:
        order = [(snapshot.id, snapshot.state) for snapshot in catalog.snapshots()]
        if row.role == Role.DELTA and (row.snapshot, State.INVALID) not in order:
            catalog.give_up_snapshot(row.snapshot, heir_of(order, row.snapshot), damage)
    return [damage for _, damage in damaged]


def needed_layers(catalog: Catalog) -> list[LayerRow]:
    """The layers that some usable snapshot reads."""
    usable = {row.id for row in catalog.snapshots() if row.state != State.INVALID}
    if not usable:
        return []
    oldest = min(usable)
    return [
        row
        for row in catalog.layers()
        if (row.snapshot in usable if row.role == Role.DELTA else oldest <= row.snapshot)
    ]


def newest_layer(directory_names: Iterable[str], recorded: Iterable[int]) -> int:
    """The highest id of a layer that has a directory or that the journal names; 0 when there is none."""
    present = [int(name, 16) for name in directory_names if re.fullmatch("[0-9a-f]{16}", name)]
    return max([one for one in (*present, *recorded) if one <= _HIGHEST_ID], default=0)


def layers_beyond(catalog: Catalog, newest: int) -> str:
    """A sentence when there is a layer that the catalog never made: the catalog lacks its latest changes. Else "".

    Ids of layers are never reused, and nothing of a layer is written before its row is durable in the catalog.
    """
    if newest <= catalog.newest_layer():
        return ""
    return (
        f"the catalog is older than what is kept beside it, which has a layer {newest}: changes of it were lost, "
        f"perhaps snapshots, and what the others read from the device may be wrong"
    )


def _invalidate_all(catalog: Catalog, cause: str) -> str:
    reason = f"{cause}: which old bytes were kept since the last checkpoint is unknown, so no snapshot can be trusted"
    for row in catalog.snapshots():
        catalog.set_state(row.id, State.INVALID, reason)
    return reason
