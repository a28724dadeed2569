"""The reference names everything public, with an example each."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

PAGES = Path(__file__).parents[2] / "docs" / "reference"
PACKAGES = ["", "nn", "functional", "reference", "data", "train", "doctor", "errors"]
DIRECTIVE = re.compile(r"\.\. auto(?:function|class):: (\S+)")


def public(package: str) -> set[str]:
    """The names that a package offers; of a module without ``__all__``, those that it defines."""
    module = importlib.import_module(f"gammabeta.{package}".rstrip("."))
    names = getattr(module, "__all__", None)
    if names is None:
        names = [n for n, o in vars(module).items() if getattr(o, "__module__", "") == module.__name__]
    found = {name for name in names if not name.startswith("_")}
    return {name for name in found if not inspect.ismodule(getattr(module, name))}


def page(package: str) -> str:
    return (PAGES / f"{package or 'gammabeta'}.md").read_text("utf-8")


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_has_its_place(package):
    text = page(package)
    prefix = f"gammabeta.{package}.".replace("..", ".")
    there = {name.removeprefix(prefix) for name in DIRECTIVE.findall(text)}
    if f".. automodule:: gammabeta.{package}" in text:
        there |= public(package)
    plain = {name for name in public(package) if f"`{name}`" in text}  # tables and types have no directive
    assert public(package) <= there | plain


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_stands_in_an_example(package):
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", page(package), re.M | re.S))
    named = set(re.findall(r"\w+", code))
    unused = {name for name in public(package) if name not in named and not name.startswith("Severity")}
    # Three dimensions are one layer: an example of one stands for all.
    assert {re.sub(r"[123]d$", "2d", name) for name in unused} <= named
