"""The order of the measuring, and what is made of the figures.

In a round every server has its turn, one after the other, before the next round begins, so that what the machine does
meanwhile meets all of them. Ratios are taken within a round; the median of the rounds counts, and all of it is shown.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import median

from tests.bench.plan import Figure, Limit, Plan, Ratio, Row

Turn = Callable[[], Mapping[str, float]]  #: does its works, and says what it reached in each


class AbsentError(Exception):
    """A server that cannot be had here; the sentence says why."""


FAILURES = (AbsentError, AssertionError, OSError, subprocess.SubprocessError)  #: of a server, not of the run


@dataclass(frozen=True)
class Spread:
    """The median of the rounds, the least and the most."""

    median: float
    least: float
    most: float


@dataclass(frozen=True)
class Result:
    """What a row came to."""

    row: Row
    ours: Spread
    other: Figure | None  #: the best of the others, by its median
    ratio: Spread | None

    @property
    def is_reached(self) -> bool:
        """Whether the median is on the right side of the target."""
        if isinstance(self.row, Limit):
            return self.ours.median <= self.row.target
        return self.ratio is not None and self.ratio.median >= self.row.target


def spread(values: Iterable[float]) -> Spread:
    known = list(values)
    return Spread(median(known), min(known), max(known))


class Measured:
    """The figures so far, and who is absent."""

    def __init__(self, plan: Plan, rows: Mapping[str, Row]) -> None:
        self.plan = plan
        self._began = time.monotonic()
        self.figures: dict[Figure, list[float]] = {}
        self.absent: dict[str, str] = {}
        self.notes: list[str] = []
        others = [figure for row in rows.values() if isinstance(row, Ratio) for figure in row.others]
        self._wanted = {figure.work for figure in [*others, *(row.ours for row in rows.values())]}

    def wants(self, *works: str) -> list[str]:
        """Those of the works that a row asks for."""
        return [work for work in works if work in self._wanted]

    def miss(self, server: str, reason: object) -> None:
        self.absent[server] = " ".join(str(reason).split())[:300]
        say(f"without {server}: {self.absent[server]}")

    def compete(self, turns: Mapping[str, Turn]) -> None:
        """Give every server its turn, round after round. One that fails is out, with the reason."""
        left = dict(turns)
        if self.plan.warm_up:
            for server in list(left):
                self._take_turn(left, server)
        found: dict[Figure, list[float]] = {}
        for number in range(self._rounds()):
            order = list(left)
            for server in order[number % len(order) :] + order[: number % len(order)] if order else ():
                for work, value in self._take_turn(left, server).items():
                    found.setdefault(Figure(work, server), []).append(value)
        kept = {figure: values for figure, values in found.items() if figure.server in left}
        for figure, values in kept.items():
            say(f"{figure.work}, {figure.server}: {spread(values).median:,.1f}")
        self.figures |= kept

    def _rounds(self) -> int:
        return self.plan.rounds if time.monotonic() - self._began < self.plan.hurry_seconds else 1

    def _take_turn(self, left: dict[str, Turn], server: str) -> Mapping[str, float]:
        try:
            return left[server]()
        except FAILURES as error:
            self.miss(server, f"failed: {error}")
            del left[server]
            return {}

    def result(self, row: Row) -> Result | None:
        """What the row came to; None when ours is not there, or all others are missing."""
        ours = self.figures.get(row.ours)
        if ours is None:
            return None
        if isinstance(row, Limit):
            return Result(row, spread(ours), None, None)
        others = {figure: self.figures[figure] for figure in row.others if figure in self.figures}
        if not others:
            return None
        ratios = [mine / max(theirs) for mine, *theirs in zip(ours, *others.values(), strict=True)]
        best = max(others, key=lambda figure: median(others[figure]))
        return Result(row, spread(ours), best, spread(ratios))


def say(text: str) -> None:
    """Progress, for whoever waits."""
    print(f"bench: {text}", file=sys.stderr, flush=True)
