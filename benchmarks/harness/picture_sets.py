"""Two public sets of pictures as PNG folders, ``train`` and ``test`` with a folder a class.

Fashion-MNIST, grey, 28×28: from a folder of IDX files (Debian's ``dataset-fashion-mnist`` is one). Emoji, in
colour, 32×32: from the npm packages ``emoji-datasource-google`` and ``emoji-datasource-twitter``, unpacked as
``google`` and ``twitter`` into one folder. What Unicode calls an emoji's category is its class. Every fifth
emoji is a test picture, in both drawings, so no test emoji was ever trained on.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gammabeta import data

SIDES = {"fashion-mnist": 28, "emoji": 32}
_VENDORS = ("google", "twitter")


def write_fashion(idx: Path, folder: Path, each: int) -> Path:
    """The first ``each`` training and test pictures of every class of Fashion-MNIST."""
    found = data.load(idx)
    for part, split in (("train", found.train), ("test", found.test)):
        for label, name in enumerate(found.classes):
            place = folder / part / name.replace("/", " ")
            place.mkdir(parents=True)
            for number in np.flatnonzero(split.labels == label)[:each]:
                Image.fromarray(np.ascontiguousarray(split.images[number, 0])).save(
                    place / f"{number:05}.png"
                )
    return folder


def write_emoji(packages: Path, folder: Path, each: int) -> Path:
    """At most ``each`` emoji of every category, spread evenly over it, on white."""
    every: list[dict[str, Any]] = json.loads((packages / "google" / "emoji.json").read_text("utf-8"))
    both = [one for one in every if all(one[f"has_img_{vendor}"] for vendor in _VENDORS)]
    for category in sorted({one["category"] for one in both} - {"Component"}):
        own = sorted((one for one in both if one["category"] == category), key=lambda one: one["sort_order"])
        for number, one in enumerate(own[:: -(-len(own) // each)]):
            place = folder / ("test" if number % 5 == 4 else "train") / category
            place.mkdir(parents=True, exist_ok=True)
            for vendor in _VENDORS:
                _on_white(packages / vendor / "img" / vendor / "64" / one["image"]).save(
                    place / f"{vendor}-{one['image']}"
                )
    return folder


def _on_white(path: Path) -> Image.Image:
    with Image.open(path) as opened:
        picture = opened.convert("RGBA")
    sheet = Image.new("RGBA", picture.size, "white")
    side = SIDES["emoji"]
    return Image.alpha_composite(sheet, picture).convert("RGB").resize((side, side), Image.Resampling.BOX)
