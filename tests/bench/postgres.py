"""PostgreSQL in an ext4 on a loop device: on live images with 1 and with 10 snapshots, and without hcpfs.

All are copies of one disk with one database. Each round begins with a new snapshot, and the oldest goes. The ceiling is
a FUSE server in C that keeps no old bytes.
"""

import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from tests.bench.plan import GIB, LOOP, ONE, PASSTHROUGH, TEN
from tests.bench.rounds import AbsentError, Measured, Turn
from tests.bench.scene import Scene, Snapshots, scene
from tests.support.sandbox import run

DISK_BYTES = 2 * GIB  # sparse; the database and its log take a third
SETTINGS = "-c listen_addresses= -c max_wal_size=256MB"
SCALE, CLIENTS = 10, 4
SNAPSHOTS = {ONE: 1, TEN: 10}


def measure(measured: Measured) -> None:
    if not measured.wants("pgbench"):
        return
    with scene(measured) as here, ExitStack() as running:
        here.sandbox.path.chmod(0o711)  # the server runs as its own user
        disk = here.sandbox.disk("postgres.img", DISK_BYTES)
        here.sandbox.format(disk, "ext4")
        with here.on_loop(disk, "template") as root:
            shutil.chown(root, "postgres", "postgres")
            _as_postgres("initdb", "--no-sync", "-D", root / "data")
            with _server(root):
                _pgbench(root, "--initialize", f"--scale={SCALE}", "--quiet")
        images = {LOOP: disk}
        mounts = {
            server: here.serve(here.copy(disk, f"disk{count}.img"), f"hcpfs{count}")
            for server, count in SNAPSHOTS.items()
        }
        images |= {server: served.live for server, served in mounts.items()}
        if here.plan.ceilings:
            here.start(disk, PASSTHROUGH)  # over a copy
        images |= here.images
        turns: dict[str, Turn] = {}
        for number, (server, image) in enumerate(images.items()):
            root = running.enter_context(here.on_loop(image, f"pg{number}"))
            running.enter_context(_server(root))
            snapshots = None
            if server in mounts:
                snapshots = Snapshots(mounts[server], SNAPSHOTS[server], partial(_pgbench, root, "--transactions=20"))
            turns[server] = _turn(here, root, snapshots)
        measured.compete(turns)


def _turn(here: Scene, root: Path, snapshots: Snapshots | None) -> Turn:
    seconds = max(1, round(here.plan.database_seconds))

    def turn() -> Mapping[str, float]:
        _as_postgres("psql", "-h", root, "-c", "checkpoint")
        if snapshots is not None:
            snapshots.renew()
        return {"pgbench": _transactions(root, seconds)}

    return turn


def _transactions(root: Path, seconds: int) -> float:
    """Transactions a second."""
    said = _pgbench(root, f"--time={seconds}", f"--client={CLIENTS}", "--jobs=2", "--no-vacuum")
    found = re.search(r"tps = ([0-9.]+)", said)
    assert found is not None, f"pgbench said no tps: {said}"
    return float(found[1])


@contextmanager
def _server(root: Path) -> Iterator[None]:
    """A server over the data below the root of the file system, with its socket there."""
    control = ("pg_ctl", "-D", root / "data", "-w")
    settings = f"{SETTINGS} -c unix_socket_directories={root}"
    _as_postgres(*control, "-l", root / "log", "-o", settings, "start")
    try:
        yield
    finally:
        _as_postgres(*control, "-m", "fast", "stop", check=False)  # it may be why we are here


def _pgbench(root: Path, *words: str) -> str:
    return _as_postgres("pgbench", "-h", root, *words, "postgres")


def _as_postgres(program: str, *words: object, check: bool = True) -> str:
    """Run one of PostgreSQL's programs as its user, and return what it said."""
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{program}"))
    if not found:
        raise AbsentError(f"not installed: {program}")
    return run("runuser", "-u", "postgres", "--", found[-1], *words, check=check, cwd="/").stdout
