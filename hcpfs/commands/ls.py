"""`hcpfs ls`."""

import json
import os
import sys
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from hcpfs.commands.asking import status_at
from hcpfs.commands.saying import Sentence
from hcpfs.system import beneath, terminal
from hcpfs.tree.lines import pairs

_WIDE = 10_000  # columns of what is no terminal


@click.command()
@click.argument("mountpoint")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def ls(mountpoint: str, as_json: bool) -> None:
    """List the snapshots at MOUNTPOINT."""
    path = beneath.real_path(mountpoint)
    status_at(path)
    found = _snapshots(path)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        _print_table(found)


def _snapshots(path: str) -> list[dict[str, str]]:
    """The values in `info` of each, with its name, the oldest first."""
    found = []
    for name in sorted(os.listdir(os.path.join(os.fsencode(path), b"snaps"))):
        try:
            text = Path(os.fsdecode(os.path.join(os.fsencode(path), b"snaps", name, b"info"))).read_bytes()
        except FileNotFoundError:
            continue  # removed meanwhile
        except OSError as error:
            raise Sentence(f"{path} cannot be read: {error.strerror}") from error
        found.append({"name": name.decode("utf-8", "backslashreplace"), **pairs(text)})
    return sorted(found, key=lambda one: one["created"])


def _print_table(found: list[dict[str, str]]) -> None:
    rows = [
        (
            *(terminal.plain(one["name"]), one["created"][:19] + "Z", one["state"], one.get("quiesced", "-")),
            *(_human(int(one[key])) for key in ("size", "preserved_bytes", "written_bytes")),
        )
        for one in found
    ]
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("NAME", overflow="fold", min_width=8)
    for place, title in enumerate(("CREATED", "STATE", "QUIESCED", "SIZE", "PRESERVED", "WRITTEN"), 1):
        width = max(len(title), *(len(row[place]) for row in rows)) if rows else None  # the name alone is broken
        table.add_column(title, min_width=width, justify="right" if place > 3 else "left")
    for row in rows:
        table.add_row(*row)
    Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else _WIDE).print(table)


def _human(count: int) -> str:
    size = float(count)
    for unit in ("B", "K", "M", "G"):
        if size < 1024:
            return f"{size:.0f}{unit}" if unit == "B" or size >= 10 else f"{size:.1f}{unit}"
        size /= 1024
    return f"{size:.1f}T"
