"""Runs a paper's setting on a data set, model by model, and keeps each result, so that a stopped work goes on.

One cell is one fitted model: one category in the single-class setting, all of them in the multi-class one; each with
one seed. A cell is one JSON file with a digest of everything it depends on; where the digest still holds, the cell is
read instead of measured. A model that was stopped while fitting goes on from its checkpoint. Files of all categories
are looked at before the first model is fitted; one that can't be used costs its own category alone. What is made of the
cells is told in `pages.py`.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from service.contract.bundle import MetricRecord
from training.backbones.weights import resolve_weights
from training.comparison.compare import sources_digest
from training.config import RunConfig
from training.data.benchmarks import identify
from training.data.check import CheckedDataset
from training.data.detect import Category, categories, read_dataset
from training.data.samples import DatasetFault
from training.faults import CALLERS, OURS
from training.measuring.evaluate import needs_held_out
from training.progress import PartReporter, Reporter
from training.reproduction.measure import Equipment, check_line, measure
from training.reproduction.published import SHOTS, Setting, read_published

_SCHEMA = 2
_CELLS, _UNFINISHED = "cells", "unfinished"
_ALL = "all"
_EXPECTED: tuple[type[Exception], ...] = (*OURS, *CALLERS, torch.OutOfMemoryError)
# What of a run's configuration a figure depends on; thresholds and golden sets are none of its business.
_DECIDING = {
    "detector",
    "backbone",
    "hyperparameters",
    "input",
    "evaluation_resolution",
    "shots",
    "shot_seed",
    "shot_views",
}


@dataclass(frozen=True)
class Plan:
    """What shall be reproduced.

    Attributes:
        lines: categories to run.
        data: key of the published data set that the folder holds, or None.
        is_whole: whether these are all lines of the folder.
        setting: one model for each category, one for all, or few frames.
        config: of every model, but for its seed and shots.
        seeds: one model or set of models each; in a few-shot setting each draws its own frames.
    """

    lines: tuple[Category, ...]
    data: str | None
    is_whole: bool
    setting: Setting
    config: RunConfig
    seeds: tuple[int, ...]

    @property
    def is_one_model(self) -> bool:
        """Whether all categories share a model."""
        told = read_published().get(self.config.detector)
        shared = told is not None and told.shots_share_a_model
        return shared if self.setting in SHOTS else self.setting == "multi-class"

    def config_of(self, seed: int) -> RunConfig:
        """Return the configuration of a seed's models."""
        update: dict[str, int] = {"seed": seed}
        if self.setting in SHOTS:
            update |= {"shots": SHOTS[self.setting], "shot_seed": seed}
        return self.config.model_copy(update=update)


class Cell(BaseModel):
    """What was measured of one model.

    Attributes:
        digest: of everything that the cell depends on.
        setting: one model for each category, or one for all.
        seed: of the model.
        figures: of each category, by name; shares of 1, not percent.
        frames: of each category: fitted on, tested normal, tested anomalous.
        shots: of each category, names of the few frames fitted on; empty where all were.
        backbone: SHA-256 of its weights, or None.
        device: where it was fitted.
        fit_s: seconds of fitting, in the process that ended it.
        warnings: what the check of the data allowed but wants known.
        created_at: UTC, ISO 8601.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    digest: str
    setting: Setting
    seed: int
    figures: dict[str, dict[str, MetricRecord]]
    frames: dict[str, tuple[int, int, int]]
    shots: dict[str, tuple[str, ...]]
    backbone: str | None
    device: str
    fit_s: float
    warnings: tuple[str, ...]
    created_at: str


class CellFailed(BaseModel):
    """A model that could not be measured.

    Attributes:
        categories: that it was for.
        seed: of the model.
        sentence: why not.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    categories: tuple[str, ...]
    seed: int
    sentence: str


def plan_lines(root: Path, layout: str | None, wanted: Sequence[str]) -> tuple[tuple[Category, ...], str | None, bool]:
    """Find the lines to run.

    Args:
        root: folder of the data set.
        layout: name of its layout, or None to find out.
        wanted: names of categories; none means all.

    Returns:
        The lines, the key of the published data set or None, and whether they are all lines of the folder.

    Raises:
        DatasetFault: if the folder holds no data set, or a wanted category is not in it.
    """
    found = {line.name: line for line in categories(root, layout)}
    unknown = [name for name in wanted if name not in found]
    if unknown:
        raise DatasetFault(f"{root} has no category {', '.join(unknown)}; it has {', '.join(found)}.")
    chosen = tuple(line for name, line in found.items() if not wanted or name in wanted)
    return chosen, identify(tuple(found.values())), len(chosen) == len(found)


def reproduce(plan: Plan, equipment: Equipment, folder: Path, reporter: Reporter) -> list[Cell | CellFailed]:
    """Read each cell that is still true, measure each other one, and go on where one fails.

    What can't be used of the files is told at once; so it can be mended before its category's turn comes.

    Args:
        plan: what shall be reproduced.
        equipment: weights and device.
        folder: keeps cells, and the checkpoint of the model at work.
        reporter: shows how many categories are done.

    Returns:
        One result for each model, seed by seed.

    Raises:
        FitStopped: after Ctrl-C or a termination signal; the same call goes on with the model that was at work.
    """
    groups = [plan.lines] if plan.is_one_model else [(line,) for line in plan.lines]
    checked = _look_at_files(groups, plan, equipment, folder, reporter)
    results: list[Cell | CellFailed] = []
    with reporter.bar("categories", len(plan.lines) * len(plan.seeds)) as bar:
        for seed in plan.seeds:
            config = plan.config_of(seed)
            for lines in groups:
                names = tuple(line.name for line in lines)
                name = f"{_ALL if plan.is_one_model else names[0]}, seed {seed}"
                try:
                    part = PartReporter(reporter, bar, name)
                    results.append(_complete(lines, checked, plan, config, equipment, folder, part))
                except _EXPECTED as error:
                    reporter.note(f"{name}: failed. {error}")
                    results.append(CellFailed(categories=names, seed=seed, sentence=str(error)))
                bar.advance(len(lines))
    return results


def cell_path(folder: Path, plan: Plan, lines: Sequence[Category], seed: int) -> Path:
    """Return where a cell is kept."""
    name = _ALL if plan.is_one_model else lines[0].name
    return folder / _CELLS / plan.setting / f"seed-{seed}" / f"{name}.json"


def read_cell(path: Path) -> Cell | None:
    """Return the cell that a file holds, or None where there is none that can be read."""
    try:
        return Cell.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def _look_at_files(
    groups: Sequence[Sequence[Category]], plan: Plan, equipment: Equipment, folder: Path, reporter: Reporter
) -> dict[str, CheckedDataset]:
    """Open every file of the categories that some model still needs; return those whose files can all be used."""
    checked: dict[str, CheckedDataset] = {}
    for lines in groups:
        for line in lines:
            try:
                if all(_kept(lines, plan, plan.config_of(seed), equipment, folder)[1] for seed in plan.seeds):
                    continue
                checked[line.name] = check_line(line, plan.config, reporter)
            except _EXPECTED as error:
                reporter.note(f"{line.name} can't be measured as it is, and is tried again at its turn. {error}")
    return checked


def _kept(
    lines: Sequence[Category], plan: Plan, config: RunConfig, equipment: Equipment, folder: Path
) -> tuple[str, Cell | None]:
    """Return the digest of a model's cell, and the cell if one with this digest is kept."""
    digest = _digest(lines, plan.setting, config, equipment)
    kept = read_cell(cell_path(folder, plan, lines, config.seed))
    return digest, kept if kept is not None and kept.digest == digest else None


def _complete(
    lines: Sequence[Category],
    checked: Mapping[str, CheckedDataset],
    plan: Plan,
    config: RunConfig,
    equipment: Equipment,
    folder: Path,
    reporter: PartReporter,
) -> Cell:
    digest, kept = _kept(lines, plan, config, equipment, folder)
    if kept is not None:
        reporter.note("is already measured")
        return kept
    usable = {line.name: checked.get(line.name) or check_line(line, config, reporter) for line in lines}
    # Named by the digest, so that a checkpoint of another configuration is never met.
    directory = folder / _UNFINISHED / digest[:16]
    measured = measure(usable, config, equipment, directory, digest, reporter)
    cell = Cell(
        digest=digest,
        setting=plan.setting,
        seed=config.seed,
        figures=measured.figures,
        frames=measured.frames,
        shots=measured.shots,
        backbone=None if measured.backbone is None else measured.backbone.digest,
        device=measured.device,
        fit_s=measured.fit_s,
        warnings=measured.warnings,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    _keep(cell_path(folder, plan, lines, config.seed), cell)
    shutil.rmtree(directory, ignore_errors=True)
    return cell


def _keep(path: Path, cell: Cell) -> None:
    """Write a cell, all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.writing")
    temporary.write_text(cell.model_dump_json(indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


def _digest(lines: Sequence[Category], setting: Setting, config: RunConfig, equipment: Equipment) -> str:
    name = config.backbone
    facts = {
        "schema": _SCHEMA,
        "setting": setting,
        "configuration": config.model_dump(mode="json", include=_DECIDING),
        "seed": config.seed,
        "lines": [[line.name, line.layout, _listing(line)] for line in lines],
        "sources": sources_digest(config.detector),
        "weights": None
        if name is None
        else resolve_weights(name, equipment.weights, equipment.weight_folders, seed=config.seed).digest,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _listing(line: Category) -> str:
    """Return the SHA-256 over names and sizes of a line's files; contents would take minutes for a large set."""
    samples = read_dataset(line.folder, line.layout).samples
    rows = [
        f"{path.as_posix()} {path.stat().st_size} {sample.split} {sample.label}"
        for sample in samples
        for path in (sample.path, *sample.mask_paths)
    ]
    if needs_held_out(samples):
        rows.append("SegF1")  # cells from before this figure lack it
    if any(sample.channels for sample in samples):
        rows.append("I-AUROC of each kind")  # likewise
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()
