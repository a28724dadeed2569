"""What keeps the house readable: its size, its imports, the length of its signatures."""

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

import gammabeta
from gammabeta.cli.app import app

ROOT = Path(gammabeta.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
#: Rooms that stand on the library and are counted apart: the most lines of each, and its command if any.
APART = {
    "lab": (2_500, "lab.py"),
    "studies": (3_200, "reproduce.py"),
    "measure": (800, "bench.py"),
    "guard": (850, None),
}
MOST_PARAMETERS = 7
# Signatures that mirror torch's, commands (an option is a parameter), and public functions with keywords.
MIRRORS = {
    "functional/__init__.py",
    "reference.py",
    "nn/layer.py",
    "nn/frozen.py",
    "nn/ghost.py",
    "nn/renorm.py",
    "nn/sync.py",
}
COMMANDS = {command.callback.__name__ for command in app.registered_commands if command.callback}
PUBLIC = {
    "doctor/diagnosis.py:diagnose",
    "stats/recalibrate.py:recalibrate",
    "train/fitting.py:fit",
    "train/network.py:__init__",
}


def place(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path) for path in FILES}


def imports(path: Path) -> Iterator[tuple[ast.ImportFrom, str, str]]:
    """``(node, module, name)`` of each name that a file imports from this package."""
    package = module_of(path).split(".")
    package = package if path.name == "__init__.py" else package[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            if module.split(".")[0] == "gammabeta":
                for alias in node.names:
                    inner = f"{module}.{alias.name}"
                    yield node, inner if inner in MODULES else module, alias.name


def room_of(path: Path) -> str:
    """The room apart that a file is in, or ``"core"``."""
    for room, (_, command) in APART.items():
        if place(path).startswith(f"{room}/") or place(path) == f"cli/{command}":
            return room
    return "core"


def lines_in(room: str) -> int:
    files = [path for path in FILES if room_of(path) == room]
    return sum(path.read_text(encoding="utf-8").count("\n") for path in files)


@pytest.mark.parametrize("room", APART)
def test_size_of_rooms_apart(room):
    assert 0 < lines_in(room) <= APART[room][0]


def test_size():
    assert lines_in("core") <= 38_000
    assert sum(room_of(path) == "core" for path in FILES) <= 229


def test_no_function_takes_more_than_seven_parameters():
    wide = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            names = names[1:] if names[:1] in (["self"], ["cls"]) else names
            triton = any("triton" in ast.unparse(decorator) for decorator in node.decorator_list)
            allowed = triton or place(path) in MIRRORS or f"{place(path)}:{node.name}" in PUBLIC
            command = place(path).startswith("cli/") and node.name in COMMANDS
            if len(names) > MOST_PARAMETERS and not allowed and not command:
                wide.append(f"{place(path)}:{node.name} has {len(names)}")
    assert not wide


def test_rooms_import_no_private_names_of_each_other():
    doors = []
    for path in FILES:
        here = module_of(path) if path.name == "__init__.py" else module_of(path).rpartition(".")[0]
        for _, module, name in imports(path):
            there = module.rpartition(".")[0]
            private = name.startswith("_") and not name.startswith("__")
            hidden = any(part.startswith("_") and not part.startswith("__") for part in module.split("."))
            if (hidden and there != here) or private:
                doors.append(f"{place(path)}: {module}.{name}")
    assert not doors


def test_no_circle_of_imports():
    """Imports inside functions count too; the front door, which names everything, is left out."""
    graph = {module_of(path): {module for _, module, _ in imports(path)} for path in FILES}
    graph.pop("gammabeta")
    finished: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join((*way, module))
        if module not in finished:
            for other in sorted(graph.get(module, ())):
                if other != module:
                    visit(other, (*way, module))
            finished.add(module)

    for module in sorted(graph):
        visit(module, ())


def test_public_functions_keep_their_keywords():
    assert {"samples", "forward_fn"} <= set(inspect.signature(gammabeta.recalibrate).parameters)
    assert {"loss", "optimizer", "example"} <= set(inspect.signature(gammabeta.diagnose).parameters)
