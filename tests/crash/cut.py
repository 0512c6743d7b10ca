"""What a power cut could leave: from a disk's log, the states in which the disk may be found at any moment.

What a completed sync of a file or directory covers is there. Of the rest any subset is: each write there, not there, or
torn at 512 bytes, each entry of a directory for itself. A sync covers what had ended when it began. What a failed sync
covered may be there or not for ever after, and no later sync changes that. A transaction of the catalog is there or
not while it is being committed, and when its commit failed until the next one succeeds.
"""

import marshal
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

from xxhash import xxh3_128_digest

from tests.crash.calls import Op, apply_to
from tests.crash.disk import ELSEWHERE_INODE, SOURCE_INODES, STORE_INODE, Disk, State

SECTOR = 512
MOST_EXHAUSTIVE = 8
SEEDED = 24  #: random subsets where not all can be tried
_KEPT, _DROPPED = None, ()

Choice = tuple[Sequence[int] | None, ...]


@dataclass(frozen=True)
class Found:
    """A state in which the disk may be found. `mark` is the last one before the cut, `event` the place in the log."""

    state: State
    mark: object
    event: int
    tell: Callable[[], str]

    @property
    def story(self) -> str:
        """What became of each change that was pending."""
        return self.tell()


class Cutter:
    """Follows a log and keeps what is durable and what is pending."""

    def __init__(self, start: State) -> None:
        self._files = dict(start.files)
        self._directories = {number: dict(entries) for number, entries in start.directories.items()}
        self._pending: list[Op] = []
        self._covered: dict[Op, list[Op]] = {}
        self._lost: set[Op] = set()
        self._catalogs: list[bytes | None] = [start.catalog]
        self._bits: dict[Op, int] = {}  #: of what has begun, one each
        self._durable = 0  #: the bits of what is durable
        self._given: set[object] = set()  #: what `states` gave out or passed over, since `forget`

    def follow(self, edge: str, op: Op) -> bool:
        """Take the next event; whether it changed what may be found."""
        if op.kind == "sync":
            if edge == "begin":
                self._covered[op] = [one for one in self._pending if one.inode == op.inode and one not in self._lost]
                return False
            covered = self._covered.pop(op)
            if op.failed:
                self._lost.update(covered)
                return False
            for one in covered:
                self._make_durable(one)
                self._pending.remove(one)
                self._supersede(one)
            return bool(covered)
        if op.kind == "commit":
            if edge == "begin":
                self._catalogs.append(op.database)
            elif not op.failed:
                self._catalogs = [op.database]
            return True
        if edge == "begin":
            self._bits[op] = 1 << len(self._bits)
            self._pending.append(op)
            if op.is_directory:
                self._directories.setdefault(op.target, {})
        return edge == "begin"

    def _supersede(self, durable: Op) -> None:
        """What a failed sync left open is settled where something later has become durable."""
        for old in [one for one in self._pending if one in self._lost and one.inode == durable.inode]:
            if durable.kind in ("link", "unlink") and old.kind in ("link", "unlink"):
                left = [] if old.name == durable.name else [old]
            elif durable.kind == "write" and old.kind == "write":
                left = list(_outside(old, durable))
            else:
                continue
            place = self._pending.index(old)
            self._pending[place : place + 1] = left
            self._lost.update(left)

    def _make_durable(self, op: Op) -> None:
        self._durable |= self._bits.get(op, 0)
        if op.kind in ("link", "unlink"):
            _apply_entry(self._directories.setdefault(op.inode, {}), op)
        else:
            content = bytearray(self._files.get(op.inode, b""))
            apply_to(content, op)
            self._files[op.inode] = bytes(content)

    def forget(self) -> None:
        """Give out again what `states` has given out."""
        self._given.clear()

    def states(self, random_: random.Random, share: float = 1.0) -> Iterator[tuple[State, Callable[[], str]]]:
        """A `share` of the states that may be found now and were not given out before, each with what tells of it.

        Of all such states, up to `MOST_EXHAUSTIVE` pending operations, else of a sample.
        """
        for catalog in self._catalogs:
            tell = self._teller(catalog)
            for choice in self._choices(random_):
                if self._is_new(choice, catalog) and random_.random() < share:
                    yield self._build(choice, catalog), partial(tell, choice)

    def _is_new(self, choice: Choice, catalog: bytes | None) -> bool:
        """Whether that was not looked at before. It follows from what is kept, durable or not: no state is built."""
        if self._lost:
            return True  # then it depends on the order too
        kept, torn = self._durable, []
        for op, sectors in zip(self._pending, choice, strict=True):
            if sectors is None:
                kept |= self._bits[op]
            elif sectors:
                torn.append((self._bits[op], *sectors))
        before = len(self._given)
        self._given.add((kept, catalog, *torn))
        return len(self._given) > before

    def one_state(self, random_: random.Random) -> tuple[State, Callable[[], str]]:
        """One of them, at random."""
        choice = tuple(random_.choice((_KEPT, _DROPPED)) for _ in self._pending)
        catalog = random_.choice(self._catalogs)
        return self._build(choice, catalog), partial(self._teller(catalog), choice)

    def _choices(self, random_: random.Random) -> Iterator[Choice]:
        """For each pending operation None (kept), or the sectors of it that are kept."""
        count = len(self._pending)
        if count <= MOST_EXHAUSTIVE:
            yield from product((_KEPT, _DROPPED), repeat=count)
        else:
            yield (_DROPPED,) * count
            yield (_KEPT,) * count
            yield (*(_DROPPED,) * (count - 1), _KEPT)
            for left_out in range(count):
                yield tuple(_DROPPED if place == left_out else _KEPT for place in range(count))
            for _ in range(SEEDED):
                yield tuple(random_.choice((_KEPT, _DROPPED)) for _ in range(count))
        for place, op in enumerate(self._pending):
            sectors = -(-len(op.data) // SECTOR)
            if sectors < 2:
                continue
            for others in (_KEPT, _DROPPED, None):
                some = sorted(random_.sample(range(sectors), random_.randint(1, sectors - 1)))
                fixed = others if others is not None else random_.choice((_KEPT, _DROPPED))
                yield tuple(some if place == at else fixed for at in range(count))

    def _build(self, choice: Choice, catalog: bytes | None) -> State:
        files: dict[int, bytearray] = {}
        directories = self._directories
        copied: set[int] = set()
        for op, kept in zip(self._pending, choice, strict=True):
            if kept is not None and not kept:
                continue
            if op.kind in ("link", "unlink"):
                if op.inode not in copied:
                    directories = {**directories, op.inode: dict(directories.get(op.inode, {}))}
                    copied.add(op.inode)
                _apply_entry(directories[op.inode], op)
                continue
            if op.inode not in files:
                files[op.inode] = bytearray(self._files.get(op.inode, b""))
            for part in [op] if kept is None else _torn(op, kept):
                apply_to(files[op.inode], part)
        return self._reachable(files, directories, catalog)

    def _reachable(
        self, changed: dict[int, bytearray], directories: dict[int, dict[str, int]], catalog: bytes | None
    ) -> State:
        sources = [number for number in SOURCE_INODES if number in self._files]
        files = {number: bytes(changed.get(number, self._files[number])) for number in sources}
        found: dict[int, dict[str, int]] = {}
        todo = [STORE_INODE, ELSEWHERE_INODE]
        while todo:
            number = todo.pop()
            found[number] = dict(directories.get(number, {}))
            for target in found[number].values():
                if target in directories:
                    todo.append(target)
                else:
                    files[target] = bytes(changed[target]) if target in changed else self._files.get(target, b"")
        return State(files, found, catalog)

    def _teller(self, catalog: bytes | None) -> Callable[[Choice], str]:
        """What tells of a choice among what is pending now: asked of few states, and later."""
        found = f"catalog: {self._catalogs.index(catalog) + 1} of {len(self._catalogs)} possible ones"
        return partial(_story, tuple(self._pending), found if len(self._catalogs) > 1 else None)


def _story(pending: Sequence[Op], catalog: str | None, choice: Choice) -> str:
    told = []
    for op, kept in zip(pending, choice, strict=True):
        fate = "kept" if kept is None else "dropped" if not kept else f"kept in sectors {list(kept)}"
        told.append(f"    {fate}: {op}")
    if catalog is not None:
        told.append(f"    {catalog}")
    return "\n".join(told) or "    nothing was pending"


def _apply_entry(entries: dict[str, int], op: Op) -> None:
    if op.kind == "link":
        entries[op.name] = op.target
    elif entries.get(op.name) == op.target:
        del entries[op.name]


def _outside(old: Op, later: Op) -> Iterator[Op]:
    """The parts of a write that a later one did not overwrite."""
    end, later_end = old.offset + len(old.data), later.offset + len(later.data)
    if later_end <= old.offset or end <= later.offset:
        yield old
        return
    for start, stop in ((old.offset, later.offset), (later_end, end)):
        if start < stop:
            data = old.data[start - old.offset : stop - old.offset]
            yield Op("write", old.inode, old.site, offset=start, data=data, ended=True)


def _torn(op: Op, kept: Sequence[int]) -> Iterator[Op]:
    for sector in kept:
        start = sector * SECTOR
        yield Op("write", op.inode, op.site, offset=op.offset + start, data=op.data[start : start + SECTOR])


def digest(state: State) -> bytes:
    """Equal for states that recovery cannot tell apart."""
    parts: list[bytes | str] = [*state.sources.values(), state.catalog or b""]
    todo = [("", STORE_INODE), ("elsewhere", ELSEWHERE_INODE)]
    while todo:
        path, number = todo.pop()
        for name, target in sorted(state.directories[number].items()):
            parts.append(f"{path}/{name}")
            if target in state.directories:
                todo.append((f"{path}/{name}", target))
            else:
                parts.append(state.files[target])
    return xxh3_128_digest(marshal.dumps(parts, 2))  # version 2 knows no references: equal for what is equal


def random_state_of(disk: Disk, random_: random.Random, first: int, end: int) -> Found:
    """One state that a cut at some event from `first` on, before `end`, may leave."""
    event = random_.randrange(first, end)
    cutter = Cutter(disk.start)
    mark: object = None
    for edge, what in disk.log[: event + 1]:
        if edge == "mark":
            mark = what
        else:
            cutter.follow(edge, what)
    state, story = cutter.one_state(random_)
    return Found(state, mark, event, story)


def states_of(disk: Disk, random_: random.Random, *, first: int = 0, share: float = 1.0) -> Iterator[Found]:
    """A `share` of the states that a cut after event `first` of the disk's log may leave, each once for each mark."""
    seen: set[object] = set()
    cutter = Cutter(disk.start)
    mark: object = None
    for event, (edge, what) in enumerate(disk.log):
        if edge == "mark":
            mark, changed = what, True
            cutter.forget()
        else:
            changed = cutter.follow(edge, what)
        if event < first or not changed:
            continue
        for state, story in cutter.states(random_, share):
            key = (digest(state), mark)
            if key not in seen:
                seen.add(key)
                yield Found(state, mark, event, story)
