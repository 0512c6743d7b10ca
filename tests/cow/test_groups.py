"""Several disks in one store: what is preserved for them at once is kept for each."""

import os
from pathlib import Path
from unittest.mock import patch

import pytest
import trio
import trio.testing

from cow.config import Source
from cow.geometry import CHUNK_BYTES
from cow.records import journal
from cow.records.journal import SECTOR_BYTES
from tests.support.engine import Engine
from tests.support.inside import journal_files, preserving_turn
from tests.support.sandbox import wait_until

CHUNKS = 1000
CHUNK = 777
SECTORS = 16  #: of a journal file, of which the first is its header


@pytest.mark.parametrize("before", range(SECTORS - 4, SECTORS))
def test_i1_old_bytes_are_kept_where_a_journal_file_is_full_in_the_middle_of_a_group(
    tmp_path: Path, before: int
) -> None:
    """The checkpoint that follows a full file must not drop the file with what is not in the layers' maps yet."""
    for name in "ab":
        (tmp_path / name).write_bytes(os.urandom(CHUNKS * CHUNK_BYTES))
    old = {name: (tmp_path / name).read_bytes() for name in "ab"}
    sources = [Source(name.encode(), str(tmp_path / name)) for name in "ab"]

    async def write_both() -> None:
        """In one batch of the preserver."""
        async with trio.open_nursery() as nursery, preserving_turn(store):
            for origin in store.origins:
                nursery.start_soon(origin.write, CHUNK * CHUNK_BYTES, b"N" * CHUNK_BYTES)
            await trio.testing.wait_all_tasks_blocked()

    with patch.object(journal, "FILE_BYTES", SECTORS * SECTOR_BYTES):
        engine = Engine(str(tmp_path / "store"), sources, write_behind=False)
        store = engine.store
        engine.call(store.create_snapshot, b"s")
        for chunk in range(before):
            engine.call(store.origins[0].write, chunk * CHUNK_BYTES, b"x" * CHUNK_BYTES)
        engine.call(write_both)
        wait_until(lambda: len(journal_files(store)) == 1, what="the end of the older files")
        engine.kill()
        engine = Engine(str(tmp_path / "store"), sources)
        (snapshot,) = engine.store.snapshots
        assert snapshot.row.state == "valid"
        for image, name in zip(snapshot.images, "ab", strict=True):
            assert engine.call(image.read, 0, CHUNKS * CHUNK_BYTES) == old[name]
        engine.kill()
