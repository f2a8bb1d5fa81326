"""What `flawline compare` does: values from the command line in, cells measured, a table and a page out."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import typer
from pydantic import TypeAdapter, ValidationError
from rich.console import Console

from models import DETECTORS
from service.contract.bundle import LineName
from service.errors import ParameterInvalid
from training.backbones.weights import UNTRAINED, read_weights_option
from training.calibrate import read_region_of_interest
from training.comparison.compare import Cell, CellPlan, Means, complete, control_of, data_digest
from training.comparison.page import TABLE_COLUMNS, Settings, pair_controls, render_comparison, table_rows
from training.config import ConfigFault, load_config
from training.data.detect import read_dataset
from training.data.samples import ANOMALOUS, NORMAL, DatasetFault
from training.fitting.fit import FitStopped
from training.jobs import layouts_of, masks_of, name_and_path
from training.progress import Reporter, choose_reporter

PAGE = "comparison.html"
_CELLS = "cells"
_STOPPED, _SOME_FAILED = 130, 1


@dataclass(frozen=True)
class Wishes:
    """What the options say.

    Attributes:
        lines: `FOLDER` or `NAME=FOLDER` each.
        detectors: names with commas between, or None for all.
        config: of every detector.
        folder: keeps everything.
        weights: a file, a folder, "untrained", or None.
        control: whether each detector's control is measured too.
        device: where to fit.
        settings: `key=value`, in order.
        layouts: how folders are read, `LAYOUT` or `NAME=LAYOUT` each; none to find out.
        regions_of_interest: mask images, `MASK` of the only line or `NAME=MASK` each.
    """

    lines: Sequence[str]
    detectors: str | None
    config: Literal["small", "paper"]
    folder: Path
    weights: str | None
    control: bool
    device: Literal["auto", "cpu", "cuda"]
    settings: Sequence[str]
    layouts: Sequence[str] = ()
    regions_of_interest: Sequence[str] = ()


def compare_detectors(wishes: Wishes, threads: int | None) -> None:
    """Measure what is missing, print one table a line and write the page.

    Raises:
        typer.Exit: with 1 if a detector could not be measured, and 130 after a stop.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    reporter = choose_reporter(Console())
    plans = list(_plans(wishes, reporter))
    weights, weight_folders = read_weights_option(wishes.weights)
    cells = wishes.folder.resolve() / _CELLS
    means = Means(cells, weights, weight_folders, wishes.device)
    try:
        outcomes = list(complete(plans, means, reporter))
    except (FitStopped, KeyboardInterrupt) as stop:
        reporter.note("Stopped. The same command goes on with what is missing.")
        raise typer.Exit(_STOPPED) from stop
    results = pair_controls(outcomes, plans)
    for line in dict.fromkeys(plan.line for plan in plans):
        rows = table_rows([result for result in results if result.plan.line == line])
        reporter.table(line, TABLE_COLUMNS, rows)
    page = wishes.folder / PAGE
    page.write_text(render_comparison(results, cells, _settings_of(wishes)), encoding="utf-8")
    reporter.note(f"{page} is written; open it in a browser.")
    if not all(isinstance(outcome, Cell) for outcome in outcomes):
        raise typer.Exit(_SOME_FAILED)


def _settings_of(wishes: Wishes) -> Settings:
    if wishes.weights == UNTRAINED:
        weights = "random, not pretrained"
    else:
        weights = "of each backbone's name" if wishes.weights is None else wishes.weights
    return Settings(wishes.config, tuple(wishes.settings), weights)


def _plans(wishes: Wishes, reporter: Reporter) -> Iterator[CellPlan]:
    lines = dict(_name_and_folder(given) for given in wishes.lines)
    if len(lines) < len(wishes.lines):
        raise ParameterInvalid("Two lines have the same name; give --line NAME=FOLDER to tell them apart.")
    layouts, masks = layouts_of(list(lines), wishes.layouts), masks_of(list(lines), wishes.regions_of_interest)
    for line, folder in lines.items():
        _refuse_unmeasurable(folder, layouts.get(line))
    for mask in masks.values():
        read_region_of_interest(mask)  # whatever is wrong with it is told now
    every = wishes.detectors is None
    names = sorted(DETECTORS) if wishes.detectors is None else [name.strip() for name in wishes.detectors.split(",")]
    for name in dict.fromkeys(names):
        try:
            config = load_config(wishes.config, name, wishes.settings)
        except ConfigFault as fault:
            if not every:
                raise ConfigFault(f"{name}: {fault}") from fault
            reporter.note(f"{name} is left out: {fault}")
            continue
        for line, folder in lines.items():
            plan = CellPlan(line, folder, config, layout=layouts.get(line), region_of_interest=masks.get(line))
            yield plan
            if wishes.control:
                yield control_of(plan)


def _name_and_folder(given: str) -> tuple[str, Path]:
    name, folder = name_and_path(given)
    try:
        return TypeAdapter(LineName).validate_python(name or folder.name), folder
    except ValidationError as error:
        raise ParameterInvalid(
            f"{name or folder.name!r} can't name a line; give --line NAME=FOLDER with a name of letters, "
            "digits, dots, dashes and underscores."
        ) from error


def _refuse_unmeasurable(folder: Path, layout: str | None) -> None:
    """Refuse a line on which detectors can't be told apart, before hours are spent on it."""
    labels = {sample.label for sample in read_dataset(folder, layout).test}
    if not {NORMAL, ANOMALOUS} <= labels:
        raise DatasetFault(
            f"{folder} has no good or no defective test frames, so detectors can't be compared; put some into "
            "test/good and test/<kind>."
        )
    data_digest(folder, layout)  # opens every file, once for all detectors
