"""Every kind: importing a file of models registers them."""

from importlib import import_module

from .harness import KINDS

__all__ = ["KINDS"]

for _name in (
    "arguments",
    "flow",
    "state",
    "randomness",
    "dataflow",
    "outputs",
    "callers",
    "methods",
    "inside",
    "later",
    "surgery_modes",
    "between",
    "rewriting",
    "weights",
    "classes",
    "grammar",
    "patched",
    "certainty",
):
    import_module(f".{_name}", __package__)
