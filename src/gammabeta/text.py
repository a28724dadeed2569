"""Text from outside, made safe for the medium it goes into.

Names of files, classes, layers and runs are other people's text. None of it is markup: no control sequence
reaches a terminal, no tag a page, no formula a picture. What cannot be shown is written as Python's escapes.
"""

import html
import os
import re
import shlex
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Letters and marks that leave no trace on the screen, beside those that are not printable for Python.
_INVISIBLE = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u3164\uffa0")
# Joiners shape the scripts from Arabic on, and emoji; between other letters they only deceive.
_JOINED = r"\u0600-\u1fff\u2190-\u27bf\ufe0f\U0001f300-\U0001faff"
_JOINER = re.compile(f"(?<=[{_JOINED}])[\u200c\u200d](?=[{_JOINED}])")
# Fonts of boxes, of brackets, or with signs where Unicode has letters.
_NO_LETTERS = re.compile(r"cm\w+10|STIX(NonUnicode|Size).*|Last Resort.*")
# Signs that our own lines use, for terminals that lack them.
_PLAIN = {"–": "-", "—": "-", "−": "-", "×": "x", "…": "...", "→": "->", "’": "'", "σ": "sigma", "µ": "u",
          "γ": "gamma", "β": "beta", "≤": "<=", "≥": ">=", "²": "^2", "‑": "-"}  # fmt: skip


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def visible(text: object) -> str:
    """The text on one line, without anything that acts and is not seen.

    Control characters, line breaks, marks of direction, zero-width characters and bytes that are no text
    (surrogates) become Python's escapes. A second time it changes nothing.
    """
    text = str(text)
    if text.isascii() and text.isprintable():
        return text
    kept = {found.start() for found in _JOINER.finditer(text)}
    return "".join(
        c if i in kept or ((c.isprintable() or c in "\xa0\u3000") and c not in _INVISIBLE) else _escaped(c)
        for i, c in enumerate(text)
    )


def one_line(message: object) -> str:
    """A message that may quote a library's lines, as one visible line."""
    return visible(re.sub(r"\s*\n\s*", " ", str(message).strip()))


def for_terminal(text: object, encoding: str) -> str:
    """``visible``, and nothing that the terminal's encoding lacks."""
    shown = visible(text)
    return shown if _encodable(shown, encoding) else "".join(_nearest(c, encoding) for c in shown)


def _encodable(text: str, encoding: str) -> bool:
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True


def _nearest(character: str, encoding: str) -> str:
    return character if _encodable(character, encoding) else _PLAIN.get(character, _escaped(character))


def for_html(text: object) -> str:
    """``visible``, with nothing that HTML or XML reads as a tag, an entity or the end of an attribute."""
    return html.escape(visible(text))


def for_shell(text: object) -> str:
    """One word of a command that can be copied into a shell."""
    word = str(text)
    if visible(word) == word:
        return shlex.quote(word)
    letters = (chr(b) if 32 <= b < 127 and chr(b) not in "\\'" else f"\\x{b:02x}" for b in os.fsencode(word))
    return f"$'{''.join(letters)}'"


def storable(text: str) -> str:
    """The text for a document in UTF-8: the bytes of a file's name that are no text become escapes."""
    return re.sub("[\ud800-\udfff]", lambda found: _escaped(found[0]), text)


def stored(text: str) -> str:
    """The text that ``storable`` was given."""
    return re.sub(r"\\u(d[89a-f][0-9a-f]{2})", lambda found: chr(int(found[1], 16)), text)


def for_figure(text: object, most: int = 96) -> str:
    """``visible``, for Matplotlib: no formula, no label left out, only characters that a font here has.

    Of more than ``most`` letters the middle is left out.
    """
    drawn = visible("".join(c if _family(c) is not None else _escaped(c) for c in visible(text)))
    if len(drawn) > most:
        drawn = f"{drawn[: most // 2]}…{drawn[1 + most // 2 - most :]}"
    return " " * drawn.startswith("_") + drawn.replace("$", r"\$")


def fit_fonts(figure: "Figure") -> None:
    """Let each text of a figure take from other fonts the characters that its own lacks; none is LaTeX."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        text.set_usetex(False)  # whatever the user's settings are: LaTeX runs what it reads
        others = sorted({_family(character) or "" for character in text.get_text()} - {""})
        if others:
            text.set_fontfamily([*text.get_fontfamily(), *others])


def _family(character: str) -> str | None:
    """The family of another font that has the character; "" if the usual one has; None if none has."""
    return "" if character.isascii() or ord(character) in _usual_font() else _other_fonts().get(character)


@cache
def _usual_font() -> frozenset[int]:
    from matplotlib.font_manager import FontProperties, findfont, get_font

    return frozenset(get_font(findfont(FontProperties())).get_charmap())


@cache
def _other_fonts() -> dict[str, str]:
    """For each character of the fonts installed here the family to take it from; sans-serif first."""
    from matplotlib.font_manager import FontProperties, findfont, fontManager
    from matplotlib.ft2font import FT2Font

    usual = FontProperties()
    families = {entry.name for entry in fontManager.ttflist if _regular(entry)} - {usual.get_name()}
    found: dict[str, str] = {}
    for name in sorted(families, key=lambda name: ("sans" not in name.lower(), name)):
        if _NO_LETTERS.fullmatch(name):
            continue
        try:
            font = FT2Font(findfont(FontProperties(family=name), fallback_to_default=False))
        except (OSError, RuntimeError, ValueError):  # gone meanwhile, or of a kind Matplotlib cannot draw
            continue
        for code in font.get_charmap() if font.scalable else ():
            found.setdefault(chr(code), name)
    return found


def _regular(entry: Any) -> bool:
    """Whether a font is upright and of normal weight and width, so that its family's name finds it."""
    return entry.style == "normal" == entry.variant == entry.stretch and entry.weight in (400, "normal")


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind where it has none."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip() if lines else type(error).__name__
