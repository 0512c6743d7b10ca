"""Scrub: read and check everything that the store holds, in use or not, and give up what cannot be used.

Every chunk that a layer holds is read and compared with its checksum, into which its place and its layer are mixed, so
that misplaced and stale chunks show too. The catalog is checked by itself and against the layers.

What is found is reported as `Finding`s, with `Progress` in between. Without `repair` none of it is changed.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass

import trio
from pyroaring import BitMap64

from cow.disk.directory import Directory
from cow.disk.io import SYSTEM, Io
from cow.disk.passing import stays
from cow.durable.recovery import layers_beyond, load_layer, needed_layers, newest_layer, open_journal, recover, strays
from cow.entry.footing import check_open_files
from cow.entry.secondplace import look_at_second_place
from cow.errors import DamagedError, printable
from cow.geometry import CHUNK_BYTES, Run, chunks_in, chunks_of, pieces, runs_of
from cow.images.image import Image
from cow.images.origin import Origin
from cow.layers.epochs import Epochs
from cow.layers.layer import Layer, pinned
from cow.layers.sums import SUM_BYTES
from cow.opening import open_directory
from cow.records.catalog import Catalog
from cow.records.journal import Journal, JournalDamagedError, Kind, Record
from cow.records.rows import Role, State
from cow.store.store import Store

STEP_CHUNKS = 256  # read at a time: 1 MiB


@dataclass(frozen=True)
class Progress:
    """How many bytes of the total have been checked."""

    done_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class Finding:
    """Something that is wrong, in a sentence. `repaired`: it can do no more harm."""

    sentence: str
    repaired: bool = False


Chain = tuple[bytes, Sequence[Layer]]  # a snapshot's name, and the layers that it asks, in order


def bad_chunks(layer: Layer, run: Run, renewed: Mapping[int, bytes]) -> BitMap64:
    """The chunks of `run` that do not match their checksums or cannot be read. All of `run` is held. Blocks.

    `renewed` has the checksums, by chunk, that replaying the journal would write into their slots. Raises MayPassError.
    """
    bad = BitMap64()
    try:
        if run.chunks == 1:
            data, sums = stays(lambda: layer.read_unchecked(run), f"layer {layer.name} cannot be read")
        else:
            data, sums = layer.read_unchecked(run)
    except (OSError, DamagedError):
        if run.chunks == 1:
            bad.add(run.first)
            return bad
        for part in pieces(run, 1):
            bad |= bad_chunks(layer, part, renewed)
        return bad
    found = layer.sums.of_data(run.first, data)
    for index in range(run.chunks):
        chunk = run.first + index
        expected = renewed.get(chunk) or sums[index * SUM_BYTES : (index + 1) * SUM_BYTES]
        if found[index * SUM_BYTES : (index + 1) * SUM_BYTES] != expected:
            bad.add(chunk)
    return bad


def describe(image: bytes, layer: Layer, bad: BitMap64, chains: Iterable[Chain]) -> Iterator[str]:
    """A sentence for each run of damaged chunks: where it is, and which snapshots read it."""
    readers = {chunk: frozenset(name for name, chain in chains if _reads(chain, layer, chunk)) for chunk in bad}
    for run in runs_of(bad):
        names = sorted(set().union(*(readers[chunk] for chunk in range(run.first, run.end))))
        whose = ", ".join(printable(name) for name in names) or "none any more"
        yield (
            f"image {printable(image)}, offset {run.offset}, length {run.length}: damaged in layer {layer.name}; "
            f"snapshots that read it: {whose}"
        )


def _reads(chain: Sequence[Layer], layer: Layer, chunk: int) -> bool:
    asked = next((one for one in chain if chunk in one.held or chunk in one.lost), None)
    return asked is layer


class OpenScrub:
    """The scrub of a store in use; trio thread only. With `repair` damaged chunks become lost ones, durably."""

    def __init__(self, store: Store, *, repair: bool) -> None:
        self._store = store
        self._repair = repair
        self._layers: list[tuple[Origin, Layer, Image | None]] = [
            (origin, layer, None)
            for origin in store.origins
            for group in origin.epochs.groups
            for layer in group.layers
        ]
        self._layers += [(one.origin, one.delta.layer, one) for snapshot in store.snapshots for one in snapshot.images]
        self._total_bytes = sum(len(layer.held) for _, layer, _ in self._layers) * CHUNK_BYTES
        self._done_bytes = 0
        self._steps = self._all_steps()
        self._has_begun = False

    def _all_steps(self) -> Iterator[tuple[Origin, Layer, Image | None, Run]]:
        for origin, layer, image in self._layers:
            for held in runs_of(layer.held.copy()):
                for run in pieces(held, STEP_CHUNKS):
                    yield origin, layer, image, run

    async def step(self) -> list[Progress | Finding] | None:
        """Check some more; returns what was found and the progress, None at the end. Raises OSError, CowError."""
        if not self._has_begun:
            self._has_begun = True
            problems = await self._store.catalog_problems()
            return [*(Finding(one) for one in problems), Progress(0, self._total_bytes)]
        step = next(self._steps, None)
        if step is None:
            return None
        origin, layer, image, run = step
        found: list[Progress | Finding] = []
        # Held until the bad chunks are recorded as lost.
        async with image.delta.settled() if image is not None else nullcontext():
            if self._store.inventory.has(layer):
                found += await self._check(origin, layer, run)
        self._done_bytes += run.length
        return [*found, Progress(self._done_bytes, max(self._total_bytes, self._done_bytes))]

    async def _check(self, origin: Origin, layer: Layer, run: Run) -> list[Finding]:
        found: list[Finding] = []
        with pinned([layer]):
            bad = await trio.to_thread.run_sync(bad_chunks, layer, run, {})
        bad &= layer.held  # chunks that were dropped meanwhile may be punched out already
        if bad and self._store.inventory.has(layer):
            chains: list[Chain] = [
                (snapshot.name, one.view.layers())
                for snapshot in self._store.snapshots
                for one in snapshot.images
                if one.origin is origin and one.view.is_usable
            ]
            found += [Finding(sentence, self._repair) for sentence in describe(origin.name, layer, bad, chains)]
            if self._repair:
                await self._store.damage.lose(layer, bad)
        return found


def scrub_store(
    path: str, *, repair: bool, elsewhere: str | None = None, io: Io = SYSTEM
) -> Iterator[Progress | Finding]:
    """Scrub the store at `path`, which nobody has open. Its devices are not needed. `elsewhere` as for `open_store`.

    Raises RefusedError when it is in use or no store at all. With `repair` it is recovered first, as by a mount.
    """
    with ExitStack() as stack:
        directory, catalog = open_directory(path, io, stack, repair=repair)
        if catalog.repaired:
            yield Finding(f"{catalog.repaired}; all snapshots were given up", repaired=True)
        yield from (Finding(problem) for problem in catalog.problems())
        second_place = None
        if elsewhere is not None:
            second_place, given_up = look_at_second_place(elsewhere, catalog, io, stack)
            if given_up and not repair:  # else recovery reports it
                yield Finding(given_up)
        layers_directory = directory.subdirectory("layers")
        stack.callback(layers_directory.close)
        check_open_files(layers_directory, (origin.size_bytes for origin in catalog.origins()))
        journal = open_journal(directory, catalog)
        stack.callback(journal.close)
        if repair:
            recovered = recover(catalog, journal, layers_directory, second_place)
            layers = recovered.layers
            yield from (Finding(sentence, repaired=True) for sentence in recovered.findings)
            yield from (Finding(sentence) for sentence in recovered.strays)
            renewed: dict[int, dict[int, bytes]] = {}
        else:
            layers, renewed, problems = _look(catalog, journal, layers_directory)
            yield from (Finding(problem) for problem in problems)
        for layer in layers.values():
            stack.callback(layer.close)
        yield from _check_snapshots(catalog, repair)
        yield from _check_layers(catalog, layers, renewed, journal if repair else None)


def _look(
    catalog: Catalog, journal: Journal, layers_directory: Directory
) -> tuple[dict[int, Layer], dict[int, dict[int, bytes]], list[str]]:
    """What recovery would find, without writing anything: the layers, the checksums in the journal, and problems."""
    chunks = {origin.id: chunks_of(origin.size_bytes) for origin in catalog.origins()}
    layers = {row.id: Layer(layers_directory, row.id, chunks[row.origin]) for row in catalog.layers()}
    renewed: dict[int, dict[int, bytes]] = {number: {} for number in layers}
    problems = []
    for row in catalog.layers():
        load_layer(layers[row.id], row.generation)
    problems += [damage for row in needed_layers(catalog) if (damage := layers[row.id].damage) is not None]
    recorded = {0}
    try:
        for record in journal.records():
            recorded.add(record.layer)
            if record.layer in layers:
                _follow(record, layers[record.layer], renewed[record.layer])
    except JournalDamagedError as error:
        problems.append(f"{error}: which old bytes were kept since the last checkpoint is unknown")
    if beyond := layers_beyond(catalog, newest_layer(layers_directory.names(), recorded)):
        problems.append(beyond)
    problems += strays(catalog, layers_directory)
    for layer in layers.values():
        if unreadable := layer.unreadable(layer.intended & layer.held):
            problems.append(f"{len(unreadable)} chunks of layer {layer.name} cannot be read any more")
        layer.pass_over_intended()  # recovery takes it as it is
    return layers, renewed, problems


def _follow(record: Record, layer: Layer, renewed: dict[int, bytes]) -> None:
    if record.kind is Kind.LOST:
        layer.lose(chunks_in(record.runs))
    elif record.kind is Kind.INTENT:
        layer.announce(chunks_in(record.runs))
    else:
        layer.commit(chunks_in(record.runs))
        chunks = (chunk for run in record.runs for chunk in range(run.first, run.end))
        for index, chunk in enumerate(chunks):
            renewed[chunk] = record.sums[index * SUM_BYTES : (index + 1) * SUM_BYTES]


def _check_snapshots(catalog: Catalog, repair: bool) -> Iterator[Finding]:
    """Check that each snapshot that can be read has its layers for each origin."""
    rows = catalog.layers()
    for snapshot in catalog.snapshots():
        if snapshot.state in (State.INVALID, State.PENDING):
            continue
        for origin in catalog.origins():
            roles = {row.role for row in rows if row.snapshot == snapshot.id and row.origin == origin.id}
            if roles != set(Role):
                reason = f"the catalog lacks its layers for the image {printable(origin.name)}"
                if repair:
                    catalog.set_state(snapshot.id, State.INVALID, reason)
                yield Finding(f"snapshot {printable(snapshot.name)} cannot be read: {reason}", repaired=repair)
                break


def _check_layers(
    catalog: Catalog, layers: Mapping[int, Layer], renewed: Mapping[int, Mapping[int, bytes]], journal: Journal | None
) -> Iterator[Progress | Finding]:
    """Check all chunks; with a journal, take the damaged ones for lost, in the layers' maps, which are saved."""
    names = {origin.id: origin.name for origin in catalog.origins()}
    epochs = _epochs_of(catalog, layers)
    rows = [row for row in catalog.layers() if layers[row.id].damage is None]
    total = sum(len(layers[row.id].held) for row in rows) * CHUNK_BYTES
    done = 0
    for row in rows:
        layer = layers[row.id]
        damaged = BitMap64()
        for run in [piece for held in runs_of(layer.held) for piece in pieces(held, STEP_CHUNKS)]:
            damaged |= bad_chunks(layer, run, renewed.get(row.id, {}))
            done += run.length
            yield Progress(done, total)
        if not damaged:
            continue
        for sentence in describe(
            names[row.origin], layer, damaged, _chains(catalog, layers, row.origin, epochs[row.origin])
        ):
            yield Finding(sentence, repaired=journal is not None)
        if journal is not None:
            layer.lose(damaged)
            layer.save(layer.encode_map())
            catalog.record_saved([(layer.id, layer.generation)])


def _epochs_of(catalog: Catalog, layers: Mapping[int, Layer]) -> dict[int, Epochs]:
    """By origin, the epochs that a mount would build from the catalog.

    A layer drops chunks that an older layer of its group knows: an old map may name them after they were punched out.
    """
    found: defaultdict[int, Epochs] = defaultdict(Epochs)
    for row in sorted(catalog.layers(), key=lambda row: (row.snapshot, row.id)):
        if row.role == Role.PRESERVED:
            epochs = found[row.origin]
            if epochs.serves(row.snapshot):
                epochs.add_layer(row.snapshot, layers[row.id])
            else:
                epochs.open_epoch(row.snapshot, layers[row.id])
    states = {row.id: row.state for row in catalog.snapshots()}
    for epochs in found.values():
        heir = None
        for snapshot in [group.snapshot for group in epochs.groups]:
            state = states.get(snapshot, State.INVALID)
            if state in (State.INVALID, State.PENDING):  # recovery drops the pending ones
                epochs.release(snapshot, heir if state is State.PENDING else None)
            else:
                heir = snapshot
    return found


def _chains(catalog: Catalog, layers: Mapping[int, Layer], origin: int, epochs: Epochs) -> list[Chain]:
    """The chain of each snapshot of an origin, its delta first."""
    rows = [row for row in catalog.layers() if row.origin == origin and row.role == Role.DELTA]
    deltas = {row.snapshot: layers[row.id] for row in rows}
    return [
        (row.name, [*([deltas[row.id]] if row.id in deltas else ()), *epochs.layers_for(row.id)])
        for row in catalog.snapshots()
        if epochs.serves(row.id)
    ]
