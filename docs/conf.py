"""The documentation site: ``sphinx-build -W -b html docs build/site``."""

import os
import sys
from pathlib import Path

import gammabeta

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

os.environ["TERM"] = "dumb"  # help texts without colours
project = "gammabeta"
author = "the gammabeta authors"
copyright = "the gammabeta authors. Apache-2.0"
version = release = gammabeta.__version__
extensions = [
    "myst_parser",
    "outside",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",  # the cards of the home page
    "sphinxcontrib.typer",
]
source_suffix = {".md": "markdown"}
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4
html_theme = "furo"
html_title = "gammabeta"
html_copy_source = False
exclude_patterns = ["_build"]
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
default_role = "literal"
smartquotes = False
