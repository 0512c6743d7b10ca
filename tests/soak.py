"""The long run of the proofs: the same code as in the tests, with other seeds, for as long as one likes.

Each proof is a function that does one portion with a seed and says how much that was. The portions go round, so that
each gets its share of the time; a proof that has reached its amount is left out. The first violation ends the run.
"""

import random
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median

import click

from tests.crash.corruption import check_many
from tests.crash.edits import CHECKS
from tests.crash.faults import check_plan, count_calls, plans
from tests.crash.harness import roam, run
from tests.crash.mutations import all_mutations, unnoticed, unnoticed_check
from tests.crash.workloads import long_workloads
from tests.mount.test_device_cache import check_flushes
from tests.mount.test_fsx import random_operations
from tests.mount.test_kill import hung_while_freezing, killed_at_random, killed_while_freezing, thawed_while_hung
from tests.mount.test_kill_points import killed_at
from tests.mount.test_policies import fill_again_and_again
from tests.mount.test_power_cut import cut_power_at_random
from tests.support.fio import fio_verify
from tests.support.killpoints import POINTS
from tests.support.model import CHUNK
from tests.support.sandbox import HCPFS, Sandbox
from tests.support.sandbox import run as command
from tests.support.workload import CHUNKS, History, do_something

FIO_MIB, FIO_PASSES = 128, 4
FSX_OPERATIONS, FSX_SNAPSHOT_RATE = 40_000, 0.001
MEMORY_OPERATIONS, MEMORY_CHECK_EVERY, MEMORY_LOOK_EVERY = 20_000, 500, 100

Portion = Callable[[int], Counter[str]]


@contextmanager
def _sandbox() -> Iterator[Sandbox]:
    sandbox = Sandbox()
    try:
        yield sandbox
    finally:
        sandbox.close()


def _crash_states(seed: int) -> Counter[str]:
    tally = roam(seed, workloads=4, share=0.3, doubles=0.15)
    return Counter({"crash states": tally.states, "of them in recovery": tally.in_recovery})


def _faults(seed: int) -> Counter[str]:
    async def check() -> int:
        random_ = random.Random(seed)
        # One thing after the other, so that an error belongs to one of them.
        workload = tuple(name for name in next(long_workloads(random_)) if not {"during", "once"} & set(name.split()))
        chosen = list(plans(await count_calls(workload), random_))
        for plan in random_.sample(chosen, min(len(chosen), 60)):
            await check_plan(workload, plan, random_)
        return min(len(chosen), 60)

    return Counter({"disk faults": run(check)})


def _corruption(seed: int) -> Counter[str]:
    run(partial(check_many, 2000, seed))
    return Counter({"damaged stores": 2000})


def _mutations(seed: int) -> Counter[str]:
    if seed > 1:
        return Counter()
    missed = [unnoticed(one) for one in all_mutations()] + [unnoticed_check(one) for one in CHECKS]
    assert not any(missed), missed
    return Counter({"mutations caught": len(missed)})


def _kills(seed: int) -> Counter[str]:
    with _sandbox() as sandbox:
        killed_at_random(sandbox, seed, 15)
    return Counter({"kills at random": 15})


def _kill_points(seed: int) -> Counter[str]:
    names = sorted(POINTS)
    turn, place = divmod(seed, len(names))
    with _sandbox() as sandbox:
        killed_at(sandbox, names[place], seed=1 + turn % 20)
    return Counter({"kills at named points": 1})


def _power_cuts(kind: str, seed: int) -> Counter[str]:
    with _sandbox() as sandbox:
        cut_power_at_random(sandbox, kind, seed, 10)
    return Counter({f"power cuts, {kind}": 10})


def _full(seed: int) -> Counter[str]:
    with _sandbox() as sandbox:
        fill_again_and_again(sandbox, cycles=25, seed=seed)
    return Counter({"store full cycles": 25})


def _freezes(seed: int) -> Counter[str]:
    with _sandbox() as sandbox:
        killed_while_freezing(sandbox, 5)
    with _sandbox() as sandbox:
        hung_while_freezing(sandbox, 5)
    with _sandbox() as sandbox:
        thawed_while_hung(sandbox, 5)
    return Counter({"kills and hangs while freezing": 15})


def _flushes(seed: int) -> Counter[str]:
    with _sandbox() as sandbox:
        return Counter({"flushes replayed": check_flushes(sandbox, seed, files=40, most=60)})


def _random_operations(seed: int) -> Counter[str]:
    target = ("live", "snapshot")[seed % 2]
    through = ("file", "loop", "loop with direct-io")[seed // 2 % 3]
    with _sandbox() as sandbox:
        done = random_operations(sandbox, target, through, FSX_OPERATIONS, seed, snapshot_rate=FSX_SNAPSHOT_RATE)
    return Counter({"file operations": done})


def _fio(seed: int) -> Counter[str]:
    """A pass of fio over an image, written in blocks of many sizes and read back against their checksums."""
    target = ("live", "snapshot")[seed % 2]
    through = (None, "off", "on")[seed // 2 % 3]
    with _sandbox() as sandbox:
        served = sandbox.mount(sandbox.disk(size=FIO_MIB << 20))
        (served.snaps / "s").mkdir()
        path = served.live if target == "live" else served.image("s")
        device = path if through is None else sandbox.loop(path, f"--direct-io={through}")
        for number in range(FIO_PASSES):
            fio_verify(sandbox, device, FIO_MIB, seed=seed * FIO_PASSES + number)
    return Counter({"MiB written and verified by fio": FIO_MIB * FIO_PASSES})


def _memory(seed: int) -> Counter[str]:
    """One daemon at work on everything: what it takes in the last quarter is what it took in the second.

    Medians, as a single look finds now a few threads at work and now none. The first quarter is the warm-up.
    """
    random_ = random.Random(seed)
    content = random_.randbytes(CHUNKS * CHUNK)
    history = History(content)
    with _sandbox() as sandbox:
        served = sandbox.mount(sandbox.disk(content=content))

        def resident() -> int:
            status = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{served.pid}/status").read_text())
            assert status is not None
            return int(status[1])

        taken = []
        for number in range(MEMORY_OPERATIONS):
            do_something(served, history, random_)
            history.live.flush()
            if number % MEMORY_CHECK_EVERY == 0:
                for name, model in history.snapshots.items():
                    assert served.image(name).read_bytes() == model.content
                command(*HCPFS, "verify", served.path)
            if number % MEMORY_LOOK_EVERY == 0:
                taken.append(resident())
    early, late = (median(taken[len(taken) * quarter // 4 :][: len(taken) // 4]) for quarter in (1, 3))
    assert late < 1.05 * early, f"the daemon grew from {early:.0f} to {late:.0f} KiB"
    return Counter({"operations without growth": MEMORY_OPERATIONS})


PROOFS: dict[str, tuple[Portion, str, int]] = {  # the portion, the figure that counts, and how much is wanted
    "mutations": (_mutations, "mutations caught", 1),
    "crash": (_crash_states, "crash states", 1_000_000),
    "faults": (_faults, "disk faults", 20_000),
    "corruption": (_corruption, "damaged stores", 100_000),
    "kill": (_kills, "kills at random", 1_000),
    "kill-points": (_kill_points, "kills at named points", 1_000),
    "power-ext4": (partial(_power_cuts, "ext4"), "power cuts, ext4", 500),
    "power-xfs": (partial(_power_cuts, "xfs"), "power cuts, xfs", 500),
    "full": (_full, "store full cycles", 1_000),
    "freeze": (_freezes, "kills and hangs while freezing", 200),
    "flushes": (_flushes, "flushes replayed", 1_000),
    "fio": (_fio, "MiB written and verified by fio", 102_400),
    "memory": (_memory, "operations without growth", 100_000),
    "fsx": (_random_operations, "file operations", 10_000_000),
}


@click.command()
@click.option("--minutes", type=float, default=60.0, show_default=True, help="When to stop, reached or not.")
@click.option("--seed", type=int, default=1, show_default=True, help="The first seed; others follow.")
@click.argument("proofs", nargs=-1, type=click.Choice(list(PROOFS)))
def main(minutes: float, seed: int, proofs: tuple[str, ...]) -> None:
    """Run PROOFS, or all, until each has reached its amount or the time is over, and print the figures."""
    deadline = time.monotonic() + 60 * minutes
    totals: Counter[str] = Counter()
    seconds: Counter[str] = Counter()
    seeds = dict.fromkeys(proofs or PROOFS, seed)
    while seeds and time.monotonic() < deadline:
        name = min(seeds, key=lambda one: seconds[one])  # the one that had the least time
        portion, figure, wanted = PROOFS[name]
        began = time.monotonic()
        try:
            totals += portion(seeds[name])
        except BaseException:
            _print_table(totals, seconds)
            click.echo(f"soak: {name} failed with seed {seeds[name]}", err=True)
            raise
        seconds[name] += time.monotonic() - began
        seeds[name] += 1
        if totals[figure] >= wanted:
            del seeds[name]
        if sys.stderr.isatty():
            click.echo(f"\r{time.monotonic() - deadline:+.0f} s  {name} {totals[figure]}\033[K", err=True, nl=False)
    _print_table(totals, seconds)


def _print_table(totals: Counter[str], seconds: Counter[str]) -> None:
    click.echo("\n| figure | reached | wanted | violations |\n|---|---|---|---|")
    wanted = {figure: amount for _, figure, amount in PROOFS.values()}
    for figure, count in sorted(totals.items()):
        click.echo(f"| {figure} | {count:,} | {wanted.get(figure, 0) or '':} | 0 |")
    click.echo("\nminutes: " + ", ".join(f"{name} {one / 60:.1f}" for name, one in seconds.items()))


if __name__ == "__main__":
    main()
