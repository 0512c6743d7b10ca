"""The ends: what sits on the images is written back first, whatever signal comes; a service manager is told."""

import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from tests.support.sandbox import HCPFS, Sandbox, Served, alive, run, wait_until


def _end(served: Served, number: int) -> str:
    os.kill(served.pid, number)
    wait_until(lambda: not alive(served.pid), what="the end of the daemon")
    return (served.store / "hcpfs.log").read_text()


def test_a_signal_writes_back_what_sits_on_the_images_the_innermost_first(sandbox: Sandbox) -> None:
    """A file system on live/, one on a file in that, and one on an image of a snapshot."""
    served = sandbox.mount(sandbox.disk(size=64 << 20))
    outer = sandbox.loop(served.live)
    sandbox.format(outer, "ext4")
    files = sandbox.mount_device(outer, "outer")
    (files / "inner.img").write_bytes(bytes(16 << 20))
    inner = sandbox.loop(files / "inner.img")
    sandbox.format(inner, "ext4")
    nested = sandbox.mount_device(inner, "inner")
    (served.snaps / "a").mkdir()
    try_out = sandbox.loop(served.image("a"))
    sandbox.mount_device(try_out, "try")
    for place in ("outer", "inner", "try"):
        (sandbox.path / place / "precious").write_text(place)
    log = _end(served, signal.SIGTERM)
    (line,) = (line for line in log.splitlines() if "written back: " in line)
    assert line.index(f"{nested} (ext4") < line.index(f"{files} (ext4")
    assert f"{sandbox.path}/try (ext4" in line
    assert "NOT written back" not in log
    assert "closed clean" in log
    for place, device in (("inner", inner), ("try", try_out), ("outer", outer)):
        run("umount", "--lazy", sandbox.path / place)
        sandbox.unloop(device)
    served = served.again()
    sandbox.mount_device(sandbox.loop(served.live), "outer")
    inner = sandbox.loop(files / "inner.img")
    sandbox.mount_device(inner, "inner")
    for place in ("outer", "inner"):
        assert (sandbox.path / place / "precious").read_text() == place
    sandbox.unmount(nested)
    sandbox.unloop(inner)
    sandbox.unmount(files)
    sandbox.mount_device(sandbox.loop(served.image("a")), "try")
    assert (sandbox.path / "try" / "precious").read_text() == "try"
    sandbox.unmount(sandbox.path / "try")


def test_a_signal_writes_back_what_sits_on_a_loop_device_over_a_loop_device(sandbox: Sandbox) -> None:
    served = sandbox.mount(sandbox.disk(size=64 << 20))
    lower = sandbox.loop(served.live)
    upper = sandbox.loop(lower)
    sandbox.format(upper, "ext4")
    files = sandbox.mount_device(upper, "files")
    (files / "precious").write_text("it")
    log = _end(served, signal.SIGTERM)
    (line,) = (line for line in log.splitlines() if "written back: " in line)
    places = [line.index(f" {what}") for what in (f"{files} (ext4 on {upper})", f"{upper},", f"{lower},")]
    assert places == sorted(places)
    assert "NOT written back" not in log
    run("umount", "--lazy", files)
    sandbox.unloop(upper)
    sandbox.unloop(lower)
    served = served.again()
    sandbox.mount_device(sandbox.loop(served.live), "files")
    assert (files / "precious").read_text() == "it"
    sandbox.unmount(files)


@pytest.mark.parametrize("name", ["SIGHUP", "SIGQUIT", "SIGINT"])
def test_other_signals_are_a_clean_end_too(sandbox: Sandbox, name: str) -> None:
    served = sandbox.mount(sandbox.disk())
    assert "closed clean" in _end(served, signal.Signals[name])
    assert not os.path.ismount(served.path)
    assert served.again().status["last_stop"] == "clean"


def test_signals_that_mean_nothing_here_end_nothing(sandbox: Sandbox) -> None:
    served = sandbox.mount(sandbox.disk())
    ignored = [signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM, signal.SIGVTALRM, signal.SIGPIPE, signal.SIGRTMIN]
    for number in ignored:
        os.kill(served.pid, number)
        assert served.status["pid"] == str(served.pid)
    assert "SIGUSR1: ignored" in (served.store / "hcpfs.log").read_text()
    served.umount()


def test_a_service_manager_is_told_by_the_daemon_alone(sandbox: Sandbox) -> None:
    address = sandbox.path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(address))
        manager.settimeout(20)
        mountpoint = sandbox.path / "mnt"
        daemon = sandbox.serve_in_foreground(
            *(sandbox.disk(), mountpoint, "--store", sandbox.path / "store", "--foreground"),
            mountpoint=mountpoint, env={**os.environ, "NOTIFY_SOCKET": str(address)}, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        said = ""
        while "READY=1" not in said:
            said += manager.recv(4096).decode() + "\n"
        assert f"STATUS=serving {mountpoint}" in said
        (child,) = map(int, run("pgrep", "-P", daemon.pid).stdout.split())
        assert b"NOTIFY_SOCKET" not in Path(f"/proc/{child}/environ").read_bytes()
        daemon.terminate()
        while "closing the store" not in said:
            said += manager.recv(4096).decode() + "\n"
        assert "STOPPING=1" in said
        assert "EXTEND_TIMEOUT_USEC=" in said
        assert daemon.wait(20) == 0


@pytest.mark.parametrize(
    "environment",
    [{"PYTHONIOENCODING": "latin-1"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}],
    ids=["latin-1", "C"],
)
def test_ls_escapes_what_cannot_be_shown(sandbox: Sandbox, environment: dict[str, str]) -> None:
    served = sandbox.mount(sandbox.disk())
    for name in ("\u20ac", "a\u202eb"):
        (served.snaps / name).mkdir()
    done = subprocess.run(
        [*HCPFS, "ls", served.path], env={**os.environ, **environment}, capture_output=True, check=True
    )
    assert b"\\u20ac" in done.stdout
    assert b"a\\u202eb" in done.stdout
    served.umount()


@pytest.mark.parametrize(("option", "words"), [("remount,ro", "cannot be remounted"), ("bind", "mount --bind")])
def test_what_mount_8_may_ask_for_and_cannot_get(sandbox: Sandbox, option: str, words: str) -> None:
    served = sandbox.mount(sandbox.disk())
    assert words in sandbox.refusal(served.sources[0], served.path, "-o", option)
    assert served.status["pid"] == str(served.pid)
    served.umount()


def test_each_mount_point_that_cannot_be_used_gets_its_own_advice(sandbox: Sandbox) -> None:
    disk = sandbox.disk()
    (sandbox.path / "round").symlink_to("round")
    for path, advice in {
        "missing": "mkdir -p",
        "disk.img/below": "is a file and no directory",
        "round": "lead in a circle",
        "n" * 256: "more than 255 bytes",
    }.items():
        assert advice in sandbox.refusal(disk, sandbox.path / path, "--store", sandbox.path / "store"), path
