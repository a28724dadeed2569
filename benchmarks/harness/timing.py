"""``gammabeta.measure.timing`` of this checkout, also where another commit's package is being measured."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

_FILE = Path(__file__).resolve().parents[2] / "src" / "gammabeta" / "measure" / "timing.py"

_spec = spec_from_file_location(f"{__name__}_of_this_checkout", _FILE)
assert _spec is not None
assert _spec.loader is not None
_module = module_from_spec(_spec)
sys.modules[_spec.name] = _module  # dataclasses look their module up
_spec.loader.exec_module(_module)

Timing = _module.Timing
interleave = _module.interleave
