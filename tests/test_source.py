"""What must hold of the source itself: imports point one way, invariants and formats are named where they are kept."""

import ast
import re
import subprocess
import sys
from pathlib import Path

from pyroaring import BitMap64

import cow
import hcpfs
from cow.layers import layer, layermap, sums
from cow.layers.sets import LayerSets
from cow.records import catalog, journal, rows

COW = Path(cow.__file__).parent
HCPFS = Path(hcpfs.__file__).parent
ROOT = COW.parent

KNOWN_INVARIANTS = {*range(1, 11), 12}  # 11 is of the mode that follows a disk, which is not there yet


def _sources() -> dict[str, Path]:
    found = {}
    for package in (COW, HCPFS):
        for path in package.rglob("*.py"):
            parts = path.relative_to(package.parent).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def test_imports_point_one_way_through_the_rooms() -> None:
    """The contracts in pyproject.toml, as scripts/check has them checked."""
    command = [Path(sys.executable).parent / "lint-imports", "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_rooms_have_nothing_of_their_own() -> None:
    """A process that locks its memory loads what it imports and no more: a room is a docstring."""
    for module, path in _sources().items():
        if path.stem == "__init__":
            found = {type(node) for node in ast.parse(path.read_text()).body}
            assert found <= {ast.Expr, ast.Assign}, module


def test_the_sets_of_a_layer_are_changed_by_the_layer_alone() -> None:
    sets = {name for name, value in vars(LayerSets()).items() if isinstance(value, (BitMap64, bool))}
    assert sets == {"held", "lost", "uncommitted", "intended", "dirty"}
    for module, path in _sources().items():
        for node in ast.walk(ast.parse(path.read_text())):
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            for target in targets:
                if isinstance(target, ast.Attribute) and ast.unparse(target.value) != "self":
                    assert target.attr not in sets, f"{module}, line {node.lineno}: {ast.unparse(node)}"


def test_the_engine_knows_no_fuse_and_no_command_line() -> None:
    for module, path in _sources().items():
        outside = {name.partition(".")[0] for name in _imports(path)}
        if module.partition(".")[0] == "cow":
            assert not outside & {"pyfuse3", "click", "rich", "hcpfs"}, module
        elif module not in ("hcpfs.daemon.operations", "hcpfs.daemon.session"):
            assert "pyfuse3" not in outside, module


#: names that begin so and are public, or none of ours
_NO_ATTRIBUTES = {"_replace", "_asdict", "_make", "_fields", "_exit", "_getframe", "_core", "_next_send_fn"}


def _looks_inside(path: Path) -> list[str]:
    """The private attributes of others that a test looks at: those that its file does not define itself."""
    tree = ast.parse(path.read_text())
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and re.match("_[a-z]", node.attr)]
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    own |= {node.attr for node in nodes if isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"}
    return [
        f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}"
        for node in nodes
        if node.attr not in own | _NO_ATTRIBUTES
        and ast.unparse(node.value) != "self"
        and "_core." not in ast.unparse(node)
    ]


def test_tests_look_inside_in_one_place_alone() -> None:
    tests = [path for path in (ROOT / "tests").rglob("*.py") if path.name != "inside.py"]
    assert [found for path in tests for found in _looks_inside(path)] == []


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


def test_the_states_of_snapshots_stand_where_they_are_read() -> None:
    states = [state.value for state in rows.State]
    found = re.search(r"CHECK \(state IN \((.*?)\)\)", catalog._SCHEMA)
    assert found is not None
    assert re.findall(r"'(\w+)'", found[1]) == states
    assert f"`state` ({', '.join(states)})" in (COW / "FORMAT.md").read_text()
    reference = (COW.parent / "hcpfs" / "REFERENCE.md").read_text()
    shown = reference.partition("| state | means |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| `(\w+)` \|", shown, re.MULTILINE) == [one for one in states if one != rows.State.PENDING]
