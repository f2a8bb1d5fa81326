"""Promises of regions of interest on the command line: each line gets its own, and none gets another's."""

import pytest

from service.errors import ParameterInvalid
from training.jobs import masks_of


def test_masks_when_there_is_one_line_then_need_no_name(tmp_path, monkeypatch):
    """One line has one mask; its name may be said, and a file may have a = in its own."""
    monkeypatch.chdir(tmp_path)
    odd = tmp_path / "a=b.png"
    odd.touch()

    assert masks_of(["cap"], []) == {}
    assert masks_of(["cap"], ["mask.png"]) == {"cap": tmp_path / "mask.png"}
    assert masks_of(["cap"], ["cap=mask.png"]) == {"cap": tmp_path / "mask.png"}
    assert masks_of(["cap"], [str(odd)]) == {"cap": odd}


def test_masks_when_there_are_several_lines_then_each_is_named(tmp_path, monkeypatch):
    """A line that is not named inspects everything."""
    monkeypatch.chdir(tmp_path)

    assert masks_of(["a", "b", "c"], ["c=x.png", "a=y.png"]) == {"c": tmp_path / "x.png", "a": tmp_path / "y.png"}


@pytest.mark.parametrize(
    ("lines", "given", "sentence"),
    [
        (["a"], ["x.png", "y.png"], "give --roi once"),
        (["a"], ["b=x.png"], "there is no line b"),
        (["a", "b"], ["x.png"], "write NAME=PATH"),
        (["a", "b"], ["a=x.png", "a=y.png"], "has two regions of interest"),
        (["a", "b"], ["c=x.png"], "there is no line c"),
    ],
)
def test_masks_when_it_is_not_clear_whose_they_are_then_are_refused(lines, given, sentence):
    """A mask on the wrong line would leave a part uninspected."""
    with pytest.raises(ParameterInvalid, match=sentence):
        masks_of(lines, given)
