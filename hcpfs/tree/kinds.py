"""The kinds of nodes in the tree, one type each, and the inode numbers that they have.

    /  live/NAME.img   snaps/SNAPSHOT/{NAME.img, info, lost}   status

Inode numbers are computed, not allocated, and never used twice: the fixed ones are small, and those of a snapshot
follow from its id. So nothing has to be remembered for the kernel, and nodes are made when they are asked for.

A new file is one class that is added to `ROOT_FILES` or `SNAPSHOT_FILES`: a `TextFile` or a `SnapshotText`, when all of
its text can be made at the open.
"""

import stat
import time
from collections.abc import Iterator
from typing import ClassVar

from cow.errors import NotFoundError
from cow.images.image import Image
from cow.images.origin import Origin
from cow.scrub import OpenScrub
from cow.store.snapshot import Snapshot
from hcpfs.quiesce.live import FIRST_INODE
from hcpfs.tree.handles import Scrub
from hcpfs.tree.nodes import (
    FIRST_COOKIE,
    IMAGE_SECONDS,
    ROOT,
    Attributes,
    Common,
    Directory,
    Entry,
    File,
    Node,
    TextFile,
    blocks_of,
    numbered,
)
from hcpfs.tree.text import info, lost

LIVE, SNAPS = 2, 3
FIRST_IMAGE = 16  #: the place of a snapshot's first image: the places before it are for its other files
_SNAPSHOT_SHIFT = 20  # an inode is (snapshot id << 20) + place, and a snapshot's directory has place 0
_LEAST_BYTES = 4096  # that an image takes: a file with contents and no blocks is a single hole to tar and others

# -- directories -----------------------------------------------------------------------------------------------------


class Root(Directory):
    """The root."""

    @property
    def links(self) -> int:
        """With `live` and `snaps`."""
        return 4

    @property
    def modified_ns(self) -> int:
        """It never changes."""
        return self._common.started_ns

    def children(self) -> Iterator[Entry]:
        """The two directories and the files."""
        files = ((one.name, one.number) for one in ROOT_FILES if one.is_listed)
        return numbered([(b"live", LIVE), (b"snaps", SNAPS), *files])

    def find(self, name: bytes) -> int:
        """Also that of a file that is not listed. Raises NotFoundError."""
        unlisted = {one.name: one.number for one in ROOT_FILES if not one.is_listed}
        return unlisted[name] if name in unlisted else super().find(name)


class Live(Directory):
    """`live`."""

    @property
    def modified_ns(self) -> int:
        """It never changes."""
        return self._common.started_ns

    def children(self) -> Iterator[Entry]:
        """The live images."""
        return numbered((origin.name, inode) for inode, origin in enumerate(self._common.store.origins, FIRST_INODE))


class Snaps(Directory):
    """`snaps`."""

    @property
    def modified_ns(self) -> int:
        """When a snapshot was taken, dropped or renamed."""
        return self._common.changed_ns

    @property
    def links(self) -> int:
        """As of every directory of directories."""
        return 2 + len(self._common.store.snapshots)

    def children(self) -> Iterator[Entry]:
        """The snapshots. Their cookies stay what they are while others come and go."""
        for one in self._common.store.snapshots:
            yield Entry(one.name, inode_of(one.id), FIRST_COOKIE - 1 + one.id)

    def find(self, name: bytes) -> int:
        """As of any directory, and quickly however many snapshots there are."""
        if name in (b".", b".."):
            return super().find(name)
        snapshot = self._common.store.find(name)
        if snapshot is None:
            raise NotFoundError("no such file or directory")
        return inode_of(snapshot.id)


class SnapshotDirectory(Directory):
    """`snaps/SNAPSHOT`."""

    parent = SNAPS

    def __init__(self, common: Common, inode: int, snapshot: Snapshot) -> None:
        super().__init__(common, inode)
        self._snapshot = snapshot

    @property
    def modified_ns(self) -> int:
        """It never changes."""
        return self._snapshot.row.created_ns

    def children(self) -> Iterator[Entry]:
        """The images, and the files about the snapshot."""
        named = [(image.origin.name, FIRST_IMAGE + place) for place, image in enumerate(self._snapshot.images)]
        named += [(one.name, one.number) for one in SNAPSHOT_FILES]
        return numbered((name, self.inode + place) for name, place in named)


# -- files -----------------------------------------------------------------------------------------------------------


class Status(TextFile):
    """`status`."""

    name, number = b"status", 4

    def content(self) -> bytes:
        """Of the daemon and the store."""
        return self._common.status()


class ScrubFile(File):
    """A file in the root that checks the store when it is read. Not listed, or a backup of the tree would start it."""

    is_listed = False
    repair: ClassVar[bool]

    def open(self) -> Scrub:
        """A check, which begins with the first read."""
        return Scrub(OpenScrub(self._common.store, repair=self.repair))

    async def attributes(self, process: int) -> Attributes:
        """Of a file for the owner alone, whose size is not known beforehand."""
        return Attributes(self.inode, stat.S_IFREG | 0o400, 1, 0, 0, time.time_ns())


class Verify(ScrubFile):
    """`.verify`."""

    name, number, repair = b".verify", 5, False


class Repair(ScrubFile):
    """`.repair`."""

    name, number, repair = b".repair", 6, True


ROOT_FILES: tuple[type[File], ...] = (Status, Verify, Repair)


class SnapshotFile(File):
    """A file about a snapshot, in its directory. `number` is below `FIRST_IMAGE`."""

    def __init__(self, common: Common, inode: int, snapshot: Snapshot) -> None:
        super().__init__(common, inode)
        self._snapshot = snapshot


class SnapshotText(SnapshotFile, TextFile):
    """A text about a snapshot."""

    @property
    def since_ns(self) -> int:
        """Not before there was the snapshot."""
        return max(self._common.started_ns, self._snapshot.row.created_ns)


class Info(SnapshotText):
    """`info`."""

    name, number = b"info", 1

    def content(self) -> bytes:
        """State, sizes and evidence."""
        return info(self._snapshot)


class Lost(SnapshotText):
    """`lost`."""

    name, number = b"lost", 2

    def content(self) -> bytes:
        """What cannot be read any more."""
        return lost(self._snapshot)


SNAPSHOT_FILES: tuple[type[SnapshotFile], ...] = (Info, Lost)


class ImageFile(Node):
    """An image: of the device as it is now, or of a snapshot."""

    def __init__(self, common: Common, inode: int, image: Image | Origin, name: bytes) -> None:
        super().__init__(common, inode)
        self._image = image
        self._name = name

    def open(self) -> Image | Origin:
        """The image itself serves its open files."""
        return self._image

    async def attributes(self, process: int) -> Attributes:
        """Of the image. While it is open with O_TRUNC every look at its size comes here, and counts as a claim."""
        blocks = blocks_of(max(await self._image.allocated_bytes(), _LEAST_BYTES))
        valid_seconds = IMAGE_SECONDS
        if self._common.open_files.is_truncated(self.inode):
            valid_seconds = 0
            self._common.open_files.note_look(self.inode, self._name, process)
        mode, size = self._common.access.image_mode, self._image.size_bytes
        return Attributes(self.inode, mode, 1, size, blocks, self._image.modified_ns, valid_seconds)


# -- all of them -----------------------------------------------------------------------------------------------------


def inode_of(snapshot_id: int) -> int:
    """The inode of a snapshot's directory."""
    return snapshot_id << _SNAPSHOT_SHIFT


def text_inodes(snapshot_id: int) -> range:
    """The inodes of a snapshot's directory and texts."""
    return range(inode_of(snapshot_id), inode_of(snapshot_id) + FIRST_IMAGE)


class Nodes:
    """All nodes, by inode."""

    def __init__(self, common: Common) -> None:
        self._common = common
        fixed = [Root(common, ROOT), Live(common, LIVE), Snaps(common, SNAPS)]
        files = [one(common, one.number) for one in ROOT_FILES]
        images = [
            ImageFile(common, inode, origin, origin.name)
            for inode, origin in enumerate(common.store.origins, FIRST_INODE)
        ]
        self._fixed: dict[int, Node] = {node.inode: node for node in (*fixed, *files, *images)}
        self._files = {one.number: one for one in SNAPSHOT_FILES}

    def at(self, inode: int) -> Node:
        """The node with that number. Raises NotFoundError when it is gone."""
        number = inode >> _SNAPSHOT_SHIFT
        node = self._fixed.get(inode) if not number else self._in_snapshot(number, inode)
        if node is None:
            raise NotFoundError("no such file or directory")
        return node

    def _in_snapshot(self, number: int, inode: int) -> Node | None:
        snapshot = self._common.store.by_id(number)
        if snapshot is None:
            raise NotFoundError("the snapshot was removed")
        place = inode - inode_of(number)
        if place == 0:
            return SnapshotDirectory(self._common, inode, snapshot)
        if place in self._files:
            return self._files[place](self._common, inode, snapshot)
        if 0 <= place - FIRST_IMAGE < len(snapshot.images):
            image = snapshot.images[place - FIRST_IMAGE]
            return ImageFile(self._common, inode, image, image.origin.name)
        return None

    def count(self) -> int:
        """How many files and directories are listed."""
        store = self._common.store
        images = len(store.origins)
        in_snapshots = len(store.snapshots) * (1 + images + len(SNAPSHOT_FILES))
        return 3 + sum(one.is_listed for one in ROOT_FILES) + images + in_snapshots
