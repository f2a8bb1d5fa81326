"""Promises of what a person sees while training runs."""

import io

import pytest
from rich.console import Console

from training.progress import LineReporter, PartReporter, SilentReporter, TerminalReporter, choose_reporter


@pytest.fixture
def page():
    """Where the text goes."""
    return io.StringIO()


def test_line_reporter_writes_now_and_then_with_the_time_left(page):
    """A log gets a line every ten seconds and one at the end."""
    times = iter([0.0, 4.0, 10.0, 12.0, 40.0, 100.0])
    reporter = LineReporter(Console(file=page), lambda: next(times))

    with reporter.bar("fitting", 6, done=2) as bar:
        for loss in (3.0, 2.0, 1.0, 0.5):
            bar.advance(figures={"loss": loss})

    assert page.getvalue().splitlines() == [
        "fitting: 4/6, loss 2, 0:00:10 left",
        "fitting: 6/6, loss 0.5 in 0:01:40",
    ]


def test_line_reporter_writes_notes_and_tables_as_they_are(page):
    """Square brackets are text, not markup, and long lines are not broken."""
    reporter = LineReporter(Console(file=page, width=20))

    reporter.note("[red] " + "x" * 40)
    reporter.table("Figures", ["name", "value"], [["AUROC", "0.9"]])

    assert page.getvalue().splitlines() == ["[red] " + "x" * 40, "Figures", "name | value", "AUROC | 0.9"]


def test_terminal_reporter_draws_bars_tables_and_notes(page):
    """A terminal shows the name, the count, the figures and the cells."""
    reporter = TerminalReporter(Console(file=page, force_terminal=True, width=120))

    with reporter.bar("[fitting]", 2) as bar:
        bar.advance(figures={"loss": 0.25})
        bar.advance()
    reporter.table("Figures", ["name"], [["[AUROC]"]])
    reporter.note("[done]")

    shown = page.getvalue()
    assert all(text in shown for text in ("[fitting]", "2/2", "loss 0.25", "[AUROC]", "[done]"))


def test_terminal_reporter_keeps_count_and_time_beside_long_figures_at_80_columns(page):
    """However many figures stand beside a bar, they take the room that is left, and fold where it is too narrow."""
    reporter = TerminalReporter(Console(file=page, force_terminal=True, color_system=None, width=80))

    with reporter.bar("reconstruction", 2000) as bar:
        bar.advance(1238, {"loss": 0.07558, "reconstruction": 0.02255, "coherence": 0.05303, "images/s": 38.33})

    last = page.getvalue().split("\r")[-1]
    words = " ".join(last.split())
    assert "reconstruction ━" in words
    assert "1238/2000" in words
    assert "-:--:--" in words
    assert all(figure in words for figure in ("loss 0.07558", "0.02255", "0.05303", "38.33"))


def test_silent_reporter_takes_everything_and_says_nothing(capsys):
    """Nothing reaches the terminal."""
    reporter = SilentReporter()

    with reporter.bar("fitting", 2) as bar:
        bar.advance()
    reporter.note("x")
    reporter.table("x", [], [])

    assert capsys.readouterr().out == ""


def test_choose_reporter_draws_at_a_terminal_only(page):
    """A pipe gets lines."""
    chosen = [choose_reporter(Console(file=page, force_terminal=here)) for here in (True, False)]

    assert [type(reporter) for reporter in chosen] == [TerminalReporter, LineReporter]


def test_part_reporter_tells_its_bars_as_figures_of_the_whole_bar(page):
    """One bar stays live: a part's bar is a percentage on it, its figures stand beside, its sentences name the part."""
    times = iter([0.0, 11.0, 22.0, 33.0, 40.0])
    whole = LineReporter(Console(file=page), lambda: next(times))

    with whole.bar("categories", 2) as bar:
        part = PartReporter(whole, bar, "grid")
        with part.bar("fitting", 4, done=1) as inner:
            inner.advance(figures={"loss": 0.5})
        part.note("is done")
        bar.advance()
        part.table("Figures", ["name"], [])
        bar.advance()

    assert page.getvalue().splitlines() == [
        "categories: 0/2, grid, fitting, % 50, loss 0.5",
        "grid: is done",
        "categories: 1/2, grid, fitting, % 50, loss 0.5, 0:00:22 left",
        "Figures",
        "name",
        "categories: 2/2, grid, fitting, % 50, loss 0.5 in 0:00:40",
    ]
