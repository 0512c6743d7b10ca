"""An error at every call that the engine makes of the disk, once and for good."""

import random
from collections import Counter

import pytest

from tests.crash.faults import WORKLOADS, check_absences, check_plan, count_calls, plans
from tests.crash.harness import run
from tests.crash.workloads import Workload


@pytest.mark.parametrize("workload", WORKLOADS, ids=["first", "second"])
def test_i1_i3_i4_i8_no_error_of_the_disk_falsifies_or_reaches_the_origin(workload: Workload) -> None:
    async def check_all() -> Counter[str]:
        random_ = random.Random(1)
        done: Counter[str] = Counter()
        for plan in plans(await count_calls(workload), random_):
            await check_plan(workload, plan, random_)
            done[plan.call.kind] += 1
        return done

    done = run(check_all)
    print(f"{sum(done.values())} faults: {dict(done)}")
    assert sum(done.values()) > 250
    assert min(done.values()) >= 2


def test_i1_i3_i8_a_source_that_is_away_for_a_while_costs_no_snapshot_anything() -> None:
    done = run(check_absences, 2)
    print(f"{done} absences")
    assert done > 60
