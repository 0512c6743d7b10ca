"""The freezer process on a real ext4: it thaws in every outcome."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.sandbox import Sandbox, run, wait_until
from tests.support.targets import name_at, target_at


class Helper:
    def __init__(self, sandbox: Sandbox, files: Path) -> None:
        self.files = files
        self.sandbox = sandbox
        self.process = sandbox.spawn(
            sys.executable,
            "-m",
            "hcpfs.quiesce.freezer",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def ask(self, **request: object) -> dict:
        self.process.stdin.write(json.dumps(request) + "\n")
        return json.loads(self.process.stdout.readline())

    def freeze(self, seconds: float = 60) -> dict:
        return self.ask(freeze=[target_at(self.files)], seconds=seconds, wanted=None)

    def writer(self) -> subprocess.Popen:
        return self.sandbox.spawn("touch", self.files / "probe")

    def writer_is_stuck(self, writer: subprocess.Popen) -> bool:
        return writer.poll() is None and " D " in Path(f"/proc/{writer.pid}/stat").read_text()


@pytest.fixture
def helper(sandbox: Sandbox) -> Iterator[Helper]:
    device = sandbox.loop(sandbox.disk(size=16 << 20))
    sandbox.format(device, "ext4")
    helper = Helper(sandbox, sandbox.mount_device(device))
    try:
        yield helper
    finally:
        helper.process.stdin.close()
        helper.process.wait()
        helper.process.stdout.close()
        sandbox.unmount(helper.files)


def test_thaws_when_told(helper: Helper) -> None:
    assert helper.freeze() == {"frozen": {name_at(helper.files): str(helper.files)}, "refused": {}}
    writer = helper.writer()
    wait_until(lambda: helper.writer_is_stuck(writer), what="the freeze")
    assert helper.ask(thaw=True) == {"thawed": 1, "late": False, "writers": [], "unseen": []}
    assert writer.wait() == 0


@pytest.mark.parametrize(
    "end",
    [
        lambda process: process.stdin.close(),
        lambda process: process.send_signal(signal.SIGTERM),
    ],
    ids=["the pipe breaks", "SIGTERM"],
)
def test_thaws_when_it_ends(helper: Helper, end: Callable[[subprocess.Popen], None]) -> None:
    helper.freeze()
    writer = helper.writer()
    wait_until(lambda: helper.writer_is_stuck(writer), what="the freeze")
    end(helper.process)
    assert writer.wait() == 0


def test_thaws_without_a_word_when_nobody_reads_its_answer(sandbox: Sandbox) -> None:
    """As when the daemon is killed during a mkdir."""
    asked = json.dumps({"freeze": [], "seconds": 60, "wanted": None})
    with subprocess.Popen(
        [sys.executable, "-m", "hcpfs.quiesce.freezer"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as helper:  # fmt: skip
        helper.stdout.close()
        _, said = helper.communicate(asked + "\n")
    assert (helper.returncode, said) == (0, "")


def test_thaws_when_the_time_is_over_and_says_so(helper: Helper) -> None:
    helper.freeze(seconds=0.2)
    assert helper.writer().wait() == 0
    assert helper.ask(thaw=True) == {"thawed": 0, "late": True, "writers": [], "unseen": []}


def test_respects_the_freeze_of_somebody_else(helper: Helper) -> None:
    run("fsfreeze", "-f", helper.files)
    try:
        assert helper.freeze() == {"frozen": {}, "refused": {name_at(helper.files): "somebody else froze it"}}
        assert helper.ask(thaw=True) == {"thawed": 0, "late": False, "writers": [], "unseen": []}
        writer = helper.writer()
        wait_until(lambda: helper.writer_is_stuck(writer), what="the writer to be stuck still")
    finally:
        run("fsfreeze", "-u", helper.files)
    assert writer.wait() == 0


def test_says_what_cannot_be_frozen(helper: Helper) -> None:
    target = target_at(helper.files)._replace(filesystem="vfat", places=[])
    answer = helper.ask(freeze=[target], seconds=5, wanted=None)
    assert answer == {"frozen": {}, "refused": {target.name: "vfat can only be reached where it is mounted"}}


def test_a_file_system_that_cannot_be_frozen_is_synced_instead(helper: Helper) -> None:
    """Such as vfat, or tmpfs, which every kernel has."""
    place = helper.sandbox.path / "memory"
    place.mkdir()
    run("mount", "-t", "tmpfs", "none", place)
    try:
        answer = helper.ask(freeze=[target_at(place)], seconds=60, wanted=None)
        assert answer == {"frozen": {}, "refused": {name_at(place): "Operation not supported; it was synced before"}}
    finally:
        run("umount", place)
