"""What can run out, or is not there, beside space: refused in words before it costs a snapshot, and counted."""

import contextlib
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.sandbox import HCPFS, PROJECT, Sandbox, run, wait_until

MIB = 1 << 20


def overwrite(path: Path, offset: int, length: int) -> None:
    with path.open("r+b") as image:
        image.seek(offset)
        image.write(os.urandom(length))
        image.flush()
        os.fsync(image.fileno())


# -- file systems ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ext2", "ext3"])
def test_a_store_on_a_file_system_that_lacks_something_is_refused_in_words(sandbox: Sandbox, kind: str) -> None:
    image = sandbox.disk("fs.img", 60 * MIB)
    run(f"mkfs.{kind}", "-q", image)
    place = sandbox.mount_device(image, "fs", "-o", "loop")
    before = sorted(place.iterdir())
    mountpoint = sandbox.path / "mnt"
    mountpoint.mkdir()
    store = place / "new" / "store"
    said = sandbox.refusal(sandbox.disk(), mountpoint, "--store", store)
    assert f"the store {store} cannot be used" in said
    assert f"({kind} at {place}) cannot hold space back (fallocate)" in said
    assert "put the store on ext4 or XFS, with --store DIR" in said
    assert "Errno" not in said
    assert sorted(place.iterdir()) == before


def test_a_store_on_an_hcpfs_like_file_system_in_user_space_is_refused(sandbox: Sandbox) -> None:
    """A FUSE file system without fallocate, which also makes no file without a name."""
    program = "import sys; from tests.support.plainfuse import serve; serve(sys.argv[1], sys.argv[2])"
    below, place = sandbox.path / "below", sandbox.path / "fuse"
    below.mkdir()
    place.mkdir()
    sandbox.spawn(sys.executable, "-c", program, below, place)
    wait_until(lambda: os.path.ismount(place), what="the mount")
    mountpoint = sandbox.path / "mnt"
    mountpoint.mkdir()
    said = sandbox.refusal(sandbox.disk(), mountpoint, "--store", place / "store")
    assert "cannot hold space back (fallocate)" in said
    assert f"fuse.plain at {place}" in said
    assert list(below.iterdir()) == []


@pytest.mark.parametrize("options", [[], ["-o", "ro"]], ids=["rw", "ro"])
def test_a_store_that_takes_no_writes_is_refused_in_words(sandbox: Sandbox, options: list[str]) -> None:
    image = sandbox.disk("fs.img", 60 * MIB)
    sandbox.format(image, "ext4")
    place = sandbox.mount_device(image, "fs", "-o", "loop")
    served = sandbox.mount(sandbox.disk(), store=place / "store")
    (served.snaps / "a").mkdir()
    served.umount()
    run("mount", "-o", "remount,ro", place)
    words = (*served.sources, served.path, *options, "--store")
    said = sandbox.refusal(*words, place / "store")
    assert "takes no writes here (Read-only file system)" in said
    assert "remount,rw" in said
    assert "cannot be made there (Read-only file system)" in sandbox.refusal(*words, place / "other")
    run("mount", "-o", "remount,rw", place)
    try:
        run("chattr", "+i", place / "store")
        assert "chattr -i -a it" in sandbox.refusal(*words, place / "store")
    finally:
        run("chattr", "-i", place / "store")
    assert served.again().status["snapshots.valid"] == "1"


# -- inodes ----------------------------------------------------------------------------------------------------------


def _small_ext4(sandbox: Sandbox) -> Path:
    image = sandbox.disk("fs.img", 100 * MIB)
    run("mkfs.ext4", "-q", "-N", "96", image)
    return sandbox.mount_device(image, "fs", "-o", "loop")


def _small_tmpfs(sandbox: Sandbox) -> Path:
    return sandbox.mount_device("tmpfs", "fs", "-t", "tmpfs", "-o", "nr_inodes=120,size=100m")


def _eat_inodes(place: Path) -> None:
    """As another program may: all of them."""
    (place / "eaten").mkdir(exist_ok=True)
    number = len(list((place / "eaten").iterdir()))
    try:
        while True:
            (place / "eaten" / str(number)).touch()
            number += 1
    except OSError:
        return


@pytest.mark.parametrize("make", [_small_ext4, _small_tmpfs])
def test_no_snapshot_is_lost_where_inodes_run_out(sandbox: Sandbox, make: Callable[[Sandbox], Path]) -> None:
    place = make(sandbox)
    content = os.urandom(8 * MIB)
    served = sandbox.mount(sandbox.disk(content=content), store=place / "store")
    taken = 0
    while run("mkdir", served.snaps / str(taken), check=False).returncode == 0:
        taken += 1
    assert served.status["last_error_errno"] == "ENOSPC"
    assert "inodes" in served.status["last_error"]
    assert 3 < taken < 40
    assert int(served.status["used_percent"]) >= 80
    for number in range(taken):  # what was promised to those that there are is there
        overwrite(served.image(str(number)), 0, 8192)
        overwrite(served.live, number * 8192, 8192)
    _eat_inodes(place)
    assert served.status["used_percent"] == "100"
    overwrite(served.live, 4 * MIB, MIB)
    assert served.status["snapshots.valid"] == str(taken)
    (served.snaps / "0").rmdir()
    served.umount()
    _eat_inodes(place)
    said = run(*HCPFS, "mount", *served.sources, served.path, "--store", served.store).stderr
    assert "inodes are taken" in said
    assert served.status["snapshots.valid"] == str(taken - 1)
    assert served.image("1").read_bytes()[8192:] == content[8192:]
    (served.snaps / "1").rmdir()
    run(*HCPFS, "umount", served.path)
    assert "all is well" in run(*HCPFS, "verify", served.store).stdout
    run("rm", "-r", place / "eaten")
    again = served.again()
    (again.snaps / "more").mkdir()


def test_the_next_old_bytes_find_inodes_though_another_program_took_all(sandbox: Sandbox) -> None:
    place = _small_ext4(sandbox)
    content = os.urandom(8 * MIB)
    served = sandbox.mount(sandbox.disk(content=content), store=place / "store", options=["--sync"])
    (served.snaps / "a").mkdir()
    _eat_inodes(place)
    with pytest.raises(OSError, match="No space left"):
        overwrite(served.image("a"), 0, 4096)  # what is left is for the origin
    overwrite(served.live, 0, MIB)
    assert served.status["snapshots.valid"] == "1"
    assert served.image("a").read_bytes() == content
    served.kill()
    assert served.again().image("a").read_bytes() == content


def test_a_new_store_where_there_are_no_inodes_is_refused_in_words(sandbox: Sandbox) -> None:
    place = _small_ext4(sandbox)
    _eat_inodes(place)
    mountpoint = sandbox.path / "mnt"
    mountpoint.mkdir()
    assert "no space or no inodes" in sandbox.refusal(sandbox.disk(), mountpoint, "--store", place / "store")


# -- limits of the process -------------------------------------------------------------------------------------------


def _refused_under(limit: str, *words: object) -> str:
    done = run("prlimit", limit, *HCPFS, "mount", *words, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    return done.stderr


def test_a_limit_of_file_sizes_is_refused_where_it_may_be_met(sandbox: Sandbox) -> None:
    disk, mountpoint, store = sandbox.disk(size=64 * MIB), sandbox.path / "mnt", sandbox.path / "store"
    mountpoint.mkdir()
    for limit in (4 * MIB, 32 * MIB):
        said = _refused_under(f"--fsize={limit}", disk, mountpoint, "--store", store)
        assert f"this process may write {limit} at most: raise the limit" in said
        assert not store.exists()
    run("prlimit", f"--fsize={4 * MIB}:", *HCPFS, "mount", disk, mountpoint, "--store", store)  # soft: it is raised
    run(*HCPFS, "umount", mountpoint)


def test_a_limit_of_file_sizes_that_is_lowered_later_costs_nothing(sandbox: Sandbox) -> None:
    served = sandbox.mount(sandbox.disk(content=os.urandom(8 * MIB)))
    before = served.live.read_bytes()
    (served.snaps / "a").mkdir()
    hard = resource.prlimit(served.pid, resource.RLIMIT_FSIZE)[1]
    resource.prlimit(served.pid, resource.RLIMIT_FSIZE, (4096, hard))
    overwrite(served.live, 4 * MIB, MIB)
    assert served.info("a")["state"] == "valid"
    assert served.image("a").read_bytes() == before


def test_too_few_open_files_for_the_layers_are_refused_at_the_mount(sandbox: Sandbox) -> None:
    served = sandbox.mount(sandbox.disk())
    for number in range(12):
        (served.snaps / str(number)).mkdir()
        overwrite(served.live, 0, 4096)
    served.umount()
    words = (*served.sources, served.path, "--store", served.store)
    said = _refused_under("--nofile=70:70", *words)
    assert "may need 100 open files, and this process may open 70: raise its limit (ulimit -n 100" in said
    run("prlimit", "--nofile=70:", *HCPFS, "mount", *words)
    assert served.status["snapshots.valid"] == "12"


def test_no_memory_costs_no_snapshot(sandbox: Sandbox) -> None:
    """Whether the daemon bears it or not."""
    content = os.urandom(32 * MIB)
    served = sandbox.mount(sandbox.disk(content=content))
    (served.snaps / "a").mkdir()
    status = Path(f"/proc/{served.pid}/status").read_text()
    used = int(status.partition("VmSize:")[2].split()[0]) << 10
    resource.prlimit(served.pid, resource.RLIMIT_AS, (used, resource.RLIM_INFINITY))
    for offset in range(0, 32 * MIB, 8 * MIB):
        with contextlib.suppress(OSError):
            overwrite(served.live, offset, 8 * MIB)
    served.kill()
    again = served.again()
    assert again.info("a")["state"] == "valid"
    assert again.image("a").read_bytes() == content


def _limited(python: list[str], program: str, **limits: int) -> str:
    """What the program says to a user who has no other process, which would count."""
    user = ["setpriv", f"--reuid={100_000 + os.getpid()}", "--clear-groups"]
    words = [f"--{name}={value}:{value}" for name, value in limits.items()]
    done = run(*user, "prlimit", *words, *python, "-c", program, check=False, cwd="/")
    return done.stdout + done.stderr


def test_threads_that_cannot_be_had_are_missed_at_the_start(sandbox: Sandbox) -> None:
    python = sandbox.python_for_all()
    program = (
        "import trio\nfrom hcpfs.system.threads import start_threads\nfrom cow.errors import RefusedError\n"
        "async def main():\n"
        "    limiter = trio.to_thread.current_default_thread_limiter()\n"
        "    try:\n        print('started', start_threads(), limiter.total_tokens)\n"
        "    except RefusedError as error:\n        print('refused', error)\n"
        "trio.run(main)"
    )
    assert "refused this process may start 1 threads, and needs 4 at least" in _limited(python, program, nproc=2)
    assert "started 9 9" in _limited(python, program, nproc=10), "no more of them will be wanted than there are"
    assert "started 40 40" in _limited(python, program)


def test_threads_stay(sandbox: Sandbox) -> None:
    """Trio's own end after ten idle seconds; these were all started before the mount was usable."""
    served = sandbox.mount(sandbox.disk())
    assert len(list(Path(f"/proc/{served.pid}/task").iterdir())) > 40
    program = "from trio._core import _thread_cache; import hcpfs.system.threads; print(_thread_cache.IDLE_TIMEOUT)"
    assert run(sys.executable, "-c", program, cwd=PROJECT).stdout.strip() == "10"


def test_memory_is_not_locked_where_that_is_limited(sandbox: Sandbox) -> None:
    """Locked memory counts, and what does not fit is refused: threads and buffers would be."""
    program = "from hcpfs.system.memory import lock_memory; print('locked', lock_memory())"
    assert "locked False" in _limited(sandbox.python_for_all(), program, memlock=4 * MIB)
    assert "locked True" in run(sys.executable, "-c", program, cwd=PROJECT).stdout


# -- places for records ----------------------------------------------------------------------------------------------


def test_what_cannot_be_recorded_elsewhere_is_told(sandbox: Sandbox) -> None:
    disk, mountpoint, store = sandbox.disk(), sandbox.path / "mnt", sandbox.path / "store"
    mountpoint.mkdir()
    hide = (
        "mkdir -p /var/lib/hcpfs /run/hcpfs && mount -t tmpfs -o ro,mode=700 none /var/lib/hcpfs && "
        'mount -t tmpfs -o ro,mode=700 none /run/hcpfs && exec "$@"'
    )
    words = ["unshare", "--mount", "--propagation", "slave", "sh", "-c", hide, "sh", *HCPFS, "mount", disk, mountpoint]
    program = [*words, "--store", store]
    done = run(*program, check=False)
    assert done.returncode == 0, done.stderr
    assert "it cannot be recorded that its snapshots are given up" in done.stderr
    assert "hcpfs recover will not know how it was mounted" in done.stderr
