"""Who uses a file system or a device: processes with files open, and what the kernel itself built on it.

No request goes to the file system, which may be dead or hang: a descriptor's file is looked at through /proc/PID/fd, a
magic link that walks no path, with AT_STATX_DONT_SYNC, which does not ask the daemon of a FUSE mount (statx(2);
fuse_update_get_attr in the kernel). Mappings are read from /proc/PID/maps, which waits for the process's memory lock,
so in a thread that can be abandoned.

Not seen: files that are only in flight over a socket or registered with an io_uring, descriptor tables of single
threads, and processes of pid namespaces that are not below ours.
"""

import ctypes
import os
import re
import stat
import threading
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from hcpfs.system import beneath, blocks, loops, probe
from hcpfs.system.libc import checked, libc
from hcpfs.system.words import listed

_AT_FDCWD, _AT_STATX_DONT_SYNC, _AT_NO_AUTOMOUNT = -100, 0x4000, 0x800
_MAPS_SECONDS = 3.0
_LOOP_SECONDS = 5.0
_DETACHED = re.compile(r"/(live|snaps/[^/]+)/[^/]+")  # an image of a lazily unmounted mount


class _Statx(ctypes.Structure):
    """struct statx, as far as it is read; 256 bytes."""

    _fields_ = (
        ("mask", ctypes.c_uint32),
        ("blksize", ctypes.c_uint32),
        ("attributes", ctypes.c_uint64),
        ("nlink", ctypes.c_uint32),
        ("uid", ctypes.c_uint32),
        ("gid", ctypes.c_uint32),
        ("mode", ctypes.c_uint16),
        ("spare", ctypes.c_uint16),
        ("ino", ctypes.c_uint64),
        ("sizes", ctypes.c_uint64 * 3),
        ("times", ctypes.c_uint64 * 8),
        ("rdev_major", ctypes.c_uint32),
        ("rdev_minor", ctypes.c_uint32),
        ("dev_major", ctypes.c_uint32),
        ("dev_minor", ctypes.c_uint32),
        ("rest", ctypes.c_uint64 * 14),
    )


class Known(NamedTuple):
    """What the kernel has cached about a file. `block_device` is the device number if the file is one, else 0."""

    device: int
    inode: int
    block_device: int


class User(NamedTuple):
    """A process that uses something.

    `how`: writing or reading (it has a descriptor open for that), cwd, root, exe or mapping. `namespace` is the inode
    of its mount namespace, 0 when that is ours.
    """

    pid: int
    program: str
    how: str
    namespace: int

    @property
    def words(self) -> str:
        """Such as `postgres (process 123, in another mount namespace)`."""
        where = ", in another mount namespace" if self.namespace else ""
        return f"{self.program} (process {self.pid}{where})"


class Swap(NamedTuple):
    """Swap space in use: the path of the device or file as the kernel shows it, and the device number (0: a file)."""

    path: str
    device: int
    priority: int


def known_of(path: str) -> Known:
    """What the kernel has cached about the file that a magic link leads to. Asks no file system. Raises OSError."""
    found = _Statx()
    flags = _AT_STATX_DONT_SYNC | _AT_NO_AUTOMOUNT
    # With an empty mask the kernel tells the device even of a FUSE mount that we may not enter.
    checked(libc.statx(_AT_FDCWD, os.fsencode(path), flags, 0, ctypes.byref(found)))
    is_device = stat.S_ISBLK(found.mode)
    block_device = os.makedev(found.rdev_major, found.rdev_minor) if is_device else 0
    return Known(os.makedev(found.dev_major, found.dev_minor), found.ino, block_device)


# -- processes -------------------------------------------------------------------------------------------------------


def of_file_system(device: int, inodes: Collection[int] | None = None) -> list[User]:
    """The processes, except ourselves, that use a file of the file system with that device number, each once.

    `inodes`: only these files. On btrfs a file has the device number of its subvolume, not that of the mount.
    """
    return _processes({device}, inodes, frozenset())


def of_block_devices(devices: Collection[int]) -> list[User]:
    """The processes, except ourselves, that have one of the block devices open, each once."""
    return _processes(frozenset(), None, devices)


def of_any(devices: Collection[int]) -> list[User]:
    """The processes that have one of the block devices open, or use a file of a file system with such a number."""
    return _processes(devices, None, devices)


def below(mountpoint: str) -> list[User]:
    """The processes that have a file below the path open, told by its name alone: for btrfs (see `of_file_system`)."""
    found = []
    for pid in (int(name) for name in os.listdir("/proc") if name.isdecimal()):
        links = [f"/proc/{pid}/{link}" for link in ("cwd", "root", "exe")]
        with suppress(OSError):
            links += [f"/proc/{pid}/fd/{number}" for number in os.listdir(f"/proc/{pid}/fd")]
        if any(_is_below(link, mountpoint) for link in links):
            found.append(User(pid, program_of(pid), "reading", 0))
    return found


def _is_below(link: str, mountpoint: str) -> bool:
    try:
        return f"{os.readlink(link)}/".startswith(f"{mountpoint}/")
    except OSError:
        return False


def _processes(devices: Collection[int], inodes: Collection[int] | None, blocks: Collection[int]) -> list[User]:
    pids = [int(name) for name in os.listdir("/proc") if name.isdecimal() and int(name) != os.getpid()]
    own = beneath.namespace_of(os.getpid())
    found: dict[int, str] = {}
    for pid in pids:
        how = next(_uses(pid, devices, inodes, blocks), None)
        if how is not None:
            found[pid] = how
    if devices:
        rest = [pid for pid in pids if pid not in found]
        found |= dict.fromkeys(_with_mappings(rest, devices, inodes), "mapping")
    users = []
    for pid, how in sorted(found.items()):
        namespace = beneath.namespace_of(pid)
        users.append(User(pid, program_of(pid), how, 0 if namespace == own else namespace))
    return users


def program_of(pid: int) -> str:
    """The name of a process's program; `?` when it is gone."""
    try:
        return Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
    except OSError:
        return "?"


def _uses(pid: int, devices: Collection[int], inodes: Collection[int] | None, blocks: Collection[int]) -> Iterator[str]:
    def is_meant(path: str) -> bool:
        try:
            known = known_of(path)
        except OSError:  # gone meanwhile
            return False
        if known.block_device and known.block_device in blocks:
            return True
        return known.device in devices and (inodes is None or known.inode in inodes)

    try:
        numbers = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        numbers = []
    for number in numbers:
        if is_meant(f"/proc/{pid}/fd/{number}"):
            yield _mode_of(pid, number)
    for link in ("cwd", "root", "exe") if devices else ():
        if is_meant(f"/proc/{pid}/{link}"):
            yield link


def _mode_of(pid: int, number: str) -> str:
    try:
        for line in Path(f"/proc/{pid}/fdinfo/{number}").read_text().splitlines():
            if line.startswith("flags:"):
                return "reading" if int(line.split()[1], 8) & os.O_ACCMODE == os.O_RDONLY else "writing"
    except OSError:
        pass  # closed meanwhile
    return "reading"


def _with_mappings(pids: list[int], devices: Collection[int], inodes: Collection[int] | None) -> list[int]:
    """Those that map such a file. The search ends at a process whose memory lock is not released in time."""
    found: list[int] = []

    def look() -> None:
        shown = {b" %02x:%02x " % (os.major(device), os.minor(device)) for device in devices}
        for pid in pids:
            try:
                maps = Path(f"/proc/{pid}/maps").read_bytes()
            except OSError:
                continue
            lines = maps.splitlines() if any(one in maps for one in shown) else []
            mapped = {int(line.split()[4]) for line in lines if any(one in line for one in shown)}
            if mapped and (inodes is None or mapped & set(inodes)):
                found.append(pid)

    thread = threading.Thread(target=look, daemon=True)  # killed with us, wherever it waits
    thread.start()
    thread.join(_MAPS_SECONDS)
    return list(found)


# -- the kernel ------------------------------------------------------------------------------------------------------


def swaps() -> list[Swap]:
    """The swap space in use."""
    found = []
    try:
        lines = Path("/proc/swaps").read_bytes().splitlines()[1:]
    except OSError:  # a kernel without swap
        return []
    for line in lines:
        path = os.fsdecode(line.split()[0].replace(b"\\040", b" ")).removesuffix(" (deleted)")
        device = 0
        if path.startswith("/dev/"):
            with suppress(OSError):  # its node is gone
                device = os.stat(path).st_rdev
        found.append(Swap(path, device, int(line.split()[-1])))
    return found


def btrfs_members() -> dict[str, set[int]]:
    """All device numbers of each mounted btrfs, by its UUID; mountinfo shows one of its devices only."""
    found = {}
    for entry in Path("/sys/fs/btrfs").glob("*/devices"):
        found[entry.parent.name] = set(blocks.numbers_in(entry))
    return found


def holders(device: int) -> list[str]:
    """The names of device-mapper, RAID and bcache devices built on the device or its partitions, such as dm-0."""
    entry = blocks.entry_of(device)
    found = {one.name for one in (*entry.glob("holders/*"), *entry.glob("*/holders/*"))}
    found |= {one.resolve().name for one in (*entry.glob("bcache/dev"), *entry.glob("*/bcache/dev"))}
    return sorted(found)


def mounts_from(mounts: Iterable[beneath.Mount], device: int) -> list[beneath.Mount]:
    """The mounts of file systems on the device, or on devices above it."""
    return mounts_on(mounts, blocks.devices_above(device))


def mounts_on(mounts: Iterable[beneath.Mount], devices: Collection[int]) -> list[beneath.Mount]:
    """The mounts of file systems on one of the devices. Of a btrfs of several devices each counts."""
    found = set(devices)
    for members in btrfs_members().values():
        found |= members if members & found else set()
    names = set(map(blocks.node_of, found))  # btrfs shows an anonymous device number
    return [mount for mount in mounts if mount.device in found or mount.source in names]


def exports(below: str) -> list[str]:
    """The directories below the path that the kernel's NFS server exports to a client at present."""
    try:
        lines = Path("/proc/net/rpc/nfsd.export/content").read_text(errors="replace").splitlines()
    except OSError:
        return []
    paths = {line.split()[0] for line in lines if line.startswith("/")}
    return sorted(path for path in paths if f"{path}/".startswith(f"{below}/"))


# -- in words --------------------------------------------------------------------------------------------------------


def mount_words(mount: beneath.Mount) -> str:
    """Where a mount is: `/srv`, or `/srv in the mount namespace of sleep (process 12)`."""
    if mount.namespace in (0, beneath.namespace_of(os.getpid())):
        return mount.mountpoint
    return f"{mount.mountpoint} in the mount namespace of {program_of(mount.pid)} (process {mount.pid})"


def device_words(device: int, path: str) -> list[str]:
    """All users of a block device, in words: mounts in every namespace, swap, holders, programs.

    When none is seen and yet the device is held exclusively, that is said. Asks no file system.
    """
    above = blocks.devices_above(device)
    mounted = mounts_from(beneath.all_mounts(), device)
    words = [f"{mount.filesystem} mounted at {mount_words(mount)}" for mount in mounted]
    words += [f"swap on {swap.path}" for swap in swaps() if swap.device in above]
    words += [f"{name}, built on it" for name in holders(device)]
    words += [user.words for user in of_any(above)]
    if not words and blocks.is_held(path):
        words.append("something in the kernel that does not show (a lazily unmounted file system, ZFS)")
    return words


def loops_of(device: int, mountpoints: Iterable[str]) -> list[tuple[loops.LoopState, int]]:
    """The loop devices on files of the hcpfs with that device number, each with the inode of its file.

    `mountpoints`: where it is mounted, in any namespace. A child asks its daemon, with a time limit.
    """
    places = tuple(f"{place.rstrip('/')}/" for place in mountpoints)
    found = []
    for state in loops.states():
        if state.file.startswith(places) or _DETACHED.match(state.file):
            file = probe.loop_file(state.path, _LOOP_SECONDS)
            if file is not None and file[0] == device:
                found.append((state, file[1]))
    return found


def loop_words(state: loops.LoopState) -> str:
    """A loop device with all that uses it: `/dev/loop0 (ext4 mounted at /srv)`."""
    return f"{state.path} on {state.file} ({listed(device_words(state.device, state.path) or ['itself not in use'])})"
