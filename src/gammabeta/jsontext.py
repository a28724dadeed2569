"""JSON as we write and read it: numbers that are not finite are null; what is read is not nested deeply."""

import json
import math
from typing import Any

_DEEPEST = 50  # our own documents have six levels


def finite(value: Any) -> Any:
    """Return plain values with None in place of NaN and infinity, for which JSON has no words."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def to_json(value: Any, **options: Any) -> str:
    """Return plain values as JSON; numbers that are not finite become null."""
    return json.dumps(finite(value), allow_nan=False, **options)


def from_json(text: str) -> Any:
    """Return what a JSON text holds; ``ValueError`` if it is none, or is nested too deeply to be ours."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    inside, depth = [value], 0
    while inside:
        depth += 1
        if depth > _DEEPEST:
            raise ValueError("nested too deeply")
        holders = [each for each in inside if isinstance(each, dict | list)]
        inside = [item for each in holders for item in (each.values() if isinstance(each, dict) else each)]
    return value
