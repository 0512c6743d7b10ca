"""The benchmark: hcpfs and its peers side by side on one machine, as a Markdown table and a plot.

Each module measures some works and puts the figures into `Measured`; the rows of the plan are drawn from those.
"""

import signal
import sys
from fnmatch import fnmatch
from pathlib import Path

import click

from tests.bench import copying, ext4, first, latency, plot, postgres, scale, steady, table
from tests.bench.plan import FULL, QUICK, ROWS
from tests.bench.rounds import FAILURES, Measured

MODULES = (steady, first, copying, ext4, postgres, latency, scale)


def _chosen(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> list[str]:
    """The rows by name; a name may be a pattern."""
    patterns = [word for value in values for word in value.split(",")]
    for pattern in patterns:
        if not any(fnmatch(key, pattern) for key in ROWS):
            raise click.BadParameter(f"there is no row {pattern}: there are {', '.join(ROWS)}")
    return [key for key in ROWS if not patterns or any(fnmatch(key, pattern) for pattern in patterns)]


@click.command()
@click.option("--quick", is_flag=True, help="A short one: under 3 minutes, with figures that say little.")
@click.option("--rounds", type=click.IntRange(min=1), help="How often every server has its turn.  [default: 5]")
@click.option(
    "--only",
    "keys",
    metavar="ROW,...",
    multiple=True,
    callback=_chosen,
    help="Only these rows; may be given again, and may be a pattern such as 'write-*'.",
)
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    help="Write table.md and plot.svg into this directory instead of the table to standard output.",
)
def main(quick: bool, rounds: int | None, keys: list[str], output: Path | None) -> None:
    """Measure, and print the table. Exits 1 when there is a row that could not be measured."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was mounted is unmounted
    plan = QUICK if quick else FULL
    if rounds is not None:
        plan = plan.with_rounds(rounds)
    rows = {key: ROWS[key] for key in keys}
    measured = Measured(plan, rows)
    for module in MODULES:
        try:
            module.measure(measured)
        except FAILURES as error:
            measured.miss(module.__name__.rpartition(".")[2], error)
    text = table.markdown(measured, rows)
    if output is None:
        click.echo(text)
    else:
        output.mkdir(parents=True, exist_ok=True)
        (output / "table.md").write_text(text)
        plot.draw(measured, rows, output / "plot.svg")
    sys.exit(any(measured.result(row) is None for row in rows.values()))


if __name__ == "__main__":
    main()
