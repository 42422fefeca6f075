"""Imports run one way: the ladder of docs/architecture.md, read from the sources and tried in fresh processes."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Each room, the rooms it may import, and what else it may import beside the standard library.
LADDER: dict[str, tuple[set[str], set[str]]] = {
    "whisperd": (set(), set()),
    "whisperd.__main__": ({"whisperd.daemon"}, set()),
    "whisperd.protocol": (set(), {"msgpack"}),
    "whisperd.daemon": ({"whisperd.protocol"}, {"click", "msgpack"}),
    "whisperd.fetch": ({"whisperd.protocol"}, {"yt_dlp"}),
    "whisperd.audio": ({"whisperd.protocol"}, {"av"}),
    "whisperd.model": (
        {"whisperd.protocol"},
        {"torch", "whisper", "numpy", "safetensors", "silero_vad", "msgpack"},
    ),
    "whisperctl": ({"whisperd.protocol", "whisperctl.dashboard"}, {"click", "pysubs2"}),
    "whisperctl.dashboard": ({"whisperd.protocol", "whisperctl"}, {"rich"}),
}
# Each heavy library has one room that knows it.
OWNERS = {
    "av": "whisperd.audio",
    "rich": "whisperctl.dashboard",
    "safetensors": "whisperd.model",
    "silero_vad": "whisperd.model",
    "torch": "whisperd.model",
    "whisper": "whisperd.model",
    "sqlite3": "whisperd.daemon",
    "yt_dlp": "whisperd.fetch",
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(module: str) -> str:
    """Return the room a module lies in: the longest name of the ladder that it begins with."""
    names = [name for name in LADDER if module == name or module.startswith(name + ".")]
    found = max(names, key=len)
    # `whisperd` itself is its __init__ alone: a folder beside the known ones needs a place on the ladder.
    assert found != "whisperd" or module == "whisperd", f"{module} lies in no room that the ladder knows"
    return found


def imports(path: Path) -> Iterator[str]:
    """Yield every module that a file imports, also inside functions and for type checkers."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports name their module in full here"
            module = node.module or ""
            # `from whisperd.protocol import logs` names a module; `from whisperd import __version__` does not.
            for alias in node.names:
                is_module = (ROOT / module.replace(".", "/") / f"{alias.name}.py").exists()
                is_package = (ROOT / module.replace(".", "/") / alias.name / "__init__.py").exists()
                yield f"{module}.{alias.name}" if is_module or is_package else module
        elif isinstance(node, ast.Call) and called(node) in ("__import__", "import_module"):
            if isinstance(node.args[0], ast.Constant):
                yield str(node.args[0].value)
            else:  # a lazy import by a table: any module that the file names
                yield from module_names(path)


def called(node: ast.Call) -> str:
    return str(getattr(node.func, "id", getattr(node.func, "attr", "")))


def module_names(path: Path) -> Iterator[str]:
    """Yield the strings of a file that name a module of ours."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Constant) and re.fullmatch(r"(whisperd|whisperctl)(\.\w+)+", str(node.value)):
            yield str(node.value)


SOURCES = sorted(path for folder in ("whisperd", "whisperctl") for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_the_ladder(path: Path) -> None:
    own = room(module_name(path))
    rooms, libraries = LADDER[own]
    for module in imports(path):
        top = module.partition(".")[0]
        if top in ("whisperd", "whisperctl"):
            assert room(module) in rooms | {own, "whisperd"}, f"{path.name} imports {module}"
        elif top not in sys.stdlib_module_names:
            assert top in libraries, f"{path.name} imports {module}"
        assert own == OWNERS.get(top, own), f"{top} belongs to {OWNERS.get(top)}"


@pytest.mark.parametrize("own", LADDER)
def test_the_ladder_allows_no_library_that_nobody_imports(own: str) -> None:
    modules = {module for path in SOURCES if room(module_name(path)) == own for module in imports(path)}
    assert LADDER[own][1] <= {module.partition(".")[0] for module in modules}


@pytest.mark.parametrize(
    "package", ["whisperd.daemon", "whisperd.model", "whisperd.protocol", "whisperd.fetch", "whisperctl"]
)
def test_inside_a_room_imports_run_one_way_too(package: str) -> None:
    """Folders and single modules of a room import each other in one direction."""
    graph: dict[str, set[str]] = {}
    depth = package.count(".") + 1
    for path in SOURCES:
        name = module_name(path).split(".")
        if name[:depth] == package.split(".") and len(name) > depth:
            others = (module.split(".") for module in imports(path))
            known = {other[depth] for other in others if other[:depth] == package.split(".") and len(other) > depth}
            graph.setdefault(name[depth], set()).update(known - {name[depth]})
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_the_daemons_rooms_know_only_those_before_them() -> None:
    """In the order of docs/architecture.md, row by row and within a row."""
    page = (ROOT / "docs/architecture.md").read_text()
    table = page.partition("| in `whisperd/daemon/` |")[2].partition("\n\n")[0]
    order = re.findall(r"`(\w+)/?`", " ".join(row.split("|")[1] for row in table.splitlines()[2:]))
    assert len(order) == len(set(order))
    for path in SOURCES:
        name = module_name(path).split(".")
        if name[:2] == ["whisperd", "daemon"] and len(name) > 2:
            known = order[: order.index(name[2]) + 1]
            for other in (module.split(".") for module in imports(path)):
                assert other[:2] != name[:2] or other[2] in known, f"{path} imports {other}"


def loaded(statement: str) -> set[str]:
    """Return the modules that a fresh Python has loaded after a statement."""
    script = f"{statement}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


HEAVY = {"torch", "av", "whisper", "yt_dlp", "numpy", "numba", "tiktoken"}


@pytest.mark.parametrize(
    "statement",
    [
        "import whisperctl.cli",
        "from whisperctl import Client; Client",
        "import whisperctl.compat",
        "import whisperctl.inspection",
        "import whisperctl.watching",
    ],
)
def test_the_client_is_light(statement: str) -> None:
    heavy = HEAVY | {"sqlite3", "psutil", "rich", "pysubs2", "importlib.metadata", "asyncio", "whisperd.daemon"}
    assert not loaded(statement) & heavy


def test_the_daemon_is_light() -> None:
    assert not loaded("import whisperd.daemon.main") & (HEAVY | {"rich", "pysubs2", "whisperctl"})


@pytest.mark.parametrize("module", ["whisperd.audio.copier", "whisperd.audio.decoder"])
def test_the_audio_helpers_know_no_model(module: str) -> None:
    assert not loaded(f"import {module}") & {"torch", "whisper", "sqlite3", "whisperd.daemon", "click"}


def test_the_fetch_helper_knows_no_audio_and_no_model() -> None:
    assert not loaded("import whisperd.fetch.fetcher") & {"torch", "whisper", "av", "whisperd.daemon", "click"}


def test_every_folder_is_a_package() -> None:
    """One without `__init__.py` works in a checkout and is missing from an installation."""
    folders = {path.parent for path in SOURCES}
    assert not {str(folder) for folder in folders if not (folder / "__init__.py").exists()}
