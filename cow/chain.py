"""Reading from a chain: a chunk is read in the first layer that knows it, else from the origin."""

from collections.abc import Iterable, Iterator, Sequence
from operator import itemgetter
from typing import NamedTuple, Protocol

from cow.errors import DamagedError, LostError
from cow.geometry import CHUNK_BYTES, Run, chunks_in, runs_of
from cow.layer import Layer

Parts = list[bytes | memoryview]  # what was read, in order


class Piece(NamedTuple):
    """A run and the layer that has it; None stands for the origin."""

    layer: Layer | None
    run: Run


class ReadOrigin(Protocol):
    """The origin, as far as a chain asks it."""

    def __call__(self, run: Run, *, nowait: bool = False) -> bytes:
        """Read whole chunks. Blocks; under `nowait` raises BlockingIOError instead."""


def resolve(layers: Iterable[Layer], run: Run) -> list[Piece]:
    """Cut `run` into pieces by where they are, in ascending order.

    Raises LostError when a chunk of it could not be kept, DamagedError when a layer that would have to be asked does
    not know any more what it holds. # I4
    """
    if run.chunks == 1:
        return [Piece(holder_of(layers, run.first), run)]
    pieces: list[Piece] = []
    wanted = chunks_in([run])
    for layer in layers:
        if layer.damage is not None:
            raise DamagedError(layer.damage)
        found = layer.held & wanted
        if len(found) == run.chunks:
            return [Piece(layer, run)]
        if found:
            pieces += [Piece(layer, held) for held in runs_of(found)]
            wanted -= found
        if layer.lost and (lost := layer.lost & wanted):
            raise _lost(lost.min())
        if not wanted:
            break
    pieces += [Piece(None, rest) for rest in runs_of(wanted)]
    pieces.sort(key=itemgetter(1))
    return pieces


def holder_of(layers: Iterable[Layer], chunk: int) -> Layer | None:
    """The same for one chunk, which is what most requests are: the layer that has it, None for the origin."""
    for layer in layers:
        if layer.damage is not None:
            raise DamagedError(layer.damage)
        if chunk in layer.held:
            return layer
        if layer.lost and chunk in layer.lost:
            raise _lost(chunk)
    return None


def _lost(chunk: int) -> LostError:
    return LostError(
        f"chunk {chunk} (offset {chunk * CHUNK_BYTES}) was lost: it could not be kept when the origin overwrote it; "
        f"the file `lost` has all of them, and the rest stays readable"
    )


def gather(pieces: Sequence[Piece], read_origin: ReadOrigin, *, nowait: bool = False) -> Parts:
    """Read pieces, ascending: the bytes of each. What comes from layers is checked. # I4

    Blocks, save under `nowait`. Raises BlockingIOError then, DamagedError, OSError.
    """
    if len(pieces) == 1:
        layer, run = pieces[0]
        return [read_origin(run, nowait=nowait) if layer is None else layer.read(run, nowait=nowait)]
    runs: dict[Layer | None, list[Run]] = {}
    for layer, run in pieces:
        runs.setdefault(layer, []).append(run)
    parts = {
        layer: _read_origin(read_origin, mine, nowait) if layer is None else layer.read_runs(mine, nowait=nowait)
        for layer, mine in runs.items()
    }
    return [next(parts[layer]) for layer, _ in pieces]


def _read_origin(read: ReadOrigin, runs: list[Run], nowait: bool) -> Iterator[bytes | memoryview]:
    """Runs of the origin, ascending: all with one call where they are most of what they span."""
    first, end = runs[0].first, runs[-1].end
    if len(runs) > 1 and 2 * sum([run.chunks for run in runs]) >= end - first:
        try:
            view = memoryview(read(Run(first, end - first), nowait=nowait))
        except BlockingIOError:
            raise
        except OSError:
            pass  # perhaps of a sector between them that nobody needs
        else:
            return (view[(run.first - first) * CHUNK_BYTES : (run.end - first) * CHUNK_BYTES] for run in runs)
    return (read(run, nowait=nowait) for run in runs)


def joined(content: bytes | Parts) -> bytes:
    """The same in one."""
    if isinstance(content, bytes):
        return content
    return bytes(content[0]) if len(content) == 1 else b"".join(content)
