"""What a person writes on the command line or in /etc/fstab, turned into values: sizes, sources, mount options."""

import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum

from xxhash import xxh3_64_hexdigest

from cow.config import OnFull, Source
from hcpfs.tree.access import Access

#: where the default stores are, and what is recorded beside a store: a user who is not root has a place of his own
STORES = (
    "/var/lib/hcpfs"
    if os.geteuid() == 0
    else os.path.join(os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share"), "hcpfs")
)
_TAKEN = {b"info", b"lost", b"changed", b"snaps"}  # other names in a snapshot's directory
_HIGHEST_ID = (1 << 32) - 2  # of a user or group; the one above says "none"
_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
# Options of mount(8) and of fstab that are its own business, or true of this file system anyway.
_IGNORED = {
    "rw", "defaults", "auto", "noauto", "user", "nouser", "users", "owner", "nofail", "_netdev", "exec", "noexec",
    "suid", "nosuid", "dev", "nodev", "async", "atime", "noatime", "relatime", "norelatime", "diratime", "nodiratime",
    "strictatime", "lazytime", "nolazytime", "dirsync", "iversion", "noiversion", "mand", "nomand", "silent", "loud",
    "nosymfollow", "symfollow", "loop", "group", "sloppy",
}  # fmt: skip
# Labels of SELinux; a kernel without it refuses them, and mount(8) then leaves them out.
_CONTEXTS = ("context", "fscontext", "defcontext", "rootcontext")
_SELINUX = "/sys/fs/selinux/enforce"
_REMOUNT = (
    "a mounted hcpfs cannot be remounted with other options: hcpfs umount {0}, and mount it again; the snapshots stay. "
    "To take the right to write from all who use it meanwhile: mount -o remount,bind,ro {0}"
)
_REFUSED = {
    "remount": _REMOUNT,
    **dict.fromkeys(("bind", "rbind"), "to show an hcpfs in a second place: mount --bind {0} PLACE, without a type"),
    "move": "to move an hcpfs, unmount it and mount it at the other place: its daemon knows it by its mount point",
}
# An option ends with a comma, but not with one in quotes, as in context="u:r:t:s0:c1,c2".
_OPTION = re.compile(r'(?:[^,"]|"[^"]*"|")+')


class UsageError(ValueError):
    """What was written makes no sense; the sentence says what would."""


class Accept(StrEnum):
    """A consequence that a mount is refused for, unless it is said that it is meant."""

    QUOTA = "quota"  # a quota at which the next write may cost snapshots
    CHANGED = "changed"  # the device was changed while hcpfs was not running: its snapshots become suspect
    UNCHANGED = "unchanged"  # it was written to, and has what it had: they stay valid


@dataclass
class MountOptions:
    """Everything about a mount, from the command line and -o together."""

    sources: list[Source] = field(default_factory=list)
    mountpoint: str = ""
    store: str | None = None
    quota_bytes: int | None = None
    on_full: OnFull = OnFull.DROP_OLDEST
    read_only: bool = False
    read_suspect: bool = False
    sync: bool = False
    allow_other: bool = False
    access: Access = field(default_factory=lambda: Access(os.geteuid(), os.getegid()))
    freeze_seconds: float = 10.0
    foreground: bool = False
    accept: set[Accept] = field(default_factory=set)  #: for this mount alone
    contexts: list[str] = field(default_factory=list)  #: options for the kernel, such as context="..."

    @property
    def store_path(self) -> str:
        """The store's directory: as given, or one for this set of sources, in whatever order."""
        if self.store is not None:
            return os.path.abspath(self.store)
        names = "+".join(sorted(os.fsdecode(source.name) for source in self.sources))
        paths = "\0".join(sorted(os.path.abspath(source.path) for source in self.sources))
        return os.path.join(STORES, f"{names[:100]}-{xxh3_64_hexdigest(os.fsencode(paths))}")

    @property
    def image_names(self) -> list[str]:
        """The names in live/."""
        return [os.fsdecode(source.name) for source in self.sources]

    def arguments(self) -> list[str]:
        """The words for `hcpfs` that mount the same from any directory, in the background.

        Without what is accepted: that is for one start, and `accepting` has the words.
        """
        words = ["mount", *map(_word, self.sources), self.mountpoint, "--store", self.store_path]
        if self.quota_bytes is not None:
            words += ["--quota", str(self.quota_bytes)]
        plain = MountOptions()
        flags = {
            "ro": self.read_only,
            "read_suspect": self.read_suspect,
            "sync": self.sync,
            "allow_other": self.allow_other,
        }
        texts = [name for name, wanted in flags.items() if wanted]
        if self.on_full != plain.on_full:
            texts.append(f"on_full={self.on_full}")
        if self.access != plain.access:
            texts += [f"uid={self.access.uid}", f"gid={self.access.gid}", f"mode={self.access.mode:o}"]
        if self.freeze_seconds != plain.freeze_seconds:
            texts.append(f"freeze={self.freeze_seconds}")
        texts += self.contexts
        return [*words, *(("-o", ",".join(texts)) if texts else ())]


def accepting(accept: Iterable[Accept]) -> list[str]:
    """The words for `hcpfs mount` that accept these consequences, for this one start."""
    return [word for one in sorted(accept) for word in ("--accept", one.value)]


def _word(source: Source) -> str:
    """The source as on the command line. A path alone where that says it, as a name may have an = in it."""
    name = os.fsdecode(source.name)
    return source.path if name == _default_name(source.path) else f"{name}={source.path}"


def parse_size(text: str) -> int:
    """A size in bytes, from digits and K, M, G or T (powers of 1024). Raises UsageError."""
    match = re.fullmatch(r"([0-9]+)([KMGT]?)(i?B)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise UsageError(f"{text!r} is not a size: write a number, and K, M, G or T for powers of 1024, such as 20G")
    return int(match[1]) << _UNITS[match[2].upper()]


def parse_source(text: str) -> Source:
    """NAME=PATH, or a path, whose image is called after its base name with .img. Raises UsageError."""
    name, equals, path = text.partition("=")
    if not equals or "/" in name:
        path = text
        name = _default_name(path)
    encoded = os.fsencode(name)
    if not encoded or encoded.startswith(b".") or b"/" in encoded or len(encoded) > 255 or encoded in _TAKEN:
        taken = ", ".join(sorted(os.fsdecode(one) for one in _TAKEN))
        raise UsageError(
            f"{name!r} cannot name an image: no slash, no leading dot, at most 255 bytes, and not one of {taken}"
        )
    return Source(encoded, os.path.abspath(path))


def _default_name(path: str) -> str:
    name = os.path.basename(os.path.abspath(path))
    return name if name.endswith(".img") else f"{name}.img"


def apply_options(options: MountOptions, texts: Iterable[str]) -> None:
    """Take over `-o` texts, each a comma-separated list. Raises UsageError for what is not known."""
    for text in texts:
        for option in _OPTION.findall(text):
            _apply_option(options, option)


def _apply_option(options: MountOptions, option: str) -> None:
    key, _, value = option.partition("=")
    if key in ("store", "quota", "on_full", "source", "uid", "gid", "mode", "freeze", "accept") and not value:
        raise UsageError(f"the option {key} needs a value: {key}=...")
    match key:
        case "store":
            options.store = value
        case "quota":
            options.quota_bytes = parse_size(value)
        case "on_full":
            try:
                options.on_full = OnFull(value)
            except ValueError:
                raise UsageError(f"on_full={value} is not a policy: there are {', '.join(OnFull)}") from None
        case "source":
            options.sources.append(parse_source(value))
        case "ro":
            options.read_only = True
        case "read_suspect":
            options.read_suspect = True
        case "sync":
            options.sync = True
        case "allow_other":
            options.allow_other = True
        case "foreground":
            options.foreground = True
        case "accept":
            options.accept |= {_consequence(word) for word in value.split("+")}
        case "uid" | "gid" | "mode":
            try:
                number = int(value, 8 if key == "mode" else 10)
            except ValueError:
                raise UsageError(f"{key}={value} is not a number") from None
            if not 0 <= number <= _HIGHEST_ID:
                raise UsageError(f"{key}={value} is out of range: there are 0 to {_HIGHEST_ID}")
            options.access = options.access._replace(**{key: number & 0o777 if key == "mode" else number})
        case "freeze":
            try:
                options.freeze_seconds = float(value)
            except ValueError:
                raise UsageError(f"freeze={value} is not a number of seconds") from None
            if not 0 <= options.freeze_seconds < math.inf:
                raise UsageError(f"freeze={value} makes no sense: write how many seconds mkdir may wait, 0 or more")
        case _ if key in _CONTEXTS:
            if os.path.exists(_SELINUX):
                options.contexts.append(option)
        case _ if key in _REFUSED:
            raise UsageError(f"-o {key}: {_REFUSED[key].format(options.mountpoint)}")
        case _:
            if key not in _IGNORED and not key.startswith(("x-", "X-", "comment")):
                raise UsageError(
                    f"the mount option {option!r} is not known: there are store, quota, on_full, source, ro, "
                    f"read_suspect, sync, allow_other, uid, gid, mode, freeze, accept and foreground"
                )


def _consequence(word: str) -> Accept:
    try:
        return Accept(word)
    except ValueError:
        raise UsageError(f"accept={word} is not known: there are {', '.join(Accept)}") from None
