"""What a person writes on the command line or in /etc/fstab, turned into values: sizes, sources, mount options.

An option of mount stands once, in the field of `MountOptions` that has its value. The command line, its help, what may
stand after -o, and the words that mount the same again follow from that.
"""

import math
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from functools import partial
from typing import Any

from xxhash import xxh3_64_hexdigest

from cow.config import OnFull, Source
from hcpfs.tree.access import Access

#: where the default stores are, and what is recorded outside of a store; users other than root have their own
STORES = (
    "/var/lib/hcpfs"
    if os.geteuid() == 0
    else os.path.join(os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share"), "hcpfs")
)
_TAKEN = {b"info", b"lost", b"changed", b"snaps"}  # names in a snapshot's directory, some of them to come
_HIGHEST_ID = (1 << 32) - 2  # of a user or group; the one above says "none"
_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
# Options of mount(8) and fstab that it handles itself, or that have no effect on this file system.
_IGNORED = {
    "rw", "defaults", "auto", "noauto", "user", "nouser", "users", "owner", "nofail", "_netdev", "exec", "noexec",
    "suid", "nosuid", "dev", "nodev", "async", "atime", "noatime", "relatime", "norelatime", "diratime", "nodiratime",
    "strictatime", "lazytime", "nolazytime", "dirsync", "iversion", "noiversion", "mand", "nomand", "silent", "loud",
    "nosymfollow", "symfollow", "loop", "group", "sloppy",
}  # fmt: skip
# Labels of SELinux. A kernel without it refuses them, so mount(8) leaves them out there.
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
    """What was written makes no sense. The sentence says what would."""


class Accept(StrEnum):
    """A consequence for which a mount is refused unless the user says that it is meant."""

    QUOTA = "quota"  # a quota at which the next write may cost snapshots
    CHANGED = "changed"  # the device was changed while hcpfs was not running: its snapshots become suspect
    UNCHANGED = "unchanged"  # it was written to, and has what it had: they stay valid


# -- sizes and sources ------------------------------------------------------------------------------------------------


def _word(source: Source) -> str:
    """The source as on the command line: the path alone if the name follows from it, because it may contain an =."""
    name = os.fsdecode(source.name)
    return source.path if name == _default_name(source.path) else f"{name}={source.path}"


def parse_size(text: str) -> int:
    """A size in bytes, from digits and K, M, G or T (powers of 1024). Raises UsageError."""
    match = re.fullmatch(r"([0-9]+)([KMGT]?)(i?B)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise UsageError(f"{text!r} is not a size: write a number, and K, M, G or T for powers of 1024, such as 20G")
    return int(match[1]) << _UNITS[match[2].upper()]


def parse_source(text: str) -> Source:
    """A source from NAME=PATH, or from a path: then the name is its base name with .img. Raises UsageError."""
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


# -- the kinds of options --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Option(ABC):
    """What is known of an option. One with a `help` can be given as --NAME and after -o, others after -o only.

    `is_kept`: whether it is written among the words that mount the same again. Options for one start alone are not.
    """

    name: str
    metavar: str = ""  #: the name of its value in the help; "" for an option without a value
    help: str = field(default="", kw_only=True)
    is_kept: bool = field(default=True, kw_only=True)

    @property
    def shown(self) -> str:
        """How it is written after -o, for the help."""
        return f"{self.name}={self.metavar}" if self.metavar else self.name

    @abstractmethod
    def taken(self, before: Any, text: str) -> Any:
        """The new value when the option is given with this text and the value was `before`. Raises UsageError."""

    @abstractmethod
    def texts(self, value: Any) -> Iterable[str]:
        """The texts with which it has to be given, once for each, to have that value; "" for an option without one."""

    def words(self, value: Any) -> list[str]:
        """The words of the command line for a value, of an option that can be given as --NAME."""
        return [word for text in self.texts(value) for word in (f"--{self.name}", text) if word]


class Flag(Option):
    """An option without a value: it is True when it is given."""

    def taken(self, before: Any, text: str) -> bool:
        """True."""
        return True

    def texts(self, value: Any) -> Iterable[str]:
        """Once, or not."""
        return [""] if value else []


@dataclass(frozen=True)
class Value(Option):
    """An option with one value. The last one given counts."""

    parse: Callable[[str], Any] = str
    write: Callable[[Any], str] = str

    def taken(self, before: Any, text: str) -> Any:
        """The value of the text."""
        return self.parse(text)

    def texts(self, value: Any) -> Iterable[str]:
        """Once."""
        return [self.write(value)]


class Sources(Option):
    """The option that adds a source to those named by the words SOURCE."""

    def taken(self, before: list[Source], text: str) -> list[Source]:
        """With that source."""
        return [*before, parse_source(text)]

    def texts(self, value: Any) -> Iterable[str]:
        """One for each."""
        return map(_word, value)


class Accepted(Option):
    """The option that accepts a consequence, or several with a + between them, in addition to those given before."""

    choices = tuple(one.value for one in Accept)

    @property
    def shown(self) -> str:
        """With several."""
        return f"{super().shown}+..."

    def taken(self, before: set[Accept], text: str) -> set[Accept]:
        """With those consequences."""
        return before | {_consequence(word) for word in text.split("+")}

    def texts(self, value: Any) -> Iterable[str]:
        """One for each."""
        return [one.value for one in sorted(value)]


def _by(option: Option) -> dict[str, Option]:
    """The metadata of a field with the value of an option."""
    return {"option": option}


def _policy(text: str) -> OnFull:
    try:
        return OnFull(text)
    except ValueError:
        raise UsageError(f"on_full={text} is not a policy: there are {', '.join(OnFull)}") from None


def _id(key: str, text: str, base: int = 10) -> int:
    try:
        number = int(text, base)
    except ValueError:
        raise UsageError(f"{key}={text} is not a number") from None
    if not 0 <= number <= _HIGHEST_ID:
        raise UsageError(f"{key}={text} is out of range: there are 0 to {_HIGHEST_ID}")
    return number


def _mode(text: str) -> int:
    return _id("mode", text, 8) & 0o777


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        raise UsageError(f"freeze={text} is not a number of seconds") from None
    if not 0 <= seconds < math.inf:
        raise UsageError(f"freeze={text} makes no sense: write how many seconds mkdir may wait, 0 or more")
    return seconds


def _consequence(word: str) -> Accept:
    try:
        return Accept(word)
    except ValueError:
        raise UsageError(f"accept={word} is not known: there are {', '.join(Accept)}") from None


# -- the options -----------------------------------------------------------------------------------------------------


@dataclass
class MountOptions:
    """Everything about a mount, from the command line and -o together. Each option is declared by its field."""

    store: str | None = field(
        default=None,
        metadata=_by(Value("store", "DIR", help="Where old bytes are kept. Default: a folder below /var/lib/hcpfs.")),
    )
    quota_bytes: int | None = field(
        default=None,
        metadata=_by(
            Value(
                "quota",
                "SIZE",
                help="The most that the store may take, such as 20G. Default: no limit.",
                parse=parse_size,
            )
        ),
    )
    on_full: OnFull = field(default=OnFull.DROP_OLDEST, metadata=_by(Value("on_full", "|".join(OnFull), parse=_policy)))
    sources: list[Source] = field(default_factory=list, metadata=_by(Sources("source", "[NAME=]PATH", is_kept=False)))
    read_only: bool = field(default=False, metadata=_by(Flag("ro")))
    read_suspect: bool = field(default=False, metadata=_by(Flag("read_suspect")))
    sync: bool = field(
        default=False, metadata=_by(Flag("sync", help="Keep no writes in memory while their old bytes are preserved."))
    )
    allow_other: bool = field(default=False, metadata=_by(Flag("allow_other")))
    uid: int = field(default_factory=os.geteuid, metadata=_by(Value("uid", "N", parse=partial(_id, "uid"))))
    gid: int = field(default_factory=os.getegid, metadata=_by(Value("gid", "N", parse=partial(_id, "gid"))))
    mode: int = field(default=Access().mode, metadata=_by(Value("mode", "OCTAL", parse=_mode, write="{:o}".format)))
    freeze_seconds: float = field(default=10.0, metadata=_by(Value("freeze", "SECONDS", parse=_seconds)))
    accept: set[Accept] = field(
        default_factory=set,
        metadata=_by(
            Accepted(
                "accept",
                "WHAT",
                help="Go on although it is refused for that. quota: at the next write it may cost snapshots. changed: "
                "the device was changed while hcpfs was not running; its snapshots become suspect. unchanged: it was "
                "written to, and has what it had.",
                is_kept=False,
            )
        ),
    )
    foreground: bool = field(
        default=False,
        metadata=_by(Flag("foreground", help="Stay in the foreground and log to standard error.", is_kept=False)),
    )
    mountpoint: str = ""
    contexts: list[str] = field(default_factory=list)  #: options for the kernel, such as context="..."

    @property
    def access(self) -> Access:
        """Who may use the images."""
        return Access(self.uid, self.gid, self.mode)

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

    def take(self, name: str, text: str) -> None:
        """Take over an option that is given with this text. Raises UsageError."""
        key = _FIELDS[name]
        setattr(self, key, OPTIONS[name].taken(getattr(self, key), text))

    def arguments(self) -> list[str]:
        """The words for `hcpfs` that mount the same from any directory, in the background.

        Without what is accepted: that is for one start, and `accepting` has the words.
        """
        words = ["mount", *map(_word, self.sources), self.mountpoint]
        after_o = []
        plain, same = MountOptions(), replace(self, store=self.store_path)
        for name, option in OPTIONS.items():
            value = getattr(same, _FIELDS[name])
            if not option.is_kept or value == getattr(plain, _FIELDS[name]):
                continue
            if option.help:
                words += option.words(value)
            else:
                after_o += [f"{name}={text}" if text else name for text in option.texts(value)]
        after_o += self.contexts
        return [*words, *(("-o", ",".join(after_o)) if after_o else ())]


#: all options by name, in the order in which they are listed
OPTIONS: dict[str, Option] = {
    one.metadata["option"].name: one.metadata["option"] for one in fields(MountOptions) if one.metadata
}
_FIELDS = {one.metadata["option"].name: one.name for one in fields(MountOptions) if one.metadata}


def accepting(accept: Iterable[Accept]) -> list[str]:
    """The words for `hcpfs mount` that accept these consequences, for this one start."""
    return OPTIONS["accept"].words(accept)


def apply_options(options: MountOptions, texts: Iterable[str]) -> None:
    """Take over the texts after -o, each a comma-separated list. Raises UsageError."""
    for text in texts:
        for option in _OPTION.findall(text):
            _apply_option(options, option)


def _apply_option(options: MountOptions, text: str) -> None:
    name, _, value = text.partition("=")
    option = OPTIONS.get(name)
    if option is not None:
        if option.metavar and not value:
            raise UsageError(f"the option {name} needs a value: {name}=...")
        options.take(name, value)
    elif name in _CONTEXTS:
        if os.path.exists(_SELINUX):
            options.contexts.append(text)
    elif name in _REFUSED:
        raise UsageError(f"-o {name}: {_REFUSED[name].format(options.mountpoint)}")
    elif name not in _IGNORED and not name.startswith(("x-", "X-", "comment")):
        *others, last = OPTIONS
        raise UsageError(f"the mount option {text!r} is not known: there are {', '.join(others)} and {last}")
