"""What messages and pages tell people to install can be installed, and from where they say."""

import re
import tomllib
from pathlib import Path

import pytest

import gammabeta
from gammabeta.errors import installing

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
    assert {"onnx", "tensorboard"} <= named <= set(PROJECT["optional-dependencies"])
