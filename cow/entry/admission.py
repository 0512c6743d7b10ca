"""Whether the devices may be used with the store: admitted, refused in words, or accepted as the user says. # I12

images/recognition.py finds what speaks for and against a device; this module decides what follows.
"""

import os
from collections.abc import Sequence

import trio

from cow.clock import after
from cow.disk.superblock import Superblock
from cow.errors import WAY, RefusedError, counted, printable
from cow.images.origin import Origin
from cow.images.recognition import Verdict, gather, judge
from cow.records.catalog import Catalog
from cow.records.facts import Facts, facts_key
from cow.records.rows import OriginRow
from cow.store.store import Store


async def admit(
    store: Store,
    catalog: Catalog,
    rows: Sequence[OriginRow],
    was_clean: bool,
    accept_changed: bool,
    accept_unchanged: bool,
) -> list[str]:
    """Check that the devices are those of the snapshots, and were left alone meanwhile. # I12

    Raises RefusedError, before anything is recorded, when a device is another one, or was changed and that is not
    accepted. When it is accepted the snapshots become suspect.
    """
    sentences = []
    for origin, row in zip(store.origins, rows, strict=True):
        known = Facts.from_text(catalog.setting(facts_key(origin.id)))
        now = await trio.to_thread.run_sync(gather, origin)
        origin.superblock = now.superblock
        newest = store.by_id(row.fingerprint_of)
        seen = row.fingerprint if newest is not None and newest.usable else b""
        verdict = judge(origin, seen, known, now, was_clean=was_clean)
        if not verdict.is_proved_untouched:
            # A write from before, or by others, may be newer than recorded.
            origin.modified_ns = after(origin.modified_ns)
        if not any(one.usable for one in store.snapshots):
            continue
        if verdict.is_another:
            raise RefusedError(_another_device(store, origin, verdict, _known_as(catalog, rows, row, verdict.now)))
        in_doubt = bool(verdict.changed) or (verdict.is_written_to and not accept_unchanged)
        if in_doubt and store.inventory.trusted:
            if not accept_changed:
                raise RefusedError(_changed_device(store, origin, verdict, row))
            sentences.append(
                f"{origin.device.label} was changed while hcpfs was not running ({verdict.what_differs()}): what "
                f"snapshots read from it may be wrong"
            )
    if sentences:
        await store.suspect("; ".join(sentences))
    return sentences


def _another_device(store: Store, origin: Origin, verdict: Verdict, known_as: str) -> str:
    names = f": it has {verdict.now}, and that had {verdict.before}" if verdict.has_other_uuid else ""
    return (
        f"{origin.device.label} is not the device that the store {store.path} was made for{names}; none of what was "
        f"sampled is on it, so it is another disk, or was made anew{known_as}. Nothing was changed. Name the right "
        f"device for {printable(origin.name)}, or another store"
    )


def _changed_device(store: Store, origin: Origin, verdict: Verdict, row: OriginRow) -> str:
    count = counted(len(store.inventory.trusted), "snapshot")
    path = os.fsdecode(row.path)
    was = f", which was {path} then" if path != origin.device.label else ""
    uuid = "" if verdict.has_other_uuid or not verdict.now.uuid else f" ({verdict.now})"
    ways = [
        "If it is another disk: name the right one, or another store.",
        "If it was written to without hcpfs (mounted directly, repaired, restored): mount it with --accept changed. "
        "Its snapshots become suspect then: what they read from the disk is refused, what the store has can be read.",
    ]
    if verdict.changed:
        ways.insert(1, "If it is the right one, and what is on it now is a mistake: put back what it had.")
    else:
        ways.append(
            "If you know that it has what it had (it was touched, or resized and put back): mount it with --accept "
            "unchanged, and the snapshots stay valid."
        )
    ways_on = "".join(f"{WAY}{way}" for way in ways)
    return (
        f"{origin.device.label}{uuid} is not as the store {store.path} knows the disk of its {count}{was}: "
        f"{verdict.what_differs()}. Nothing was changed.{ways_on}"
    )


def _known_as(catalog: Catalog, rows: Sequence[OriginRow], own: OriginRow, found: Superblock) -> str:
    """Which other source of the store has that UUID: names may have been exchanged."""
    for row in rows:
        if row is not own and found.uuid and Facts.from_text(catalog.setting(facts_key(row.id))).superblock == found:
            return f"; it is the one that the store knows as {printable(row.name)}"
    return ""
