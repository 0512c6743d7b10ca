"""The plot: a bar for each row, how far it is from what it must reach, with the rounds' least and most."""

from collections.abc import Mapping
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from tests.bench.plan import WORKS, Limit, Row
from tests.bench.rounds import Measured, Result, Spread

REACHED, MISSED = "#2a7f62", "#c0504d"
INCHES_A_ROW = 0.28


def draw(measured: Measured, rows: Mapping[str, Row], path: Path) -> None:
    """Write an SVG. Each bar goes from the target, at 1, to what was reached: to the right all is well."""
    results = {key: result for key, row in rows.items() if (result := measured.result(row)) is not None}
    if not results:
        return
    shares = [_share(result) for result in results.values()]
    places = range(len(shares))
    figure = Figure(figsize=(9, 1.2 + INCHES_A_ROW * len(shares)), layout="constrained")
    axes = figure.subplots()
    axes.barh(
        places,
        [share.median - 1 for share in shares],
        left=1,
        color=[REACHED if result.is_reached else MISSED for result in results.values()],
        xerr=[
            [share.median - share.least for share in shares],
            [share.most - share.median for share in shares],
        ],
        error_kw={"elinewidth": 1, "capsize": 2, "ecolor": "#444444"},
    )
    axes.axvline(1, color="#444444", linewidth=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_yticks(places, [_label(key, result) for key, result in results.items()], fontsize=8)
    axes.set_ylim(len(shares) - 0.4, -0.6)
    axes.set_xlabel("reached / wanted (median of the rounds; least and most)")
    axes.spines[["top", "right"]].set_visible(False)
    with rc_context({"svg.fonttype": "none"}):  # text stays text
        figure.savefig(path, metadata={"Date": None})


def _share(result: Result) -> Spread:
    """What was reached, in targets; more is better also for a limit."""
    target = result.row.target
    if result.ratio is not None:
        return Spread(result.ratio.median / target, result.ratio.least / target, result.ratio.most / target)
    return Spread(target / result.ours.median, target / result.ours.most, target / result.ours.least)


def _label(key: str, result: Result) -> str:
    row = result.row
    wanted = f"<= {row.target:g} {WORKS[row.ours.work].unit}" if isinstance(row, Limit) else f">= {row.target:g}"
    return f"{key}  {wanted}"
