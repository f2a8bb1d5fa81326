"""Several detectors on several lines: each pair is one real run, measured, and kept so that nothing is measured twice.

A cell is one detector on one line with one seed, from the folder of frames to the bundle; its control is the same with
an untrained backbone and no descent, which is what the detector's training has to beat. A cell is kept as one JSON
file with a digest of everything it depends on; where the digest still holds, the cell is read instead of measured.
"""

import ast
import dataclasses
import hashlib
import importlib.util
import json
import shlex
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from models import DETECTORS, build_detector
from models.detector import GradientStage, Recipe
from service.contract.bundle import MODEL_FILE, SCHEMA_VERSION, MetricRecord, load_bundle
from service.contract.frames import FrameLimits
from service.contract.tiling import cut_tiles
from training.backbones.weights import UNTRAINED, resolve_weights
from training.calibrate import read_region_of_interest
from training.comparison.speed import GraphSpeed, measure_speed
from training.config import RunConfig
from training.data.check import check_dataset
from training.data.detect import read_dataset
from training.data.loader import load_frame
from training.faults import CALLERS, OURS
from training.measuring.bootstrap import FEWEST_FRAMES
from training.progress import Reporter, SilentReporter
from training.reporting.page_data import VerdictRow
from training.run import FinishedRun, train
from training.run_directory import LineRequest, RunRequest, mask_path

Kind = Literal["fitted", "control"]

_CELL_FILE = "cell.json"
_RESAMPLES = 2000
# The GPU's memory is one detector's fault, and the next one may fit.
_EXPECTED: tuple[type[Exception], ...] = (*OURS, *CALLERS, torch.OutOfMemoryError)
# Of the cell's file; a file of another schema is measured again.
_SCHEMA = 1
_SHARED_SHAPE = "models.detector"
_CONTROL_TOLERANCE = 1e-6


@dataclass(frozen=True)
class CellPlan:
    """What a cell shall measure.

    Attributes:
        line: name of the line.
        folder: of its frames.
        config: of the run.
        kind: the detector, or its control.
        variant: what tells the configuration from another one of the same detector; empty where there is one only.
        layout: how the folder is read, or None to find out.
        region_of_interest: a mask image, white where parts are inspected, or None.
    """

    line: str
    folder: Path
    config: RunConfig
    kind: Kind = "fitted"
    variant: str = ""
    layout: str | None = None
    region_of_interest: Path | None = None

    def __str__(self) -> str:
        """Name the cell for people."""
        control = " (control)" if self.kind == "control" else ""
        return f"{title_of(self.config.detector, self.variant)} on {self.line}{control}, seed {self.config.seed}"


@dataclass(frozen=True)
class Means:
    """What all cells of a comparison share.

    Attributes:
        folder: keeps the cells.
        weights: a safetensors file, "untrained", or None to search by the backbone's name.
        weight_folders: folders that may hold the file.
        device: where to fit.
        speed_s: seconds that timing of one graph lasts at least.
    """

    folder: Path
    weights: Path | Literal["untrained"] | None = None
    weight_folders: tuple[Path, ...] = ()
    device: Literal["auto", "cpu", "cuda"] = "auto"
    speed_s: float = 3.0


class Cell(BaseModel):
    """What was measured of one detector on one line.

    Attributes:
        digest: of everything that the cell depends on.
        detector: name of the method.
        line: name of the line.
        kind: the detector, or its control.
        seed: of the run.
        backbone: name of the feature extractor, or None.
        metrics: figures of the test frames; an undefined one has a reason.
        good_scores: of good test frames, in the line's order.
        defect_scores: of anomalous test frames, in the line's order.
        fit_s: seconds of fitting, encoding of frames included.
        total_s: seconds from the folder of frames to the bundle.
        total_cpu_s: seconds of this process on all cores in that time, which other work hardly moves; None in older
            cells.
        trainable_parameters: numbers that a descent changes.
        parameters: all numbers that the network learnt or was given, backbone included.
        speed: of the exported graph, or None where nothing was exported.
        model_bytes: size of the graph.
        bundle_bytes: size of the whole bundle.
        bundle: its directory, from the cell's own; None where it was not kept.
        created_at: UTC, ISO 8601.
        verdicts: at the thresholds that good frames gave: held-out good frames first, then test frames by kind.
        variant: of the plan.
        git_revision: commit of the sources that measured it, with "+changes" where files differed; None outside a
            checkout and in older cells.
        backbone_digest: SHA-256 of the backbone's weights; None without a backbone and in older cells.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    digest: str
    detector: str
    line: str
    kind: Kind
    seed: int
    backbone: str | None
    metrics: dict[str, MetricRecord]
    good_scores: tuple[float, ...]
    defect_scores: tuple[float, ...]
    fit_s: float
    total_s: float
    trainable_parameters: int | None
    parameters: int | None
    speed: GraphSpeed | None
    model_bytes: int | None
    bundle_bytes: int | None
    bundle: Path | None
    created_at: str
    verdicts: tuple[VerdictRow, ...] = ()
    variant: str = ""
    total_cpu_s: float | None = None
    git_revision: str | None = None
    backbone_digest: str | None = None

    @property
    def title(self) -> str:
        """Name the row of a table that the cell belongs to."""
        return title_of(self.detector, self.variant)


@dataclass(frozen=True)
class CellFailed:
    """A cell that could not be measured.

    Attributes:
        plan: what was wanted.
        sentence: why not.
    """

    plan: CellPlan
    sentence: str


def control_of(plan: CellPlan) -> CellPlan:
    """Return a cell's control: an untrained backbone, and descents of no step; passes over good frames do run."""
    own = plan.config.detector_config()
    still = {
        field.name: dataclasses.asdict(dataclasses.replace(recipe, iterations=0, epochs=None))
        for field in dataclasses.fields(own)
        if isinstance(recipe := getattr(own, field.name), Recipe)
    }
    values = plan.config.model_dump(mode="json")
    values["hyperparameters"] |= json.loads(json.dumps(still))  # lists in place of tuples, as YAML would give
    # Scores that nothing was learnt for may all be nearly the same; a control is measured and never served.
    values["golden"]["score_tolerance"] = _CONTROL_TOLERANCE
    return dataclasses.replace(plan, config=RunConfig.model_validate(values), kind="control")


def complete(plans: Sequence[CellPlan], means: Means, reporter: Reporter) -> Iterator[Cell | CellFailed]:
    """Read each cell that is still true, measure each other one, and go on where one fails.

    Args:
        plans: in the order of the work.
        means: where cells are kept, and what runs need.
        reporter: shows how far the work is.

    Yields:
        One result for each plan, in order.

    Raises:
        FitStopped: after Ctrl-C or a termination signal; the same call goes on with the first cell that is missing.
    """
    for number, plan in enumerate(plans, start=1):
        place = f"{number} of {len(plans)}: {plan}"
        try:
            digest = _digest(plan, means)
            kept = read_cell(cell_directory(means.folder, plan))
            if kept is not None and kept.digest == digest:
                reporter.note(f"{place} is already measured")
                yield kept
                continue
            reporter.note(place)
            yield _measure(plan, means, digest, reporter)
        except _EXPECTED as error:
            reporter.note(f"{plan} failed: {error}")
            yield CellFailed(plan, str(error))


def cell_directory(folder: Path, plan: CellPlan) -> Path:
    """Return where a cell is kept, its bundle included."""
    name = plan.config.detector if not plan.variant else f"{plan.config.detector}+{plan.variant.replace(' ', '_')}"
    return folder / plan.line / name / f"{plan.kind}-{plan.config.seed}"


def rimless_mask(folder: Path, plan: CellPlan) -> Path:
    """Return where the mask is kept that leaves out the rim, if that sets a detector's thresholds.

    Beside the cell, not in it: measured again with that mask, the cell is made anew, and the mask must outlast it.
    """
    directory = cell_directory(folder, plan)
    return directory.with_name(f"{directory.name}-without_rim.png")


def title_of(detector: str, variant: str) -> str:
    """Name a detector, or one of several configurations of it."""
    return detector if not variant else f"{detector}, {variant}"


def read_cell(directory: Path) -> Cell | None:
    """Return the cell that a directory holds, or None where there is none that can be read."""
    try:
        return Cell.model_validate_json((directory / _CELL_FILE).read_bytes())
    except (OSError, ValidationError):
        return None


def read_cells(folder: Path) -> list[Cell]:
    """Return all cells below a folder, by line, detector, kind and seed."""
    found = (read_cell(path.parent) for path in sorted(folder.rglob(_CELL_FILE)))
    return [cell for cell in found if cell is not None]


def keep_cell(directory: Path, cell: Cell) -> None:
    """Write a cell, all of it or nothing."""
    directory.mkdir(parents=True, exist_ok=True)
    temporary = directory / f".{_CELL_FILE}.writing"
    temporary.write_text(cell.model_dump_json(indent=2) + "\n", encoding="utf-8")
    temporary.replace(directory / _CELL_FILE)


def count_parameters(config: RunConfig) -> tuple[int, int]:
    """Return how many numbers of a detector a descent changes, and how many it has, backbone included."""
    detector: Any = build_detector(config.detector, config.detector_config())
    trainable = {
        id(parameter): parameter.numel()
        for stage in detector.stages()
        if isinstance(stage, GradientStage)
        for parameter in stage.parameters
    }
    return sum(trainable.values()), sum(parameter.numel() for parameter in detector.parameters())


def sources_digest(detector: str) -> str:
    """Return the SHA-256, in hexadecimal, over the code of a detector and of all of `models` that it imports.

    Words are not code: comments and docstrings may change. The shape that all detectors share is left out, because
    what it decides, the recipe, is part of the configuration.
    """
    waiting, seen = [DETECTORS[detector].detector.__module__], {_SHARED_SHAPE: ""}
    while waiting:
        module = waiting.pop()
        if module not in seen:
            tree = ast.parse(_source(module))
            waiting.extend(_imports_of_ours(tree))
            seen[module] = ast.dump(_without_docstrings(tree))
    return hashlib.sha256(json.dumps(seen, sort_keys=True).encode()).hexdigest()


def auroc_resamples(cells: Sequence[Cell], seed: int = 0) -> NDArray[np.float64]:
    """Draw test frames with replacement, normal and anomalous ones apart, and return each draw's mean image AUROC.

    Equal seeds draw equal frames, so that two detectors on one line can be compared draw by draw.

    Args:
        cells: of one detector on one line, one or more seeds.
        seed: of the draws.

    Returns:
        `(2000,)` float64; empty where the line lacks good or defective test frames.
    """
    good, defective = len(cells[0].good_scores), len(cells[0].defect_scores)
    if not good or not defective:
        return np.empty(0)
    rng = np.random.default_rng(seed)
    good_counts = rng.multinomial(good, np.full(good, 1 / good), size=_RESAMPLES)
    defect_counts = rng.multinomial(defective, np.full(defective, 1 / defective), size=_RESAMPLES)
    beaten = np.mean([_beaten(cell) for cell in cells], axis=0)  # (D, G)
    draws: NDArray[np.float64] = np.sum((defect_counts @ beaten) * good_counts, axis=1, dtype=np.float64)
    return draws / (good * defective)


def auroc_difference(first: Sequence[Cell], second: Sequence[Cell]) -> tuple[float, float] | None:
    """Return the 95 % interval of how much higher one image AUROC is than another, over the same draws of test frames.

    A frame that is hard is hard for both, so this tells two detectors apart where the intervals of each alone overlap
    (DeLong, DeLong, Clarke-Pearson, "Comparing the Areas under Two or More Correlated ROC Curves", Biometrics 1988).

    Args:
        first: cells of one detector on one line, one or more seeds.
        second: of another on the same frames.

    Returns:
        Lower and upper bound, from -1 to 1; None where good or defective test frames are too few to tell.
    """
    if min(len(first[0].good_scores), len(first[0].defect_scores)) < FEWEST_FRAMES:
        return None
    difference = auroc_resamples(first) - auroc_resamples(second)
    low, high = np.percentile(difference, (2.5, 97.5))
    return float(low), float(high)


def _beaten(cell: Cell) -> NDArray[np.float64]:
    """Return for each defective frame and good frame, `(D, G)`, 1 where the first scores higher and 1/2 for a tie."""
    defective, good = np.array(cell.defect_scores)[:, None], np.array(cell.good_scores)[None]
    return np.where(defective == good, 0.5, defective > good).astype(np.float64)


def _measure(plan: CellPlan, means: Means, digest: str, reporter: Reporter) -> Cell:
    directory = cell_directory(means.folder, plan)
    # What lies here is an older cell or half of this one, and the folder is the comparison's own.
    shutil.rmtree(directory, ignore_errors=True)
    store, run = directory / "store", directory / "run"
    request = RunRequest(
        name=plan.line,
        lines=(
            LineRequest(
                name=plan.line,
                folder=plan.folder,
                layout=plan.layout,
                region_of_interest=plan.region_of_interest,
            ),
        ),
        store=store,
        config=plan.config,
        weights=UNTRAINED if plan.kind == "control" else means.weights,
        weight_folders=means.weight_folders,
        device=means.device,
    )
    rimless = rimless_mask(means.folder, plan)
    begun, begun_cpu = time.perf_counter(), time.process_time()
    try:
        finished = train(request, run, reporter, how_to_leave_out=lambda _: _compare_with(plan.line, rimless))
    finally:  # the mask has been named, also where a later step fails
        if (proposed := mask_path(run, plan.line, [plan.line])).exists():
            shutil.copyfile(proposed, rimless)
    total_s, total_cpu_s = time.perf_counter() - begun, time.process_time() - begun_cpu
    cell = _cell_of(plan, finished, digest, (total_s, total_cpu_s), means.speed_s)
    if plan.kind == "control":
        shutil.rmtree(store)
        cell = cell.model_copy(update={"bundle": None})
    # The checkpoint is large, and the bundle holds all that is looked at later.
    shutil.rmtree(run)
    keep_cell(directory, cell)
    return cell


def _compare_with(line: str, mask: Path) -> str:
    """Say how to compare without the rim; all detectors have to inspect the same, so it is not one's export."""
    return f"the same flawline compare with {shlex.join(('--roi', f'{line}={mask}'))}"


def _cell_of(plan: CellPlan, finished: FinishedRun, digest: str, total: tuple[float, float], speed_s: float) -> Cell:
    bundle, report = load_bundle(finished.bundle), finished.report
    (line,) = report.lines
    spec = plan.config.frame_input
    canvas = load_frame(read_dataset(plan.folder, plan.layout).train_good[0].path, spec, FrameLimits())
    trainable, parameters = count_parameters(plan.config)
    return Cell(
        digest=digest,
        detector=plan.config.detector,
        line=plan.line,
        kind=plan.kind,
        seed=plan.config.seed,
        backbone=report.run.backbone,
        metrics=line.metrics,
        good_scores=line.good_scores,
        defect_scores=line.defect_scores,
        fit_s=sum(finished.fitting.seconds.values()),
        total_s=total[0],
        total_cpu_s=total[1],
        trainable_parameters=trainable,
        parameters=parameters,
        speed=measure_speed(bundle.model, cut_tiles(canvas, spec), speed_s),
        model_bytes=(finished.bundle / MODEL_FILE).stat().st_size,
        bundle_bytes=sum(path.stat().st_size for path in finished.bundle.rglob("*") if path.is_file()),
        bundle=Path("store") / plan.line / finished.bundle.name,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        verdicts=line.verdicts,
        variant=plan.variant,
        git_revision=finished.manifest.git_revision,
        backbone_digest=None if finished.manifest.backbone is None else finished.manifest.backbone.digest,
    )


def _digest(plan: CellPlan, means: Means) -> str:
    backbone = plan.config.backbone
    weights = UNTRAINED if plan.kind == "control" else means.weights
    facts: dict[str, object] = {
        "schema": _SCHEMA,
        "bundle": SCHEMA_VERSION,
        # Without defaults, so that a key which the run learns later does not make old cells untrue.
        "configuration": plan.config.model_dump(mode="json", exclude_defaults=True),
        "kind": plan.kind,
        "data": data_digest(plan.folder, plan.layout),
        "sources": sources_digest(plan.config.detector),
        "weights": None if backbone is None else _weights_digest(backbone, weights, means.weight_folders),
    }
    if plan.region_of_interest is not None:
        facts["region of interest, of all figures"] = read_region_of_interest(plan.region_of_interest)
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


@cache
def data_digest(folder: Path, layout: str | None) -> str:
    """Return the digest of a line's files, each of them looked at once.

    Raises:
        DatasetFault: if one of them can't be used.
    """
    return check_dataset(read_dataset(folder, layout), FrameLimits(), SilentReporter()).digest


@cache
def _weights_digest(backbone: str, weights: Path | Literal["untrained"] | None, folders: tuple[Path, ...]) -> str:
    return UNTRAINED if weights == UNTRAINED else resolve_weights(backbone, weights, folders).digest


def _source(module: str) -> bytes:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{module} has no source file")
    return Path(spec.origin).read_bytes()


def _imports_of_ours(tree: ast.Module) -> list[str]:
    return [
        node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module is not None and node.module.startswith("models.")
    ]


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return tree
