"""A daemon that kills itself at a named point: `python -m tests.support.killpoints POINT COUNT FILE ARGUMENTS...`.

The COUNT-th call of the point's function, before or after it, ends the process; FILE is made then. ARGUMENTS are those
of hcpfs. With COUNT 0 the process is not ended but stopped, as by SIGSTOP, at every call. The engine has no hooks for
this: functions are wrapped from outside.
"""

import functools
import importlib
import os
import signal
import sys
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple


class Phase(Enum):
    """When a daemon comes to the function."""

    START = "while it starts, after a kill"
    WORK = "at work"
    STOP = "while it stops"


class Point(NamedTuple):
    """A function, the phase in which the daemon shall die there, and which of its calls since the start that is."""

    place: str
    phase: Phase
    call: int = 1


_FUNCTIONS = {
    "recovery": Point("cow.opening:recover", Phase.START),
    "load of a layer": Point("cow.durable.recovery:load_layer", Phase.START, 2),
    "first journal file": Point("cow.records.journal:Journal.start_file", Phase.START),
    "first retire": Point("cow.records.journal:Journal.retire", Phase.START),
    "append": Point("cow.records.journal:Journal.append", Phase.WORK, 3),
    "sync of a layer": Point("cow.layers.layerfiles:LayerFiles.sync_data", Phase.WORK, 2),
    "preserving": Point("cow.durable.preserver:_copy_durably", Phase.WORK, 2),
    "emptying of the buffer": Point("cow.images.origin:write_out", Phase.WORK, 2),
    "checksums": Point("cow.layers.sums:Sums.write_runs", Phase.WORK, 3),
    "add snapshot": Point("cow.records.catalog:Catalog.add_snapshot", Phase.WORK),
    "finish snapshot": Point("cow.records.catalog:Catalog.finish_snapshot", Phase.WORK, 2),
    "delete snapshot": Point("cow.records.catalog:Catalog.delete_snapshot", Phase.WORK),
    "fingerprint": Point("cow.records.catalog:Catalog.set_fingerprint", Phase.WORK),
    "overwrite": Point("cow.disk.source:OriginDevice.pwrite", Phase.WORK, 3),
    "sync of the origin": Point("cow.disk.source:OriginDevice.sync", Phase.WORK, 2),
    "removal of a layer": Point("cow.store.disposal:remove_layer_directory", Phase.WORK),
    "last journal file": Point("cow.records.journal:Journal.start_file", Phase.STOP, 2),
    "save of a map": Point("cow.layers.layer:Layer.save", Phase.STOP),
    "last retire": Point("cow.records.journal:Journal.retire", Phase.STOP, 2),
    "clean stop": Point("cow.records.catalog:Catalog.record_clean_stop", Phase.STOP),
}
POINTS = {f"{when} {name}": point for name, point in _FUNCTIONS.items() for when in ("before", "after")}


def _deadly(function: Callable[..., Any], when: str, count: int, marker: Path) -> Callable[..., Any]:
    left = [count]

    @functools.wraps(function)
    def wrapper(*arguments: Any, **options: Any) -> Any:
        left[0] -= 1
        here = left[0] == 0 or count == 0
        if here and when == "before":
            _end(marker, count)
        result = function(*arguments, **options)
        if here and when == "after":
            _end(marker, count)
        return result

    return wrapper


def _end(marker: Path, count: int) -> None:
    marker.touch()
    os.kill(os.getpid(), signal.SIGKILL if count else signal.SIGSTOP)


def main() -> None:
    point, count, marker, *arguments = sys.argv[1:]
    module_name, _, path = POINTS[point].place.partition(":")
    owner: Any = importlib.import_module(module_name)
    *classes, name = path.split(".")
    for one in classes:
        owner = getattr(owner, one)
    setattr(owner, name, _deadly(getattr(owner, name), point.split()[0], int(count), Path(marker)))
    from hcpfs import cli

    sys.argv = ["hcpfs", *arguments]
    cli.main()


if __name__ == "__main__":
    main()
