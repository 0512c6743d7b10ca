"""What a source may do to us: shrink, and lie at a path that is no UTF-8."""

import errno
import os
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from cow.config import Source
from cow.geometry import CHUNK_BYTES
from cow.store.store import Evidence
from tests.support.engine import Engine
from tests.support.sandbox import Sandbox, run

CHUNKS = 64


def test_i4_a_device_that_shrinks_for_a_while_is_not_read_as_zeroes(sandbox: Sandbox) -> None:
    """An NBD or network disk that loses its connection; neither readers nor what is preserved may take it for empty."""
    content = os.urandom(CHUNKS * CHUNK_BYTES)
    backing = sandbox.disk(content=content)
    device = sandbox.loop(backing)
    engine = Engine(str(sandbox.path / "store"), [Source(b"disk", device)])
    try:
        image = engine.call(engine.store.create_snapshot, b"a").images[0]
        origin = engine.store.origins[0]
        os.truncate(backing, 16 * CHUNK_BYTES)
        run("losetup", "--set-capacity", device)
        for read in (image.read, origin.read):
            with pytest.raises(OSError, match="it shrank") as caught:
                engine.call(read, 40 * CHUNK_BYTES, CHUNK_BYTES)
            assert caught.value.errno == errno.EIO
        engine.call(origin.write, 50 * CHUNK_BYTES, b"n" * CHUNK_BYTES)
        with pytest.raises(OSError, match="it shrank"):
            engine.call(origin.sync)
        backing.write_bytes(content)
        run("losetup", "--set-capacity", device)
        assert engine.call(image.read, 0, CHUNKS * CHUNK_BYTES) == content
        engine.call(origin.sync)
        assert engine.call(image.read, 0, CHUNKS * CHUNK_BYTES) == content
        assert backing.read_bytes()[50 * CHUNK_BYTES :][:CHUNK_BYTES] == b"n" * CHUNK_BYTES
    finally:
        engine.kill()


def test_sentences_and_evidence_may_name_paths_that_are_not_utf8(tmp_path: Path) -> None:
    """The catalog is of text; a path is bytes. It must not keep a store from being opened, or a snapshot from being."""
    place = Path(tempfile.mkdtemp(prefix=os.fsdecode(b"\xff\xfe"), dir=tmp_path))
    disk, store = place / "disk.img", str(place / "store")
    disk.write_bytes(os.urandom(512 * CHUNK_BYTES))
    sources = [Source(b"disk.img", str(disk))]

    @asynccontextmanager
    async def quiesce() -> AsyncIterator[Evidence]:
        yield {"quiesced": "yes", "frozen": str(place)}

    engine = Engine(store, sources)
    engine.call(engine.store.create_snapshot, b"a", quiesce)
    engine.close()
    with disk.open("r+b") as file:
        file.write(b"behind our back")
    for _ in range(2):
        engine = Engine(store, sources, accept_changed=True)
        row = engine.store.snapshots[0].row
        assert str(row.state) == "suspect"
        engine.close()
    assert "\\xff\\xfe" in row.reason
    assert "\\xff\\xfe" in row.evidence["frozen"]
