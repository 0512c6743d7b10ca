"""An option of mount stands once: in -o, on the command line, in the words that mount the same, in the reference."""

from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import hcpfs
from hcpfs.commands.given import mount_options, take_over
from hcpfs.commands.mount import mount
from hcpfs.options import OPTIONS, MountOptions, Option, UsageError, apply_options

TEXTS = {
    "DIR": "/with space",
    "SIZE": "2G",
    "drop-oldest|lose-chunks|block-writes": "lose-chunks",
    "[NAME=]PATH": "a=/dev/sdb",
    "N": "7",
    "OCTAL": "640",
    "SECONDS": "2.5",
    "WHAT": "changed",
}
REFERENCE = (Path(hcpfs.__file__).parent / "REFERENCE.md").read_text()

every_option = pytest.mark.parametrize("option", OPTIONS.values(), ids=lambda option: option.name)


def _text(option: Option) -> str:
    return f"{option.name}={TEXTS[option.metavar]}" if option.metavar else option.name


def _given(words: list[str]) -> MountOptions:
    """What the command line makes of these words."""
    found = MountOptions()

    @click.command()
    @click.argument("sources", nargs=-1)
    @mount_options
    def command(sources: tuple[str, ...], options: tuple[str, ...], **given: object) -> None:
        apply_options(found, [*(f"source={source}" for source in sources[:-1]), *options])
        take_over(found, given)

    done = CliRunner().invoke(command, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return found


@every_option
def test_the_words_for_mounting_again_have_every_option_that_is_not_for_one_start(option: Option) -> None:
    wanted = MountOptions()
    apply_options(wanted, [_text(option)])
    assert wanted != MountOptions()
    command, *words = wanted.arguments()
    again = _given(words)
    wanted.store = wanted.store_path
    if option.name in ("accept", "foreground"):
        apply_options(again, [_text(option)])
    assert (command, again) == ("mount", wanted)


@pytest.mark.parametrize("option", [one for one in OPTIONS.values() if one.help], ids=lambda option: option.name)
def test_what_can_be_given_by_name_means_the_same_after_o(option: Option) -> None:
    words = [f"--{option.name}", *([TEXTS[option.metavar]] if option.metavar else [])]
    assert _given(words) == _given(["-o", _text(option)])
    assert f"--{option.name}" in {word for one in mount.params for word in one.opts}


@every_option
def test_the_help_and_the_reference_have_every_option(option: Option) -> None:
    (after_o,) = (one.help for one in mount.params if "-o" in one.opts)
    assert option.shown in after_o
    assert f"`{option.name}" in REFERENCE
    assert not option.help or f"`--{option.name}" in REFERENCE


@pytest.mark.parametrize("option", [one for one in OPTIONS.values() if one.metavar], ids=lambda option: option.name)
def test_an_option_without_its_value_is_refused(option: Option) -> None:
    with pytest.raises(UsageError, match=f"the option {option.name} needs a value"):
        apply_options(MountOptions(), [option.name])


def test_an_option_that_is_not_known_is_refused_with_those_that_are() -> None:
    with pytest.raises(UsageError, match=r"there are store, quota, .*, accept and foreground"):
        apply_options(MountOptions(), ["colour=blue"])


def test_an_empty_size_is_refused() -> None:
    with pytest.raises(UsageError, match="'' is not a size"):
        take_over(MountOptions(), {"quota": "", "store": None})
