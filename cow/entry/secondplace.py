"""The opening's look at the second place: was it there that the last session would have recorded what it gave up?

That snapshots were given up while the store took no writes stands in a directory outside of it (elsewhere.py). With
another such directory, on another machine or in a container, it would not be found, and they would be taken for valid.
So each opening leaves a token there and the same in the catalog. After a crash, where the token of the catalog is not
found, it is unknown whether something was given up, and nobody may believe the snapshots. # I1 # I4
"""

import os
import uuid
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field

from cow.disk.directory import Directory
from cow.disk.io import FULL, Io
from cow.entry.footing import WHY_NOT_MADE
from cow.errors import CowError, RefusedError
from cow.records.catalog import Catalog
from cow.records.elsewhere import Elsewhere
from cow.records.rows import TRUSTED, SnapshotRow

_SETTING = "session"


@dataclass
class SecondPlace:
    """What the opening found, in sentences. Without `elsewhere` nothing can be recorded there."""

    elsewhere: Elsewhere | None
    findings: list[str] = field(default_factory=list)
    _token: str = ""

    def end(self, catalog: Catalog) -> None:
        """After a clean stop: the token is needed no more. What cannot be removed does no harm."""
        if self.elsewhere is not None and self._token:
            with suppress(CowError, OSError):
                catalog.set_setting(_SETTING, "")
                self.elsewhere.end_session(self._token)


def open_second_place(
    path: str | None, store_path: str, catalog: Catalog, io: Io, stack: ExitStack, *, accept_doubt: bool
) -> SecondPlace:
    """Open the directory at `path`, made when missing, and begin a session; before the store is recovered. Blocks.

    Raises RefusedError when it is unknown what was given up and that is not accepted, before anything is changed, and
    when others can write to the directory; OSError when it cannot be used.
    """
    if path is None:
        return SecondPlace(None)
    before = str(catalog.setting(_SETTING) or "")
    try:
        directory = Directory.open_path(path, io, create=True)
    except OSError as error:
        if error.errno not in FULL | WHY_NOT_MADE.keys():
            raise
        if before and catalog.setting("clean") != 1 and _doubtful(catalog) and not accept_doubt:
            raise RefusedError(
                f"the store {store_path} was not stopped clean, and whether its snapshots were given up then, as it "
                f"took no writes, stands in {path}, which cannot be opened ({error.strerror}). Nothing was changed. "
                f"Have it there, or mount with -o read_suspect: its snapshots become suspect then; new ones do not"
            ) from error
        return SecondPlace(None, [_without(path, str(error.strerror))])
    stack.callback(directory.close)
    stack.callback(directory.unmake)
    directory.check_ours()  # who could write there could give up snapshots, or hide that some were
    elsewhere = Elsewhere(directory, str(catalog.setting("uuid")))
    is_known = not before or catalog.setting("clean") == 1 or elsewhere.has_session(before)
    doubt = "" if is_known or _is_beside(store_path, before, elsewhere, io) else _doubt(store_path, catalog, elsewhere)
    if doubt and not accept_doubt:
        raise RefusedError(
            f"{doubt}. Nothing was changed.\n"
            f"  If it was served by another machine, container or system: mount it there; or copy "
            f"{elsewhere.session_name}, and given-up{elsewhere.session_name.removeprefix('session')} if there is one, "
            f"from that one's {elsewhere.label} to this one's.\n"
            f"  If those are gone: mount it with -o read_suspect. Its snapshots become suspect then; new ones do not"
        )
    findings = [doubt] if doubt else []
    if doubt:  # durable before the token says that all is well
        catalog.suspect_snapshots([row.id for row in _doubtful(catalog)], doubt)
    token = uuid.uuid4().hex
    try:
        elsewhere.begin_session(token)
    except OSError as error:
        if before and is_known and elsewhere.has_session(before):
            return SecondPlace(elsewhere, findings, before)  # which proves as much
        findings.append(_without(elsewhere.label, str(error.strerror)))
        return SecondPlace(None, findings)
    catalog.set_setting(_SETTING, token)
    if before:
        with suppress(OSError):  # it is needed no more
            elsewhere.end_session(before)
    return SecondPlace(elsewhere, findings, token)


def _without(path: str, why: str) -> str:
    return (
        f"{path} takes no writes ({why}): should the store's disk take none either some day, it cannot be recorded "
        f"that its snapshots are given up, and writers to the source get EIO. Have it there, with room, and mount again"
    )


def look_at_second_place(path: str, catalog: Catalog, io: Io, stack: ExitStack) -> tuple[Elsewhere | None, str]:
    """What is recorded at `path`, for who only looks, and a sentence when snapshots were given up. Blocks.

    Raises RefusedError and OSError as `open_second_place`.
    """
    try:
        directory = Directory.open_path(path, io)
    except FileNotFoundError:
        return None, ""
    stack.callback(directory.close)
    directory.check_ours()
    elsewhere = Elsewhere(directory, str(catalog.setting("uuid")))
    newest = elsewhere.read()
    given_up = [row for row in _doubtful(catalog) if row.id <= newest]
    if not given_up:
        return elsewhere, ""
    return elsewhere, (
        f"{len(given_up)} snapshots were given up when the store took no writes, as {elsewhere.label} has recorded: "
        f"the next mount takes that over"
    )


def _is_beside(store_path: str, token: str, elsewhere: Elsewhere, io: Io) -> bool:
    """Whether the directory above the store is the one: a default store that is looked at from a rescue system."""
    try:
        directory = Directory.open_path(os.path.dirname(os.path.abspath(store_path)), io)
    except (OSError, RefusedError):
        return False
    try:
        directory.check_ours()
        above = elsewhere.at(directory)
        if not above.has_session(token):
            return False
        if newest := above.read():
            elsewhere.record(max(newest, elsewhere.read()))
    except RefusedError:
        return False
    finally:
        directory.close()
    return True


def _doubtful(catalog: Catalog) -> list[SnapshotRow]:
    return [row for row in catalog.snapshots() if row.state in TRUSTED]


def _doubt(store_path: str, catalog: Catalog, elsewhere: Elsewhere) -> str:
    count = len(_doubtful(catalog))
    if not count:
        return ""
    return (
        f"the store {store_path} was not stopped clean, and {elsewhere.label} is not the one that it was used with "
        f"then ({elsewhere.session_name} is not there, or another one): whether its {count} snapshots were given up, "
        f"as the store took no writes, is unknown here, and they might show what was overwritten"
    )
