"""The options of a mount for click, as hcpfs/options.py declares them."""

from collections.abc import Callable, Iterator
from typing import Any

import click

from hcpfs.options import OPTIONS, Accepted, MountOptions

Command = Callable[..., None]


def accept_option(command: Command) -> Command:
    """--accept, for a command that starts a daemon."""
    return _option("accept")(command)


def mount_options(command: Command) -> Command:
    """-o, and each option that can be given as --NAME. The command gets them as keywords, for `take_over`."""
    shown = ", ".join(option.shown for option in OPTIONS.values())
    command = click.option("-o", "options", multiple=True, metavar="OPT,...", help=f"{shown}.")(command)
    for name, option in reversed(OPTIONS.items()):
        if option.help:
            command = _option(name)(command)
    return command


def _option(name: str) -> Callable[[Command], Command]:
    option = OPTIONS[name]
    kind: dict[str, Any] = {"metavar": option.metavar} if option.metavar else {"is_flag": True}
    if isinstance(option, Accepted):
        kind |= {"multiple": True, "type": click.Choice(option.choices)}
    return click.option(f"--{name}", name, help=option.help, **kind)


def take_over(wanted: MountOptions, given: dict[str, Any]) -> None:
    """Take over what click found of the options that can be given as --NAME. Raises UsageError."""
    for name, value in given.items():
        for text in _texts(value):
            wanted.take(name, text)


def _texts(value: bool | str | tuple[str, ...] | None) -> Iterator[str]:
    """The texts that an option was given with."""
    if isinstance(value, tuple):
        yield from value
    elif isinstance(value, str):
        yield value
    elif value:
        yield ""
