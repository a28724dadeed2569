"""What a release says of itself is one version."""

import re
from pathlib import Path

import gammabeta

ROOT = Path(__file__).parents[2]


def test_changelog_and_citation_name_the_version() -> None:
    heading = re.findall(r"^## (\S+?),? ", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M)[0]
    citation = re.findall(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text("utf-8"), re.M)[0]
    assert heading == citation == gammabeta.__version__
