"""A first walk through the tree by system calls."""

import os

from tests.support.sandbox import Sandbox


def test_a_snapshot_keeps_what_the_origin_overwrites(sandbox: Sandbox) -> None:
    served = sandbox.mount(sandbox.disk(content=os.urandom(1 << 20)))
    before = served.live.read_bytes()
    (served.snaps / "a").mkdir()
    with served.live.open("r+b") as live:
        live.seek(5000)
        live.write(b"x" * 10000)
    assert served.image("a").read_bytes() == before
    assert served.live.read_bytes() == before[:5000] + b"x" * 10000 + before[15000:]
    served = served.remount()
    assert served.image("a").read_bytes() == before
    (served.snaps / "a").rmdir()
    assert os.listdir(served.snaps) == []
    served.umount()
