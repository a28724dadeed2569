"""What public functions refuse by its type, in one line that names the function and the argument."""

from typing import Any

from .errors import UsageError


def check_type(door: str, name: str, value: object, kind: Any, wanted: str) -> None:
    """Refuse a value of another kind.

    Raises:
        UsageError: it says what ``wanted`` says.
    """
    if not isinstance(value, kind):
        raise UsageError(f"{door}: {name} is {_called(value)}; give {wanted}")


def check_model(door: str, value: object, name: str = "model") -> None:
    """Refuse what is no module, such as a class of modules or a function that makes one.

    Raises:
        UsageError: naming the argument.
    """
    from torch import nn

    check_type(door, name, value, nn.Module, "a torch.nn.Module")


def check_batches(door: str, value: object, name: str = "loader") -> None:
    """Refuse what gives no batches: one thing that cannot be gone through, or a text.

    Raises:
        UsageError: naming the argument.
    """
    from torch import nn

    iterable = hasattr(type(value), "__iter__") or hasattr(type(value), "__getitem__")
    if not iterable or isinstance(value, str | bytes | type | nn.Module):
        raise UsageError(f"{door}: {name} is {_called(value)}; give a loader, or a list of batches")


def _called(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
