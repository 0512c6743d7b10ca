"""SQLite's own files under power cuts: why the simulated disk may take a transaction of the catalog for one event.

A catalog is used by a process whose system calls are traced; what a cut at any moment would leave of its files is
opened with the real catalog. Every transaction that had returned is there, and none is there in part.
"""

import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from cow.disk.directory import Directory
from cow.records.catalog import Catalog
from cow.records.rows import State
from tests.crash import disk
from tests.crash.calls import Op
from tests.crash.cut import Cutter, digest

SNAPSHOTS = 12
MOST_STATES_A_MOMENT = 12
_ROOT = disk.STORE_INODE

# Each snapshot takes two transactions; every third one is deleted, in a third. "done N" goes out after each step.
WORK = """
import os, sys
from cow.records.catalog import Catalog
from cow.disk.directory import Directory
directory = Directory.open_path(sys.argv[1])
catalog = Catalog(directory)
directory.sync()
step = 0
def done():
    global step
    step += 1
    os.write(2, b"done %d\\n" % step)
done()
for number in range(int(sys.argv[2])):
    row, _ = catalog.add_snapshot(b"s%d" % number, number)
    done()
    catalog.finish_snapshot(row.id, {"quiesced": "yes" * 400})
    done()
    if number % 3 == 2:
        catalog.delete_snapshot(row.id, None)
        done()
catalog.close()
done()
"""

_CALL = re.compile(r"(?:\d+ +)?(\w+)\((.*)\) += (-?\d+)")
_NAME = re.compile(r'(?:<|")((?:\\x[0-9a-f]{2})+)(?:>|")')


def _contents(steps: int) -> list[dict[bytes, State]]:
    """What the catalog holds after each number of steps."""
    held: dict[bytes, State] = {}
    after = [{}, {}]
    for number in range(SNAPSHOTS):
        name = b"s%d" % number
        held = {**held, name: State.PENDING}
        after.append(held)
        held = {**held, name: State.VALID}
        after.append(held)
        if number % 3 == 2:
            held = {key: value for key, value in held.items() if key != name}
            after.append(held)
    after.append(held)
    assert len(after) == steps + 1
    return after


def _unescape(text: str) -> bytes:
    return bytes.fromhex(text.replace("\\x", ""))


def _events(trace: str, directory: str) -> Iterator[Op | int]:
    """The changes below the directory, and the numbers of the steps that were done."""
    inodes: dict[str, int] = {}
    present: set[str] = set()
    for line in trace.splitlines():
        found = _CALL.match(line)
        if found is None or int(found[3]) < 0:
            continue
        call, arguments = found[1], found[2]
        if call == "write" and arguments.startswith("2"):
            text = _unescape(_NAME.findall(arguments)[-1])
            if text.startswith(b"done "):
                yield int(text.split()[1])
            continue
        paths = [_unescape(name).decode("utf-8", "replace") for name in _NAME.findall(arguments)]
        path = next((name for name in paths if directory in name), "")
        if call in ("openat", "unlinkat") and path == directory:
            path = f"{directory}/{paths[1]}"
        if not path:
            continue
        name = path.removeprefix(directory).strip("/")
        if name.endswith("-shm"):
            continue  # an index of the log, made anew when it is missing
        inode = _ROOT if not name else inodes.setdefault(name, len(inodes) + 10)
        if call == "openat":
            if "O_CREAT" in arguments and name not in present:
                present.add(name)
                yield Op("link", _ROOT, call, name=name, target=inode)
        elif call in ("unlink", "unlinkat"):
            present.discard(name)
            del inodes[name]
            yield Op("unlink", _ROOT, call, name=name, target=inode)
        elif call == "pwrite64":
            data = _unescape(_NAME.findall(arguments)[1])
            yield Op("write", inode, call, offset=int(arguments.rpartition(", ")[2]), data=data)
        elif call == "ftruncate":
            yield Op("truncate", inode, call, length=int(arguments.rpartition(", ")[2]))
        elif call in ("fsync", "fdatasync"):
            yield Op("sync", inode, call)
        else:
            raise AssertionError(f"a call that the test does not know: {line[:200]}")


def _found_after_a_cut(state: disk.State, place: Path) -> dict[bytes, State]:
    place.mkdir()
    for name, number in state.directories[_ROOT].items():
        (place / name).write_bytes(state.files[number])
    directory = Directory.open_path(str(place))
    catalog = Catalog(directory)
    held = {row.name: row.state for row in catalog.snapshots()}
    assert all(row.evidence for row in catalog.snapshots() if row.state is State.VALID)
    catalog.close()
    directory.close()
    for path in place.iterdir():
        path.unlink()
    place.rmdir()
    return held


def test_i5_a_transaction_of_the_catalog_is_there_or_not_after_a_cut(tmp_path: Path) -> None:
    used = tmp_path / "used"
    used.mkdir()
    trace = tmp_path / "trace"
    calls = "openat,write,pwrite64,pwritev,fsync,fdatasync,ftruncate,fallocate,unlink,unlinkat,rename,renameat"
    command = ["strace", "-f", "-y", "-xx", "-s", "100000", "-e", f"trace={calls}", "-o", str(trace)]
    subprocess.run([*command, sys.executable, "-c", WORK, str(used), str(SNAPSHOTS)], check=True, capture_output=True)
    events = list(_events(trace.read_text(), str(used)))
    steps = max(event for event in events if isinstance(event, int))
    contents = _contents(steps)

    random_ = random.Random(1)
    cutter = Cutter(disk.State({disk.SOURCE_INODE: b""}, {_ROOT: {}, disk.ELSEWHERE_INODE: {}}, None))
    done, states, seen = 0, 0, set()
    for event in events:
        if isinstance(event, int):
            done = event
            cutter.forget()
            continue
        changed = cutter.follow("begin", event)
        event.ended = True
        for state, story in _some(cutter, random_) if changed else ():
            key = (digest(state), done)
            if key in seen:
                continue
            seen.add(key)
            states += 1
            held = _found_after_a_cut(state, tmp_path / "found")
            assert held in contents[done : done + 2], f"after step {done}, with\n{story()}\nthere is {held}"
        cutter.follow("end", event)
    assert states > 500


def _some(cutter: Cutter, random_: random.Random) -> list[tuple[disk.State, str]]:
    found = list(cutter.states(random_))
    return random_.sample(found, min(len(found), MOST_STATES_A_MOMENT))
