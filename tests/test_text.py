"""Text from outside stays text, whatever it goes into."""

import shutil
import subprocess
import sys
import unicodedata
import warnings

import numpy as np
import pytest
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.text import Text

from gammabeta import text
from gammabeta.errors import DataError, out_of_memory
from gammabeta.text import fit_fonts, for_figure, for_html, for_shell, for_terminal, storable, stored, visible

# Names as they are found, each read as something else by some medium.
NAMES = [
    "[v2]",
    "[/b]",
    "[red]x[/red]",
    ":heart:",
    "$x_1$",
    "$",
    r"\$x\$",
    "_hidden",
    "\x1b[31mred\x1b]8;;http://x\x07",
    "\x9b2J",
    "<img src=x onerror=alert(1)>",
    "a&amp;\"'>",
    "two\nlines\r\tend",
    "line\u2028end\x85",
    "photo\u202egnp.exe",
    "\u2066isolated\u2069",
    "a\u200bb\u200d\ufeff\u00ad",
    "blank\u3164\u115f",
    "tag\U000e0041",
    "caf\udce9",
    "日本語",
    "🙂",
    "naïve Ωσ",
    "x" * 100_000,
]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_what_is_shown_acts_nowhere(name):
    shown = visible(name)
    assert shown.isprintable()
    assert not any("\u2000" < c < "\u2070" and not c.isspace() for c in shown)
    assert visible(shown) == shown
    assert not set("<>\"'") & set(for_html(name))
    for encoding in ("ascii", "cp1252", "utf-8"):
        for_terminal(name, encoding).encode(encoding)
    storable(name).encode()
    assert stored(storable(name)) == name


@pytest.mark.parametrize("name", ["cat", "naïve Ωσ", "日本語", "می‌خواهم", "👩\u200d🚀", "ﬁ ½ x²", "a b  c"])
def test_what_is_seen_is_shown_as_it_is(name):
    assert visible(name) == name


def test_escapes_and_nearest_signs():
    assert visible("a\x1b[31m\u202e\u200b\n") == r"a\x1b[31m\u202e\u200b\n"
    assert visible("x\u200dy") == r"x\u200dy"  # a joiner joins nothing between such letters
    assert for_terminal("1×2 – 日", "ascii") == r"1x2 - \u65e5"
    assert for_terminal("1×2 – 日", "cp1252") == r"1×2 – \u65e5"
    assert for_html("<b>&\x1b") == r"&lt;b&gt;&amp;\x1b"


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no shell to try them in")
def test_words_of_a_command_reach_the_command_as_they_are():
    words = [name for name in NAMES if len(name) < 100] + ["", "it's", "a\\b\x01'"]
    program = "import os, sys; print([os.fsencode(word) for word in sys.argv[1:]])"
    line = " ".join([for_shell(sys.executable), "-X utf8 -c", for_shell(program), *map(for_shell, words)])
    assert line.isprintable()
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str([word.encode("utf-8", "surrogateescape") for word in words])


def test_an_error_is_one_line_of_text():
    error = DataError("a\x1b[31m.png: no\n  such file")
    assert str(error) == r"a\x1b[31m.png: no such file"


# Pictures


def pixels(figure):
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name)[:40])
def test_names_are_drawn_as_they_are(name):
    """As title, legend and tick: no formula, no warning of a missing letter, nothing left out."""
    drawn = for_figure(name)
    figure = Figure(figsize=(4, 3))
    axes = figure.subplots()
    axes.plot([1, 2], [1, 2], label=drawn)
    axes.set_title(drawn)
    axes.set_xticks([1], [drawn])
    legend = axes.legend()
    fit_fonts(figure)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.draw_without_rendering()
    assert len(legend.get_texts()) == 1
    for shown in (axes.title, *legend.get_texts()):
        plain, math = shown._preprocess_math(shown.get_text())
        assert not math
        assert plain.strip() == text.visible(plain).strip()
    if len(name) < 100 and name.isascii():
        assert plain.strip() == visible(name)


def test_a_formula_of_ours_is_drawn_still():
    figure = Figure()
    axes = figure.subplots()
    axes.set_yscale("log")
    fit_fonts(figure)
    figure.draw_without_rendering()
    assert any("mathdefault" in label.get_text() for label in axes.get_yticklabels())


def test_no_name_is_run_as_latex():
    with rc_context({"text.usetex": True}):
        figure = Figure()
        title = figure.suptitle(for_figure(r"\input{secret} $x$"))
        fit_fonts(figure)
        figure.draw_without_rendering()
    assert not title.get_usetex()


def test_a_letter_comes_from_another_font_or_is_an_escape(monkeypatch):
    usual = frozenset(map(ord, "abc"))
    monkeypatch.setattr(text, "_usual_font", lambda: usual)
    monkeypatch.setattr(text, "_other_fonts", lambda: {"é": "STIXGeneral"})
    assert for_figure("aé日") == r"aé\u65e5"
    figure = Figure()
    plain, other = figure.text(0, 0, "a"), figure.text(0, 0, for_figure("aé"))
    fit_fonts(figure)
    assert plain.get_fontfamily() == Text().get_fontfamily()
    assert other.get_fontfamily() == [*Text().get_fontfamily(), "STIXGeneral"]


def test_every_letter_that_another_font_has_is_drawn(caplog):
    """Of whatever fonts are installed here: no missing letter, and nothing said about fonts."""
    found = text._other_fonts()
    assert not {"Last Resort High-Efficiency", "cmsy10", "STIXNonUnicode"} & set(found.values())
    alone = [c for c in found if c.isprintable() and not unicodedata.combining(c)]
    letters = [c for c in alone if ord(c) not in text._usual_font()]
    figure = Figure()
    for start in range(0, len(letters), 97):
        figure.text(0, 0, for_figure("".join(letters[start : start + 96])))
    fit_fonts(figure)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.draw_without_rendering()
    assert not caplog.records


# Memory


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (MemoryError(), ""),
        (MemoryError("Unable to allocate 7.45 GiB for an array with shape (1, 2)"), "7.45 GiB"),
        (
            RuntimeError(
                "DefaultCPUAllocator: can't allocate memory: you tried to allocate 2147483648 bytes"
            ),
            "2.0 GiB",
        ),
        (RuntimeError("CUDA out of memory. Tried to allocate 3.00 GiB. GPU 0 has"), "3.00 GiB"),
    ],
)
def test_memory_that_runs_out_is_known_by_every_library_s_words(error, wanted):
    line = out_of_memory(error)
    assert line is not None
    assert wanted in line
    assert "--image-size" in line
    wrapped = DataError("the model could not run")
    wrapped.__cause__ = error
    assert out_of_memory(wrapped) == line


@pytest.mark.parametrize("error", [None, ValueError("out of memory lane"), RuntimeError("shape mismatch")])
def test_other_errors_are_not_called_so(error):
    assert out_of_memory(error) is None
