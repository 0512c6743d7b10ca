"""The opening's check of the second place: is it the one where the last session would have recorded what it gave up?

That snapshots were given up while the store took no writes is recorded in a directory outside of it (elsewhere.py).
With another such directory, on another machine or in a container, the record would not be found, and the snapshots
would be taken for valid. So each opening leaves a token there and the same one in the catalog. After a crash, when the
catalog's token is not found, it is unknown whether something was given up, and no snapshot may be trusted. # I1 # I4
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
        """Remove the token, after a clean stop. One that cannot be removed does no harm."""
        if self.elsewhere is not None and self._token:
            with suppress(CowError, OSError):
                catalog.set_setting(_SETTING, "")
                self.elsewhere.end_session(self._token)


def open_second_place(
    path: str | None, store_path: str, catalog: Catalog, io: Io, stack: ExitStack, *, accept_doubt: bool
) -> SecondPlace:
    """Open the directory at `path`, made if missing, and begin a session. Called before recovery. Blocks.

    Raises RefusedError when it is unknown what was given up and that is not accepted, before anything is changed, and
    when others can write to the directory; OSError when it cannot be used, except where it takes no writes: then the
    result has no `elsewhere`, and a finding says so.
    """
    if path is None:
        return SecondPlace(None)
    before = str(catalog.setting(_SETTING) or "")
    try:
        directory = Directory.open_path(path, io, create=True)
    except OSError as error:
        if error.errno not in FULL | WHY_NOT_MADE.keys():
            raise
        findings = []
        if before and catalog.setting("clean") != 1 and (doubtful := _doubtful(catalog)):
            doubt = (
                f"the store {store_path} was not stopped clean, and whether its snapshots were given up then, as it "
                f"took no writes, stands in {path}, which cannot be opened ({error.strerror})"
            )
            if not accept_doubt:
                raise RefusedError(
                    f"{doubt}. Nothing was changed. Have it there, or mount with -o read_suspect: its snapshots become "
                    f"suspect then; new ones do not"
                ) from error
            catalog.suspect_snapshots([row.id for row in doubtful], doubt)
            findings.append(doubt)
        return SecondPlace(None, [*findings, _without(path, str(error.strerror))])
    stack.callback(directory.close)
    stack.callback(directory.unmake)
    directory.check_ours()  # others who can write there could give up snapshots, or hide that some were
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
            return SecondPlace(elsewhere, findings, before)  # the old token proves as much
        findings.append(_without(elsewhere.label, str(error.strerror)))
        return SecondPlace(None, findings)
    catalog.set_setting(_SETTING, token)
    if before:
        with suppress(OSError):  # it is not needed any more
            elsewhere.end_session(before)
    return SecondPlace(elsewhere, findings, token)


def _without(path: str, why: str) -> str:
    return (
        f"{path} takes no writes ({why}): should the store's disk take none either some day, it cannot be recorded "
        f"that its snapshots are given up, and writers to the source get EIO. Have it there, with room, and mount again"
    )


def look_at_second_place(path: str, catalog: Catalog, io: Io, stack: ExitStack) -> tuple[Elsewhere | None, str]:
    """What is recorded at `path`, for a caller that only reads, and a sentence when snapshots were given up. Blocks.

    Raises RefusedError when others can write to the directory, or the record cannot be understood; OSError.
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
    """Whether the second place was the directory above the store: a default store opened from a rescue system."""
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
