"""The Markdown tables: what each row came to, every server's figures, who is absent, and on what machine."""

import os
import platform
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime

from tests.bench.plan import GIB, IMAGE, KEPT, MIB, PASSTHROUGH, PEERS, PLAIN, REFLINK, WORKS, Limit, Row
from tests.bench.rounds import Measured, Spread, spread
from tests.support.sandbox import run

PACKAGES = ("qemu-system-common", "nbdkit", "libnbd-bin", "xmount", "libfuse3-dev", "xfsprogs", "fio")
SIDE_BY_SIDE = (IMAGE, PLAIN, KEPT, *PEERS, PASSTHROUGH, REFLINK)


def markdown(measured: Measured, rows: Mapping[str, Row]) -> str:
    return "\n".join([*_rows(measured, rows), "", *_figures(measured), "", *_conditions(measured), ""])


def number(value: float) -> str:
    """Three digits are as many as mean something; whole thousands are written out."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _rows(measured: Measured, rows: Mapping[str, Row]) -> Iterator[str]:
    yield "| row | work | hcpfs | against | ratio (of the rounds) | wanted | |"
    yield "|---|---|---|---|---|---|---|"
    for key, row in rows.items():
        result = measured.result(row)
        work = WORKS[row.ours.work]
        wanted = f"<= {row.target:g} {work.unit}" if isinstance(row, Limit) else f">= {row.target:g}"
        if result is None:
            yield f"| {key} | {row.words} | | | not measured | {wanted} | |"
            continue
        other = ratio = ""
        if result.other is not None and result.ratio is not None:
            other = f"{number(spread(measured.figures[result.other]).median)}, {_name(row, result.other.server)}"
            ratio = f"{result.ratio.median:.2f} ({result.ratio.least:.2f} to {result.ratio.most:.2f})"
        verdict = "reached" if result.is_reached else "**no**"
        ours = number(result.ours.median) if other else _spread(result.ours)
        yield f"| {key} | {row.words} | {ours} {work.unit} | {other} | {ratio} | {wanted} | {verdict} |"


def _name(row: Row, server: str) -> str:
    """Who the other is; hcpfs itself, where a row compares it with itself."""
    return "itself" if server == row.ours.server else server


def _figures(measured: Measured) -> Iterator[str]:
    """What all servers do stands side by side; below it the works that have servers of their own."""
    reached: dict[str, dict[str, str]] = {}
    for figure, values in measured.figures.items():
        reached.setdefault(figure.work, {})[figure.server] = _spread(spread(values))
    together = {work: cells for work, cells in reached.items() if cells.keys() <= set(SIDE_BY_SIDE)}
    if together:
        columns = [server for server in SIDE_BY_SIDE if any(server in cells for cells in together.values())]
        yield f"| median (of the rounds) | {' | '.join(columns)} |"
        yield "|---" * (1 + len(columns)) + "|"
        for work, what in WORKS.items():
            if work in together:
                cells = " | ".join(together[work].get(server, "") for server in columns)
                yield f"| {what.words}, {what.unit} | {cells} |"
        yield ""
    if reached.keys() - together.keys():
        yield "| work | server | median (of the rounds) |"
        yield "|---|---|---|"
        for work, what in WORKS.items():
            for server, cell in reached.get(work, {}).items():
                if work not in together:
                    yield f"| {what.words} | {server} | {cell} {what.unit} |"


def _spread(value: Spread) -> str:
    return f"{number(value.median)} ({number(value.least)} to {number(value.most)})"


def _conditions(measured: Measured) -> Iterator[str]:
    plan = measured.plan
    versions = (f"{package} {version}" for package in PACKAGES if (version := _version(package)))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
    machine = f"Linux {platform.release()}, {os.cpu_count()} cores, {memory:.0f} GiB of memory"
    yield f"- {datetime.now(UTC):%Y-%m-%d}; {machine}"
    yield f"- {', '.join(versions)}"
    rounds = {len(values) for values in measured.figures.values()}
    taken = " to ".join(str(count) for count in sorted({min(rounds), max(rounds)})) if rounds else "none"
    yield (
        f"- all on tmpfs; rounds: {taken}, interleaved; a disk of {plan.disk_bytes // MIB:,} MiB, cells of "
        f"{plan.seconds:g} s, cp of {plan.copy_bytes // MIB:,} MiB. A ratio is of one round; the median counts"
    )
    yield from (f"- {note}" for note in measured.notes)
    yield from (f"- not measured: {server}: {reason}" for server, reason in measured.absent.items())


def _version(package: str) -> str:
    return run("dpkg-query", "-W", "-f", "${Version}", package, check=False).stdout
