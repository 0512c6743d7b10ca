"""The texts of `status`, `info` and `lost`: lines of `key value`, flat-keyed as in cgroup v2, or of extents."""

import errno
import json
import os
import time
from dataclasses import dataclass

from cow.durable.space import Space
from cow.errors import printable
from cow.records.rows import State
from cow.store.snapshot import Snapshot
from cow.store.store import Store
from hcpfs import __version__
from hcpfs.tree.lines import lines


@dataclass
class LastError:
    """The last error of which a caller got the errno alone, or of which nobody was told."""

    time_ns: int
    errno: int
    sentence: str


def when(time_ns: int) -> str:
    """A time as ISO 8601 in UTC, to the microsecond."""
    seconds, rest = divmod(time_ns, 1_000_000_000)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{rest // 1000:06d}Z"


def _key(name: bytes) -> str:
    return printable(name).replace(" ", "\\040").replace("\n", "\\n")


def _frozen(value: str) -> list[str]:
    """Where the frozen file systems were mounted: a JSON list; in older stores, paths separated by spaces."""
    if not value.startswith("["):
        return [path.replace("\\040", " ") for path in value.split(" ")]
    places: list[str] = json.loads(value)
    return places


def info(snapshot: Snapshot) -> bytes:
    """The text of a snapshot's `info`."""
    row = snapshot.row
    pairs: list[tuple[str, object]] = [("created", when(row.created_ns)), ("state", row.state.value)]
    if row.reason:
        pairs.append(("reason", row.reason))
    pairs += [
        ("parent", "-"),
        ("device", " ".join(_key(os.fsencode(image.origin.device.label)) for image in snapshot.images)),
        ("size", sum(image.size_bytes for image in snapshot.images)),
        ("preserved_bytes", sum(image.view.preserved_bytes for image in snapshot.images)),
        ("written_bytes", sum(image.view.written_bytes for image in snapshot.images)),
    ]
    for key, value in row.evidence.items():
        pairs += [(key, one) for one in (_frozen(value) if key == "frozen" else [value])]
    for image in snapshot.images:
        key = _key(image.origin.name)
        pairs += [
            (f"{key}.size", image.size_bytes),
            (f"{key}.preserved_bytes", image.view.preserved_bytes),
            (f"{key}.written_bytes", image.view.written_bytes),
            (f"{key}.modified", when(image.modified_ns)),
        ]
    return lines(pairs)


def lost(snapshot: Snapshot) -> bytes:
    """The text of a snapshot's `lost`: `offset length image` lines, in bytes, of what cannot be read any more."""
    return b"".join(
        f"{run.offset} {min(run.length, image.size_bytes - run.offset)} {_key(image.origin.name)}\n".encode(
            "utf-8", "backslashreplace"
        )
        for image in snapshot.images
        for run in image.view.lost()
    )


def _available_bytes(space: Space) -> int:
    """The space that is available; rounded down to a sixteenth where the file system bounds it and not the quota.

    Others write to that file system, too, and with all digits a backup program would find a changed text each time.
    """
    available = space.available_bytes
    if space.quota_bytes is not None and space.total_bytes == space.quota_bytes:
        return available
    step = 1 << max(0, available.bit_length() - 5)
    return available // step * step


def status(store: Store, mountpoint: str, was_clean: bool, findings: list[str], last: LastError | None) -> bytes:
    """The text of `status`."""
    states = [snapshot.row.state.value for snapshot in store.snapshots]
    pairs: list[tuple[str, object]] = [
        ("version", __version__),
        ("pid", os.getpid()),
        ("mountpoint", mountpoint),
        ("store", store.path),
        ("read_only", int(store.settings.read_only)),
        ("quota_bytes", "-" if store.space.quota_bytes is None else store.space.quota_bytes),
        ("used_bytes", store.space.used_bytes),
        ("available_bytes", _available_bytes(store.space)),
        ("used_percent", store.space.used_percent),
        ("on_full", store.settings.on_full.value),
        ("reads", "threads" if store.reads is None else "io_uring"),
        ("snapshots", len(states)),
    ]
    pairs += [(f"snapshots.{state}", states.count(state)) for state in State if state is not State.PENDING]
    if trouble := store.presence.trouble():
        pairs.append(("store_trouble", trouble))
    for origin in store.origins:
        key = _key(origin.name)
        pairs += [
            (f"{key}.device", origin.device.label),
            (f"{key}.uuid", origin.superblock.uuid or "-"),
            (f"{key}.filesystem", origin.superblock.kind or "-"),
            (f"{key}.size", origin.size_bytes),
            (f"{key}.buffered_bytes", origin.buffered_bytes),
        ]
    pairs.append(("last_stop", "clean" if was_clean else "not-clean"))
    pairs += [("found", finding) for finding in findings]
    if last is not None:
        pairs += [
            ("last_error_time", when(last.time_ns)),
            ("last_error_errno", errno.errorcode.get(last.errno, "-")),
            ("last_error", last.sentence),
        ]
    return lines(pairs)
