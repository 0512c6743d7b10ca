"""What is measured: the works, the rows of the table with what each must reach, and how much of it a run does.

A work is one thing that is done, such as reading at random; a server is whoever does it. A figure is what a server
reached in a work, once a round. All figures are rates, of which more is better, save those of the limits.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

MIB, GIB, TIB = 1 << 20, 1 << 30, 1 << 40

IMAGE, PLAIN, KEPT = "hcpfs image", "hcpfs live", "hcpfs live, preserved"
QEMU, NBDKIT, XMOUNT = "qemu-storage-daemon", "nbdkit cow + nbdfuse", "xmount --cache"
PASSTHROUGH, REFLINK = "passthrough_ll -s", "XFS reflink"
PEERS = (QEMU, NBDKIT, XMOUNT)
ONE, MANY = "hcpfs, 1 snapshot", "hcpfs, 100 snapshots"
LOOP, HCPFS, TEN = "loop alone", "hcpfs", "hcpfs, 10 snapshots"
SMALL, LARGE = "hcpfs, small disk", "hcpfs, 64 TiB"


class Figure(NamedTuple):
    """What one server reaches in one work."""

    work: str
    server: str


@dataclass(frozen=True)
class Work:
    """One thing that is done."""

    words: str
    unit: str


@dataclass(frozen=True)
class Ratio:
    """A row: ours against the best of the others, and the ratio to reach."""

    words: str
    ours: Figure
    others: tuple[Figure, ...]
    target: float


@dataclass(frozen=True)
class Limit:
    """A row: a figure of ours, and the most that it may be."""

    words: str
    ours: Figure
    target: float


Row = Ratio | Limit

WORKS = {
    "read-qd1": Work("4 KiB random read, qd1", "IOPS"),
    "read-qd16": Work("4 KiB random read, qd16", "IOPS"),
    "seq-read": Work("1 MiB sequential read", "MiB/s"),
    "write-qd1": Work("4 KiB random write, qd1", "IOPS"),
    "write-qd16": Work("4 KiB random write, qd16", "IOPS"),
    "seq-write": Work("1 MiB sequential write", "MiB/s"),
    "first": Work("4 KiB random first overwrite, qd16, then fsync", "IOPS"),
    "again": Work("4 KiB random re-overwrite of the same chunks, qd16, then fsync", "IOPS"),
    "cp-cold": Work("cp of an image, not in the cache", "MiB/s"),
    "cp-cached": Work("cp of an image, the second time", "MiB/s"),
    "ext4-direct": Work("4 KiB random write in ext4, O_DIRECT, fsync every 32", "IOPS"),
    "ext4-buffered": Work("4 KiB random write in ext4, buffered, fsync every 32", "IOPS"),
    "pgbench": Work("PostgreSQL, pgbench, scale 10, 4 clients", "tps"),
    "mkdir-median": Work("mkdir of a snapshot, median", "ms"),
    "mkdir-p99": Work("mkdir of a snapshot, 99th percentile", "ms"),
    "memory": Work("resident memory at its peak", "MiB"),
    "mount-clean": Work("mount after a clean umount", "s"),
    "mount-killed": Work("mount after kill -9", "s"),
}


def _all(work: str, servers: tuple[str, ...]) -> tuple[Figure, ...]:
    return tuple(Figure(work, server) for server in servers)


def _against_peers(words: str, work: str, server: str, target: float) -> Ratio:
    return Ratio(words, Figure(work, server), _all(work, PEERS), target)


def _against(words: str, ours: Figure, other: Figure, target: float) -> Ratio:
    return Ratio(words, ours, (other,), target)


ROWS: dict[str, Row] = {
    **{
        f"read-{depth}": _against_peers(f"4 KiB random read, image, {depth}", f"read-{depth}", IMAGE, 2.5)
        for depth in ("qd1", "qd16")
    },
    **{
        f"read-{depth}-ceiling": _against(
            f"4 KiB random read, image, {depth}",
            Figure(f"read-{depth}", IMAGE),
            Figure(f"read-{depth}", PASSTHROUGH),
            0.55,
        )
        for depth in ("qd1", "qd16")
    },
    **{
        f"write-{name}-{depth}": _against_peers(
            f"4 KiB random write, {words}, {depth}", f"write-{depth}", server, target
        )
        for name, words, server, target in (
            ("plain", "live without snapshot", PLAIN, 2.5),
            ("preserved", "live, already preserved", KEPT, 2.5),
            ("delta", "image", IMAGE, 2.0),
        )
        for depth in ("qd1", "qd16")
    },
    "first": _against(
        "4 KiB random first overwrite, 1 snapshot, with fsync", Figure("first", ONE), Figure("first", QEMU), 2.0
    ),
    "first-100": _against("the same, 100 snapshots against 1", Figure("first", MANY), Figure("first", ONE), 0.9),
    "first-again": _against(
        "first overwrite against re-overwrite, 1 snapshot", Figure("first", ONE), Figure("again", ONE), 0.4
    ),
    "first-again-100": _against(
        "first overwrite against re-overwrite, 100 snapshots", Figure("first", MANY), Figure("again", MANY), 0.4
    ),
    **{
        f"seq-{work}-{name}": _against_peers(f"1 MiB sequential {work}, {name}", f"seq-{work}", server, 1.3)
        for work in ("read", "write")
        for name, server in (("image", IMAGE), ("live", PLAIN))
    },
    "cp-cold": _against_peers("cp of an image, cold", "cp-cold", IMAGE, 1.3),
    "cp-cached": _against_peers("cp of an image, cached", "cp-cached", IMAGE, 1.3),
    **{
        f"ext4-{how}": _against(
            f"ext4 on a loop on live, 1 snapshot: 4 KiB random write, {words}, fsync every 32",
            Figure(f"ext4-{how}", HCPFS),
            Figure(f"ext4-{how}", LOOP),
            0.6,
        )
        for how, words in (("direct", "O_DIRECT"), ("buffered", "buffered"))
    },
    "pgbench-1": _against(
        "PostgreSQL on such an ext4, 1 snapshot", Figure("pgbench", ONE), Figure("pgbench", LOOP), 0.6
    ),
    "pgbench-10": _against(
        "PostgreSQL on such an ext4, 10 snapshots", Figure("pgbench", TEN), Figure("pgbench", LOOP), 0.6
    ),
    "mkdir": Limit("mkdir, 99th percentile, small disk", Figure("mkdir-p99", SMALL), 20.0),
    "mkdir-64t": Limit("mkdir, 99th percentile, 64 TiB", Figure("mkdir-p99", LARGE), 20.0),
    "memory": Limit("resident memory, 64 TiB, scattered chunks", Figure("memory", LARGE), 200.0),
    "mount-clean": Limit("mount of that after a clean umount", Figure("mount-clean", LARGE), 2.0),
    "mount-killed": Limit("mount of that after kill -9", Figure("mount-killed", LARGE), 10.0),
}


@dataclass(frozen=True)
class Plan:
    """How much of everything a run does."""

    rounds: int
    warm_up: bool  #: whether a round goes before that does not count
    ceilings: bool  #: whether the ceilings run also where no row asks for them
    seconds: float  #: a cell that writes or reads for a while
    disk_bytes: int
    first_bytes: int  #: overwritten for the first time, a round
    copy_bytes: int
    database_seconds: float
    mkdirs: int  #: a round
    scale_chunks: int
    scale_snapshots: int
    hurry_seconds: float = math.inf  #: after so long, one round has to do

    def with_rounds(self, rounds: int) -> "Plan":
        return replace(self, rounds=rounds)


FULL = Plan(
    rounds=5,
    warm_up=True,
    ceilings=True,
    seconds=3.0,
    disk_bytes=GIB,
    first_bytes=128 * MIB,
    copy_bytes=4 * GIB,
    database_seconds=15.0,
    mkdirs=200,
    scale_chunks=1_000_000,
    scale_snapshots=100,
)
QUICK = Plan(
    rounds=2,
    warm_up=False,
    ceilings=False,
    seconds=0.4,
    disk_bytes=128 * MIB,
    first_bytes=24 * MIB,
    copy_bytes=256 * MIB,
    database_seconds=2.0,
    mkdirs=50,
    scale_chunks=20_000,
    scale_snapshots=10,
    hurry_seconds=100.0,
)
