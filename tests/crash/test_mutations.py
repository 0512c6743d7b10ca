"""Would the harness notice? Each sync, commit, check and ordering edge of the write path is left out once."""

import os
import random
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

from cow.device import Directory
from cow.errors import CowError
from cow.geometry import Run
from cow.journal import Journal, Kind, Record
from tests.crash.cut import states_of
from tests.crash.disk import STORE, Disk, empty_state
from tests.crash.harness import CONTENT, run, small_and_deterministic
from tests.crash.mutations import AWAY, CHECKS, all_mutations, hunt, unnoticed, unnoticed_away, unnoticed_check


def test_without_a_mutation_there_is_nothing_to_notice() -> None:
    assert run(partial(hunt, glances=1)) is None


def test_every_mutation_of_the_write_path_is_noticed() -> None:
    mutations = all_mutations()
    with ProcessPoolExecutor(os.cpu_count() or 1, mp_context=get_context("spawn")) as processes:
        missed = [what for what in processes.map(unnoticed, mutations) if what is not None]
    print(f"{len(mutations)} mutations, {len(missed)} not noticed")
    assert missed == []
    assert len(mutations) > 35


def test_every_missing_check_is_noticed() -> None:
    with ProcessPoolExecutor(os.cpu_count() or 1, mp_context=get_context("spawn")) as processes:
        missed = [what for what in processes.map(unnoticed_check, CHECKS) if what is not None]
    print(f"{len(CHECKS)} checks, {len(missed)} not missed")
    assert missed == []


def test_every_missing_step_for_a_device_that_is_away_is_noticed() -> None:
    with ProcessPoolExecutor(os.cpu_count() or 1, mp_context=get_context("spawn")) as processes:
        missed = [what for what in processes.map(unnoticed_away, AWAY) if what is not None]
    print(f"{len(AWAY)} steps, {len(missed)} not noticed")
    assert missed == []


def test_journal_files_are_retired_without_a_gap() -> None:
    """A gap would look like damage. Without the sync between two of them there is one, so it is needed."""

    def replayed(left_out: bool) -> Sequence[bool]:
        """Whether each state that a cut in `retire` may leave can be replayed."""
        disk = Disk(empty_state(CONTENT))
        journal = Journal(Directory.open_path(STORE, disk), bytes(16))
        for number in range(3):
            older = journal.start_file([Record(Kind.PRESERVED, number, 0, [Run(0, 1)], bytes(8))])
        first = len(disk.log)
        disk.left_out = lambda call: left_out
        journal.retire([*older, journal.numbers[-1]])
        return [_can_be_replayed(Disk(found.state)) for found in states_of(disk, random.Random(1), first=first)]

    with small_and_deterministic():
        assert all(replayed(left_out=False))
        assert not all(replayed(left_out=True))


def _can_be_replayed(disk: Disk) -> bool:
    try:
        list(Journal(Directory.open_path(STORE, disk), bytes(16)).replay())
    except CowError:
        return False
    return True
