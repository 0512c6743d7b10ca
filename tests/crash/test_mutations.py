"""Would the harness notice? Each sync, commit, check and ordering edge of the write path is left out once."""

from functools import partial

import pytest

from tests.crash.harness import run
from tests.crash.mutations import HUNTS, NEEDLESS, ORDER, Edit, calls_of, disk_without, hunt


def test_without_a_mutation_there_is_nothing_to_notice() -> None:
    assert run(hunt) is None


def test_every_sync_and_commit_is_missed_when_it_is_left_out() -> None:
    """Or it is one of those that are known not to be needed by themselves, with the reason."""

    async def unnoticed() -> list[str]:
        calls = [call for call in await calls_of(HUNTS, {"sync", "commit"}) if call.site not in NEEDLESS]
        assert len(calls) > 20
        return [str(call) for call in calls if await hunt(partial(disk_without, call)) is None]

    assert run(unnoticed) == []


@pytest.mark.parametrize("edit", ORDER, ids=lambda edit: edit.what.replace(" ", "_"))
def test_every_wrong_order_is_noticed(edit: Edit) -> None:
    with edit.applied():
        assert run(hunt) is not None
