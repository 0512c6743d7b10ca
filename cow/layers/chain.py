"""Reading from a chain: a chunk is read from the first layer that knows it, else from the origin."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from cow.errors import DamagedError, LostError
from cow.geometry import CHUNK_BYTES, Run, chunks_in, place_of, runs_of
from cow.layers.layer import Layer


class Share(NamedTuple):
    """The layer that has some runs, ascending; None stands for the origin."""

    layer: Layer | None
    runs: list[Run]


class ReadOrigin(Protocol):
    """The origin, as far as a chain needs it."""

    def __call__(self, run: Run, into: memoryview, *, nowait: bool = False) -> None:
        """Read whole chunks. Blocks; under `nowait` raises BlockingIOError instead."""


def resolve(layers: Iterable[Layer], run: Run) -> list[Share]:
    """Divide `run` among the layers that have it, in the order in which they are asked, and the origin.

    Raises LostError when a chunk of it could not be kept, DamagedError when a layer that would have to be asked no
    longer knows what it holds. # I4
    """
    if run.chunks == 1:
        return [Share(holder_of(layers, run.first), [run])]
    shares: list[Share] = []
    wanted = chunks_in([run])
    for layer in layers:
        if layer.damage is not None:
            raise DamagedError(layer.damage)
        found = layer.held & wanted
        if len(found) == run.chunks:
            return [Share(layer, [run])]
        if found:
            shares.append(Share(layer, list(runs_of(found))))
            wanted -= found
        if layer.lost and (lost := layer.lost & wanted):
            raise _lost(lost.min())
        if not wanted:
            return shares
    return [*shares, Share(None, list(runs_of(wanted)))]


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


def gather(
    shares: Sequence[Share], first: int, into: memoryview, read_origin: ReadOrigin, *, nowait: bool = False
) -> None:
    """Read all shares into `into`, which begins with the chunk `first`. Chunks from layers are checked. # I4

    Blocks; under `nowait` raises BlockingIOError instead. Raises DamagedError, OSError.
    """
    for layer, runs in reversed(shares):  # the origin first: its reads may cover chunks of the layers too
        if layer is None:
            _fill_from_origin(read_origin, runs, first, into, nowait)
        else:
            layer.fill(runs, first, into, nowait=nowait)


def _fill_from_origin(read: ReadOrigin, runs: list[Run], first: int, into: memoryview, nowait: bool) -> None:
    """Read runs of the origin, all with one call if they are at least half of what they span."""
    span = Run(runs[0].first, runs[-1].end - runs[0].first)
    if len(runs) > 1 and 2 * sum([chunks for _, chunks in runs]) >= span.chunks:
        try:
            return read(span, into[place_of(span, first)], nowait=nowait)
        except BlockingIOError:
            raise
        except OSError:
            pass  # perhaps from a sector between them that nobody needs
    for run in runs:
        read(run, into[place_of(run, first)], nowait=nowait)
    return None
