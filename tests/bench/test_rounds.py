"""What the benchmark makes of figures, without measuring any."""

from collections.abc import Mapping

import pytest

from tests.bench.plan import QUICK, ROWS, WORKS, Figure, Limit, Ratio
from tests.bench.rounds import Measured, Turn
from tests.bench.table import markdown

ROW = Ratio("a row", Figure("read-qd1", "ours"), (Figure("read-qd1", "slow"), Figure("read-qd1", "other")), 2.0)


def _reaching(taken: list[str], server: str, values: list[float]) -> Turn:
    remaining = iter(values)

    def turn() -> Mapping[str, float]:
        taken.append(server)
        return {"read-qd1": next(remaining)}

    return turn


def _measured(rounds: int) -> Measured:
    return Measured(QUICK.with_rounds(rounds), {"row": ROW})


def test_servers_take_turns_and_ratios_are_of_a_round() -> None:
    taken: list[str] = []
    measured = _measured(3)
    measured.compete(
        {
            "ours": _reaching(taken, "ours", [20.0, 40.0, 60.0]),
            "slow": _reaching(taken, "slow", [1.0, 1.0, 30.0]),
            "other": _reaching(taken, "other", [10.0, 10.0, 10.0]),
        }
    )
    assert [sorted(taken[place : place + 3]) for place in (0, 3, 6)] == 3 * [["other", "ours", "slow"]]
    result = measured.result(ROW)
    assert result is not None
    assert result.ratio is not None
    assert (result.ratio.median, result.ratio.least, result.ratio.most) == (2.0, 2.0, 4.0)
    assert result.other == Figure("read-qd1", "other")
    assert result.is_reached


def test_a_server_that_fails_is_named_and_the_others_go_on() -> None:
    def fail() -> Mapping[str, float]:
        raise AssertionError("it broke")

    taken: list[str] = []
    measured = _measured(2)
    measured.compete(
        {
            "ours": _reaching(taken, "ours", [10.0, 10.0]),
            "slow": fail,
            "other": _reaching(taken, "other", [10.0, 10.0]),
        }
    )
    result = measured.result(ROW)
    assert result is not None
    assert not result.is_reached
    assert "not measured: slow: failed: it broke" in markdown(measured, {"row": ROW})


def test_a_row_without_figures_is_in_the_table() -> None:
    assert "| row | a row | | | not measured |" in markdown(_measured(1), {"row": ROW})


@pytest.mark.parametrize("key", ROWS)
def test_every_row_is_of_known_works(key: str) -> None:
    row = ROWS[key]
    assert row.ours.work in WORKS
    assert isinstance(row, Limit) or all(other.work in WORKS for other in row.others)
