"""The UUID of a file system, found by blkid(8), in an open device or file or in a part of it."""

import subprocess

from cow.disk.superblock import Superblock

_SECONDS = 5.0


def superblock_of(fd: int, offset: int = 0, size: int = 0) -> Superblock:
    """The superblock in `size` bytes from `offset` on (0: to the end); of a disk with partitions that of the table.

    Empty where none is found, or blkid does not answer. Blocks.
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
