"""What watches or changes a module from outside: the hooks on it, and those on all modules.

One rule for the whole package: a module with any hook is left as it is. It keeps its own call, and its inputs
and outputs stay what they were. A hook on all modules (torch's ``register_module_forward_hook`` and the like)
counts as one on each.
"""

from torch.nn import Module
from torch.nn.modules import module as _torch

#: The attributes of a module that hold its hooks, and what each kind is called.
KINDS = {
    "_forward_hooks": "forward hook",
    "_forward_pre_hooks": "forward pre-hook",
    "_backward_hooks": "backward hook",
    "_backward_pre_hooks": "backward pre-hook",
}
#: The hooks on all modules, in the same order; torch fills and empties these dictionaries in place.
ON_ALL_MODULES = tuple(getattr(_torch, f"_global{name}") for name in KINDS)


def hooked(module: Module) -> bool:
    """Whether a hook is called with the module's inputs or outputs, or with its gradients."""
    for name in KINDS:
        if getattr(module, name, None):
            return True
    return any(ON_ALL_MODULES)  # an empty dictionary is False


def hook_on(module: Module) -> str:
    """The first kind of hook found on the module, by name; empty if there is none."""
    for name, kind in KINDS.items():
        if getattr(module, name, None):
            return f"a {kind}"
    for hooks, kind in zip(ON_ALL_MODULES, KINDS.values(), strict=True):
        if hooks:
            return f"a global {kind}"
    return ""
