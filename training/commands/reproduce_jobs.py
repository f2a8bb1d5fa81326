"""What `flawline reproduce` does: values from the command line in, results kept, tables printed and written."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import typer
from rich.console import Console

from service.errors import ParameterInvalid
from training.backbones.weights import UNTRAINED, read_weights_option
from training.config import load_config
from training.fitting.fit import FitStopped
from training.progress import Reporter, choose_reporter
from training.reproduction.measure import Equipment
from training.reproduction.pages import (
    COMPARISON_COLUMNS,
    Reproduction,
    comparison_rows,
    differences_of_configuration,
    summarise,
    to_html,
    to_markdown,
)
from training.reproduction.published import Setting, read_published
from training.reproduction.reproduce import Plan, plan_lines, reproduce

_STOPPED, _SOME_FAILED = 130, 1
_FILE = "reproduction"


@dataclass(frozen=True)
class ReproductionWishes:
    """What the options say.

    Attributes:
        categories: names, or none for all.
        config: `paper`, `small` or a file.
        setting: of the models, or `paper` for the detector's own. Zero-shot is refused with what is known of it.
        seeds: at least one.
        output: folder of results.
        layout: of the data set, or None to find out.
        weights: a file, a folder, "untrained", or None.
        device: where to fit.
        settings: `key=value`, in order.
    """

    categories: Sequence[str]
    config: str
    setting: Literal["paper", "zero-shot"] | Setting
    seeds: tuple[int, ...]
    output: Path
    layout: str | None
    weights: str | None
    device: Literal["auto", "cpu", "cuda"]
    settings: Sequence[str]


def split_names(text: str) -> list[str]:
    """Return the names between commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def split_seeds(text: str) -> tuple[int, ...]:
    """Return the whole numbers between commas.

    Raises:
        ParameterInvalid: if there is none, one is no whole number from 0 on, or one comes twice.
    """
    names = split_names(text)
    if not names or not all(name.isdecimal() for name in names) or len(set(map(int, names))) < len(names):
        raise ParameterInvalid(f"--seeds is {text!r}; give different whole numbers, for example 1,2,3.")
    return tuple(int(name) for name in names)


def reproduce_paper(detector: str, dataset: Path, wishes: ReproductionWishes, threads: int | None) -> None:
    """Run a paper's setting on a data set; write and print our figures beside the published ones.

    Raises:
        ParameterInvalid: if the setting is zero-shot.
        typer.Exit: with 1 if a model could not be measured, and 130 after a stop.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    reporter = choose_reporter(Console())
    setting = _setting(detector, wishes)
    changes = _changes_of(detector, setting, wishes)
    config = load_config(wishes.config, detector, [*changes, *wishes.settings])
    lines, data, is_whole = plan_lines(dataset, wishes.layout, wishes.categories)
    if changes:
        reporter.note(f"as the paper's {setting} setting has it: {', '.join(changes)}")
    plan = Plan(lines, data, is_whole, setting, config, wishes.seeds)
    equipment = Equipment(*read_weights_option(wishes.weights), wishes.device)
    try:
        results = reproduce(plan, equipment, wishes.output, reporter)
    except (FitStopped, KeyboardInterrupt) as stop:
        reporter.note(f"Stopped. What is finished is kept in {wishes.output}; the same command goes on from here.")
        raise typer.Exit(_STOPPED) from stop
    special = {"Backbone weights": "random, not pretrained"} if wishes.weights == UNTRAINED else {}
    differences = differences_of_configuration(wishes.config, wishes.settings, special)
    found = summarise(plan, results, dataset.resolve().name, differences)
    _write(wishes.output, found)
    _tell(found, wishes.output, reporter)
    if found.failures:
        raise typer.Exit(_SOME_FAILED)


def _setting(detector: str, wishes: ReproductionWishes) -> Setting:
    if wishes.setting == "zero-shot":
        raise ParameterInvalid(_tell_zero_shot(detector))
    if wishes.setting != "paper":
        return wishes.setting
    told = read_published().get(detector)
    return "single-class" if told is None else told.setting


def _changes_of(detector: str, setting: Setting, wishes: ReproductionWishes) -> tuple[str, ...]:
    """Return what the setting changes in the paper configuration; other configurations are meant as they are."""
    told = read_published().get(detector)
    return told.changes_in(setting) if told is not None and wishes.config == "paper" else ()


def _tell_zero_shot(detector: str) -> str:
    """Say how a zero-shot figure comes about, and what is published of it."""
    told = read_published().get(detector)
    rows = [] if told is None else [row for row in told.figures if row.setting == "zero-shot"]
    published = "".join(
        f" Published on {row.data}: {', '.join(f'{name} {value:g}' for name, value in row.values.items())} "
        f"({row.source})."
        for row in rows
    )
    return (
        "A zero-shot model is fitted on another data set than the one it is measured on, and reproduce has one data "
        "set. Fit it there with flawline train, or import the authors' with flawline import-checkpoint; then flawline "
        f"export RUN --zero-shot --name NAME, and flawline evaluate on each category.{published}"
    )


def _write(folder: Path, found: Reproduction) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pages = {".json": found.model_dump_json(indent=2) + "\n", ".md": to_markdown(found) + "\n", ".html": to_html(found)}
    for suffix, text in pages.items():
        (folder / _FILE).with_suffix(suffix).write_text(text, encoding="utf-8")


def _tell(found: Reproduction, folder: Path, reporter: Reporter) -> None:
    title = f"{found.title} on {found.data}, {found.setting}"
    reporter.table(title, COMPARISON_COLUMNS, comparison_rows(found.means))
    reporter.table(f"{title}, by category", COMPARISON_COLUMNS, comparison_rows(found.by_category))
    differs = dict.fromkeys(text for row in (*found.means, *found.by_category) for text in row.differs)
    for text in (found.remark, *found.differences, *differs):
        if text:
            reporter.note(text)
    for suffix in (".md", ".html", ".json"):
        reporter.note(f"written: {(folder / _FILE).with_suffix(suffix)}")
