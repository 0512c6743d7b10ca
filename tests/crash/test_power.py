"""Power cuts at every moment of every short workload, and again during the recovery: nothing lost, nothing false."""

import os
import random
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from tests.crash.cut import states_of
from tests.crash.disk import STORE_INODE, Disk, empty_state
from tests.crash.harness import CONTENT, SPLIT, Tally, check_workload, record, run, sweep

SHARE, DOUBLES = 0.0203, 0.035


def test_i1_i2_i3_i4_i5_power_cuts_everywhere() -> None:
    parts = os.cpu_count() or 1
    with ProcessPoolExecutor(parts, mp_context=get_context("spawn")) as processes:
        swept = [processes.submit(sweep, part, parts, 1, SHARE, DOUBLES) for part in range(parts)]
        tallies = [one.result() for one in swept]
    states = sum(tally.states for tally in tallies)
    in_recovery = sum(tally.in_recovery for tally in tallies)
    print(f"{states} crash states checked, {in_recovery} of them after a second cut, in the recovery")
    assert states >= 20_000
    assert in_recovery >= 1_000


def test_i1_i9_power_cuts_where_two_disks_are_overwritten_at_once() -> None:
    """What is preserved for both together, at each place of a journal file: none may go with a file that is dropped."""
    tally = Tally()
    disk = Disk(empty_state(CONTENT[:SPLIT], CONTENT[SPLIT:]))
    workload = (
        "restart without write-behind",
        *("create", "write a live chunk", "write live chunks everywhere at once") * 3,
    )
    run(lambda: check_workload(workload, random.Random(1), tally, share=0.2, disk=disk))
    assert tally.states > 1_000


def test_i5_power_cuts_while_a_store_is_made() -> None:
    tally = Tally()
    run(lambda: check_workload(("sync live",), random.Random(1), tally, doubles=0.2, whole=True))
    assert tally.states > 200


def test_the_simulated_disk_leaves_what_it_should() -> None:
    """The harness itself: synced writes stay, others are kept, dropped and torn, and entries go by themselves."""
    disk = Disk(empty_state(CONTENT))
    store = disk.open("/store", os.O_DIRECTORY)
    file = disk.open("name", os.O_CREAT, dir_fd=store)
    disk.pwrite(file, b"a" * 4096, 0)
    disk.fdatasync(file)
    disk.pwrite(file, b"b" * 4096, 0)
    found = set()
    for state in states_of(disk, random.Random(1), first=len(disk.log) - 2):
        entries = state.state.directories[STORE_INODE]
        found.add(state.state.files[entries["name"]] if entries else None)
    assert {None, b"a" * 4096, b"b" * 4096} < found
    torn = [content for content in found if content is not None and len(set(content)) == 2]
    assert torn
    assert all(len(set(content[at : at + 512])) == 1 for content in torn for at in range(0, 4096, 512))
    disk.fsync(store)
    disk.fdatasync(file)
    (last,) = list(states_of(disk, random.Random(1), first=len(disk.log) - 1))
    assert last.state.files[last.state.directories[STORE_INODE]["name"]] == b"b" * 4096


def test_the_same_seed_gives_the_same_states() -> None:
    def stories() -> list[str]:
        disk, first = run(lambda: record(("create", "write live during a create", "sync live")))
        return [found.story for found in states_of(disk, random.Random(1), first=first)]

    assert stories() == stories()
