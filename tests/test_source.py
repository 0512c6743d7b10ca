"""What must hold of the source itself: imports point one way, invariants and formats are named where they are kept."""

import ast
import re
from pathlib import Path

import cow
import hcpfs
from cow import catalog, journal, layer, layermap, sums

COW = Path(cow.__file__).parent
HCPFS = Path(hcpfs.__file__).parent
ROOT = COW.parent

# Each module may import only from rows above its own; modules of one row do not import each other.
LAYERS = [
    {
        "cow.clock",
        "cow.errors",
        "cow.holding",
        "cow.limits",
        "cow.memory",
        "cow.offload",
        "cow.rowsum",
        "cow.superblock",
        "cow.trial",
        "cow.witness",
    },
    {"cow.geometry", "cow.passing", "cow.unwritable"},
    {"cow.contents", "cow.device"},
    {
        "cow.ailing",
        "cow.behind",
        "cow.catalog",
        "cow.elsewhere",
        "cow.fingerprint",
        "cow.gate",
        "cow.journal",
        "cow.layerfiles",
    },
    {"cow.inodes", "cow.layermap", "cow.sums"},
    {"cow.layer"},
    {"cow.chain", "cow.commits", "cow.presence", "cow.recovery"},
    {"cow.preserver", "cow.rescue", "cow.space"},
    {"cow.footing", "cow.housekeeping"},
    {"cow.secondplace"},
    {"cow.origin"},
    {"cow.flatten", "cow.image", "cow.origins", "cow.recognition"},
    {"cow.snapshot"},
    {"cow.damage", "cow.removal"},
    {"cow.store"},
    {"cow.forecast"},
    {"cow.admission"},
    {"cow.opening"},
    {"cow.scrub"},
    {"cow"},
    {"hcpfs"},
    {"hcpfs.terminal"},
    {
        "hcpfs.aside",
        "hcpfs.background",
        "hcpfs.beneath",
        "hcpfs.handles",
        "hcpfs.live",
        "hcpfs.loops",
        "hcpfs.process",
        "hcpfs.protocol",
        "hcpfs.superblock",
        "hcpfs.reaching",
        "hcpfs.supervisor",
        "hcpfs.text",
        "hcpfs.truncating",
        "hcpfs.threads",
    },
    {"hcpfs.openfiles", "hcpfs.probe", "hcpfs.record"},
    {"hcpfs.leftovers", "hcpfs.users"},
    {"hcpfs.busy", "hcpfs.doomed", "hcpfs.namespaces", "hcpfs.stack", "hcpfs.writers"},
    {"hcpfs.usage"},
    {
        "hcpfs.above",
        "hcpfs.freezer",
        "hcpfs.ground",
        "hcpfs.mountpoint",
        "hcpfs.quiesce",
        "hcpfs.readahead",
        "hcpfs.remount",
        "hcpfs.tree",
        "hcpfs.who",
        "hcpfs.writeback",
    },
    {"hcpfs.ending", "hcpfs.fastpath", "hcpfs.operations", "hcpfs.options", "hcpfs.rebuild"},
    {"hcpfs.notes", "hcpfs.session", "hcpfs.stores", "hcpfs.unprivileged"},
    {"hcpfs.mount", "hcpfs.recover", "hcpfs.unmount"},
    {"hcpfs.cli"},
    {"hcpfs.__main__"},
]
KNOWN_INVARIANTS = {*range(1, 11), 12}  # 11 is of the mode that follows a disk, which is not there yet
RANK = {module: rank for rank, modules in enumerate(LAYERS) for module in modules}


def _sources() -> dict[str, Path]:
    found = {}
    for package in (COW, HCPFS):
        for path in package.glob("*.py"):
            name = package.name if path.stem == "__init__" else f"{package.name}.{path.stem}"
            found[name] = path
    return found


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} & RANK.keys() or {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def test_every_module_has_its_place() -> None:
    assert _sources().keys() == RANK.keys()


def test_imports_point_one_way() -> None:
    wrong = [
        f"{module} imports {other}"
        for module, path in _sources().items()
        for other in _imports(path) & RANK.keys()
        if RANK[other] >= RANK[module]
    ]
    assert wrong == []


def test_the_engine_knows_no_fuse_and_no_command_line() -> None:
    for module, path in _sources().items():
        outside = {name.partition(".")[0] for name in _imports(path)}
        if module.partition(".")[0] == "cow":
            assert not outside & {"pyfuse3", "click", "rich", "hcpfs"}, module
        elif module not in ("hcpfs.operations", "hcpfs.session"):
            assert "pyfuse3" not in outside, module


def test_every_module_says_its_job() -> None:
    assert [module for module, path in _sources().items() if not ast.get_docstring(ast.parse(path.read_text()))] == []


def test_every_invariant_is_kept_somewhere_and_none_is_unknown() -> None:
    named = {number for path in _sources().values() for number in re.findall(r"# I(\d+)", path.read_text())}
    named |= {number for path in _sources().values() for number in re.findall(r"\(I(\d+)\)", path.read_text())}
    stated = set(re.findall(r"^- \*\*I(\d+) ", (COW / "DESIGN.md").read_text(), re.MULTILINE))
    assert named == stated == {str(number) for number in KNOWN_INVARIANTS}


def test_tests_name_known_invariants() -> None:
    for path in (ROOT / "tests").rglob("test_*.py"):
        for name in re.findall(r"def (test_(?:i\d+_)+)", path.read_text()):
            assert all(int(number) in KNOWN_INVARIANTS for number in re.findall(r"i(\d+)_", name)), (path, name)


def test_the_format_document_describes_what_the_code_writes() -> None:
    text = (COW / "FORMAT.md").read_text()
    headings = set(re.findall(r"^#+ (.+)$", text, re.MULTILINE))
    for kind in journal.Kind:
        assert f"{kind.name} ({kind.value})" in headings
    for constant, value in {
        "FILE_MAGIC": journal.FILE_MAGIC.decode(),
        "RECORD_MAGIC": journal.RECORD_MAGIC.decode(),
        "MAP_MAGIC": layermap.MAP_MAGIC.decode(),
        "SECTOR_BYTES": journal.SECTOR_BYTES,
        "FILE_BYTES": journal.FILE_BYTES,
        "MAP_FORMAT": layermap.MAP_FORMAT,
        "SUM_BYTES": sums.SUM_BYTES,
        "SEGMENT_CHUNKS": layer.SEGMENT_CHUNKS,
        "FORMAT": catalog.FORMAT,
    }.items():
        assert re.search(rf"`{constant}`[^\n]*`{value}`", text), constant
    for table, columns in re.findall(r"CREATE TABLE (\w+) \((.*?)\n\)", catalog._SCHEMA, re.DOTALL):
        assert f"Table `{table}`" in headings
        for column in re.findall(r"^    ([a-z_]+) ", columns, re.MULTILINE):
            assert f"`{column}`" in text, f"{table}.{column}"
