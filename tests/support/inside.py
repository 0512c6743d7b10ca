"""What no public face of hcpfs shows, for tests that have to wait for it, to hold it up, or to make it fail.

This is the one place where tests look at private attributes (tests/test_source.py holds that): what is renamed there is
mended here.
"""

import os
import select
import signal
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import trio

from cow.buffer.behind import Behind
from cow.disk import passing
from cow.disk.directory import Directory
from cow.disk.ring import Ring
from cow.durable.space import Space
from cow.images.image import Image
from cow.images.origin import Origin
from cow.layers.epochs import Epochs
from cow.records.catalog import Catalog
from cow.records.journal import Journal
from cow.store import flatten
from cow.store.store import Store
from hcpfs.daemon.fastpath import FastPath
from hcpfs.quiesce.helper import Freezer


def journal_files(store: Store) -> Sequence[int]:
    """The numbers of the journal's files; one is left when all checkpoints are saved."""
    return store._commits._journal.numbers


def broken(journal: Journal) -> None:
    """As after an append that failed."""
    journal._broken = "an append failed"


@contextmanager
def appending_to(journal: Journal, fd: int) -> Iterator[None]:
    """Within the block what is appended to the journal goes to another open file."""
    own = journal._file.fd
    saved = os.dup(own)
    try:
        os.dup2(fd, own)
        yield
    finally:
        os.dup2(saved, own)
        os.close(saved)


def catalog_of(store: Store) -> Catalog:
    """The catalog, to change it behind the store's back or to have it fail."""
    return store._catalog


def forget_pauses() -> None:
    """As if nothing had been tried again before."""
    passing._pauses.clear()


def count_steps(catalog: Catalog, step: Callable[[], int]) -> None:
    """Have SQLite call `step` at each step of its virtual machine."""
    catalog._connection.set_progress_handler(step, 1)


def commit_lock(store: Store) -> trio.Lock:
    """Held while somebody commits."""
    return store._commits._lock


def preserving_turn(store: Store) -> trio.Lock:
    """Held while a batch of old bytes is preserved."""
    return store._preserver._turn


def are_writes_held(store: Store) -> bool:
    """Whether an instant is being taken."""
    return store._gate.held


def give_up(store: Store, snapshots: Sequence[int], reason: str) -> Awaitable[None]:
    """Give snapshots up, by their ids, as when nothing else helps."""
    return store._removal.give_up(snapshots, reason)


def make_room(store: Store) -> Awaitable[bool]:
    """Give the oldest snapshot up, as for the origin on a full store."""
    return store._removal.make_room()


def pair_to_merge(store: Store, epochs: Epochs) -> Any:
    """The two layers that would be merged next; None for none."""
    return store._flattener._pair(epochs, set())


def copying(monkeypatch: pytest.MonkeyPatch, around: Callable[[Callable[..., bytes]], Callable[..., bytes]]) -> None:
    """Have `around` of it stand for the copying of chunks from one layer to another: (source, target, runs)."""
    monkeypatch.setattr(flatten, "_copy", around(flatten._copy))


def punches(store: Store) -> Any:
    """What is to be punched out of layers in use."""
    return store.disposal._punches


def layers_directory(space: Space) -> Directory:
    """Where the layers are, as the measuring sees it."""
    return space._layers_directory


def file_system_has(space: Space, free_bytes: Callable[[], int]) -> None:
    """Have the file system of the store say that it has so much room."""
    space._directory.free_bytes = free_bytes


def buffer_of(image: Image | Origin) -> Behind:
    """The writes that wait."""
    return image._behind


def rescue_reads(origin: Origin, read: Callable[[int], bytes] | None) -> None:
    """Have `read` stand for reading a chunk past the cache; with None the real thing again."""
    if read is None:
        del origin._read_past_cache
    else:
        origin._read_past_cache = read


def delta_writes(image: Image, write: Callable[..., Any] | None) -> None:
    """Have `write` stand for writing rows into the image's delta, with None the real thing again."""
    if write is None:
        del image.delta._write_rows
    else:
        image.delta._write_rows = write


async def kill_freezer(freezer: Freezer) -> None:
    """Kill the process that freezes, and wait for its end."""
    assert freezer._process is not None
    os.kill(freezer._process.pid, signal.SIGKILL)
    await freezer._process.wait()


def poll_of(path: FastPath) -> Any:
    """What the fast path waits at."""
    return path._poll


def serves(path: FastPath, number: int, handle: Any) -> None:
    """Have the fast path serve one open file, by its number."""
    path._handles = {number: handle}


def polls_with(path: FastPath, poll: Any = None) -> None:
    """Have the fast path wait at something else; by default at a new, empty poll object."""
    path._poll = select.poll() if poll is None else poll


def is_patient(path: FastPath, seconds: float) -> None:
    """For how long the fast path waits awake."""
    path._patience = seconds


@contextmanager
def no_ring_for_a_moment(ring: Ring) -> Iterator[None]:
    """Within the block the ring's system calls fail: they name a file that is no ring."""
    real, ring._fd = ring._fd, os.open(os.devnull, os.O_RDONLY)
    try:
        yield
    finally:
        os.close(ring._fd)
        ring._fd = real
