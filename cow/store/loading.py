"""Loading: puts the snapshots together at an opening, from the catalog's rows and the layers that recovery found."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence

import trio
from pyroaring import BitMap64

from cow.clock import after
from cow.errors import RefusedError, printable
from cow.images.origin import Origin
from cow.layers.layer import Layer
from cow.records.catalog import Catalog
from cow.records.rows import DOUBTED_FROM, LayerRow, Role, SnapshotRow, State
from cow.store.inventory import Inventory
from cow.store.snapshot import Snapshot

NO_LAYER = 0  # an id that the catalog never assigns


def load(
    inventory: Inventory,
    catalog: Catalog,
    layers: Mapping[int, Layer],
    make: Callable[[SnapshotRow, Mapping[int, Layer]], Snapshot],
) -> list[tuple[Layer, BitMap64]]:
    """Fill an inventory that has its origins and nothing else. Blocks.

    `layers` are those that recovery found, by id; `make` makes a snapshot from its row and its deltas, by origin.
    Returns the chunks, by layer, that nobody reads there: they are to be punched out. Raises RefusedError when the
    catalog does not make sense.
    """
    inventory.load_layers(layers)
    rows_of: defaultdict[int, list[LayerRow]] = defaultdict(list)  # by snapshot
    for layer_row in catalog.layers():
        rows_of[layer_row.snapshot].append(layer_row)
    needless: list[tuple[Layer, BitMap64]] = []
    for row in catalog.snapshots():
        own = rows_of[row.id]
        if row.state != State.INVALID:
            for origin in inventory.origins:
                needless += _load_group(inventory, origin, row, own)
        # An invalid snapshot may have no layers any more; its images are listed all the same, and reads give EIO.
        deltas = {origin.id: Layer(inventory.layers_directory, NO_LAYER, origin.chunks) for origin in inventory.origins}
        deltas.update({layer.origin: layers[layer.id] for layer in own if layer.role == Role.DELTA})
        inventory.add(make(row, deltas))
    return needless


def _load_group(
    inventory: Inventory, origin: Origin, row: SnapshotRow, own: Sequence[LayerRow]
) -> Iterator[tuple[Layer, BitMap64]]:
    rows = [layer for layer in own if layer.origin == origin.id]
    preserved = [inventory.layer(layer.id) for layer in rows if layer.role == Role.PRESERVED]
    if not preserved or not any(layer.role == Role.DELTA for layer in rows):
        raise RefusedError(
            f"the catalog of {inventory.store_path} lacks the layers of snapshot {printable(row.name)}: it was edited "
            f"or is damaged; restore it from a backup"
        )
    origin.epochs.open_epoch(row.id, preserved[0])
    for layer in preserved[1:]:
        if shadowed := origin.epochs.add_layer(row.id, layer):
            yield layer, shadowed


async def suspect(inventory: Inventory, catalog: Catalog, reason: str, *, read_suspect: bool) -> None:
    """Record that what is on a device may be wrong for all snapshots. Called before anybody uses them.

    Old bytes preserved from now on may be wrong for them too, and right for newer ones: they go into new layers.
    """
    trusted = inventory.trusted
    if not trusted:
        return
    rows = await trio.to_thread.run_sync(catalog.suspect_snapshots, [one.id for one in trusted], reason)
    added = {row.origin: layer for row, layer in zip(rows, inventory.make_layers(rows), strict=True)}
    for origin in inventory.origins:
        origin.epochs.add_layer(origin.epochs.groups[-1].snapshot, added[origin.id])
        origin.modified_ns = after(origin.modified_ns)
    for snapshot in trusted:
        snapshot.row.state, snapshot.row.reason = State.SUSPECT, reason
        first_layer = int(snapshot.row.evidence.setdefault(DOUBTED_FROM, str(rows[0].id)))
        for image in snapshot.images:
            image.view.doubt(first_layer, is_refused=not read_suspect)
