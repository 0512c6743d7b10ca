"""What commands say to a person: errors and notes, each in a sentence."""

import os
from typing import Any

import click

from cow.errors import CowError
from hcpfs.recover.rebuild import Voice
from hcpfs.system import terminal

VOICE = Voice(terminal.say, terminal.complain)


class Sentence(click.ClickException):
    """An error as one sentence on standard error, and exit code 1."""

    def show(self, file: Any = None) -> None:
        """Print it."""
        terminal.complain(self.message)


def sentence_of(error: CowError | OSError) -> str:
    """The error in words, without the number and the quotes of Python."""
    if isinstance(error, OSError) and error.strerror is not None and error.filename is not None:
        return f"{os.fsdecode(error.filename)} cannot be used: {error.strerror}"
    return str(error)


def note(sentence: str) -> None:
    """What a person must know, and goes on with."""
    terminal.complain(f"note: {sentence}")
