"""Would the harness notice? Each sync, commit, check and ordering edge of the write path is left out once."""

import os
import random
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from multiprocessing import get_context

import pytest

from cow.disk.directory import Directory
from cow.errors import CowError
from cow.geometry import Run
from cow.records import journal
from cow.records.journal import Journal, Kind, Record
from tests.crash.corruption import check_many
from tests.crash.cut import states_of
from tests.crash.disk import STORE, Disk, empty_state
from tests.crash.edits import AWAY, CHECKS, ORDER, Edit
from tests.crash.harness import CONTENT, run, small_and_deterministic
from tests.crash.mutations import BrokenEditError, all_mutations, hunt, unnoticed, unnoticed_away, unnoticed_check
from tests.support.constants import changed


def test_functions_compiled_anew_as_they_are_change_nothing() -> None:
    """The control of all edits at once: without a mutation there is nothing to notice."""
    with ExitStack() as stack:
        for function in {edit.function: edit for edit in (*ORDER, *CHECKS)}.values():
            stack.enter_context(function.unchanged.applied())
        assert hunt(glances=1, share=0.01) is None
        run(partial(check_many, 200, 2))


@pytest.mark.parametrize(
    "new", ["await self._no_such_thing(records)", "apply.no_such_name", "no_such_name", "apply(1)"]
)
def test_an_edit_that_is_no_program_is_not_taken_for_noticed(new: str) -> None:
    old = "        async with holding(self._lock):\n"
    edit = Edit("a broken edit", "durable.commits:Commits.commit", old, f"{old}            {new}\n")
    with edit.applied(), pytest.raises(BrokenEditError):
        hunt()


def test_an_engine_that_breaks_down_for_another_reason_is_not_taken_for_noticed() -> None:
    old = "        async with holding(self._lock):\n"
    edit = Edit("a defect", "durable.commits:Commits.commit", old, f"{old}            {{}}['nothing']\n")
    with edit.applied():
        assert hunt(glances=0) is None


def test_a_constant_that_is_gone_is_not_passed_over() -> None:
    with pytest.raises(AttributeError, match="NO_SUCH_NAME"), changed(journal, NO_SUCH_NAME=1):
        pass


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
