"""The daemon's end of the freezer, when that dies."""

from pathlib import Path

import pytest
import trio

from hcpfs.quiesce.helper import Freezer
from tests.support.inside import kill_freezer
from tests.support.sandbox import Sandbox
from tests.support.targets import target_at

SECONDS = 5


@pytest.fixture
def files(sandbox: Sandbox) -> Path:
    device = sandbox.loop(sandbox.disk(size=16 << 20))
    sandbox.format(device, "ext4")
    return sandbox.mount_device(device)


def test_a_file_system_is_thawed_although_its_freezer_was_killed(sandbox: Sandbox, files: Path) -> None:
    """The out-of-memory killer may take it, and a freeze outlives who asked for it."""

    async def main() -> None:
        freezer = Freezer()
        await freezer.start()
        with trio.fail_after(10 * SECONDS):
            async with freezer.frozen([target_at(files)], SECONDS) as answer:
                assert list(answer["frozen"].values()) == [str(files)]
                await kill_freezer(freezer)
            assert answer["late"] == "the freezer process died before the end"
            writer = sandbox.spawn("touch", files / "probe")
            await trio.to_thread.run_sync(writer.wait)
            await freezer.end()

    trio.run(main)
    assert (files / "probe").exists()


def test_a_freezer_that_died_before_is_started_anew(sandbox: Sandbox, files: Path) -> None:
    async def main() -> None:
        freezer = Freezer()
        await freezer.start()
        await kill_freezer(freezer)
        async with freezer.frozen([target_at(files)], SECONDS) as answer:
            assert list(answer["frozen"].values()) == [str(files)]
        assert answer["late"] == ""
        await freezer.end()

    trio.run(main)
