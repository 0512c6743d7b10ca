"""The engine against a plain in-memory model, in random order, thousands of steps."""

import shutil
import tempfile
from pathlib import Path
from unittest.mock import patch

from cow.buffer import behind, contents
from cow.config import Source
from cow.images.image import Image
from cow.images.origin import Origin
from tests.support.engine import Engine
from tests.support.model import Machine, machine_settings
from tests.support.sandbox import MARK
from tests.support.served import write_served


class EngineDriver:
    """The engine without a mount."""

    def __init__(self, content: bytes) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix=MARK, dir="/dev/shm"))
        self.device = self.directory / "disk.img"
        self.device.write_bytes(content)

    def open(self) -> None:
        self.engine = Engine(str(self.directory / "store"), [Source(b"disk.img", str(self.device))])

    def _image(self, name: str | None) -> Image | Origin:
        if name is None:
            return self.engine.store.origins[0]
        found = self.engine.store.find(name.encode())
        assert found is not None
        return found.images[0]

    def read(self, image: str | None, offset: int, length: int) -> bytes:
        return self.engine.call(self._image(image).read, offset, length)

    def write(self, image: str | None, offset: int, data: bytes) -> int:
        return self.engine.call(write_served, self._image(image), offset, data)

    def sync(self, image: str | None) -> None:
        self.engine.call(self._image(image).sync)

    def create(self, name: str) -> None:
        self.engine.call(self.engine.store.create_snapshot, name.encode())

    def delete(self, name: str) -> None:
        self.engine.call(self.engine.store.delete_snapshot, name.encode())

    def rename(self, old: str, new: str) -> None:
        self.engine.call(self.engine.store.rename_snapshot, old.encode(), new.encode())

    def names(self) -> list[str]:
        return [snapshot.name.decode() for snapshot in self.engine.store.snapshots]

    def checkpoint(self) -> None:
        self.engine.call(self.engine.store.checkpoint)

    def stop(self) -> bytes:
        assert self.engine.troubles == []
        self.engine.close()
        return self.device.read_bytes()

    def kill(self) -> None:
        self.engine.kill()

    def end(self) -> None:
        self.engine.close()
        shutil.rmtree(self.directory)


class EngineAgainstModel(Machine):
    def make_driver(self, content: bytes) -> EngineDriver:
        return EngineDriver(content)


class LongWritesAgainstModel(Machine):
    """With short writes that count as long: those go straight to the device, and are extents in the buffers."""

    def make_driver(self, content: bytes) -> EngineDriver:
        self._patches = [patch.object(behind, "MOST_CHUNKS_HERE", 2), patch.object(contents, "EXTENT_CHUNKS", 2)]
        for one in self._patches:
            one.start()
        return EngineDriver(content)

    def teardown(self) -> None:
        super().teardown()
        if self.driver is not None:
            for one in self._patches:
                one.stop()


EngineAgainstModel.TestCase.settings = machine_settings(60)
LongWritesAgainstModel.TestCase.settings = machine_settings(60)
test_i2_i9_the_engine_equals_the_model = EngineAgainstModel.TestCase
test_i2_i9_the_engine_equals_the_model_when_writes_are_long = LongWritesAgainstModel.TestCase
