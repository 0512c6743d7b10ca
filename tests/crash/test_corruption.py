"""Damaged stores, of every class, opened and read: never a wrong byte, never a traceback."""

from functools import partial

from tests.crash.corruption import check_many
from tests.crash.harness import run

STORES = 2400


def test_i4_damaged_stores_give_right_bytes_or_an_error() -> None:
    tally = run(partial(check_many, STORES, 1))
    print(dict(tally))
    assert tally["right"] > STORES
    assert tally["errors"] > STORES // 10
    assert tally["refused"] > STORES // 10
