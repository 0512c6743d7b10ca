"""The small parts of the engine by themselves: geometry, gate, fingerprint, chain, layers."""

import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import cast

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from pyroaring import BitMap64
from trio.testing import wait_all_tasks_blocked

from cow.disk.directory import Directory
from cow.disk.source import OriginDevice
from cow.errors import DamagedError, HoldTimeoutError, SyncError
from cow.geometry import CHUNK_BYTES, Run, chunks_in, chunks_of, covering, runs_of, split
from cow.images.gate import Gate
from cow.layers.chain import holder_of, resolve
from cow.layers.layer import SEGMENT_CHUNKS, Layer
from cow.records.fingerprint import Comparison, compare, digests, sampled

CHUNK_SETS = st.sets(st.integers(0, 60))


def _holding(chunks: set[int]) -> Layer:
    layer = Layer(cast(Directory, None), 1, 100)  # whose files nobody opens
    layer.held = BitMap64(chunks)
    return layer


@given(CHUNK_SETS)
def test_runs_are_the_set_and_apart_from_each_other(chunks: set[int]) -> None:
    runs = list(runs_of(BitMap64(chunks)))
    assert [chunk for run in runs for chunk in range(run.first, run.end)] == sorted(chunks)
    assert all(run.end < later.first for run, later in pairwise(runs))
    assert chunks_in(runs) == BitMap64(chunks)


@given(st.lists(CHUNK_SETS, max_size=3), st.integers(0, 50), st.integers(2, 30))
def test_a_run_is_read_where_the_first_layer_has_it(sets: list[set[int]], first: int, count: int) -> None:
    layers = [_holding(chunks) for chunks in sets]
    found = resolve(layers, Run(first, count))
    placed = {chunk: layer for layer, runs in found for run in runs for chunk in range(run.first, run.end)}
    assert placed.keys() == set(range(first, first + count))
    assert sum(run.chunks for _, runs in found for run in runs) == count
    for chunk, layer in placed.items():
        assert layer is next((one for one in layers if chunk in one.held), None)
        assert layer is holder_of(layers, chunk)


@given(st.integers(0, 20000), st.integers(1, 20000))
def test_split_and_covering_agree(offset: int, length: int) -> None:
    head, body, tail = split(offset, length)
    assert head + body + tail == length
    assert body % CHUNK_BYTES == 0
    assert (offset + head) % CHUNK_BYTES == 0 or head == length
    run = covering(offset, length)
    assert run.offset <= offset < run.offset + CHUNK_BYTES
    assert run.offset + run.length - CHUNK_BYTES < offset + length <= run.offset + run.length
    assert chunks_of(offset + length) == run.end


@asynccontextmanager
async def _passing(gate: Gate) -> AsyncIterator[None]:
    await gate.enter()
    try:
        yield
    finally:
        gate.leave()


def test_the_gate_lets_writers_out_before_it_is_held_and_keeps_new_ones_waiting() -> None:
    events = []

    async def writer(gate: Gate, name: str, finish: trio.Event) -> None:
        async with _passing(gate):
            events.append(f"{name} in")
            await finish.wait()
            events.append(f"{name} out")

    async def holder(gate: Gate, release: trio.Event) -> None:
        async with gate.hold(60):
            events.append("held")
            await release.wait()
            events.append("released")

    async def main() -> None:
        gate, first, second, release = Gate(), trio.Event(), trio.Event(), trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(writer, gate, "first", first)
            await wait_all_tasks_blocked()
            nursery.start_soon(holder, gate, release)
            await wait_all_tasks_blocked()
            nursery.start_soon(writer, gate, "second", second)
            await wait_all_tasks_blocked()
            first.set()
            await wait_all_tasks_blocked()
            release.set()
            await wait_all_tasks_blocked()
            second.set()

    trio.run(main)
    assert events == ["first in", "first out", "held", "released", "second in", "second out"]


def test_a_hold_that_takes_too_long_fails_and_opens_the_gate() -> None:
    async def main() -> None:
        gate, finish = Gate(), trio.Event()

        async def stuck() -> None:
            async with _passing(gate):
                await finish.wait()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(stuck)
            await wait_all_tasks_blocked()
            with pytest.raises(HoldTimeoutError, match="1 writes to the live image did not finish"):
                async with gate.hold(0.01):
                    raise AssertionError("held although a writer is inside")
            async with _passing(gate):
                pass
            finish.set()

    trio.run(main)


def test_a_fingerprint_tells_a_changed_device_from_another_one(tmp_path: Path) -> None:
    """Preserved chunks do not count, zeroes are no sign of identity, and the sample has both ends of the device."""
    size_bytes = 64 << 20
    runs = sampled(size_bytes)
    assert runs[0].first == 0
    assert runs[0].length >= 1 << 20
    assert runs[-1].end == chunks_of(size_bytes)
    assert sum(run.chunks for run in runs) < 400
    content = bytearray(os.urandom(1 << 20) + bytes(size_bytes - (1 << 20)))

    def read(run: Run) -> bytes:
        return bytes(content[run.offset : run.offset + run.length])

    before = digests(runs, read)
    assert compare(runs, before, digests(runs, read), lambda chunk: True) == Comparison(256, [])
    content[5 * CHUNK_BYTES] ^= 1
    content[-1] ^= 1
    now = digests(runs, read)
    last = chunks_of(size_bytes) - 1
    assert compare(runs, before, now, lambda chunk: True) == Comparison(255, [Run(5, 1), Run(last, 1)])
    assert compare(runs, before, now, lambda chunk: chunk not in (5, last)) == Comparison(255, [])
    assert not compare(runs, before, now, lambda chunk: True).is_another_device
    content[: 1 << 20] = os.urandom(1 << 20)
    assert compare(runs, before, digests(runs, read), lambda chunk: True).is_another_device


def test_i3_a_failed_sync_never_turns_into_success(tmp_path: Path) -> None:
    """A sync fails with EINVAL on a pipe: a real error of the real call."""
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(4096))
    device = OriginDevice.open_path(str(path))
    reading, writing = os.pipe()
    saved = os.dup(device.fd)
    os.dup2(writing, device.fd)
    with pytest.raises(OSError, match="Invalid argument"):
        device.sync()
    os.dup2(saved, device.fd)
    with pytest.raises(SyncError, match="unmount and mount again"):
        device.sync()
    for fd in (reading, writing, saved):
        os.close(fd)
    device.close()


@pytest.fixture
def layers(tmp_path: Path) -> Iterator[Directory]:
    directory = Directory.open_path(str(tmp_path))
    yield directory
    directory.close()


def _filled(layers: Directory, number: int, runs: list[Run], fill: bytes) -> Layer:
    layer = Layer(layers, number, 1 << 34)
    for run in runs:
        layer.write(run.first, fill * run.length)
    layer.commit(chunks_in(runs))
    return layer


def test_a_layer_survives_save_and_load_across_segments(layers: Directory) -> None:
    runs = [Run(3, 2), Run(SEGMENT_CHUNKS - 1, 3)]
    layer = _filled(layers, 9, runs, b"a")
    layer.written_ns = 1234
    layer.files.sync_data()
    layer.save(layer.encode_map())
    layer.close()
    loaded = Layer(layers, 9, 1 << 34)
    loaded.load(0)
    assert (loaded.held, loaded.written_ns, loaded.damage) == (layer.held, 1234, None)
    assert [loaded.read(run) for run in runs] == [b"a" * run.length for run in runs]
    assert sorted(p.name for p in Path(layers.label, loaded.name).glob("data.*")) == ["data.0000", "data.0001"]
    loaded.close()


def test_i4_a_chunk_at_another_place_or_of_another_layer_does_not_match(layers: Directory) -> None:
    layer = _filled(layers, 1, [Run(0, 2)], b"a")
    assert layer.sums.of_data(0, b"a" * CHUNK_BYTES) != layer.sums.of_data(1, b"a" * CHUNK_BYTES)
    other = Layer(layers, 2, 10)
    assert layer.sums.of_data(0, b"a" * CHUNK_BYTES) != other.sums.of_data(0, b"a" * CHUNK_BYTES)
    layer.sums.write(1, layer.sums.read_runs([Run(0, 1)]))
    with pytest.raises(DamagedError, match=r"chunk 1 \(offset 4096\) of layer 0000000000000001"):
        layer.read(Run(0, 2))
    layer.close()


@pytest.mark.parametrize("name", ["data.0000", "sums"])
def test_i4_a_missing_or_short_file_is_damage(layers: Directory, name: str) -> None:
    layer = _filled(layers, 1, [Run(0, 2)], b"a")
    layer.save(layer.encode_map())
    layer.close()
    path = Path(layers.label, layer.name, name)
    for change in (lambda: _truncate(path), path.unlink):
        change()
        damaged = Layer(layers, 1, 10)
        damaged.load(0)
        with pytest.raises(DamagedError):
            damaged.read(Run(0, 2))
        damaged.close()


def _truncate(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(5)


def test_i4_a_layer_with_a_bad_map_is_not_passed_over(layers: Directory) -> None:
    layer = _filled(layers, 1, [Run(0, 2)], b"a")
    layer.save(layer.encode_map())
    layer.close()
    path = Path(layers.label, layer.name, "map")
    content = bytearray(path.read_bytes())
    content[20] ^= 1
    path.write_bytes(content)
    damaged = Layer(layers, 1, 10)
    damaged.load(0)
    with pytest.raises(DamagedError, match="map of layer"):
        resolve([damaged], Run(5, 1))
    damaged.close()


def test_a_chain_asks_its_layers_in_order_and_then_the_origin(layers: Directory) -> None:
    top = _filled(layers, 1, [Run(2, 2)], b"a")
    below = _filled(layers, 2, [Run(0, 3), Run(6, 1)], b"b")
    found = resolve([top, below], Run(1, 7))
    assert found == [(top, [(2, 2)]), (below, [(1, 1), (6, 1)]), (None, [(4, 2), (7, 1)])]
    top.close()
    below.close()
