"""The edits of the engine's source, each of which takes out one check or one ordering edge, for mutations.py to hunt.

`ORDER` must show in what a power cut or another task sees, `CHECKS` in damaged stores, `AWAY` where a device is away.
"""

import importlib
import inspect
import sys
import textwrap
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from unittest.mock import patch


@dataclass(frozen=True)
class Edit:
    """`old` in the source of `function` (module:Class.function) becomes `new`."""

    what: str
    function: str
    old: str
    new: str

    @property
    def unchanged(self) -> "Edit":
        """The control: the function compiled anew as it is."""
        return replace(self, new=self.old)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The engine with the edit in it."""
        module_name, _, path = self.function.partition(":")
        module = importlib.import_module(f"cow.{module_name}")
        owner_name, _, name = path.rpartition(".")
        owner = getattr(module, owner_name) if owner_name else module
        source = inspect.getsource(inspect.getattr_static(owner, name))
        assert source.count(self.old) == 1, (
            f"{self.what}: {self.old!r} is in {self.function} {source.count(self.old)} times"
        )
        # In its own globals: what it is imported into, or inherited by, has other names.
        home = sys.modules[inspect.unwrap(getattr(owner, name)).__module__]
        namespace: dict[str, object] = {}
        exec(
            compile(textwrap.dedent(source.replace(self.old, self.new)), f"<{self.what}>", "exec"),
            vars(home),
            namespace,
        )
        original = inspect.getattr_static(owner, name)
        with ExitStack() as stack:
            stack.enter_context(patch.object(owner, name, namespace[name]))
            for other in [one for key, one in sys.modules.items() if key.startswith("cow.") and not owner_name]:
                if vars(other).get(name) is original:  # imported by name
                    stack.enter_context(patch.object(other, name, namespace[name]))
            yield


ORDER = [
    Edit(
        "a commit is applied before it is durable",
        "durable.commits:Commits.commit",
        "        async with holding(self._lock):\n",
        "        async with holding(self._lock):\n            apply()\n",
    ),
    Edit(
        "the origin is overwritten before the old bytes are preserved",
        "images.origin:Origin.write_waiting",
        "                await self._preserver.preserve(self, chunks_in([run]))\n",
        "                self.device.pwrite(data, offset)\n"
        "                await self._preserver.preserve(self, chunks_in([run]))\n",
    ),
    Edit(
        "old bytes are not preserved at all",
        "images.origin:Origin.write_waiting",
        "                await self._preserver.preserve(self, chunks_in([run]))\n",
        "                pass\n",
    ),
    Edit(
        "what was buffered overwrites the origin before the old bytes are preserved",
        "images.origin:Origin._take",
        "        await self._preserver.preserve(self, chunks)\n",
        "        write_out(self.device, contents)\n        await self._preserver.preserve(self, chunks)\n",
    ),
    Edit(
        "old bytes of what was buffered are not preserved at all",
        "images.origin:Origin._take",
        "        await self._preserver.preserve(self, chunks)\n",
        "",
    ),
    Edit(
        "a write in a chunk passes by an older one in the buffer",
        "images.origin:Origin._must_buffer",
        "if not self._is_preserved(chunk) or self._behind.touches(offset, length):",
        "if not self._is_preserved(chunk):",
    ),
    Edit(
        "a write of several chunks passes by an older one in the buffer",
        "images.origin:Origin._must_buffer",
        "        if self._behind.touches(offset, length):",
        "        if False:",
    ),
    Edit(
        "reads of the live image pass over the buffer",
        "images.origin:Origin.read_waiting",
        "await read_through(self._behind, offset, length, self._read_device)",
        "await self._read_device(offset, length)",
    ),
    Edit(
        "reads of the live image that need no waiting pass over the buffer",
        "images.origin:Origin.read_nowait",
        "self._behind.touches(offset, length)",
        "False",
    ),
    Edit(
        "reads in a chunk of an image that need no waiting pass over the buffer",
        "images.image:Image.read_nowait",
        "self._behind.touches(offset, length)",
        "length > CHUNK_BYTES and self._behind.touches(offset, length)",
    ),
    Edit(
        "reads of several chunks of an image that need no waiting pass over the buffer",
        "images.image:Image.read_nowait",
        "self._behind.touches(offset, length)",
        "length <= CHUNK_BYTES and self._behind.touches(offset, length)",
    ),
    Edit(
        "a write that needs no waiting comes in while an instant is taken",
        "images.origin:Origin.write_nowait",
        "self._gate.held",
        "False",
    ),
    Edit(
        "a write that needs no waiting overwrites what is not preserved",
        "images.origin:Origin.write_nowait",
        "(self._write_behind and not self._behind.is_long(length)) or self._may_overwrite(offset, length)",
        "True",
    ),
    Edit(
        "an image asks the layers that served it once",
        "images.view:View.layers",
        "self.version != self.epochs.version",
        "self.version < 0",
    ),
    Edit(
        "the memory of a long write is used for something else while it waits",
        "buffer.contents:Contents._put_extent",
        "            memory.keep()\n            self._kept.append(memory)\n",
        "            pass\n",
    ),
    Edit(
        "the memory of a long write is used for something else while it is written",
        "buffer.behind:Behind._flush",
        "            left = await self._take(taken.contents)\n",
        "            taken.contents.release()\n            left = await self._take(taken.contents)\n",
    ),
    Edit(
        "a sync does not wait for the buffer", "images.origin:Origin.sync", "        await self._behind.flush()\n", ""
    ),
    Edit(
        "a sync of an image does not wait for it", "images.image:Image.sync", "        await self._behind.flush()\n", ""
    ),
    Edit(
        "reads of an image pass over the buffer",
        "images.image:Image.read_waiting",
        "await read_through(self._behind, offset, length, self._read_beneath)",
        "await self._read_beneath(offset, length)",
    ),
    Edit(
        "a snapshot is taken with writes in the buffer",
        "store.store:Store.create_snapshot",
        "                    await self.origins.drain(DRAIN_SECONDS)\n"
        "                    async with self.inventory.lock:\n",
        "                    async with self.inventory.lock:\n",
    ),
    Edit(
        "a snapshot is recorded as valid before the origin is synced",
        "store.store:Store.create_snapshot",
        "            for origin in self.origins:\n                await origin.sync()\n"
        "            async with self.inventory.lock:\n                await self._finish(snapshot, evidence)\n",
        "            async with self.inventory.lock:\n                await self._finish(snapshot, evidence)\n"
        "            for origin in self.origins:\n                await origin.sync()\n",
    ),
    Edit(
        "no intent is recorded", "images.delta:Delta._announce", "        if not overwritten:\n", "        if True:\n"
    ),
    Edit(
        "an intent is recorded after the overwriting",
        "images.delta:Delta.write",
        "                    self._is_crowded = await self._announce(chunks)\n"
        "                    await offload(self._write_rows, chunks, rows, here=self._is_short(chunks))\n",
        "                    await offload(self._write_rows, chunks, rows, here=self._is_short(chunks))\n"
        "                    self._is_crowded = await self._announce(chunks)\n",
    ),
    Edit(
        "open intents are not carried over",
        "durable.commits:Commits._start_file",
        "            if layer.intended\n",
        "            if False\n",
    ),
    Edit(
        "journal files are dropped before the layers are saved",
        "durable.commits:Commits._save",
        "        saved = []\n",
        "        saved = []\n"
        "        self._journal.retire([number for number in checkpoint.journals if number in self._journal.numbers])\n",
    ),
    Edit(
        "recovery drops the journal before the layers are saved",
        "durable.recovery:_recover",
        "    if not _save(layers, catalog, journal, rehashed):\n",
        "    journal.retire(journal.numbers)\n    if not _save(layers, catalog, journal, rehashed):\n",
    ),
    Edit(
        "recovery does not rehash what was being overwritten",
        "durable.recovery:_recover",
        "        if layer.intended:\n",
        "        if False:\n",
    ),
    Edit(
        "recovery keeps half-taken snapshots", "durable.recovery:_drop_pending", "row.state == State.PENDING]", "False]"
    ),
    Edit(
        "recovery does not apply the journal",
        "durable.recovery:_apply",
        "    layer.commit(chunks_in(record.runs) - lost)\n",
        "",
    ),
    Edit(
        "recovery does not restore the checksums",
        "durable.recovery:_apply",
        "        lost |= _write_sums(layer, run, record.sums[at : at + 8 * run.chunks])\n",
        "",
    ),
    Edit("an heir does not inherit", "layers.epochs:Epochs.release", "self.add_layer(heir, layer)", "BitMap64()"),
    Edit(
        "the catalog hands the layers of a deleted snapshot to nobody",
        "store.removal:Removal.delete",
        "self._catalog.delete_snapshot, snapshot.id, heir)",
        "self._catalog.delete_snapshot, snapshot.id, None)",
    ),
    Edit(
        "a checkpoint saves what is not committed",
        "layers.layer:Layer.encode_map",
        "committed = self.held - self.uncommitted",
        "committed = self.held | self.uncommitted",
    ),
    Edit(
        "a sync of an image does not reach the journal",
        "images.delta:Delta._commit",
        "            await self._commits.commit([record], lambda: self.layer.commit(written))\n",
        "            self.layer.commit(written)\n",
    ),
    Edit(
        "a sync of an image passes over what was overwritten in place",
        "images.delta:Delta._commit",
        "written = self.layer.uncommitted | self.layer.intended",
        "written = self.layer.uncommitted | BitMap64()",
    ),
    Edit(
        "a layer is merged into another before the data is durable",
        "store.flatten:_copy",
        "    target.files.sync_data()\n",
        "",
    ),
    Edit(
        "a layer is merged into another before that is committed",
        "store.flatten:Flattener._move",
        "                await self._commits.commit([Record(kind, target.id, time.time_ns(), runs, sums)], apply)\n",
        "                apply()\n",
    ),
    Edit(
        "the row of a layer goes before its chunks are moved",
        "store.flatten:Flattener._merge",
        "            while source.known and",
        "            await trio.to_thread.run_sync(self._catalog.remove_layer, source.id)\n"
        "            while source.known and",
    ),
    Edit(
        "a merged layer keeps its row",
        "store.flatten:Flattener._drop",
        "            await trio.to_thread.run_sync(self._catalog.remove_layer, source.id)\n",
        "",
    ),
    Edit(
        "chunks are moved into a newer layer",
        "store.flatten:Flattener._pair",
        "small.id > other.id",
        "small.id < other.id",
    ),
    Edit(
        "chunks are moved that an older layer has",
        "store.flatten:Flattener._merge",
        "epochs.drop_shadowed(source)",
        "BitMap64()",
    ),
    Edit(
        "moved chunks keep their checksums",
        "store.flatten:_copy",
        "    target.sums.write_runs(runs, sums)\n",
        "    target.sums.write_runs(runs, source.sums.read_runs(runs))\n",
    ),
    Edit(
        "a read that had to wait does not look at the sets again",
        "images.view:View.read",
        "            if not self.is_overtaken(found):\n",
        "            if True:\n",
    ),
    Edit(
        "a read that was begun does not look at the sets again",
        "images.reading:Reading._is_right",
        "not self._beneath.is_overtaken(self._found)",
        "True",
    ),
    Edit(
        "a read of a snapshot that is begun passes over the buffer",
        "images.image:Image.begin_read",
        "not self._behind.touches(offset, length) and ",
        "",
    ),
    Edit(
        "a read of the live image that is begun passes over the buffer",
        "images.origin:Origin.begin_read",
        " or self._behind.touches(offset, length)",
        "",
    ),
    Edit(
        "the buffer is asked after what is beneath it",
        "images.handle:read_through",
        "    if not newer:\n        return await read_beneath(offset, length)\n",
        "    data = await read_beneath(offset, length)\n"
        "    return overlaid(data, offset, behind.pieces(offset, length))\n",
    ),
]

CHECKS = [
    Edit(
        "chunks of a read that was begun are not checked",
        "images.reading:Reading._is_right",
        " or not self._matches()",
        "",
    ),
    Edit("chunks are not checked", "layers.layer:Layer._check", "        if found != sums:\n", "        if False:\n"),
    Edit(
        "a chunk by itself is not checked",
        "layers.layer:Layer.read_chunk_nowait",
        "data if xxh3_64_digest(data, self.sums.seed_of(chunk)) == expected else None",
        "data",
    ),
    Edit("checksums know no place", "layers.sums:Sums.seed_of", "(self._seed + chunk) & MASK_64", "7"),
    Edit("maps are not checked", "layers.layermap:_decode", "xxh3_64_digest(body) != digest", "False"),
    Edit(
        "maps of other layers are taken",
        "layers.layermap:_decode",
        "(magic, format_number, layer_id) != (MAP_MAGIC, MAP_FORMAT, layer)",
        "False",
    ),
    Edit(
        "a missing map is an empty one",
        "layers.layer:Layer.load",
        "            if generation:\n",
        "            if False:\n",
    ),
    Edit(
        "journal sectors are not checked",
        "records.journal:_open_sector",
        "_seal(payload, number, sector) == raw",
        "True",
    ),
    Edit(
        "a missing journal is an empty one", "records.journal:Journal._all_records", "found < self._expected", "False"
    ),
    Edit("a short journal is a young one", "records.journal:Journal._read_file", "len(content) < FILE_BYTES", "False"),
    Edit(
        "a record may be missing between others",
        "records.journal:_records_of",
        "header is not None and header[1] > sequence",
        "False",
    ),
    Edit("the catalog is not checked", "records.catalog:Catalog._open", "self._sum.is_right()", "True"),
]
AWAY = [
    Edit(
        "a device that is away is taken for bad sectors",
        "durable.preserver:_copy_singly",
        "        job.away = job.origin.why_away(unread[0], error)\n",
        "        pass\n",
    ),
    Edit(
        "who writes to a device that is away is not told",
        "durable.preserver:Preserver.preserve",
        "                raise away\n",
        "                return\n",
    ),
    Edit(
        "what was not read when the device went away counts as copied",
        "durable.preserver:_copy_all",
        "job.keep_what_was_copied(copied - job.lost)",
        "job.lose_all(job.away)",
    ),
]
