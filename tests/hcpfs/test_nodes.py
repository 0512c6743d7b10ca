"""The nodes of the tree, without a mount: a new file is one class, and nothing else has to know of it."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from cow.config import Source
from cow.errors import NotFoundError
from cow.opening import open_store
from hcpfs.options import UsageError, parse_source
from hcpfs.quiesce.live import FIRST_INODE, LiveImages
from hcpfs.tree import kinds
from hcpfs.tree.access import Access
from hcpfs.tree.kinds import FIRST_IMAGE, LIVE, SNAPS, SnapshotText
from hcpfs.tree.nodes import ROOT, DirectoryAsFileError, NotDirectoryError, TextFile
from hcpfs.tree.tree import Tree


class Colour(TextFile):
    name, number = b"colour", 15

    def content(self) -> bytes:
        return b"blue\n"


class Name(SnapshotText):
    name, number = b"name", 15

    def content(self) -> bytes:
        return self._snapshot.name + b"\n"


@asynccontextmanager
async def _undisturbed() -> AsyncIterator[dict[str, str]]:
    yield {}


@asynccontextmanager
async def _tree(place: Path) -> AsyncIterator[Tree]:
    disk = place / "disk.img"
    disk.write_bytes(os.urandom(1 << 20))
    sources = [Source(b"disk.img", str(disk))]
    async with open_store(str(place / "store"), sources) as opened:
        yield Tree(opened, "/mnt", _undisturbed, Access(), LiveImages(opened.store.origins))


async def _read(tree: Tree, inode: int) -> bytes:
    opening = tree.open(inode, os.O_RDONLY)
    content = await tree.handles[opening.number].read_waiting(0, 1 << 20)
    tree.close(opening.number)
    return bytes(content)


def _names(tree: Tree, inode: int) -> list[bytes]:
    return [entry.name for entry in tree.entries(inode)]


def test_a_new_file_is_one_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "ROOT_FILES", (*kinds.ROOT_FILES, Colour))
    monkeypatch.setattr(kinds, "SNAPSHOT_FILES", (*kinds.SNAPSHOT_FILES, Name))

    async def main() -> None:
        async with _tree(tmp_path) as tree:
            before = tree.count_files()
            snapshot = await tree.mkdir(SNAPS, b"monday")
            assert tree.count_files() == before + 5  # the directory, its image, info, lost and name
            assert _names(tree, ROOT) == [b".", b"..", b"live", b"snaps", b"status", b"colour"]
            assert _names(tree, snapshot) == [b".", b"..", b"disk.img", b"info", b"lost", b"name"]
            for parent, name, content in ((ROOT, b"colour", b"blue\n"), (snapshot, b"name", b"monday\n")):
                inode = tree.lookup(parent, name)
                assert await _read(tree, inode) == content
                found = await tree.attributes(inode)
                assert (found.inode, found.mode, found.size) == (inode, 0o100400, len(content))

    trio.run(main)


def test_each_node_has_a_number_of_its_own(tmp_path: Path) -> None:
    async def main() -> None:
        async with _tree(tmp_path) as tree:
            snapshots = [await tree.mkdir(SNAPS, name) for name in (b"a", b"b")]
            found = [ROOT]
            for directory in (ROOT, LIVE, SNAPS, *snapshots):
                listed = [entry for entry in tree.entries(directory) if entry.name not in (b".", b"..")]
                cookies = [entry.cookie for entry in tree.entries(directory)]
                assert cookies == sorted(set(cookies))
                for entry in listed:
                    assert tree.lookup(directory, entry.name) == entry.inode
                    assert (await tree.attributes(entry.inode)).inode == entry.inode
                found += [entry.inode for entry in listed]
            assert len(found) == len(set(found)) == tree.count_files()
            await tree.rmdir(SNAPS, b"a")
            for inode in range(snapshots[0], snapshots[0] + FIRST_IMAGE + 1):
                with pytest.raises(NotFoundError):
                    await tree.attributes(inode)

    trio.run(main)


def test_a_file_is_no_directory_and_a_directory_no_file(tmp_path: Path) -> None:
    async def main() -> None:
        async with _tree(tmp_path) as tree:
            snapshot = await tree.mkdir(SNAPS, b"monday")
            files = (tree.lookup(ROOT, b"status"), tree.lookup(ROOT, b".verify"), FIRST_INODE, snapshot + FIRST_IMAGE)
            for inode in files:
                with pytest.raises(NotDirectoryError):
                    list(tree.entries(inode))
                with pytest.raises(NotDirectoryError):
                    tree.lookup(inode, b"name")
            for inode in (ROOT, LIVE, SNAPS, snapshot):
                with pytest.raises(DirectoryAsFileError):
                    tree.open(inode, os.O_RDONLY)

    trio.run(main)


@pytest.mark.parametrize("file", kinds.SNAPSHOT_FILES)
def test_no_image_takes_the_name_of_another_file_of_a_snapshot(file: type[SnapshotText]) -> None:
    with pytest.raises(UsageError, match="cannot name an image"):
        parse_source(f"{os.fsdecode(file.name)}=/dev/sdb")
