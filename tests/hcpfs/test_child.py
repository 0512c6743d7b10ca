"""Work in a child process: its answer, its error, and its death by a file that somebody cuts while it is mapped."""

import mmap
import os
import sqlite3
from pathlib import Path

import pytest

from hcpfs.system.child import in_child


def _fail() -> None:
    raise sqlite3.DatabaseError("not a database")


def test_what_it_returns_and_raises_is_had_here() -> None:
    assert in_child(lambda: {"pid": os.getpid()})["pid"] != os.getpid()
    with pytest.raises(sqlite3.DatabaseError, match="not a database"):
        in_child(_fail)


def test_a_file_that_is_cut_while_it_is_mapped_ends_the_child_alone(tmp_path: Path) -> None:
    path = tmp_path / "shared"
    path.write_bytes(bytes(8192))

    def look() -> int:
        with path.open("r+b") as file, mmap.mmap(file.fileno(), 8192) as mapped:
            os.truncate(path, 0)
            return mapped[4096]

    with pytest.raises(ChildProcessError, match="ended by SIGBUS"):
        in_child(look)


def test_an_answer_that_cannot_be_handed_over_is_an_error() -> None:
    with pytest.raises(ChildProcessError, match="without an answer"):
        in_child(lambda: (one for one in ()))
