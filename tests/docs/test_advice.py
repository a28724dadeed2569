"""What messages and pages tell people to run can be run, and what they tell to install can be installed."""

import ast
import re
import shlex
import tomllib
from pathlib import Path

import pytest

import gammabeta
from gammabeta.cli.app import app, run
from gammabeta.errors import installing
from gammabeta.train.trackers import TRACKERS

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
PLACES = [
    path
    for pattern in ("src/**/*.py", "benchmarks/**/*.py", "docs/**/*.md", "*.md", ".ci/run")
    for path in sorted(ROOT.glob(pattern))
]
INSTALL = re.compile(r"pip install((?:\s+(?:-[-\w]+|\"[^\"]+\"|'[^']+'|[^\s`'\"()&;]+))+)")
OPTIONS_WITH_A_FILE = {"-c", "-r", "--constraint", "--requirement"}
# Projects on the index that are what their names say; none of ours is there.
OTHERS = {
    "timm",
    "pyyaml",
    "triton",
    "numba",
    "torch",
    "pytorchcv",
    "monai",
    "efficientnet-pytorch",
    "pillow-heif",
    "pyarrow",
    "lightning",
    "transformers",
    "pytorch-ignite",
    "netron",
    "weightwatcher",
}


def advice() -> list[tuple[str, list[str]]]:
    found = []
    for path in PLACES:
        for line in path.read_text("utf-8").splitlines():
            for match in INSTALL.finditer(line.replace('\\"', '"').replace("{extra}", "onnx")):
                words = [re.sub(r"(?<=\w)[.,]$", "", word.strip("\"'")) for word in match[1].split()]
                found.append((f"{path.relative_to(ROOT)}: {match[0]}", words))
    return found


def test_there_is_advice() -> None:
    assert len(advice()) >= 5
    for extra in ("onnx", "tensorboard"):
        assert f'".[{extra}]"' in installing(extra)


@pytest.mark.parametrize(
    ("line", "words"), advice(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_what_is_advised_can_be_installed(line: str, words: list[str]) -> None:
    """Of files, that the clone has them; of extras, that the project has them; of names, whose they are."""
    rest = iter(words)
    for word in rest:
        if word in OPTIONS_WITH_A_FILE:
            assert (ROOT / next(rest)).is_file(), line
        elif not word.startswith("-"):
            target, _, extras = word.partition("[")
            if target == ".":
                assert set(extras.rstrip("]").split(",")) - {""} <= set(PROJECT["optional-dependencies"]), (
                    line
                )
            else:
                name = re.split("[<>=~!{]", target)[0]
                assert name in OTHERS or not name, f"{line}: whose is {name}?"


def test_extras_that_messages_name_exist() -> None:
    """Each ``installing("...")`` in the source names an extra of the project."""
    source = "".join(path.read_text("utf-8") for path in Path(gammabeta.__file__).parent.rglob("*.py"))
    named = set(re.findall(r"installing\(['\"](\w+)['\"]\)", source))
    named |= set(TRACKERS)  # `installing(name)` of those
    assert {"onnx", "tensorboard"} <= named <= set(PROJECT["optional-dependencies"])


# --- commands ---------------------------------------------------------------------------------------------


def messages() -> list[tuple[str, str]]:
    """Every string of the source but docstrings, with a word for what is filled in; and where it stands."""
    found = []
    for path in sorted(Path(gammabeta.__file__).parent.rglob("*.py")):
        tree = ast.parse(path.read_text("utf-8"))
        within = {
            id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values
        }
        docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if id(node) in within | docs:
                continue
            if isinstance(node, ast.JoinedStr):
                text = "".join(
                    str(part.value) if isinstance(part, ast.Constant) else "PLACE" for part in node.values
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                text = node.value
            else:
                continue
            found.append((f"{path.name}:{node.lineno}", text))
    return found


def commands() -> list[tuple[str, str]]:
    """Every command line of ours in a message (in backticks, or all of it) and in the pages' shell blocks."""
    found = []
    for place, text in messages():
        lines = re.findall(r"`(gammabeta [^`]+)`", text)
        found += [(place, line) for line in lines or re.findall(r"^gammabeta (?=\w+ -).*$", text)]
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for block in re.findall(r"^```sh\n(.*?)^```", path.read_text("utf-8"), re.M | re.S):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if "gammabeta" in words[:1]:
                    found.append((path.name, shlex.join(words)))
    return found


def test_there_are_commands() -> None:
    lines = [line for _, line in commands()]
    assert any(line.startswith("gammabeta train --resume PLACE") for line in lines)
    assert any(line.startswith("gammabeta train --out PLACE") for line in lines)
    assert len(lines) >= 20


@pytest.mark.parametrize(("place", "line"), sorted(set(commands())))
def test_every_command_that_is_advised_is_one(
    place: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is run with --help behind it: all of it is parsed, options and commands, and nothing is done."""
    words = re.split(r" [|>&] ", line)[0]
    code = run([*shlex.split(words)[1:], "--help"])
    captured = capsys.readouterr()
    assert code == 0, f"{place}: {line}: {captured.err}"
    assert "Usage:" in captured.out


def test_every_option_that_a_message_names_exists() -> None:
    callbacks = [command.callback for command in app.registered_commands if command.callback]
    files = {Path(callback.__code__.co_filename) for callback in callbacks}
    files |= {Path(gammabeta.__file__).parent / "cli" / name for name in ("app.py", "model.py", "output.py")}
    declared = re.findall(r'"[^"]*?(--[a-z][-a-z]+)', "".join(path.read_text("utf-8") for path in files))
    parameters = {name for callback in callbacks for name in callback.__annotations__}
    known = {*declared, *(f"--{name.replace('_', '-')}" for name in parameters)}
    known |= {"--help", "--version", "--install-completion"}
    for place, text in messages():
        if " " in text and "git" not in text:
            for option in re.findall(r"(?<![-\w])--[a-z][-a-z]+", text):
                assert option in known, f"{place}: {option}"
