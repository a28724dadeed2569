"""Names imported at their first use (PEP 562), so that a package costs nothing until it is needed."""

import sys
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import Any


def importer(package: str, names: Mapping[str, str], modules: Iterable[str] = ()) -> Callable[[str], Any]:
    """Return a module ``__getattr__`` for ``package``.

    Args:
        package: Whose attributes are meant.
        names: For each public name the module, relative to the package, that defines it.
        modules: Names of modules of the package that are public themselves.
    """
    public = set(modules)

    def get(name: str) -> Any:
        if name in public:
            return import_module(f".{name}", package)
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(names[name], package), name)
        setattr(sys.modules[package], name, value)
        return value

    return get
