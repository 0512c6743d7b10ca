"""The epochs against a naive model: a copy of the whole device for each snapshot.

The layers are real ones, and their files a dictionary, which is preserved to, punched and merged as the engine does it.
A chunk that is read from the wrong place, dropped too early or kept nowhere shows as other contents.
"""

from collections.abc import Callable
from typing import cast

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from pyroaring import BitMap64

from cow.disk.directory import Directory
from cow.errors import InvalidSnapshotError, LostError
from cow.geometry import Run
from cow.layers.chain import holder_of
from cow.layers.epochs import Epochs
from cow.layers.layer import Layer
from tests.support.model import machine_settings

CHUNKS = 6
LOST = -1
SOME = st.sets(st.integers(0, CHUNKS - 1), min_size=1)


def an_empty_layer(number: int) -> Layer:
    return Layer(cast(Directory, None), number, CHUNKS)  # whose files nobody opens


class EpochsAgainstCopies(RuleBasedStateMachine):
    """What an origin, the flattener and an opening do to epochs. A chunk's contents are a number."""

    def __init__(self) -> None:
        super().__init__()
        self.epochs = Epochs()
        self.device = list(range(CHUNKS))
        self.next_content = CHUNKS
        self.next_id = 1
        self.copies: dict[int, list[int]] = {}  #: by snapshot: what it shows, LOST where that could not be kept
        self.files: dict[Layer, dict[int, int]] = {}
        self.seen_version = -1
        self.seen_chains: dict[int, list[Layer]] = {}

    def _new_id(self) -> int:
        self.next_id += 1
        return self.next_id

    def _new_layer(self) -> Layer:
        layer = an_empty_layer(self._new_id())
        self.files[layer] = {}
        return layer

    def _write(self, chunks: BitMap64) -> None:
        for chunk in chunks:
            self.device[chunk] = self.next_content
            self.next_content += 1

    def _heir(self, snapshot: int) -> int | None:
        return max((one for one in self.copies if one < snapshot), default=None)

    def _content(self, layers: list[Layer], chunk: int) -> int:
        try:
            layer = holder_of(layers, chunk)
        except LostError:
            return LOST
        return self.device[chunk] if layer is None else self.files[layer][chunk]

    # -- what is done to them ------------------------------------------------------------------------------------

    @rule()
    def take_a_snapshot(self) -> None:
        snapshot = self._new_id()
        self.epochs.open_epoch(snapshot, self._new_layer())
        self.copies[snapshot] = self.device.copy()

    @rule(chunks=SOME)
    def overwrite(self, chunks: set[int]) -> None:
        """What is not preserved yet is, in the newest layer, and nothing else is."""
        missing = self.epochs.unpreserved(BitMap64(chunks))
        assert set(missing) == {
            chunk for chunk in chunks if any(self._is_read_from_device(one, chunk) for one in self.copies)
        }
        if missing:
            newest = self.epochs.newest_layer
            self.files[newest] |= {chunk: self.device[chunk] for chunk in missing}
            newest.commit(missing)
        self._write(BitMap64(chunks))

    @precondition(lambda self: self.copies)
    @rule(chunks=SOME)
    def delete_while_old_bytes_are_preserved(self, chunks: set[int]) -> None:
        """They come into a layer that may serve an older snapshot by then, or nobody; the writer looks again."""
        missing = self.epochs.unpreserved(BitMap64(chunks))
        layer = self.epochs.newest_layer
        self._delete(self.epochs.groups[-1].snapshot)
        if layer in self.files:
            self.files[layer] |= {chunk: self.device[chunk] for chunk in missing}
            layer.commit(missing)
        self.overwrite(chunks)

    @rule(chunks=SOME)
    def overwrite_what_cannot_be_kept(self, chunks: set[int]) -> None:
        missing = self.epochs.unpreserved(BitMap64(chunks))
        affected = set(self.epochs.needing(missing))
        assert affected == {
            one for one in self.copies if any(self._is_read_from_device(one, chunk) for chunk in missing)
        }
        for snapshot in affected:
            for chunk in missing:
                if self._is_read_from_device(snapshot, chunk):
                    self.copies[snapshot][chunk] = LOST
        if missing:
            self.epochs.newest_layer.lose(missing)
        self._write(BitMap64(chunks))

    @precondition(lambda self: self.copies)
    @rule(number=st.integers(0, 9))
    def delete_one(self, number: int) -> None:
        self._delete(sorted(self.copies)[number % len(self.copies)])

    def _delete(self, snapshot: int) -> None:
        heir = self._heir(snapshot)
        going = self.epochs.group_of(snapshot).layers
        freed = self.epochs.freed_by(snapshot, heir)
        punches = self.epochs.release(snapshot, heir)
        if heir is None:
            assert punches == []
            assert freed == sum(len(self.files.pop(layer)) for layer in going)
        else:
            assert freed == sum(len(shadowed) for _, shadowed in punches)
            self._punch(punches)
            before = BitMap64()
            for layer in self.epochs.group_of(heir).layers:
                assert layer not in going or not layer.known & before
                before |= layer.known
        del self.copies[snapshot]

    def _punch(self, punches: list[tuple[Layer, BitMap64]]) -> None:
        for layer, chunks in punches:
            assert not chunks & layer.held
            for chunk in chunks:
                del self.files[layer][chunk]

    @precondition(lambda self: self.copies)
    @rule()
    def preserve_in_another_layer_from_now_on(self) -> None:
        """What happens when a device was changed by others."""
        layer = self._new_layer()
        assert not self.epochs.add_layer(self.epochs.groups[-1].snapshot, layer)
        assert self.epochs.newest_layer is layer

    @precondition(lambda self: any(len(group.layers) > 1 for group in self.epochs.groups))
    @rule(number=st.integers(0, 9), first=st.integers(0, 9), part=SOME, goes=st.booleans())
    def merge_a_part(self, number: int, first: int, part: set[int], goes: bool) -> None:
        """Into an older layer, as the flattener does, perhaps while its snapshot goes; what is empty is removed."""
        groups = [group for group in self.epochs.groups if len(group.layers) > 1]
        group = groups[number % len(groups)]
        usable = [layer for layer in group.layers if layer is not self.epochs.newest_layer]
        if len(usable) < 2:
            return
        place = first % (len(usable) - 1)
        target, source = usable[place], usable[place + 1]
        assert self.epochs.group_with(source, target) is group
        shadowed = self.epochs.drop_shadowed(source)
        self._punch([(source, shadowed)] if shadowed else [])
        held, lost = source.held & BitMap64(part), BitMap64()
        if not held:
            lost = source.lost & BitMap64(part)
        copied = {chunk: self.files[source][chunk] for chunk in held}
        if goes:
            self._delete(group.snapshot)
        moved = held & source.held
        source.hand_over(target, held, lost)
        assert not source.known & (held | lost)
        if self.epochs.group_with(source, target) is None:
            return
        self.files[target] |= {chunk: copied[chunk] for chunk in moved}
        for chunk in moved:
            del self.files[source][chunk]
        if not source.known:
            self.epochs.remove_layer(source)
            assert self.files.pop(source) == {}
            assert self.epochs.group_with(source, target) is None

    @rule(data=st.data())
    def open_the_store_anew(self, data: st.DataObject) -> None:
        """With older maps for some: they name what was dropped since, and was perhaps punched out."""
        epochs = Epochs()
        for group in self.epochs.groups:
            known = BitMap64()
            epochs.open_epoch(group.snapshot, group.layers[0])
            for before, layer in zip(group.layers, group.layers[1:], strict=False):
                known |= before.known
                old = known & BitMap64(data.draw(SOME)) - layer.known
                layer.take_over(layer.held | old, layer.lost)
                shadowed = epochs.add_layer(group.snapshot, layer)
                assert old <= shadowed
                self._punch([(layer, shadowed - old)])
        self.epochs = epochs
        self.seen_version = -1

    # -- what must hold ------------------------------------------------------------------------------------------

    def _is_read_from_device(self, snapshot: int, chunk: int) -> bool:
        return not any(chunk in layer.known for layer in self.epochs.layers_for(snapshot))

    @invariant()
    def every_snapshot_shows_what_was_there(self) -> None:
        assert [group.snapshot for group in self.epochs.groups] == sorted(self.copies)
        for snapshot, copy in self.copies.items():
            layers = list(self.epochs.layers_for(snapshot))
            assert [self._content(layers, chunk) for chunk in range(CHUNKS)] == copy

    @invariant()
    def what_is_lost_is_known(self) -> None:
        found = dict(self.epochs.lost())
        assert list(found) == sorted(self.copies, reverse=True)
        for snapshot, copy in self.copies.items():
            assert set(found[snapshot]) == {chunk for chunk in range(CHUNKS) if copy[chunk] == LOST}

    @invariant()
    def what_is_preserved_is_known(self) -> None:
        exposed = [
            any(self._is_read_from_device(snapshot, chunk) for snapshot in self.copies) for chunk in range(CHUNKS)
        ]
        for first in range(CHUNKS):
            assert self.epochs.is_preserved(first) is not exposed[first]
            assert self.epochs.knows(first) == any(first in layer.known for layer in self._layers())
            for end in range(first + 1, CHUNKS + 1):
                assert self.epochs.is_run_preserved(Run(first, end - first)) is not any(exposed[first:end])

    def _layers(self) -> list[Layer]:
        return [layer for group in self.epochs.groups for layer in group.layers]

    @invariant()
    def no_layer_serves_two_snapshots_and_none_holds_for_nobody(self) -> None:
        layers = self._layers()
        assert len(set(layers)) == len(layers)
        assert set(layers) == self.files.keys()
        for layer in layers:
            assert set(layer.held) == self.files[layer].keys()

    @invariant()
    def as_long_as_the_version_stays_so_do_the_chains(self) -> None:
        chains = {snapshot: list(self.epochs.layers_for(snapshot)) for snapshot in self.copies}
        if self.epochs.version == self.seen_version:
            assert chains == self.seen_chains
        self.seen_version, self.seen_chains = self.epochs.version, chains


EpochsAgainstCopies.TestCase.settings = machine_settings(600, steps=40)
test_i1_i2_the_epochs_equal_a_copy_for_each_snapshot = EpochsAgainstCopies.TestCase


def test_what_two_layers_of_a_snapshot_hold_is_freed_once_when_it_goes() -> None:
    epochs = EpochsAgainstCopies()
    for _ in range(2):
        epochs.take_a_snapshot()
    epochs.overwrite({0})
    epochs.take_a_snapshot()
    epochs.delete_while_old_bytes_are_preserved({0, 1})
    first, second = epochs.epochs.groups[-1].layers
    assert first.held & second.held == BitMap64([0])
    epochs.delete_one(1)
    epochs.every_snapshot_shows_what_was_there()


@pytest.mark.parametrize(
    "ask",
    [
        lambda epochs: epochs.group_of(7),
        lambda epochs: epochs.layers_for(7),
        lambda epochs: epochs.release(7, None),
        lambda epochs: epochs.freed_by(7, None),
        lambda epochs: epochs.add_layer(7, an_empty_layer(2)),
    ],
)
def test_a_snapshot_that_was_given_up_has_no_layers(ask: Callable[[Epochs], object]) -> None:
    epochs = Epochs()
    epochs.open_epoch(1, an_empty_layer(1))
    assert epochs.serves(1)
    assert not epochs.serves(7)
    with pytest.raises(InvalidSnapshotError, match="given up"):
        ask(epochs)
    assert [group.snapshot for group in epochs.groups] == [1]
