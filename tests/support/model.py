"""What hcpfs must be: an in-memory model, and a machine that does random things to it and to the real one alike."""

from typing import Protocol

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, precondition, rule

CHUNK = 4096
SIZES = [12 * CHUNK, 12 * CHUNK + 3584, 20 * CHUNK + 512, 512]
OFFSETS = st.builds(
    lambda chunk, within: chunk * CHUNK + within,
    st.sampled_from(range(21)),
    st.sampled_from([0, 0, 0, 512, 1023, 4095]),
)
LENGTHS = st.sampled_from([CHUNK, CHUNK, 2 * CHUNK, 5 * CHUNK, 512, 1, 5000])
FILLS = st.sampled_from([0, 1, 77, 255])  # 0: a trim by zeroes


class ModelImage:
    """What an image must read as. After a kill, unflushed writes may or may not be there, chunk by chunk."""

    def __init__(self, content: bytes) -> None:
        self.content = bytearray(content)
        self._flushed = bytes(content)
        self._since_flush: list[bytes] = []

    def write(self, offset: int, data: bytes) -> None:
        self.content[offset : offset + len(data)] = data
        self._since_flush.append(bytes(self.content))

    def flush(self) -> None:
        self._flushed = bytes(self.content)
        self._since_flush = []

    def settle_after_kill(self, found: bytes) -> None:
        """Check what survived, and go on from there."""
        assert len(found) == len(self.content)
        for start in range(0, len(found), CHUNK):
            allowed = {state[start : start + CHUNK] for state in [self._flushed, *self._since_flush]}
            assert found[start : start + CHUNK] in allowed, f"chunk {start // CHUNK} is none of what was written"
        self.content = bytearray(found)
        self.flush()


class Driver(Protocol):
    """The real one, by whatever road. Images are named; None is the live one."""

    def open(self) -> None: ...
    def read(self, image: str | None, offset: int, length: int) -> bytes: ...
    def write(self, image: str | None, offset: int, data: bytes) -> int: ...
    def sync(self, image: str | None) -> None: ...
    def create(self, name: str) -> None: ...
    def delete(self, name: str) -> None: ...
    def rename(self, old: str, new: str) -> None: ...
    def names(self) -> list[str]: ...
    def checkpoint(self) -> None: ...
    def stop(self) -> bytes: ...
    def kill(self) -> None: ...
    def end(self) -> None: ...


class Machine(RuleBasedStateMachine):
    """Random operations on a driver, with the model beside it. Subclasses say what the driver is."""

    snapshots = Bundle("snapshots")
    most_restarts = 1000  #: in one example; a restart through the mount is slow

    def __init__(self) -> None:
        super().__init__()
        self.images: dict[str, ModelImage] = {}
        self.counter = 0
        self.restarts = 0
        self.driver: Driver | None = None

    def make_driver(self, content: bytes) -> Driver:
        raise NotImplementedError

    @initialize(size=st.sampled_from(SIZES), seed=st.binary(min_size=1, max_size=3))
    def make_device(self, size: int, seed: bytes) -> None:
        self.size = size
        self.live = ModelImage((seed * size)[:size])
        self.driver = self.make_driver(bytes(self.live.content))
        self.driver.open()

    def cut(self, offset: int, length: int, fill: int) -> tuple[int, bytes]:
        offset %= self.size
        return offset, bytes([fill]) * min(length, self.size - offset)

    @rule(offset=OFFSETS, length=LENGTHS, fill=FILLS)
    def write_live(self, offset: int, length: int, fill: int) -> None:
        offset, data = self.cut(offset, length, fill)
        assert self.driver.write(None, offset, data) == len(data)
        self.live.write(offset, data)

    @rule(name=snapshots, offset=OFFSETS, length=LENGTHS, fill=FILLS)
    def write_snapshot(self, name: str, offset: int, length: int, fill: int) -> None:
        offset, data = self.cut(offset, length, fill)
        assert self.driver.write(name, offset, data) == len(data)
        self.images[name].write(offset, data)

    @rule(name=snapshots)
    def flush_snapshot(self, name: str) -> None:
        self.driver.sync(name)
        self.images[name].flush()

    @rule()
    def flush_live(self) -> None:
        self.driver.sync(None)
        self.live.flush()

    @precondition(lambda self: len(self.images) < 8)
    @rule(target=snapshots)
    def snapshot(self) -> str:
        self.counter += 1
        name = f"s{self.counter}"
        self.driver.create(name)
        self.live.flush()
        self.images[name] = ModelImage(bytes(self.live.content))
        return name

    @rule(name=consumes(snapshots))
    def delete(self, name: str) -> None:
        self.driver.delete(name)
        del self.images[name]

    @rule(target=snapshots, name=consumes(snapshots))
    def rename(self, name: str) -> str:
        self.counter += 1
        new = f"r{self.counter}"
        self.driver.rename(name, new)
        self.images[new] = self.images.pop(name)
        return new

    @rule(name=snapshots, offset=OFFSETS, length=LENGTHS)
    def read_snapshot(self, name: str, offset: int, length: int) -> None:
        assert self.driver.read(name, offset, length) == bytes(self.images[name].content[offset : offset + length])

    @rule()
    def checkpoint(self) -> None:
        self.driver.checkpoint()

    @precondition(lambda self: self.restarts < self.most_restarts)
    @rule()
    def remount(self) -> None:
        self.restarts += 1
        assert self.driver.stop() == self.live.content  # I8
        self.live.flush()
        self.driver.open()
        self.every_image_reads_right()

    @precondition(lambda self: self.restarts < self.most_restarts)
    @rule()
    def kill(self) -> None:
        self.restarts += 1
        self.driver.kill()
        self.driver.open()
        self.live.settle_after_kill(self.driver.read(None, 0, self.size))
        for name, model in self.images.items():
            model.settle_after_kill(self.driver.read(name, 0, self.size))

    @rule()
    def every_image_reads_right(self) -> None:
        for name, model in self.images.items():
            assert self.driver.read(name, 0, self.size) == model.content

    @invariant()
    def live_reads_back(self) -> None:
        if self.driver is not None:
            assert self.driver.read(None, 0, self.size) == self.live.content
            assert sorted(self.driver.names()) == sorted(self.images)

    def teardown(self) -> None:
        if self.driver is None:
            return
        try:
            self.every_image_reads_right()
        finally:
            self.driver.end()


def machine_settings(examples: int, steps: int = 80) -> settings:
    """Of a test against the model: so many runs of so many steps, the same ones each time, however long they take."""
    return settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
