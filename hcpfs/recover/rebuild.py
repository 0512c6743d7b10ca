"""Taking down what sits on a dead mount, and putting it back once the mount is served again.

Each step, and each failure, is said in a sentence, and the other steps are done all the same. What was taken down is
kept in the record, so that a recovery whose daemon does not start can be repeated.
"""

import os
import re
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import fields, replace
from pathlib import Path
from typing import NamedTuple

from hcpfs.daemon import record
from hcpfs.daemon.record import Record
from hcpfs.recover import doomed, leftovers
from hcpfs.recover.above import Above, LoopAbove, MountAbove, SwapAbove, binds_of, find, images_of_detached, images_on
from hcpfs.system import aside, beneath, blocks, loops, namespaces, probe, users
from hcpfs.system.remount import bind, mount_elsewhere, mounted

_ANSWER_SECONDS = 5.0
_UNMOUNT_SECONDS = 30.0
_NODE_SECONDS = 5.0
_SWAP_SECONDS = 60.0
# What a file system shows among its options once it has failed.
_FAILED = {"emergency_ro", "shutdown"}


class Voice(NamedTuple):
    """Where the sentences go: those on what was done, and those on what failed."""

    say: Callable[[str], None]
    complain: Callable[[str], None]


class Rebuild:
    """The steps of one recovery; the caller has the mount served between `clear` and `put_back`."""

    def __init__(self, dead: beneath.Mount | None, wanted: Record, known: Record | None, voice: Voice) -> None:
        """`dead` is None when the mount was unmounted lazily; `wanted` says how it is mounted again.

        `known` is the record of the dead mount; its `above` has what an unfinished recovery took down.
        """
        self._dead = dead
        self._wanted = wanted
        self._known = known
        self._mountpoint = wanted.mountpoint
        self._say, self._complain = voice
        self._above = Above()
        self._aside: list[tuple[int, str, int]] = []  #: the id of the mount that it was mounted in, path, descriptor
        self._lost = False
        self._survey = namespaces.Survey([], {})  #: before anything was taken down

    def _lose(self, sentence: str) -> None:
        self._lost = True
        self._complain(sentence)

    # -- down ----------------------------------------------------------------------------------------------------

    def clear(self) -> None:
        """Take down what sits on the dead mount, the innermost first, and the mount. Name what cannot be put back."""
        self._survey = namespaces.survey()
        mounts = [
            one._replace(namespace=one.namespace * (one.namespace in self._survey.others))
            for one in self._survey.mounts
        ]
        self._above = self._find(mounts)
        present = replace(self._above, **{one.name: list(getattr(self._above, one.name)) for one in fields(Above)})
        self._take_over_an_earlier_one()
        victims = {mount.id for mount in present.mounts}
        for overlay in doomed.overlays(mounts, victims):
            self._lose(f"the overlay at {self._survey.where(overlay)} has a layer that is dead: mount it again")
        for swap in present.swaps:
            self._swap_off(swap)
        for mount in present.binds:
            self._unmount_lazily(mount)
        top = max((loop.level for loop in present.loops), default=-1)
        for level in range(top, -1, -1):
            on_level = [mount for mount in present.mounts if mount.level == level]
            for mount in sorted(on_level, key=lambda mount: (mount.depth, mount.id), reverse=True):
                self._put_aside(mount.id, victims)
                self._unmount(mount)
            for loop in present.loops:
                if loop.level == level:
                    self._detach(loop)
        if self._dead is not None:
            self._put_aside(self._dead.id, victims)
            if self._unmount_lazily(_above_itself(self._dead)):
                self._say(f"unmounted the dead hcpfs at {self._mountpoint}")
        self._name_the_programs()

    def _name_the_programs(self) -> None:
        """Name the programs that have files of the dead mount itself open."""
        known = self._known
        if self._dead is not None:
            device = self._dead.device
        elif known is not None and known.device and not leftovers.is_gone(known, beneath.all_mounts()):
            device = known.device
        else:
            return
        for words in doomed.programs({device}):
            self._lose(f"{words} has files of the dead mount open: they stay dead until it is restarted")

    def _find(self, mounts: list[beneath.Mount]) -> Above:
        if self._dead is None:
            return find(mounts, self._detached_image)
        image_of = images_on([mount for mount in mounts if not mount.namespace], self._dead)
        found = find(mounts, lambda state: image_of(state.file))
        found.binds = binds_of(mounts, self._dead)
        return found

    def _detached_image(self, state: loops.LoopState) -> str | None:
        """The image that a loop device is on whose mount was unmounted lazily, if that mount certainly was ours."""
        image = images_of_detached(self._mountpoint, self._wanted.images)(state.file)
        if image is None or (self._known is not None and not leftovers.can_be_of(self._known, state)):
            return None
        if probe.ask_loop(state.path, _ANSWER_SECONDS) is not probe.Answer.DEAD:
            return None
        mounts = beneath.all_mounts()
        if self._known is not None and leftovers.is_gone(self._known, mounts):
            return None
        mounted = {mount.mountpoint for mount in mounts if mount.filesystem == beneath.FILESYSTEM_TYPE}
        for other in record.others(self._mountpoint):
            if other.is_alive or other.mountpoint in mounted or not leftovers.can_be_of(other, state):
                continue
            if not leftovers.is_gone(other, mounts):
                self._lose(
                    f"{state.path} is left alone: it may belong to {self._mountpoint} or to {other.mountpoint}, both "
                    f"of which were unmounted lazily; unmount what is on it, and losetup -d it"
                )
                return None
        return image

    def _take_over_an_earlier_one(self) -> None:
        try:
            self._above.add(Above.from_json(self._known.above if self._known is not None else {}))
        except (TypeError, KeyError):
            self._complain(
                f"what an earlier recovery of {self._mountpoint} took down cannot be read: put it back by hand"
            )
        self._wanted.above = self._above.to_json()
        if self._known is not None:  # what is left, should it come to a second attempt, is left of that mount
            for name in ("boot", "device", "source", "mounted_ns"):
                setattr(self._wanted, name, getattr(self._known, name))
        try:
            record.write(self._wanted)
        except OSError as error:
            self._complain(f"what is taken down could not be noted for a second attempt: {error}")

    def _put_aside(self, parent: int, victims: set[int]) -> None:
        """Keep the mounts in a mount that are not on our images."""
        for child in self._current_mounts():
            if child.parent != parent or child.id in victims:
                continue
            if child.namespace in self._survey.others:
                self._lose(f"{self._survey.where(child)} ({child.filesystem}) goes too: mount it again there")
                continue
            try:
                self._aside.append((parent, child.mountpoint, aside.put_aside(child.mountpoint)))
                self._say(f"put {child.mountpoint} ({child.filesystem}) aside")
            except OSError as error:
                self._lose(f"{child.mountpoint} ({child.filesystem}) cannot be kept and goes too: {error.strerror}")

    def _unmount(self, mount: MountAbove) -> None:
        if all(one.id != mount.id for one in self._current_mounts()):
            return  # the unmounting of another one was propagated to it
        device = next((one.device for one in self._survey.mounts if one.id == mount.id), 0)
        what = f"{self._where(mount)} ({mount.filesystem} on /dev/{mount.source})"
        if mount.namespace:
            words = _said(lambda: namespaces.unmount(self._survey.others[mount.namespace], mount.mountpoint, device))
        else:
            code, words = probe.attempt(["umount", "--no-canonicalize", mount.mountpoint], _UNMOUNT_SECONDS)
            words = "" if code == 0 else words or "in use"
        if not words:
            self._say(f"unmounted {what}")
            return
        found = users.of_file_system(device) or users.below(mount.mountpoint)
        names = ", ".join(f"{user.words}" for user in found)
        exported = users.exports(mount.mountpoint)
        if exported:
            self._lose(f"the NFS server has handed out {' '.join(exported)}: exportfs -ra")
        if self._unmount_lazily(mount):
            why = f"in use by {names}" if names else words
            sentence = f"unmounted {what} lazily, as it is {why}"
            if names:
                self._lose(f"{sentence}: what they have open there stays dead until they are restarted")
            else:
                self._say(sentence)

    def _unmount_lazily(self, mount: MountAbove) -> bool:
        if mount.namespace:
            device = next((one.device for one in self._survey.mounts if one.id == mount.id), 0)
            space = self._survey.others[mount.namespace]
            words = _said(lambda: namespaces.unmount(space, mount.mountpoint, device, lazily=True))
        else:
            command = ["umount", "--lazy", "--no-canonicalize", mount.mountpoint]
            code, words = probe.attempt(command, _UNMOUNT_SECONDS)
            words = "" if code == 0 else words or f"umount failed with {code}"
        if words and any(one.id == mount.id for one in self._current_mounts()):
            self._lose(f"{self._where(mount)} could not be unmounted: {words}")
        return not words

    def _current_mounts(self) -> list[beneath.Mount]:
        return namespaces.survey().mounts

    def _where(self, mount: MountAbove) -> str:
        other = self._survey.others.get(mount.namespace)
        return mount.mountpoint if other is None else f"{mount.mountpoint} in {other.words}"

    def _swap_off(self, swap: SwapAbove) -> None:
        code, words = probe.attempt(["swapoff", swap.path], _SWAP_SECONDS)
        if code == 0:
            self._say(f"turned off the swap on {swap.path}")
        else:
            self._lose(
                f"the swap on {swap.path} cannot be turned off ({words or code}): programs whose memory is there end "
                f"when they need it"
            )

    def _detach(self, loop: LoopAbove) -> None:
        state = loop.state
        try:
            if loops.detach(state):
                self._say(f"detached {state.path} ({state.file})")
                return
            reason = "it goes when its last user does"
        except OSError as error:
            reason = str(error.strerror)
        names = users.holders(state.device)
        if names:
            self._lose(
                f"{state.path} was not detached: {' '.join(names)} holds it; deactivate that (vgchange -an, dmsetup "
                f"remove, mdadm --stop) and activate it again on the new device"
            )
            return
        devices = blocks.devices_above(state.device)
        found = doomed.programs(devices) or [
            words for words in users.device_words(state.device, state.path) if blocks.is_held(state.path)
        ]
        if found or Path(f"/sys/block/{state.name}/loop/backing_file").exists():
            who = ", ".join(found) or "something that does not show"
            self._lose(f"{state.path} was not detached, as {who} uses it, which stays dead until restarted: {reason}")

    # -- up ------------------------------------------------------------------------------------------------------

    def put_back(self, *, mount_again: bool) -> bool:
        """Set up and mount again what sat on the mount; whether all of it is back."""
        with ExitStack() as stack:
            names: dict[str, str] = {}
            if self._dead is not None:
                self._put_back_aside(self._dead.id)
            for level in range(max((loop.level for loop in self._above.loops), default=-1) + 1):
                for loop in self._above.loops:
                    # One with autoclear is part of its mount, and one on a file there needs it.
                    if loop.level == level and (mount_again or not (level or loop.state.autoclear)):
                        self._attach(loop, names, stack)
                on_level = [mount for mount in self._above.mounts if mount.level == level]
                for mount in sorted(on_level, key=lambda mount: (mount.depth, mount.id)) if mount_again else ():
                    self._mount(mount, names)
                    self._put_back_aside(mount.id)
            for mount in sorted(self._above.binds, key=lambda mount: (mount.depth, mount.id)):
                self._bind(self._mountpoint + mount.root.rstrip("/"), mount)
            for swap in self._above.swaps if mount_again else ():
                self._swap_on(swap, names)
        for _, path, _ in self._aside:
            self._lose(f"{path}, which was put aside, is not back, as what it was mounted in is not: mount it again")
        self.release()
        return not self._lost

    def release(self) -> None:
        """Let go of what was put aside."""
        while self._aside:
            os.close(self._aside.pop()[2])

    def _put_back_aside(self, parent: int) -> None:
        for one in [one for one in self._aside if one[0] == parent]:
            try:
                aside.put_back(one[2], one[1])
            except OSError as error:
                self._complain(f"{one[1]} could not be put back: {error.strerror}")
                continue
            self._aside.remove(one)
            os.close(one[2])
            self._say(f"put {one[1]} back")

    def _attach(self, loop: LoopAbove, names: dict[str, str], stack: ExitStack) -> None:
        state = loop.state
        try:
            name, fd = loops.attach(state)
        except OSError as error:
            self._lose(f"{state.path} is not back on {state.file}: {error.strerror}; look there, and use losetup")
            return
        stack.callback(os.close, fd)  # not earlier: one with autoclear would go
        names[state.name] = name
        other = "" if name == state.name else f" as /dev/{name}, as its old number is in use"
        self._say(f"set up {state.path} again on {state.file}{other}")

    def _mount(self, mount: MountAbove, names: dict[str, str]) -> None:
        source = self._new_device(mount.source, names)
        if source is None:
            self._lose(f"{self._where(mount)} is not mounted again, as /dev/{mount.source} is not back")
            return
        if self._is_there(mount, source):
            return  # it was propagated from another one
        options = mount.super_options.split(",")
        shown = next((option[7:] for option in options if option.startswith("subvol=")), "/")  # of btrfs
        if mount.root == shown and not mount.namespace:
            words = self._mount_device(mount, source, mount.mountpoint)
            if words is None:
                self._say(f"mounted {mount.mountpoint} again ({mount.filesystem} on {source})")
            else:
                self._lose(
                    f"{mount.mountpoint} is not mounted again: {words}; look at the kernel's log, and mount {source}"
                )
            return
        place = tempfile.mkdtemp(prefix="hcpfs-", dir="/run")  # for a part of it, or for another namespace
        try:
            words = self._mount_device(mount, source, place)
            if words is not None:
                self._lose(f"{self._where(mount)} is not mounted again: {words}")
                return
            self._bind(os.path.join(place, os.path.relpath(mount.root, shown)), mount)
            probe.attempt(["umount", place], _UNMOUNT_SECONDS)
        finally:
            os.rmdir(place)  # and never what is in it

    def _mount_device(self, mount: MountAbove, source: str, place: str) -> str | None:
        """Mount the device with the options that it had. None when it succeeded, else what mount(8) said."""
        alike = [one for one in self._above.mounts if one.source == mount.source]
        # The file system has one read-only flag for all its mounts; a single mount is made read-only afterwards.
        read_only = all(one.read_only for one in alike)
        options = [*mount.options.split(","), *mount.super_options.split(",")]
        options = ["ro" if read_only else "rw", *(one for one in options if one not in {"ro", "rw", *_FAILED})]
        words = mounted("-t", mount.filesystem, "-o", ",".join(options), source, place)
        if words is None and mount.read_only and not read_only and place == mount.mountpoint:
            return mounted("-o", f"remount,bind,{mount.options}", place)
        return words

    def _bind(self, source: str, mount: MountAbove) -> None:
        if mount.namespace:
            words = mount_elsewhere(source, mount.namespace, mount.mountpoint, mount.options)
        else:
            words = bind(source, mount.mountpoint, mount.options)
        if words is None:
            self._say(f"mounted {self._where(mount)} again (a bind mount)")
        else:
            self._lose(f"{self._where(mount)} is not mounted again: {words}")

    def _is_there(self, mount: MountAbove, source: str) -> bool:
        return any(
            (one.mountpoint, one.source, one.namespace * (one.namespace in self._survey.others))
            == (mount.mountpoint, source, mount.namespace)
            for one in self._current_mounts()
        )

    def _new_device(self, source: str, names: dict[str, str]) -> str | None:
        """The path of the device that was called `source`, once it is there; None if its loop device is not back."""
        path = f"/dev/{source}"
        match = re.fullmatch(r"(loop[0-9]+)(p[0-9]+)?", source)
        if match is not None and any(loop.state.name == match[1] for loop in self._above.loops):
            if match[1] not in names:
                return None
            path = f"/dev/{names[match[1]]}{match[2] or ''}"
        deadline = time.monotonic() + _NODE_SECONDS
        while not os.path.exists(path) and time.monotonic() < deadline:
            time.sleep(0.02)  # a partition's node
        return path

    def _swap_on(self, swap: SwapAbove, names: dict[str, str]) -> None:
        path = self._new_device(swap.source, names) if swap.source else swap.path
        words = f"/dev/{swap.source} is not back"
        if path is not None:
            priority = ["--priority", str(swap.priority)] if swap.priority >= 0 else []
            code, words = probe.attempt(["swapon", *priority, path], _SWAP_SECONDS)
            if code == 0:
                self._say(f"turned on the swap on {path} again")
                return
        self._lose(f"the swap on {swap.path} is not on again: {words}")


def _above_itself(dead: beneath.Mount) -> MountAbove:
    return MountAbove(
        *(0, 0, dead.id, dead.parent, "", dead.mountpoint, dead.filesystem, dead.root),
        *(dead.options, dead.super_options),
    )


def _said(call: Callable[[], None]) -> str:
    """Nothing, or why the call failed."""
    try:
        call()
    except OSError as error:
        return str(error.strerror)
    return ""
