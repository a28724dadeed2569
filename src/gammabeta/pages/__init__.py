"""Self-contained pages: one look for the doctor's report and for runs; nothing is fetched from anywhere.

What a template is given is text: it is made visible (``text.visible``) and escaped, whoever wrote it. Only
``Markup``, made here, is markup.
"""

import base64
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ..text import visible


def render(template: str, **values: Any) -> str:
    """Fill a template of this folder."""
    return _environment().get_template(template).render(values)


@cache
def _environment() -> Environment:
    environment = Environment(
        autoescape=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
        loader=PackageLoader(__package__),
        lstrip_blocks=True,
        trim_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters.update(percent=percent, figure=figure)
    return environment


def percent(share: float | None) -> str:
    """A share as it is printed; a dash where there is none."""
    return "–" if share is None else f"{100 * share:.2f} %"


def figure(value: float | None, form: str = ".4g") -> str:
    """A number as it is printed; a dash where there is none."""
    return "–" if value is None else format(value, form)


def embedded(content: bytes, kind: str) -> Markup:
    """A file of a media type such as ``image/png`` as the address of a picture."""
    return Markup(f"data:{kind};base64,{base64.b64encode(content).decode()}")
