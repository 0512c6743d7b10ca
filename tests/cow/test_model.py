"""The engine against a plain in-memory model, in random order, thousands of steps."""

import shutil
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, precondition, rule

from cow import Source
from tests.support.engine import Engine

CHUNK = 4096
SIZES = [12 * CHUNK, 12 * CHUNK + 3584, 20 * CHUNK + 512, 512]
OFFSETS = st.builds(
    lambda chunk, within: chunk * CHUNK + within,
    st.sampled_from(range(21)),
    st.sampled_from([0, 0, 0, 512, 1023, 4095]),
)
LENGTHS = st.sampled_from([CHUNK, CHUNK, 2 * CHUNK, 5 * CHUNK, 512, 1, 5000])


class ModelImage:
    """What an image must read as. After a kill, unflushed writes may or may not be there, chunk by chunk."""

    def __init__(self, content: bytes) -> None:
        self.content = bytearray(content)
        self.flushed = bytes(content)
        self.since_flush: list[bytes] = []

    def write(self, offset: int, data: bytes) -> None:
        self.content[offset : offset + len(data)] = data
        self.since_flush.append(bytes(self.content))

    def flush(self) -> None:
        self.flushed = bytes(self.content)
        self.since_flush = []

    def settle_after_kill(self, found: bytes) -> None:
        for start in range(0, len(found), CHUNK):
            allowed = [state[start : start + CHUNK] for state in [self.flushed, *self.since_flush]]
            assert found[start : start + CHUNK] in allowed
        self.content = bytearray(found)
        self.flush()


class EngineAgainstModel(RuleBasedStateMachine):
    snapshots = Bundle("snapshots")

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="hcpfs-model-", dir="/dev/shm"))
        self.device = self.directory / "disk.img"
        self.images: dict[str, ModelImage] = {}
        self.counter = 0
        self.engine: Engine | None = None

    @initialize(size=st.sampled_from(SIZES), seed=st.binary(min_size=1, max_size=3))
    def make_device(self, size: int, seed: bytes) -> None:
        self.size = size
        self.live = bytearray((seed * size)[:size])
        self.device.write_bytes(self.live)
        self.open()

    def open(self) -> None:
        self.engine = Engine(str(self.directory / "store"), [Source(b"disk.img", str(self.device))])

    def image(self, name: str):
        found = self.engine.store.find(name.encode())
        assert found is not None
        return found.images[0]

    def cut(self, offset: int, data: bytes) -> tuple[int, bytes]:
        offset %= self.size
        return offset, data[: self.size - offset]

    @rule(offset=OFFSETS, length=LENGTHS, fill=st.integers(0, 255))
    def write_live(self, offset: int, length: int, fill: int) -> None:
        offset, data = self.cut(offset, bytes([fill]) * length)
        assert self.engine.call(self.engine.store.origins[0].write, offset, data) == len(data)
        self.live[offset : offset + len(data)] = data

    @rule(name=snapshots, offset=OFFSETS, length=LENGTHS, fill=st.integers(0, 255))
    def write_snapshot(self, name: str, offset: int, length: int, fill: int) -> None:
        offset, data = self.cut(offset, bytes([fill]) * length)
        assert self.engine.call(self.image(name).write, offset, data) == len(data)
        self.images[name].write(offset, data)

    @rule(name=snapshots)
    def flush_snapshot(self, name: str) -> None:
        self.engine.call(self.image(name).sync)
        self.images[name].flush()

    @rule()
    def flush_live(self) -> None:
        self.engine.call(self.engine.store.origins[0].sync)

    @precondition(lambda self: len(self.images) < 8)
    @rule(target=snapshots)
    def snapshot(self) -> str:
        self.counter += 1
        name = f"s{self.counter}"
        self.engine.call(self.engine.store.create_snapshot, name.encode())
        self.images[name] = ModelImage(bytes(self.live))
        return name

    @rule(name=consumes(snapshots))
    def delete(self, name: str) -> None:
        self.engine.call(self.engine.store.delete_snapshot, name.encode())
        del self.images[name]

    @rule(target=snapshots, name=consumes(snapshots))
    def rename(self, name: str) -> str:
        self.counter += 1
        new = f"r{self.counter}"
        self.engine.call(self.engine.store.rename_snapshot, name.encode(), new.encode())
        self.images[new] = self.images.pop(name)
        return new

    @rule(name=snapshots, offset=OFFSETS, length=LENGTHS)
    def read_snapshot(self, name: str, offset: int, length: int) -> None:
        expected = bytes(self.images[name].content[offset : offset + length])
        assert self.engine.call(self.image(name).read, offset, length) == expected

    @rule()
    def checkpoint(self) -> None:
        self.engine.call(self.engine.store._commits.checkpoint)

    @precondition(lambda self: self.engine is not None)
    @rule()
    def remount(self) -> None:
        self.engine.close()
        assert self.device.read_bytes() == self.live
        self.open()
        assert self.engine.was_clean
        self.check_all()

    @rule()
    def every_image_reads_right(self) -> None:
        self.check_all()

    @rule()
    def kill(self) -> None:
        self.engine.kill()
        assert self.device.read_bytes() == self.live
        self.open()
        assert not self.engine.was_clean
        for name, model in self.images.items():
            model.settle_after_kill(self.engine.call(self.image(name).read, 0, self.size))

    def check_all(self) -> None:
        for name, model in self.images.items():
            assert self.engine.call(self.image(name).read, 0, self.size) == model.content

    @invariant()
    def live_reads_back(self) -> None:
        if self.engine is not None:
            assert self.engine.call(self.engine.store.origins[0].read, 0, self.size) == self.live
            assert [one.name.decode() for one in self.engine.store.snapshots] == sorted(
                self.images, key=lambda name: self.engine.store.find(name.encode()).id
            )

    def teardown(self) -> None:
        if self.engine is not None:
            self.check_all()
            self.engine.close()
            assert self.engine.troubles == []
        shutil.rmtree(self.directory)


EngineAgainstModel.TestCase.settings = settings(
    max_examples=150,
    stateful_step_count=80,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
test_i2_i9_engine_equals_model = EngineAgainstModel.TestCase
