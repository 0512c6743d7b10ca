"""The `map` file of a layer: the chunks that it held and had lost at a checkpoint. FORMAT.md describes its bytes."""

import struct
from contextlib import suppress
from typing import NamedTuple

from pyroaring import BitMap64
from xxhash import xxh3_64_digest

from cow.disk.directory import Directory
from cow.disk.file import File
from cow.errors import CowError, SyncError
from cow.layers.layerfiles import NEW_MAP_NAME

MAP_MAGIC = b"HCPFSMAP"
MAP_FORMAT = 2
FILE_NAME = "map"
_HEADER = struct.Struct("<8sIQQQQQ")  # magic, format, layer, generation, written_ns, bytes of held, bytes of lost
_DIGEST_BYTES = 8
_MOST_EMPTY_BYTES = 1 << 16  # a map takes well below this and a byte for each chunk of the device


class BadMapError(CowError):
    """A map that cannot be trusted; the sentence says what is wrong with it."""


class LayerMap(NamedTuple):
    """What a map says. The generation grows with each map of a layer; `written_ns` is 0 when there was no write."""

    layer: int
    generation: int
    written_ns: int
    held: BitMap64
    lost: BitMap64


class MapImage(NamedTuple):
    """The content for a `map` file."""

    generation: int
    content: bytes


def encode(what: LayerMap) -> MapImage:
    """The content of the file."""
    what.held.run_optimize()
    held, lost = what.held.serialize(), what.lost.serialize()
    header = _HEADER.pack(
        MAP_MAGIC, MAP_FORMAT, what.layer, what.generation, what.written_ns, len(held), len(lost)
    )  # fmt: skip
    content = header + held + lost
    return MapImage(what.generation, content + xxh3_64_digest(content))


def replace(directory: Directory, image: MapImage) -> None:
    """Put a new map into the layer's directory, in the place of the old one; durable on return. Raises OSError."""
    with suppress(FileNotFoundError):
        directory.unlink(NEW_MAP_NAME)  # after a crash during the rename it may be the same file as the map
    file = directory.open(NEW_MAP_NAME, create=True)
    try:
        file.pwrite(image.content, 0)
        file.sync()
    except (OSError, SyncError):
        with suppress(OSError):  # on a full disk its room is needed
            directory.unlink(NEW_MAP_NAME)
        raise
    finally:
        file.close()
    directory.rename(NEW_MAP_NAME, FILE_NAME)
    directory.sync()


def read(file: File, layer: int, chunks: int) -> LayerMap:
    """Read the map of a layer of a device with that many chunks. Raises BadMapError, and OSError when a disk fails."""
    return _decode(_read_content(file, chunks), layer, chunks)


def _read_content(file: File, chunks: int) -> bytes:
    """The file's content; no more is read than a map can have."""
    header = file.pread(_HEADER.size, 0).ljust(_HEADER.size, b"\0")
    *_, held_bytes, lost_bytes = _HEADER.unpack(header)
    size = file.size_bytes
    if size != _HEADER.size + held_bytes + lost_bytes + _DIGEST_BYTES or size > chunks + _MOST_EMPTY_BYTES:
        raise BadMapError(f"has {size} bytes, which is not what its header says")
    return file.pread(size, 0)


def _decode(content: bytes, layer: int, chunks: int) -> LayerMap:
    body, digest = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
    if xxh3_64_digest(body) != digest:
        raise BadMapError("does not match its checksum")
    magic, format_number, layer_id, generation, written_ns, held_bytes, lost_bytes = _HEADER.unpack_from(body)
    if (magic, format_number, layer_id) != (MAP_MAGIC, MAP_FORMAT, layer):
        raise BadMapError("is that of another layer, so the store's files were moved")
    lost_at = _HEADER.size + held_bytes
    try:
        held = BitMap64.deserialize(body[_HEADER.size : lost_at])
        lost = BitMap64.deserialize(body[lost_at : lost_at + lost_bytes])
    except (ValueError, IndexError) as error:
        raise BadMapError(f"cannot be understood ({error})") from error
    if any(one and one.max() >= chunks for one in (held, lost)):
        raise BadMapError("names chunks beyond the device's end")
    return LayerMap(layer, generation, written_ns, held, lost)
