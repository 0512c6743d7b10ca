"""`hcpfs verify`: finds what is damaged, names it, and with --repair gives up that and nothing else."""

import os
import random
import shutil
import sqlite3
import subprocess
from pathlib import Path

import pytest

from tests.support.sandbox import HCPFS, Sandbox, Served, run

MIB = 1 << 20
CHUNK = 4096


@pytest.fixture
def served(sandbox: Sandbox) -> Served:
    """Snapshots `old` and `new`, with chunks preserved for both, and writes to `new`."""
    random_ = random.Random(1)
    served = sandbox.mount(sandbox.disk(content=random_.randbytes(8 * MIB)))
    for name in ("old", "new"):
        (served.snaps / name).mkdir()
        with served.live.open("r+b") as live:
            live.seek(MIB if name == "new" else 0)
            live.write(random_.randbytes(2 * MIB))
            live.flush()
            os.fsync(live.fileno())
    with served.image("new").open("r+b") as image:
        image.seek(6 * MIB)
        image.write(random_.randbytes(MIB))
        os.fsync(image.fileno())
    return served


def _verify(place: Path, *options: str) -> subprocess.CompletedProcess[str]:
    done = run(*HCPFS, "verify", place, *options, check=False)
    assert "Traceback" not in done.stderr
    return done


def _layers(store: Path, role: str) -> list[Path]:
    with sqlite3.connect(store / "catalog.sqlite") as catalog:
        rows = catalog.execute("SELECT id FROM layers WHERE role = ? ORDER BY id", (role,)).fetchall()
    catalog.close()
    return [store / "layers" / f"{row[0]:016x}" for row in rows]


def _flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))


def test_a_good_store_is_found_good_online_offline_and_after_a_crash(served: Served) -> None:
    assert _verify(served.path).returncode == 0
    done = _verify(served.store)
    assert done.returncode == 1
    assert "is in use by another hcpfs" in done.stderr
    served.kill()
    before = {path: path.read_bytes() for path in served.store.rglob("*") if path.is_file()}
    assert _verify(served.store).stdout == "all is well\n"
    after = {path: path.read_bytes() for path in served.store.rglob("*") if path.is_file()}
    changed = {path.name for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    assert all(name.startswith("catalog.sqlite") for name in changed)  # SQLite's log is folded in
    assert _verify(served.store, "--repair").returncode == 0


@pytest.mark.parametrize("online", [True, False], ids=["online", "offline"])
def test_a_flipped_bit_is_named_and_repair_gives_up_that_chunk_only(served: Served, online: bool) -> None:
    moments = {name: served.image(name).read_bytes() for name in ("old", "new")}
    if not online:
        served.umount()
    place = served.path if online else served.store
    _flip(_layers(served.store, "preserved")[0] / "data.0000", 5 * CHUNK + 17)
    done = _verify(place)
    assert done.returncode == 3
    assert f"image disk.img, offset {5 * CHUNK}, length {CHUNK}: damaged" in done.stdout
    assert "snapshots that read it: old\n" in done.stdout
    assert _verify(place).returncode == 3
    done = _verify(place, "--repair")
    assert done.returncode == 4
    assert "1 things were found, 1 of them repaired" in done.stdout
    assert _verify(place).returncode == 0
    if not online:
        served = served.again()
    assert served.info("old")["state"] == "damaged"
    assert (served.snaps / "old" / "lost").read_text() == f"{5 * CHUNK} {CHUNK} disk.img\n"
    assert served.image("new").read_bytes() == moments["new"]
    fd = os.open(served.image("old"), os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)  # the kernel's cache still has the right bytes
    assert os.pread(fd, 4 * CHUNK, 0) == moments["old"][: 4 * CHUNK]
    assert os.pread(fd, 4 * CHUNK, 64 * CHUNK) == moments["old"][64 * CHUNK : 68 * CHUNK]
    with pytest.raises(OSError, match="Input/output error"):
        os.pread(fd, CHUNK, 5 * CHUNK)
    os.close(fd)


def test_a_damaged_write_to_a_snapshot_is_named(served: Served) -> None:
    served.umount()
    delta = _layers(served.store, "delta")[1]
    _flip(delta / "data.0000", 6 * MIB)
    done = _verify(served.store, "--repair")
    assert done.returncode == 4
    assert f"offset {6 * MIB}, length {CHUNK}: damaged" in done.stdout
    assert "snapshots that read it: new\n" in done.stdout


def test_misplaced_and_stale_chunks_are_found(served: Served) -> None:
    """A chunk that is good, with its checksum, but in the place of another one; and one of another layer."""
    served.umount()
    first, second = _layers(served.store, "preserved")
    for name, unit in (("data.0000", CHUNK), ("sums", 8)):
        content = bytearray((first / name).read_bytes())
        content[9 * unit : 10 * unit] = content[8 * unit : 9 * unit]
        (first / name).write_bytes(content)
        other = bytearray((second / name).read_bytes())
        place = slice(300 * unit, 301 * unit)
        other[place] = (first / name).read_bytes()[place]
        (second / name).write_bytes(other)
    done = _verify(served.store)
    assert done.returncode == 3
    assert f"offset {9 * CHUNK}, length {CHUNK}" in done.stdout
    assert f"offset {300 * CHUNK}, length {CHUNK}" in done.stdout
    assert len(done.stdout.splitlines()) == 3


@pytest.mark.parametrize("what", ["data.0000", "sums", "map", "layer", "journal", "old map"])
def test_i4_missing_and_stale_files_are_found_and_nothing_wrong_is_read(served: Served, what: str) -> None:
    moments = {name: served.image(name).read_bytes() for name in ("old", "new")}
    served = served.remount()
    layer = _layers(served.store, "preserved")[0]
    old_map = (layer / "map").read_bytes()
    (served.snaps / "new").rmdir()  # its layer serves `old` now, and the map of that one changes
    with served.live.open("r+b") as live:
        live.seek(4 * MIB)
        live.write(os.urandom(MIB))
    served.umount()
    match what:
        case "layer":
            shutil.rmtree(layer)
        case "journal":
            for path in served.store.glob("journal.*"):
                path.unlink()
        case "old map":
            newest = _layers(served.store, "preserved")[-1]
            assert newest != layer
            stale = (newest / "map").read_bytes()
            served = served.again()
            with served.live.open("r+b") as live:
                live.seek(7 * MIB)
                live.write(os.urandom(MIB))
            served.umount()
            assert (newest / "map").read_bytes() != stale != old_map
            (newest / "map").write_bytes(stale)
        case _:
            (layer / what).unlink()
    assert _verify(served.store).returncode == 3
    served = served.again()
    fd = os.open(served.image("old"), os.O_RDONLY)
    read = 0
    for offset in range(0, 8 * MIB, CHUNK):
        try:
            assert os.pread(fd, CHUNK, offset) == moments["old"][offset : offset + CHUNK]
            read += 1
        except OSError:
            continue
    os.close(fd)
    assert read == 0 or what in ("data.0000", "sums")
    assert served.info("old")["state"] in ("damaged", "invalid")
    assert served.info("old")["reason"]
    assert _verify(served.path, "--repair").returncode in (0, 4)
    assert _verify(served.path).returncode == 0


def test_rows_whose_snapshot_is_gone_are_gone_after_a_repair(served: Served) -> None:
    served.umount()
    with sqlite3.connect(served.store / "catalog.sqlite") as catalog:
        catalog.execute("DELETE FROM snapshots WHERE name = CAST('old' AS BLOB)")
    catalog.close()
    assert _verify(served.store, "--repair").returncode == 4
    assert _verify(served.store).returncode == 0
    served = served.again()
    assert [path.name for path in served.snaps.iterdir()] == ["new"]
    assert served.info("new")["state"] == "invalid"
    (served.snaps / "fresh").mkdir()
    assert served.image("fresh").read_bytes() == served.live.read_bytes()


def test_an_edited_catalog_is_refused_and_repair_gives_up_its_snapshots(sandbox: Sandbox, served: Served) -> None:
    served.umount()
    with sqlite3.connect(served.store / "catalog.sqlite") as catalog:
        catalog.execute("UPDATE layers SET snapshot = 2 WHERE id = 1")
    catalog.close()
    assert "do not match their checksum" in sandbox.refusal(*served.sources, served.path, "--store", served.store)
    assert _verify(served.store).returncode == 1
    done = _verify(served.store, "--repair")
    assert done.returncode == 4
    assert "all snapshots were given up" in done.stdout
    assert _verify(served.store).returncode == 0
    served = served.again()
    assert served.info("old")["state"] == served.info("new")["state"] == "invalid"
    (served.snaps / "old").rmdir()
    (served.snaps / "fresh").mkdir()
    assert served.image("fresh").read_bytes() == served.live.read_bytes()


@pytest.mark.parametrize("repair", [False, True])
def test_i4_a_catalog_that_lost_its_latest_changes_is_noticed(sandbox: Sandbox, repair: bool) -> None:
    """SQLite passes over all of its -wal from the first damaged page on."""
    served = sandbox.mount(sandbox.disk(size=64 * MIB))
    (served.snaps / "s1").mkdir()
    wal = served.store / "catalog.sqlite-wal"
    before = wal.stat().st_size
    (served.snaps / "s2").mkdir()
    with served.live.open("r+b", buffering=0) as live:  # what no sample of the fingerprint has
        os.pwrite(live.fileno(), os.urandom(16 * 4096), 263 * 4096)
        os.fsync(live.fileno())
    served.kill()
    _flip(wal, before + 124)
    done = _verify(served.store)
    assert done.returncode == 3
    assert "the catalog is older" in done.stdout
    if repair:
        assert "the catalog is older" in _verify(served.store, "--repair").stdout
    served = served.again()
    assert repair or "the catalog is older" in served.status["found"]
    assert served.info("s1")["state"] == "suspect"
    with pytest.raises(OSError, match="Input/output error"), served.image("s1").open("rb", buffering=0) as image:
        os.pread(image.fileno(), 4096, 263 * 4096)


def test_repair_ends_where_a_map_is_gone(served: Served) -> None:
    served.umount()
    for layer in _layers(served.store, "preserved"):
        os.truncate(layer / "map", 0)
    assert _verify(served.store, "--repair").returncode == 4
    assert _verify(served.store).returncode == 0
    assert _verify(served.store, "--repair").returncode == 0


def test_what_is_no_store_is_left_alone(sandbox: Sandbox) -> None:
    places = [sandbox.path / "empty", sandbox.path / "missing", sandbox.disk()]
    places[0].mkdir(mode=0o700)
    for place in places:
        done = _verify(place)
        assert done.returncode == 1
        assert done.stderr.strip().startswith("hcpfs: ")
    assert sorted(path.name for path in sandbox.path.rglob("*") if path.name != "lock") == ["disk.img", "empty"]
