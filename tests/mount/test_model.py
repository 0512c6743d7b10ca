"""The real mount against the plain in-memory model, in random order."""

import os
from pathlib import Path

from tests.support.model import Machine, machine_settings
from tests.support.sandbox import Sandbox


class MountDriver:
    """System calls on a mounted hcpfs."""

    def __init__(self, content: bytes) -> None:
        self.sandbox = Sandbox()
        self.device = self.sandbox.disk(content=content)

    def open(self) -> None:
        self.served = self.sandbox.mount(self.device)

    def _path(self, image: str | None) -> Path:
        return self.served.path / "live/disk.img" if image is None else self.served.snaps / image / "disk.img"

    def _with(self, image: str | None, call, *arguments):
        fd = os.open(self._path(image), os.O_RDWR)
        try:
            return call(fd, *arguments)
        finally:
            os.close(fd)

    def read(self, image: str | None, offset: int, length: int) -> bytes:
        return self._with(image, os.pread, length, offset)

    def write(self, image: str | None, offset: int, data: bytes) -> int:
        return self._with(image, os.pwrite, data, offset)

    def sync(self, image: str | None) -> None:
        self._with(image, os.fsync)

    def create(self, name: str) -> None:
        (self.served.snaps / name).mkdir()

    def delete(self, name: str) -> None:
        (self.served.snaps / name).rmdir()

    def rename(self, old: str, new: str) -> None:
        (self.served.snaps / old).rename(self.served.snaps / new)

    def names(self) -> list[str]:
        return os.listdir(self.served.snaps)

    def checkpoint(self) -> None:
        """Only the engine's test can ask for one."""

    def stop(self) -> bytes:
        self.served.umount()
        return self.device.read_bytes()

    def kill(self) -> None:
        self.served.kill()

    def end(self) -> None:
        self.sandbox.close()


class MountAgainstModel(Machine):
    most_restarts = 3

    def make_driver(self, content: bytes) -> MountDriver:
        return MountDriver(content)


MountAgainstModel.TestCase.settings = machine_settings(8, steps=100)
test_i2_i9_the_mount_equals_the_model = MountAgainstModel.TestCase
