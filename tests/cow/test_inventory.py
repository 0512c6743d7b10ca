"""The inventory: who is there, by which name, and whose layers are whose; and the bell that wakes who waits."""

from collections.abc import Callable

import pytest
import trio
import trio.testing

from cow.bell import Bell
from cow.geometry import CHUNK_BYTES, chunks_in, covering
from tests.support.engine import Engine
from tests.support.failing import take, write
from tests.support.sandbox import wait_until

CHUNK = chunks_in([covering(0, CHUNK_BYTES)])


@pytest.fixture
def engine(start: Callable[..., Engine]) -> Engine:
    return start()


def test_a_snapshot_that_is_being_taken_has_its_name_and_is_not_shown(engine: Engine) -> None:
    inventory, origin = engine.store.inventory, engine.store.origins[0]
    real, seen = origin.sync, []

    async def sync() -> None:
        seen.append((inventory.is_taken(b"a"), inventory.find(b"a"), inventory.snapshots, len(inventory.all_snapshots)))
        await real()

    origin.sync = sync
    take(engine, b"a")
    assert seen == [(True, None, [], 1)]
    (snapshot,) = inventory.snapshots
    assert inventory.find(b"a") is inventory.by_id(snapshot.id) is snapshot


def test_a_renamed_snapshot_is_found_by_its_new_name_alone_and_keeps_its_place(engine: Engine) -> None:
    for name in (b"a", b"b"):
        take(engine, name)
    engine.call(engine.store.rename_snapshot, b"a", b"z")
    inventory = engine.store.inventory
    assert [one.name for one in inventory.snapshots] == [b"z", b"b"]
    assert inventory.find(b"z") is inventory.snapshots[0]
    assert not inventory.is_taken(b"a")


def test_the_layers_of_a_snapshot_go_to_the_next_older_one_and_else_they_go(engine: Engine) -> None:
    inventory, origin = engine.store.inventory, engine.store.origins[0]
    for name in (b"older", b"newer"):
        take(engine, name)
    write(engine, origin, 0, b"x")
    older, newer = inventory.snapshots
    layer = origin.epochs.newest_layer
    assert inventory.heir_of(newer) == older.id
    assert inventory.heir_of(older) is None
    assert inventory.asking(layer) == inventory.reading(layer, CHUNK) == [older, newer]
    delta = newer.images[0].delta
    engine.call(engine.store.delete_snapshot, b"newer")
    assert inventory.reading(layer, CHUNK) == [older]
    assert inventory.has(layer)
    assert not inventory.has(delta)
    engine.call(engine.store.delete_snapshot, b"older")
    assert list(inventory.layers) == []
    wait_until(lambda: not inventory.layers_directory.names(), what="the end of the layers' files")


def test_a_layer_is_settled_only_while_its_image_is_not_written_to(engine: Engine) -> None:
    image = take(engine, b"a")
    begun: list[str] = []

    async def settle() -> None:
        async with engine.store.inventory.settled(image.delta):
            begun.append("settled")

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            async with image.settled():
                nursery.start_soon(settle)
                await trio.testing.wait_all_tasks_blocked()
                assert begun == []
            await trio.testing.wait_all_tasks_blocked()
            assert begun == ["settled"]

    engine.call(main)


def test_a_bell_that_rings_while_nobody_waits_is_heard_once() -> None:
    heard = []

    async def main() -> None:
        bell = Bell()
        bell.ring()
        bell.ring()

        async def listen() -> None:
            while True:
                await bell.wait()
                heard.append(len(heard))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(listen)
            await trio.testing.wait_all_tasks_blocked()
            assert heard == [0]
            bell.ring()
            await trio.testing.wait_all_tasks_blocked()
            assert heard == [0, 1]
            nursery.cancel_scope.cancel()

    trio.run(main)
