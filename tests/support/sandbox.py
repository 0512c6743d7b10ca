"""A scratch directory with disk images, real mounts and loop devices, all gone at the end, also after a failure."""

import contextlib
import ctypes
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from hcpfs.daemon import record
from hcpfs.options import STORES
from hcpfs.system import beneath, loops
from tests.support import apart

PROJECT = Path(__file__).parents[2]
HCPFS = [sys.executable, "-m", "hcpfs"]
MNT_DETACH = 2
RUN_VARIABLE, WORKER_VARIABLE = "HCPFS_TEST_RUN", "PYTEST_XDIST_WORKER"
#: of this process and those that test beside it, all of which have it in their environment
RUN = os.environ.setdefault(RUN_VARIABLE, f"{os.getpid()}-{time.monotonic_ns()}")
WORKER = os.environ.get(WORKER_VARIABLE, "")  #: which of them this is

_libc = ctypes.CDLL(None, use_errno=True)


def mark_of(worker: str) -> str:
    """What is in the path of everything that one of the processes of this run makes."""
    return f"hcpfs-test-{RUN}-{worker}-"


MARK = mark_of(WORKER)  #: of this one


def processes_of(worker: str) -> list[int]:
    """The processes that one of those of this run has started."""
    return [pid for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))) if _is_of(worker, pid)]


def _is_of(worker: str, pid: int) -> bool:
    """Whether one of those of this run has started the process. The number alone may be somebody else's by now."""
    wanted = {f"{RUN_VARIABLE}={RUN}".encode()} | ({f"{WORKER_VARIABLE}={worker}".encode()} if worker else set())
    try:
        return wanted <= set(Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
    except OSError:  # gone, or not ours to look at
        return False


def clear_away(worker: str) -> None:
    """Remove all that a process of this run made which died without doing so itself."""
    for pid in processes_of(worker):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not any(map(alive, processes_of(worker))), what="the end of what was left")  # and of its mounts
    apart.detach_orphans()
    for place in Path("/dev/shm").glob(f"{mark_of(worker)}*"):
        shutil.rmtree(place)


def run(*command: object, check: bool = True, **options: object) -> subprocess.CompletedProcess[str]:
    """Run a command; its output is in the error when it fails."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False, **options)
    if check and done.returncode != 0:
        raise AssertionError(f"{' '.join(map(str, command))} exited {done.returncode}: {done.stdout}{done.stderr}")
    return done


def wait_until(condition, seconds: float = 20.0, what: str = "condition") -> None:
    """Poll what the kernel does later (a process's end, a lazy close); fail when it takes too long."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come true within {seconds} s"
        time.sleep(0.01)


def status_of(mountpoint: Path) -> dict[str, str]:
    return parse((mountpoint / "status").read_bytes())


def parse(text: bytes) -> dict[str, str]:
    return dict(line.partition(" ")[::2] for line in text.decode("utf-8", "backslashreplace").splitlines())


class Served:
    """A mounted hcpfs."""

    def __init__(
        self, sandbox: "Sandbox", mountpoint: Path, store: Path, sources: list[str], options: list[str]
    ) -> None:
        self.sandbox = sandbox
        self.path = mountpoint
        self.store = store
        self.sources = sources
        self.options = options
        self.pid = int(self.status["pid"])

    @property
    def live(self) -> Path:
        """The first live image."""
        return sorted((self.path / "live").iterdir())[0]

    @property
    def snaps(self) -> Path:
        return self.path / "snaps"

    @property
    def status(self) -> dict[str, str]:
        return status_of(self.path)

    def info(self, name: str) -> dict[str, str]:
        return parse((self.snaps / name / "info").read_bytes())

    def image(self, name: str) -> Path:
        """The first image of a snapshot."""
        return self.snaps / name / self.live.name

    def umount(self) -> None:
        run(*HCPFS, "umount", self.path)

    def kill(self) -> None:
        """Kill -9 the daemon and clear away its dead mount."""
        if _is_of(WORKER, self.pid):
            os.kill(self.pid, signal.SIGKILL)
        wait_until(lambda: not _is_of(WORKER, self.pid), what="the end of the daemon")
        _detach(self.path)

    def die(self) -> None:
        """Kill -9 the daemon; its dead mount stays."""
        os.kill(self.pid, signal.SIGKILL)
        wait_until(lambda: not alive(self.pid), what="the end of the daemon")

    def again(self) -> "Served":
        """Mount once more with the same arguments."""
        return self.sandbox.mount(*self.sources, mountpoint=self.path, store=self.store, options=self.options)

    def remount(self) -> "Served":
        self.umount()
        return self.again()


class Sandbox:
    """Everything that a test makes outside of Python. `close` removes it all, in the right order."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix=MARK, dir="/dev/shm"))
        self.devices: list[str] = []
        self._daemons: list[int] = []
        self._mountpoints: set[str] = set()
        self.processes: list[subprocess.Popen] = []

    def disk(self, name: str = "disk.img", size: int = 8 << 20, content: bytes | None = None) -> Path:
        """A disk image: zeroes, or `content`."""
        path = self.path / name
        if content is not None:
            path.write_bytes(content)
        else:
            with path.open("wb") as file:
                file.truncate(size)
        return path

    def mkdir(self, name: str) -> Path:
        """A directory."""
        (self.path / name).mkdir()
        return self.path / name

    def python_for_all(self) -> list[str]:
        """The Python that has hcpfs, also for users who have no way to the project, which may lie in root's home."""
        place = self.mkdir("project")
        run("mount", "--bind", PROJECT, place)
        self.path.chmod(0o755)
        python = Path(sys.executable)
        if python.is_relative_to(PROJECT):
            python = place / python.relative_to(PROJECT)
        return ["env", f"PYTHONPATH={place}", str(python)]

    def mount(
        self,
        *sources: object,
        mountpoint: Path | None = None,
        store: Path | None = None,
        options: list[str] | None = None,
    ) -> Served:
        """Mount, in the background; `options` are more words for the command line."""
        mountpoint = mountpoint or self.path / "mnt"
        store = store or self.path / "store"
        mountpoint.mkdir(exist_ok=True)
        options = options or []
        words = [str(source) for source in sources]
        self._mountpoints.add(str(mountpoint))
        run(*HCPFS, "mount", *words, mountpoint, "--store", store, *options)
        served = Served(self, mountpoint, store, words, options)
        self._daemons.append(served.pid)
        return served

    def refusal(self, *words: object) -> str:
        """The sentence with which `hcpfs mount` refuses."""
        done = run(*HCPFS, "mount", *words, check=False)
        assert done.returncode != 0, "the mount was not refused"
        assert "Traceback" not in done.stderr
        return done.stderr.strip()

    def loop(self, file: Path, *options: str) -> str:
        """A loop device on the file."""
        device = apart.free_loop()
        run("losetup", *options, device, file)
        self.devices.append(device)
        return device

    def unloop(self, device: str) -> None:
        run("losetup", "-d", device)
        self.devices.remove(device)

    def mount_device(self, device: object, name: str = "fs", *options: str) -> Path:
        """Mount a file system at a directory of the sandbox; the option `loop` gets a loop device of ours."""
        target = self.path / name
        target.mkdir(exist_ok=True)
        words = [f"loop={apart.free_loop()}" if word == "loop" else word for word in options]
        run("mount", *words, device, target)
        return target

    def format(self, device: object, kind: str) -> None:
        """Make a file system. Our images take no discard."""
        run(*{"ext4": ("mkfs.ext4", "-q", "-E", "nodiscard"), "xfs": ("mkfs.xfs", "-q", "-K")}[kind], device)

    def unmount(self, target: Path) -> None:
        """Unmount; the kernel, or an ending process, may keep it busy for a moment."""
        wait_until(lambda: run("umount", target, check=False).returncode == 0, what=f"umount {target}")

    def serve_in_foreground(
        self, *words: object, mountpoint: Path, program: Sequence[str] = HCPFS, **options: object
    ) -> subprocess.Popen:
        """`hcpfs mount` with --foreground among the words, as a service manager runs it; returns when it is usable."""
        mountpoint.mkdir(exist_ok=True)
        self._mountpoints.add(str(mountpoint))
        process = self.spawn(*program, "mount", *words, **options)

        def is_served() -> bool:
            assert process.poll() is None, f"the daemon exited {process.poll()}"
            found = record.read(str(mountpoint))
            return found is not None and found.pid == process.pid

        wait_until(is_served, what="the mount")
        return process

    def spawn(self, *command: object, **options: object) -> subprocess.Popen:
        """A process that does not outlive the test."""
        process = subprocess.Popen([str(word) for word in command], **options)
        self.processes.append(process)
        return process

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        records = [found for path in self._mountpoints if (found := record.read(path)) is not None]
        self._daemons += [one.pid for one in records if one.pid not in self._daemons and one.is_alive]
        self.devices += [state.path for state in loops.states() if state.file.startswith(f"{self.path}/")]
        self._unmount_all()
        for device in reversed(self.devices):
            run("partx", "-d", device, check=False)  # those that were added by hand outlive the losetup -d
            run("blockdev", "--setrw", device, check=False)  # as does this
            run("losetup", "-d", device, check=False)
        for pid in self._daemons:
            with contextlib.suppress(AssertionError):
                wait_until(lambda pid=pid: not _is_of(WORKER, pid), seconds=10)
            if _is_of(WORKER, pid):
                os.kill(pid, signal.SIGKILL)
        for one in records:
            record.remove(one.mountpoint, one.pid)
        for store in self.path.rglob("catalog.sqlite"):
            _forget_sessions(store)
        for link in Path(STORES).glob("store.*"):
            if link.is_symlink() and os.readlink(link).startswith(f"{self.path}/"):
                link.unlink()
        shutil.rmtree(self.path)
        apart.remove_loops()

    def _unmount_all(self) -> None:
        inside = [mount.mountpoint for mount in beneath.mounts() if mount.mountpoint.startswith(f"{self.path}/")]
        for mountpoint in reversed(inside):
            if run("umount", mountpoint, check=False).returncode != 0:
                _detach(Path(mountpoint))


def _forget_sessions(catalog: Path) -> None:
    """Remove what a store that was not stopped clean, and will never be opened again, has left outside of it."""
    with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(catalog)) as database:
        (uuid,) = database.execute("SELECT value FROM store WHERE key = 'uuid'").fetchone()
        for kind in ("session", "given-up"):
            Path(STORES, f"{kind}.{uuid}").unlink(missing_ok=True)


def alive(pid: int) -> bool:
    """Whether the process runs; one that nobody has waited for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _detach(path: Path) -> None:
    _libc.umount2(os.fsencode(path), MNT_DETACH)
