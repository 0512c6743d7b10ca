"""A user who is not root, with an image file, a mount point and a store of his own: what works, and what is said."""

import os
import shutil
from pathlib import Path

import pytest

from tests.support.sandbox import Sandbox, run

NOBODY = 65534
MIB = 1 << 20
_DEVICE = os.makedev(10, 229)  # /dev/fuse, Documentation/admin-guide/devices.txt


@pytest.fixture
def home(sandbox: Sandbox) -> Path:
    """A directory of his, and beside it a /dev/fuse that all may open, as distributions have it."""
    home = sandbox.path / "home"
    (home / "mnt").mkdir(parents=True)
    (home / "disk.img").write_bytes(os.urandom(8 * MIB))
    for path in (home, home / "mnt", home / "disk.img"):
        shutil.chown(path, NOBODY, NOBODY)
    os.mknod(sandbox.path / "fuse", 0o20666, _DEVICE)
    (sandbox.path / "fuse").chmod(0o666)
    return home


def _as_nobody(sandbox: Sandbox, home: Path, script: str, *, fuse: bool = True) -> str:
    """What the shell script says, run by him in a mount namespace of its own. `$hcpfs` is the program."""
    bind = f"mount --bind {sandbox.path / 'fuse'} /dev/fuse && " if fuse else ""
    user = f"setpriv --reuid={NOBODY} --regid={NOBODY} --clear-groups --inh-caps=-all --bounding-set=+all"
    words = f"HOME={home} XDG_RUNTIME_DIR= hcpfs='{' '.join(sandbox.python_for_all())} -m hcpfs'"
    inside = f"cd {home} && {bind}exec env {words} {user} sh -c '{script}'"
    done = run("unshare", "--mount", "--propagation", "slave", "sh", "-c", inside, check=False)
    assert "Traceback" not in done.stderr
    return f"{done.stdout}{done.stderr}exit {done.returncode}"


def test_a_user_takes_snapshots_of_an_image_of_his_own(sandbox: Sandbox, home: Path) -> None:
    said = _as_nobody(
        sandbox,
        home,
        """
        $hcpfs mount disk.img mnt --store $HOME/store && mkdir mnt/snaps/a &&
        cmp disk.img mnt/snaps/a/disk.img && dd if=/dev/zero of=mnt/live/disk.img bs=1M count=2 conv=notrunc,fsync &&
        $hcpfs ls mnt && rmdir mnt/snaps/a && $hcpfs umount mnt && echo all of it
        """,
    )
    assert "all of it\n" in said
    assert "not root: mkdir does not freeze" in said
    assert "valid" in said


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("/root/x.img mnt --store $HOME/store", "/root/x.img"),
        ("disk.img /srv --store $HOME/store", "you may not write to the mount point /srv"),
        ("disk.img mnt --store $HOME/store -o allow_other", "user_allow_other"),
        ("disk.img mnt --store $HOME/store -o uid=0", "of no use without allow_other"),
        ("disk.img mnt --store /var/lib/other/store", "/var/lib/other/store"),
    ],
)
def test_what_a_user_may_not_do_is_said_and_leaves_nothing(
    sandbox: Sandbox, home: Path, words: str, sentence: str
) -> None:
    said = _as_nobody(sandbox, home, f"$hcpfs mount {words}")
    assert sentence in said
    assert said.endswith("exit 1")
    assert sorted(os.listdir(home)) == ["disk.img", "mnt"]


def test_a_fuse_device_that_only_root_may_open_is_named(sandbox: Sandbox, home: Path) -> None:
    (sandbox.path / "fuse").chmod(0o600)
    said = _as_nobody(sandbox, home, "$hcpfs mount disk.img mnt --store $HOME/store")
    assert "you may not open /dev/fuse" in said
    assert sorted(os.listdir(home)) == ["disk.img", "mnt"]
