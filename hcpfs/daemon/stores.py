"""What can be told of stores without opening them: whether one stopped clean, and of which disks they have snapshots.

A default store is made for a set of paths, and the same disk may come under another path: by another kernel name,
moved, as its partition, or through a loop device. What is overwritten while it is served with a second store is not
preserved for the snapshots in the first. So before a default store is used, all others are looked at. # I4 # I12
"""

import os
import shlex
import sqlite3
from contextlib import closing, suppress
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from itertools import product
from pathlib import Path

from xxhash import xxh3_64_hexdigest

from cow.config import Source
from cow.errors import WAY, RefusedError, counted
from cow.geometry import Run
from cow.records.catalog import FILE_NAME
from cow.records.facts import Facts, facts_key
from cow.records.fingerprint import compare, digests, sampled
from cow.records.rows import State
from hcpfs.options import STORES, MountOptions
from hcpfs.system import blocks, ground
from hcpfs.system.child import in_child
from hcpfs.system.superblock import superblock_of

_LINK = "store."  #: followed by a hash of the target


@dataclass(frozen=True)
class _Known:
    """A source of a store, according to its catalog."""

    name: str
    path: str
    size_bytes: int
    fingerprint: bytes
    facts: Facts


@dataclass(frozen=True)
class _Other:
    """A store that has snapshots that are not invalid."""

    path: str
    snapshots: int
    is_clean: bool
    known: list[_Known]


def stopped_clean(store: str) -> bool:
    """Whether a store's catalog says that the last stop was clean; False when the store is gone."""
    try:
        return in_child(partial(_stopped_clean, store))
    except (sqlite3.Error, ChildProcessError):
        return False


def _stopped_clean(store: str) -> bool:
    with closing(_catalog(store)) as catalog:
        return bool(catalog.execute("SELECT value FROM store WHERE key = 'clean'").fetchone() == (1,))


def check_no_other(options: MountOptions) -> list[str]:
    """Refuse a default store if another one has snapshots of the same disk, of a part of it, or of what it is part of.

    For a store that was named explicitly, return a sentence on each such store instead. Raises RefusedError; for a
    default store also when a known store cannot be read.
    """
    notes = []
    for store in map(os.path.realpath, _known_stores()):
        if store == os.path.realpath(options.store_path):
            continue
        try:
            other = in_child(partial(_read, store))
        except (sqlite3.Error, OSError, ValueError, KeyError, TypeError) as error:
            if options.store is not None:
                continue
            raise RefusedError(
                f"the store {store} may have snapshots of this disk, and cannot be read ({error}): check it (hcpfs "
                f"verify {shlex.quote(store)}), remove it if nobody needs it, or choose a store with --store"
            ) from error
        for source, known in product(options.sources, other.known if other is not None else ()):
            assert other is not None
            relation = _recognised(source, known, other)
            if relation is None:
                continue
            sentence = _sentence(source, known, other, relation)
            if options.store is None:
                raise RefusedError(f"{sentence}{_ways_on(source, known, other, relation, options.mountpoint)}")
            notes.append(sentence)
    return notes


def remember(store: str) -> None:
    """Leave a link to a store beside the default stores, so that `check_no_other` looks at it, too.

    Removes links to stores whose directory is gone together with the one above it. Raises OSError.
    """
    target = os.path.realpath(store)
    if os.path.dirname(target) == os.path.realpath(STORES):
        return
    for link in _links():
        if not os.path.lexists(os.path.dirname(os.readlink(link))):
            with suppress(FileNotFoundError):
                os.unlink(link)
    with suppress(FileExistsError):
        os.symlink(target, os.path.join(STORES, f"{_LINK}{xxh3_64_hexdigest(os.fsencode(target))}"))


def _links() -> list[str]:
    return [entry.path for entry in os.scandir(STORES) if entry.name.startswith(_LINK) and entry.is_symlink()]


def _known_stores() -> list[str]:
    """The default stores, and the stores elsewhere that were ever used and still exist."""
    with suppress(FileNotFoundError):
        return [entry.path for entry in sorted(os.scandir(STORES), key=lambda entry: entry.name) if entry.is_dir()]
    return []


def _catalog(store: str) -> sqlite3.Connection:
    return sqlite3.connect(f"{Path(store, FILE_NAME).absolute().as_uri()}?mode=ro", uri=True)


def _read(store: str) -> _Other | None:
    """What a store has; None when it has no usable snapshots. Raises sqlite3.Error and others if it cannot be read."""
    if not os.path.exists(os.path.join(store, FILE_NAME)):
        if any(name == "layers" or name.startswith("journal.") for name in os.listdir(store)):
            raise FileNotFoundError(f"{FILE_NAME} is missing")
        return None  # it never was a store
    with closing(_catalog(store)) as catalog:
        (snapshots,) = catalog.execute("SELECT count(*) FROM snapshots WHERE state != ?", (State.INVALID,)).fetchone()
        if not snapshots:
            return None
        settings = dict(catalog.execute("SELECT key, value FROM store").fetchall())
        rows = catalog.execute("SELECT id, name, path, size_bytes, fingerprint FROM origins ORDER BY id").fetchall()
    known = [
        _Known(
            os.fsdecode(name), os.fsdecode(path), size, fingerprint, Facts.from_text(settings.get(facts_key(number)))
        )
        for number, name, path, size, fingerprint in rows
    ]
    return _Other(store, snapshots, settings.get("clean") == 1, known)


class _Relation(StrEnum):
    """The relation of a source to a disk that a store knows, in words between the two."""

    SAME = "is"
    ALIKE = "has on it what was on"
    PART = "is a part of"
    WHOLE = "holds"
    OVERLAPS = "has bytes in common with"


_VIEWS = {"": _Relation.ALIKE, "below": _Relation.PART, "part": _Relation.WHOLE}


def _recognised(source: Source, known: _Known, other: _Other) -> _Relation | None:
    """The relation of the source to a disk that a store knows; None when they are not related."""
    with suppress(OSError):  # a source that cannot be opened is refused elsewhere
        if ground.is_on_an_image(source.path):
            return None  # what is written to it goes through the hcpfs that serves the image
        if _is_at(known, known.path) and ground.meet(source.path, known.path):
            is_all = blocks.size_of(source.path) == known.size_bytes
            return _Relation.SAME if is_all else _Relation.OVERLAPS
        for view in ground.views(source.path):
            if view.length == known.size_bytes and _matches(view, known, is_clean=other.is_clean):
                return None if _is_a_copy(source, known, other) else _VIEWS[view.relation]
    return None


def _is_at(known: _Known, path: str) -> bool:
    """Whether what is at the path may be the disk: its size is, and its UUID where both are known."""
    try:
        if blocks.size_of(path) != known.size_bytes:
            return False
    except OSError:
        return False
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        now, before = superblock_of(fd), known.facts.superblock
    finally:
        os.close(fd)
    return not (now.uuid and before.uuid) or now == before


def _is_a_copy(source: Source, known: _Known, other: _Other) -> bool:
    """Whether the disk is still where it was, and the source is proved to be another one."""
    if not os.path.exists(known.path) or not ground.are_apart(source.path, known.path):
        return False
    itself = ground.View(known.path, 0, known.size_bytes, "")
    return _is_served(other.path) or (_is_at(known, known.path) and _matches(itself, known, is_clean=other.is_clean))


def _is_served(store: str) -> bool:
    """Whether a daemon has the store open, and so has recognised the disk, and holds it."""
    try:
        status = os.stat(os.path.join(store, "lock"))
    except OSError:
        return False
    lock = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    # Trying to lock it could make a daemon fail that locks it at the same time.
    return any(lock in line.split() for line in Path("/proc/locks").read_text().splitlines())


def _matches(view: ground.View, known: _Known, *, is_clean: bool) -> bool:
    """Whether the extent shows the disk's UUID or, where that is not known, most of the sample that the store has."""
    fd = os.open(view.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:

        def read(run: Run) -> bytes:
            length = min(run.length, view.length - run.offset)
            data = os.pread(fd, length, view.offset + run.offset)
            if len(data) != length:
                raise OSError("it ends early")
            return data.ljust(run.length, b"\0")

        runs = sampled(known.size_bytes)
        now = digests(runs, read)
        superblock = superblock_of(fd, view.offset, view.length)
    finally:
        os.close(fd)
    samples = [known.fingerprint, known.facts.sample if is_clean else b""]
    found = [compare(runs, sample, now, lambda chunk: True) for sample in samples if sample]
    before = known.facts.superblock
    if before.uuid and superblock.uuid:
        return before == superblock and any(one.same for one in found)
    return any(one.same > sum(run.chunks for run in one.changed) for one in found)


def _sentence(source: Source, known: _Known, other: _Other, relation: _Relation) -> str:
    uuid = f", {known.facts.superblock}" if known.facts.superblock.uuid else ""
    count = counted(other.snapshots, "snapshot")
    return (
        f"{source.path} {relation} the disk of which the store {other.path} has {count} (there "
        f"{known.path}{uuid}). What is written to it with another store is not kept for them, and they read wrong bytes"
    )


def _ways_on(source: Source, known: _Known, other: _Other, relation: _Relation, mountpoint: str) -> str:
    if relation not in (_Relation.SAME, _Relation.ALIKE):
        return (
            f".{WAY}Use it through that store: mount {known.path} as before"
            f"{WAY}or remove those snapshots first"
            f"{WAY}or, if they may become wrong, choose a store for it with --store DIR"
        )
    words = [f"{one.name}={os.path.abspath(source.path) if one is known else one.path}" for one in other.known]
    return (
        f".{WAY}Mount it with that store: hcpfs mount {shlex.join([*words, mountpoint, '--store', other.path])}"
        f"{WAY}or, if it is a copy of that disk and not the disk, give it a store of its own with --store DIR"
    )
