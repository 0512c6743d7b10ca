"""Where a chunk is to be read: the first layer of a chain that knows it, else the origin."""

from collections.abc import Iterable
from typing import NamedTuple

from cow.errors import DamagedError, LostError
from cow.geometry import CHUNK_BYTES, Run, held_in
from cow.layer import Layer


class Piece(NamedTuple):
    """A run and the layer that has it; None stands for the origin."""

    layer: Layer | None
    run: Run


def resolve(layers: Iterable[Layer], run: Run) -> list[Piece]:
    """Cut `run` into pieces by where they are, in ascending order.

    Raises LostError when a chunk of it could not be kept, DamagedError when a layer that would have to be asked does
    not know any more what it holds. # I4
    """
    if run.chunks == 1:
        return [Piece(holder_of(layers, run.first), run)]
    pieces: list[Piece] = []
    missing = [run]
    for layer in layers:
        if layer.damage is not None:
            raise DamagedError(layer.damage)
        left: list[Run] = []
        for wanted in missing:
            at = wanted.first
            for held in held_in(layer.held, wanted):
                pieces.append(Piece(layer, held))
                if held.first > at:
                    left.append(Run(at, held.first - at))
                at = held.end
            if at < wanted.end:
                left.append(Run(at, wanted.end - at))
        for wanted in left if layer.lost else ():
            if lost := held_in(layer.lost, wanted):
                raise _lost(lost[0].first)
        missing = left
        if not missing:
            break
    pieces += [Piece(None, wanted) for wanted in missing]
    pieces.sort(key=lambda piece: piece.run.first)
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
