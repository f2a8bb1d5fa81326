"""Promises of names as they are shown: nobody writes on a terminal with the name of a file."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.contract.legible import is_legible, legible

ODD = {
    "escape": ("\x1b[2J", r"\x1b[2J"),
    "escape of the second set": ("\x9b31m", r"\x9b31m"),
    "line break": ("a\nb", r"a\nb"),
    "line separator": ("a\u2028b", r"a\u2028b"),
    "from right to left": ("\u202egnp.exe", r"\u202egnp.exe"),
    "undecodable byte": ("\udcff", r"\udcff"),
}


@pytest.mark.parametrize(("name", "shown"), ODD.values(), ids=ODD)
def test_legible_when_a_name_holds_what_is_obeyed_then_shows_it_instead(name, shown):
    """What was meant to act is read."""
    assert not is_legible(name)
    assert legible(name) == shown


@pytest.mark.parametrize("name", ["0815.png", "Größe 3 µm", "部品", "a\u202fb", r"C:\new", "\N{THUMBS UP SIGN}"])
def test_legible_when_a_name_is_only_text_then_leaves_it(name):
    """Blanks that cameras and desktops write, and every script, are names like others."""
    assert is_legible(name)
    assert legible(name) == name


@given(st.text(st.characters()))
def test_legible_when_anything_comes_then_what_is_shown_is_legible_and_can_be_written(text):
    """Whatever a file is called, its sentence goes to any output."""
    assert is_legible(legible(text))
    legible(text).encode()
