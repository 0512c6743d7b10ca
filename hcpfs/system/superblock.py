"""The UUID of a file system, read by blkid(8), which knows them all: of a descriptor, or of an extent of one."""

import subprocess

from cow.disk.superblock import Superblock

_SECONDS = 5.0


def superblock_of(fd: int, offset: int = 0, size: int = 0) -> Superblock:
    """What is at `offset` of the open device or file, for `size` bytes (0: to its end). Blocks; does not raise.

    Of a disk with a partition table the UUID of that table.
    """
    place = [f"/dev/fd/{fd}"] if not offset and not size else ["-O", str(offset), "-S", str(size), f"/dev/fd/{fd}"]
    try:
        done = subprocess.run(
            ["blkid", "--probe", "--output", "export", *place],
            pass_fds=(fd,), stdin=subprocess.DEVNULL, capture_output=True, timeout=_SECONDS, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return Superblock()
    found = dict(line.partition("=")[::2] for line in done.stdout.decode(errors="replace").splitlines())
    if "UUID" in found:
        return Superblock(found.get("TYPE", ""), found["UUID"])
    if "PTUUID" in found:
        return Superblock(f"{found.get('PTTYPE', '')} partition table", found["PTUUID"])
    return Superblock()
