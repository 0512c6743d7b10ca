"""Random operations on the live image and on a snapshot, as files and as loop devices, while snapshots come and go."""

import random

import pytest

from tests.support.fsx import Fsx
from tests.support.sandbox import Sandbox

SIZE = (8 << 20) + 4096
OPERATIONS = 1500
SNAPSHOT_RATE = 0.01  #: snapshots for each operation


@pytest.mark.parametrize("through", ["file", "loop", "loop with direct-io"])
@pytest.mark.parametrize("target", ["live", "snapshot"])
def test_i2_i9_random_operations(sandbox: Sandbox, target: str, through: str) -> None:
    assert random_operations(sandbox, target, through, OPERATIONS, seed=1) == OPERATIONS


def random_operations(
    sandbox: Sandbox, target: str, through: str, count: int, seed: int, snapshot_rate: float = SNAPSHOT_RATE
) -> int:
    """Do `count` operations on the target, with a snapshot taken or dropped now and then; every one stays right."""
    random_ = random.Random(f"{target} {through} {seed}")
    content = random_.randbytes(SIZE)
    served = sandbox.mount(sandbox.disk(content=content))
    (served.snaps / "target").mkdir()
    path = served.live if target == "live" else served.image("target")
    if through != "file":
        path = sandbox.loop(path, f"--direct-io={'on' if 'direct' in through else 'off'}")
    model = bytearray(content)
    moments = {"target": content} if target == "live" else {}
    fsx = Fsx(path, model, random_)
    for number in range(count):
        fsx.step()
        if random_.random() < snapshot_rate:
            name = f"s{number}"
            if through != "file":
                fsx.settle()  # the loop device's cache is not part of a snapshot
            moments[name] = bytes(model if target == "live" else content)
            (served.snaps / name).mkdir()
        if len(moments) > 5:
            name = random_.choice(sorted(moments.keys() - {"target"}))
            assert served.image(name).read_bytes() == moments.pop(name), name
            (served.snaps / name).rmdir()
    fsx.check()
    fsx.close()
    for name, moment in moments.items():
        assert served.image(name).read_bytes() == moment, name
    if through != "file":
        sandbox.unloop(str(path))
    served.umount()
    assert (sandbox.path / "disk.img").read_bytes() == (bytes(model) if target == "live" else content)
    return fsx.operations
