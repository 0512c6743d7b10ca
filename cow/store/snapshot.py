"""A snapshot: its name, its state, and an image for each origin."""

from pyroaring import BitMap64

from cow.errors import BadNameError, NameTooLongError, printable
from cow.images.image import Image
from cow.layers.layer import Layer
from cow.records.rows import SnapshotRow, State

MOST_NAME_BYTES = 255


class Snapshot:
    """A snapshot in memory. Trio thread only."""

    def __init__(self, row: SnapshotRow, images: list[Image]) -> None:
        self.row = row
        self.images = images  #: in the order of the store's origins
        self.leaving = False  #: being deleted: it cannot be opened any more
        self.abandoned = False  #: it could not be taken, and never existed for users

    @property
    def id(self) -> int:
        """A number that no other snapshot of the store ever has."""
        return self.row.id

    @property
    def name(self) -> bytes:
        """Its present name."""
        return self.row.name

    @property
    def exists(self) -> bool:
        """Whether users see it."""
        return self.row.state != State.PENDING and not self.leaving and not self.abandoned

    @property
    def usable(self) -> bool:
        """Whether it can be read at all."""
        return self.row.state is not State.INVALID

    @property
    def is_open(self) -> bool:
        """Whether one of its images is open."""
        return any(image.opened for image in self.images)

    def asks(self, layer: Layer) -> bool:
        """Whether the layer is among those that its images ask. The snapshot must be usable."""
        return any(layer in image.view.layers() for image in self.images)

    def reads(self, layer: Layer, chunks: BitMap64) -> bool:
        """Whether an image reads any of the chunks, all held by `layer`, from there."""
        return any(image.view.reads(layer, chunks) for image in self.images)

    def frees_something(self, heir: int | None) -> bool:
        """Whether its removal would free space, if `heir` inherits."""
        return any(image.delta.layer.held or image.origin.epochs.freed_by(self.id, heir) for image in self.images)

    def image(self, name: bytes) -> Image | None:
        """The image of that name."""
        return next((image for image in self.images if image.origin.name == name), None)


def check_name(name: bytes) -> None:
    """Raise BadNameError or NameTooLongError unless a snapshot may have that name."""
    if len(name) > MOST_NAME_BYTES:
        raise NameTooLongError(f"a snapshot's name has at most {MOST_NAME_BYTES} bytes, and this one {len(name)}")
    controls = any(character < " " or "\x7f" <= character < "\xa0" for character in name.decode("utf-8", "replace"))
    if not name or name.startswith(b".") or b"/" in name or controls:
        raise BadNameError(
            f"{printable(name)!r} cannot name a snapshot: no leading dot, no slash and no control character, please"
        )
