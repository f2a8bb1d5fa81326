"""What a person sees while training runs: bars at a terminal, plain lines in a log, nothing in tests.

The one door to rich in `training`. Nothing here decides anything: whoever works reports, and gets no answer.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

_PLAIN_LINE_EVERY_S = 10.0
_BAR_CHARACTERS = 20  # half of rich's, so that a terminal of 80 columns has room for figures


class Bar(Protocol):
    """One piece of work with a known length."""

    def advance(self, steps: int = 1, figures: Mapping[str, float] | None = None) -> None:
        """Tell that so many steps are done, and which figures to show beside them."""
        ...


class Reporter(Protocol):
    """Where bars, tables and notes go."""

    def bar(self, name: str, total: int, done: int = 0) -> AbstractContextManager[Bar]:
        """Show a piece of work while the context is open; `done` steps of `total` were done before."""
        ...

    def note(self, text: str) -> None:
        """Say one sentence."""
        ...

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Show a table."""
        ...


def choose_reporter(console: Console) -> Reporter:
    """Return bars where somebody watches, else plain lines."""
    return TerminalReporter(console) if console.is_terminal else LineReporter(console)


class SilentReporter:
    """Says nothing; for tests and for callers who watch by other means."""

    @contextmanager
    def bar(self, name: str, total: int, done: int = 0) -> Iterator[Bar]:  # noqa: ARG002 -- the shape of a reporter
        """Count nothing."""
        yield _SilentBar()

    def note(self, text: str) -> None:
        """Drop the sentence."""

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Drop the table."""


class _SilentBar:
    def advance(self, steps: int = 1, figures: Mapping[str, float] | None = None) -> None:
        pass


class PartReporter:
    """Tells the bars of one part of a long work as figures of the long work's own bar, because only one can be live.

    Args:
        whole: where sentences and tables go.
        bar: of the long work.
        part: name of what is being done.
    """

    def __init__(self, whole: Reporter, bar: Bar, part: str) -> None:
        self._whole = whole
        self._bar = bar
        self._part = part

    @contextmanager
    def bar(self, name: str, total: int, done: int = 0) -> Iterator[Bar]:
        """Show how far a piece of the part is, in percent."""
        yield _PartBar(self._bar, f"{self._part}, {name}, %", total, done)

    def note(self, text: str) -> None:
        """Say the sentence for the part."""
        self._whole.note(f"{self._part}: {text}")

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Show the table."""
        self._whole.table(title, columns, rows)


class _PartBar:
    def __init__(self, bar: Bar, name: str, total: int, done: int) -> None:
        self._bar, self._name, self._total, self._done = bar, name, total, done

    def advance(self, steps: int = 1, figures: Mapping[str, float] | None = None) -> None:
        self._done += steps
        self._bar.advance(0, {self._name: 100 * self._done / max(self._total, 1), **(figures or {})})


class LineReporter:
    """Writes a line now and then, for logs and pipes.

    Args:
        console: where to write.
        clock: seconds that only grow.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock

    @contextmanager
    def bar(self, name: str, total: int, done: int = 0) -> Iterator[Bar]:
        """Write how far the work is, at most every ten seconds, and at its end."""
        bar = _LineBar(self.note, self._clock, name, total, done)
        yield bar
        bar.finish()

    def note(self, text: str) -> None:
        """Write the sentence as it is."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Write the table with bars between its cells."""
        for cells in ([title], columns, *rows):
            self.note(" | ".join(cells))


class _LineBar:
    def __init__(
        self, write: Callable[[str], None], clock: Callable[[], float], name: str, total: int, done: int
    ) -> None:
        self._write, self._clock, self._name, self._total = write, clock, name, total
        self._done = self._first = done
        self._begun = self._told = clock()
        self._figures: Mapping[str, float] = {}

    def advance(self, steps: int = 1, figures: Mapping[str, float] | None = None) -> None:
        self._done += steps
        self._figures = figures or self._figures
        now = self._clock()
        if now - self._told >= _PLAIN_LINE_EVERY_S and self._done < self._total:
            self._told = now
            self._write(f"{self._so_far()}{self._left(now)}")

    def finish(self) -> None:
        self._write(f"{self._so_far()} in {_duration(self._clock() - self._begun)}")

    def _left(self, now: float) -> str:
        done = self._done - self._first
        return f", {_duration((now - self._begun) / done * (self._total - self._done))} left" if done else ""

    def _so_far(self) -> str:
        return f"{self._name}: {self._done}/{self._total}{_told(self._figures)}"


class TerminalReporter:
    """Draws bars with the time left.

    Args:
        console: the terminal.
    """

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def bar(self, name: str, total: int, done: int = 0) -> Iterator[Bar]:
        """Draw a bar that stays when its work is done."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(_BAR_CHARACTERS),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            # Without a share of its own, long figures push bar, count and time off a narrow terminal.
            TextColumn("{task.fields[told]}", markup=False, table_column=Column(ratio=1)),
        )
        with Progress(*columns, console=self._console, expand=True) as progress:
            yield _TerminalBar(progress, name, total, done)

    def note(self, text: str) -> None:
        """Print the sentence as it is."""
        self._console.print(text, markup=False, highlight=False)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table with lines."""
        table = Table(*(escape(column) for column in columns), title=escape(title))
        for row in rows:
            table.add_row(*(escape(cell) for cell in row))
        self._console.print(table)


class _TerminalBar:
    def __init__(self, progress: Progress, name: str, total: int, done: int) -> None:
        self._progress = progress
        self._task = progress.add_task(escape(name), total=total, completed=done, told="")

    def advance(self, steps: int = 1, figures: Mapping[str, float] | None = None) -> None:
        if figures is None:
            self._progress.update(self._task, advance=steps)
        else:
            self._progress.update(self._task, advance=steps, told=_told(figures).removeprefix(", "))


def _told(figures: Mapping[str, float]) -> str:
    return "".join(f", {name} {value:.4g}" for name, value in figures.items())


def _duration(seconds: float) -> str:
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{left:02d}"
