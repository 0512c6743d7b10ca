"""fio as a meter: one cell of reading or writing, and the operations a second that it reached."""

import json
from dataclasses import dataclass
from pathlib import Path

from tests.support.sandbox import run

TIMEOUT_SECONDS = 600


@dataclass(frozen=True)
class Cell:
    """What is done to a file, past the kernel's cache unless it says otherwise."""

    operation: str  #: fio's word: read, write, randread, randwrite
    block: str
    depth: int = 1
    direct: bool = True
    sync_every: int = 0  #: an fsync after so many writes

    def for_seconds(self, target: Path, seconds: float, *options: str) -> float:
        """Operations a second."""
        return self._run(target, "--time_based", f"--runtime={int(seconds * 1000)}ms", "--randrepeat=0", *options)

    def for_bytes(self, target: Path, amount: int, seed: int, *options: str) -> float:
        """Operations a second, the fsync at the end counted. The same seed meets the same places."""
        return self._run(target, f"--io_size={amount}", f"--randseed={seed}", "--end_fsync=1", *options)

    def _run(self, target: Path, *options: str) -> float:
        engine = ("--ioengine=psync",) if self.depth == 1 else ("--ioengine=libaio", f"--iodepth={self.depth}")
        done = run(
            "fio", "--name=cell", f"--filename={target}", f"--rw={self.operation}", f"--bs={self.block}", *engine,
            f"--direct={int(self.direct)}", f"--fsync={self.sync_every}", "--thread", "--output-format=json", *options,
            cwd="/", timeout=TIMEOUT_SECONDS,
        )  # fmt: skip
        job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
        counts = job["read" if self.operation.endswith("read") else "write"]
        assert counts["total_ios"] > 0, f"fio did nothing with {target}"
        return float(counts["total_ios"] * 1000 / max(counts["runtime"], 1))
