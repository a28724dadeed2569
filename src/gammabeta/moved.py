"""The module names of version 0.1.0, so that models that were pickled with it can be read.

A pickle names each class by its module. This table maps each former name to today's module. It is used only
when something imports a former name.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "surgery": "conversion",
    "surgery._moments": "stats.moments",
    "surgery._report": "conversion.convert",
    "surgery._rewritten": "conversion.rewrite",
    "surgery.convert": "conversion.convert",
    "surgery.fold": "folding",
    "surgery.fold.affine": "folding.affine",
    "surgery.fold.chain": "accelerate.chain",
    "surgery.fold.convolution": "accelerate.convolution",
    "surgery.fold.layers": "folding.layers",
    "surgery.fold.packed": "accelerate.packed",
    "surgery.fold.report": "folding",
}
_HERE = __name__.rpartition(".")[0]


class _Finder(MetaPathFinder, Loader):
    """Finds a module under its former name."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        return ModuleSpec(fullname, self, is_package=True) if package == _HERE and name in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__.partition(".")[2]
        sys.modules[module.__name__] = import_module(f"{_HERE}.{MOVED[name]}")


def install() -> None:
    """Let ``import`` find the former names, once.

    Before any other finder, which would find ``surgery.fold.layers`` as a file of the new folder, and load it
    a second time under the former name.
    """
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
