"""All detectors on real lines, each beside its control, on this machine's CPU: figures, time, size, bottleneck.

Every cell is one complete run with the committed configuration, from the folder of frames to a bundle, and is kept as
one JSON file in the output folder with a digest of configuration, data, weights and the detector's sources. A cell
that is still true is not measured again, so the work can be stopped, and split over processes by --detectors. The
cells lie in `cells/` beside this file and are committed; the bundles beside them are not.

    .venv/bin/python tests/benchmarks/detectors.py measure --control --probe
    .venv/bin/python tests/benchmarks/detectors.py measure --control --detectors inp_former,glcf
    .venv/bin/python tests/benchmarks/detectors.py measure --control-only --detectors st_mae
    .venv/bin/python tests/benchmarks/detectors.py measure --variant resnet18 --set backbone=resnet18
    .venv/bin/python tests/benchmarks/detectors.py measure --detectors grnr --variant 'rim left out' --without-rim
    .venv/bin/python tests/benchmarks/detectors.py table

The last command writes the section between the two markers of RESULTS.md; the words on why a detector is weak are
read from weaknesses.yaml beside it. `--variant TITLE` with `--set KEY=VALUE` or `--without-rim` measures a detector in
another way, as a row of its own. Nothing is chosen on test frames here.
"""

import argparse
import hashlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean
from string import ascii_lowercase

import numpy as np
import torch
import yaml
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from models import DETECTORS
from service.contract.frames import encode_png
from tests.benchmarks import nearest_neighbour_probe
from training.comparison.compare import (
    Cell,
    CellFailed,
    CellPlan,
    Means,
    auroc_resamples,
    complete,
    control_of,
    keep_cell,
    read_cell,
    read_cells,
)
from training.comparison.speed import GraphSpeed
from training.config import ConfigFault, load_config
from training.measuring.evaluate import to_records
from training.measuring.metrics import image_metrics
from training.measuring.peaks import mask_without_rim
from training.progress import choose_reporter

_HERE = Path(__file__).resolve().parent
_RESULTS = _HERE / "RESULTS.md"
_WEAKNESSES = _HERE / "weaknesses.yaml"
_CELLS = _HERE / "cells"
_BEGIN, _END = "<!-- detectors: begin -->", "<!-- detectors: end -->"
# Features of the probe, and the untrained ones that are their control.
_PROBES = {"embedded": None, "mobilenetv1_100": "untrained mobilenetv1_100", "resnet18": None}
_PROBE = "nearest neighbours"
_MASK_SIZE = (256, 256)

_ACCURACY_COLUMNS = (
    *("detector", "line", "seeds", "I-AUROC [95 %]", "control [95 %]", "above control"),
    *("I-AP (control)", "P-AUROC (control)", "AUPRO@0.3 (control)"),
)


@dataclass
class Side:
    """A detector or its control on one line."""

    cells: list[Cell] = field(default_factory=list)

    def figure(self, name: str) -> float | None:
        """Return the mean of the cells that have the figure."""
        values = [cell.metrics[name].value for cell in self.cells if name in cell.metrics]
        known = [value for value in values if value is not None]
        return mean(known) if known else None

    def interval(self) -> tuple[float, float] | None:
        """Return the bounds of 95 % of the draws of the image AUROC."""
        if not self.cells:
            return None
        draws = auroc_resamples(self.cells)
        if not draws.size:
            return None
        low, high = np.percentile(draws, (2.5, 97.5))
        return float(low), float(high)


@dataclass
class Pair:
    """What a row compares."""

    fitted: Side
    control: Side


def measure(options: argparse.Namespace) -> int:
    """Measure every cell that is missing or no longer true; return the number of those that failed."""
    torch.set_num_threads(options.threads)
    reporter = choose_reporter(Console(stderr=True, soft_wrap=True))
    lines = _lines(options)
    means = Means(folder=options.output.resolve(), weight_folders=(options.weights.resolve(),), device="cpu")
    plans = list(_plans(options, lines))
    if options.control_only:
        plans = [control_of(plan) for plan in plans]
    elif options.control:
        plans = [each for plan in plans for each in (plan, control_of(plan))]
    failed = 0
    for result in complete(plans, means, reporter):
        if isinstance(result, CellFailed):
            failed += 1
        else:
            print(_told(result), flush=True)
    if options.probe:
        for features in dict.fromkeys([*_PROBES, *filter(None, _PROBES.values())]):
            _probe(features, lines, options)
    return failed


def _plans(options: argparse.Namespace, lines: Sequence[Path]) -> Iterator[CellPlan]:
    region = None
    if options.without_rim:
        region = options.output / "without_rim.png"
        region.parent.mkdir(parents=True, exist_ok=True)
        region.write_bytes(encode_png(mask_without_rim(_MASK_SIZE, (0.0, 0.0, 1.0, 1.0))))
    for detector in _names(options.detectors, DETECTORS):
        for line in lines:
            settings = list(options.set)
            if getattr(DETECTORS[detector].config, "products", None) is not None:
                settings.append(f"product={'texture' if line.name in options.textures.split(',') else 'object'}")
            try:
                configs = [load_config(options.config, detector, [f"seed={seed}", *settings]) for seed in options.seeds]
            except ConfigFault as fault:
                print(f"{detector} on {line.name} is left out: {fault}", flush=True)
                continue
            yield from (
                CellPlan(line.name, line, config, variant=options.variant, region_of_interest=region)
                for config in configs
            )


def write_table(options: argparse.Namespace) -> int:
    """Write the Markdown section between the markers of the results."""
    cells = read_cells(options.output)
    if not cells:
        print(f"{options.output} holds no cell; run measure first.", file=sys.stderr)
        return 1
    weaknesses = yaml.safe_load(_WEAKNESSES.read_text("utf-8")) or {}
    section = f"{_BEGIN}\n{tell(cells, weaknesses)}{_END}"
    text = options.results.read_text("utf-8")
    if _BEGIN in text and _END in text:
        before, after = text.split(_BEGIN)[0], text.split(_END, 1)[1]
        text = before + section + after
    else:
        text = f"{text.rstrip()}\n\n{section}\n"
    options.results.write_text(text, "utf-8")
    print(f"{options.results} is written from {len(cells)} cells.")
    return 0


def tell(cells: Sequence[Cell], weaknesses: dict[str, str]) -> str:
    """Return the section: what the figures mean, a table of accuracy, one of cost, and the words on weaknesses.

    Args:
        cells: measured ones.
        weaknesses: words by title of a row.
    """
    pairs: dict[tuple[str, str], Pair] = {}
    for cell in cells:
        pair = pairs.setdefault((cell.title, cell.line), Pair(Side(), Side()))
        (pair.fitted if cell.kind == "fitted" else pair.control).cells.append(cell)
    lines = sorted({line for _, line in pairs})
    names = _by_accuracy(pairs, lines)
    cpus = sorted({cell.speed.cpu for cell in cells if cell.speed is not None})
    marks = dict(zip(cpus, ascii_lowercase, strict=False)) if len(cpus) > 1 else dict.fromkeys(cpus, "")
    parts = [
        "## All detectors, small configuration, each beside its control\n",
        _HOW_MEASURED.format(cpus=";\n".join(f"{marks[cpu]}: {cpu}".removeprefix(": ") for cpu in cpus) or "-"),
        "### I-AUROC in short, control in brackets\n",
        _table(
            ("detector", *lines, "mean"),
            (_short_row(name, [pairs.get((name, line), Pair(Side(), Side())) for line in lines]) for name in names),
        ),
        "### Accuracy\n",
        _table(
            _ACCURACY_COLUMNS,
            (_accuracy_row(name, line, pairs[name, line]) for name in names for line in lines if (name, line) in pairs),
        ),
        _undefined(cells),
        "### Cost\n",
        _table(
            (
                "detector",
                "backbone",
                "trained / all parameters",
                "fit",
                "run",
                "run, CPU",
                "ms a frame",
                "slowest operators",
                "graph",
            ),
            _cost_rows(names, cells, marks),
        ),
    ]
    notes = [f"- **{name}**: {' '.join(weaknesses[name].split())}" for name in names if name in weaknesses]
    if notes:
        parts += ["### Where a detector is weak, and why\n", "\n".join(notes) + "\n"]
    return "\n".join(parts)


_HOW_MEASURED = """\
`tests/benchmarks/detectors.py measure --control --probe`, then `detectors.py table`. Every row is a complete run from
the folder of frames to a bundle; figures are means over a row's seeds, which stand in brackets for a control that has
others. The control is the same detector with an untrained backbone and descents of no step, passes over the good frames
included. Brackets: 95 % of 2000 bootstrap draws of the test frames, good and defective ones apart. *Above control* is
the interval of the difference over the same draws: where it holds 0, the detector is **within the noise of its
control** on that line. `nearest neighbours` is the plain probe (`nearest_neighbour_probe.py`): no training, a memory
bank of features; its maps are not measured. A row's title names what it changes of the small configuration.

ms a frame: ONNX Runtime, batch 1, one thread, median of the thread's own CPU time, so that other work on the machine
hardly moves it; CPU:
{cpus}.
Seconds of fitting and of the whole run are on the wall, on a machine with other work: upper bounds, of rb_ae far above
what it needs, because four others shared the two cores. `run, CPU` is what the run's process used of all cores, where
it was kept.
"""


# ---- rows


def _short_row(name: str, of_lines: Sequence[Pair]) -> tuple[str, ...]:
    told = [f"{_told_figure(pair.fitted)} ({_told_figure(pair.control)})" for pair in of_lines]
    means = []
    for sides in ([pair.fitted for pair in of_lines], [pair.control for pair in of_lines]):
        values = [side.figure("i_auroc") for side in sides]
        known = [value for value in values if value is not None]
        means.append(f"{mean(known):.3f}" if len(known) == len(values) else "-")
    return (name, *told, f"{means[0]} ({means[1]})")


def _accuracy_row(name: str, line: str, pair: Pair) -> tuple[str, ...]:
    return (
        name,
        line,
        _told_seeds(pair),
        _with_interval(pair.fitted),
        _with_interval(pair.control),
        _above(pair.fitted, pair.control),
        *(
            f"{_told_figure(pair.fitted, figure)} ({_told_figure(pair.control, figure)})"
            for figure in ("i_ap", "p_auroc", "aupro")
        ),
    )


def _cost_rows(names: Sequence[str], cells: Sequence[Cell], marks: Mapping[str, str]) -> Iterator[tuple[str, ...]]:
    for name in names:
        own = [cell for cell in cells if (cell.title, cell.kind) == (name, "fitted")]
        if own and not name.startswith(_PROBE):
            yield _cost_row(name, own, marks)


def _cost_row(name: str, cells: Sequence[Cell], marks: Mapping[str, str]) -> tuple[str, ...]:
    trained, every = cells[0].trainable_parameters or 0, cells[0].parameters or 0
    speeds = [cell.speed for cell in cells if cell.speed is not None]
    cpu_s = [cell.total_cpu_s for cell in cells if cell.total_cpu_s is not None]
    slowest = (
        ", ".join(f"{share.kind} {100 * share.share:.0f} %" for share in speeds[0].operators[:3]) if speeds else "-"
    )
    return (
        name,
        cells[0].backbone or "none",
        f"{trained / 1e6:.2f} / {every / 1e6:.2f} M",
        f"{mean(cell.fit_s for cell in cells):.0f} s",
        f"{mean(cell.total_s for cell in cells):.0f} s",
        f"{mean(cpu_s):.0f} s" if cpu_s else "-",
        _told_speed(speeds, marks),
        slowest,
        f"{mean(cell.model_bytes or 0 for cell in cells) / 2**20:.0f} MiB",
    )


def _told_speed(speeds: Sequence[GraphSpeed], marks: Mapping[str, str]) -> str:
    """Return the mean of each CPU apart: milliseconds of two are not alike."""
    of_cpu = {cpu: [speed.cpu_ms for speed in speeds if speed.cpu == cpu] for cpu in marks}
    return ", ".join(f"{mean(values):.0f} {marks[cpu]}".strip() for cpu, values in of_cpu.items() if values) or "-"


def _told_seeds(pair: Pair) -> str:
    fitted, control = (
        ", ".join(map(str, sorted(cell.seed for cell in side.cells))) for side in (pair.fitted, pair.control)
    )
    return fitted if control in ("", fitted) else f"{fitted} ({control})"


def _with_interval(side: Side) -> str:
    interval = side.interval()
    return "not run" if interval is None else f"{_told_figure(side)} [{interval[0]:.3f}, {interval[1]:.3f}]"


def _above(fitted: Side, control: Side) -> str:
    """Return the interval of the difference, and a word where it holds 0."""
    if not (fitted.cells and control.cells):
        return "-"
    difference = auroc_resamples(fitted.cells) - auroc_resamples(control.cells)
    if not difference.size:
        return "-"
    low, high = np.percentile(difference, (2.5, 97.5))
    told = f" [{low:+.3f}, {high:+.3f}]"
    if low > 0:
        return f"yes{told}"
    return f"**below its control**{told}" if high < 0 else f"**within noise**{told}"


def _told_figure(side: Side, name: str = "i_auroc") -> str:
    value = side.figure(name)
    return "-" if value is None else f"{value:.3f}"


def _undefined(cells: Sequence[Cell]) -> str:
    """Say why some figures are missing, each reason once."""
    reasons = {
        (record.reason, cell.line)
        for cell in cells
        for record in cell.metrics.values()
        if record.value is None and record.reason
    }
    return "".join(f"{line}: {reason}, so its pixel figures are not defined.\n" for reason, line in sorted(reasons))


def _by_accuracy(pairs: dict[tuple[str, str], Pair], lines: Iterable[str]) -> list[str]:
    """Order rows by their mean I-AUROC over the lines, the best first, probes last."""

    def accuracy(name: str) -> float:
        values = [pairs[name, line].fitted.figure("i_auroc") for line in lines if (name, line) in pairs]
        known = [value for value in values if value is not None]
        return mean(known) if known else 0.0

    return sorted({name for name, _ in pairs}, key=lambda name: (name.startswith(_PROBE), -accuracy(name)))


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines) + "\n"


def _told(cell: Cell) -> str:
    side = Side([cell])
    figures = ", ".join(f"{name} {_told_figure(side, name)}" for name in ("i_auroc", "i_ap", "p_auroc", "aupro"))
    speed = "" if cell.speed is None else f", {cell.speed.cpu_ms:.1f} ms a frame"
    return f"{cell.title} {cell.line} {cell.kind} seed {cell.seed}: {figures}, fit {cell.fit_s:.0f} s{speed}"


# ---- the probe


def _probe(features: str, lines: Sequence[Path], options: argparse.Namespace) -> None:
    """Measure the nearest-neighbour probe with some features, as the control of others where the table says so."""
    builders: dict[str, Callable] = nearest_neighbour_probe.contestants(options.weights, None)
    kind, names = "fitted", [features]
    if features not in _PROBES:
        kind, names = "control", [name for name, control in _PROBES.items() if control == features]
    for line in lines:
        for seed in options.seeds:
            places = [options.output / line.name / f"probe-{name}" / f"{kind}-{seed}" for name in names]
            digest = _probe_digest(features, line, seed, options.weights)
            kept = [read_cell(place) for place in places]
            if all(cell is not None and cell.digest == digest for cell in kept):
                continue
            begun = time.perf_counter()
            (scores,), labels = nearest_neighbour_probe.probe_scores(builders[features](), line, [seed])
            for name, place in zip(names, places, strict=True):
                cell = Cell(
                    digest=digest,
                    detector=f"{_PROBE}, {name}",
                    line=line.name,
                    kind=kind,
                    seed=seed,
                    backbone=features,
                    metrics=to_records(image_metrics(scores, labels)),
                    good_scores=tuple(scores[~labels].tolist()),
                    defect_scores=tuple(scores[labels].tolist()),
                    fit_s=0.0,
                    total_s=time.perf_counter() - begun,
                    trainable_parameters=None,
                    parameters=None,
                    speed=None,
                    model_bytes=None,
                    bundle_bytes=None,
                    bundle=None,
                    created_at=datetime.now(UTC).isoformat(timespec="seconds"),
                )
                keep_cell(place, cell)
                print(_told(cell), flush=True)


def _probe_digest(features: str, line: Path, seed: int, weights: Path) -> str:
    digest = hashlib.sha256(f"{features} {seed}".encode())
    digest.update((_HERE / "nearest_neighbour_probe.py").read_bytes())
    for path in sorted(line.rglob("*")):
        if path.is_file():
            digest.update(path.relative_to(line).as_posix().encode() + hashlib.sha256(path.read_bytes()).digest())
    for path in sorted(weights.glob(f"{features}*.safetensors")):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


# ---- options


def _lines(options: argparse.Namespace) -> list[Path]:
    every = sorted(path.resolve() for path in options.data.iterdir() if path.is_dir())
    wanted = _names(options.lines, [path.name for path in every])
    return [path for path in every if path.name in wanted]


def _names(given: str | None, known: Iterable[str]) -> list[str]:
    known = list(known)
    wanted = known if given is None else given.split(",")
    for name in wanted:
        if name not in known:
            sys.exit(f"There is no {name!r}; known are {', '.join(known)}.")
    return wanted


def main() -> None:
    """Read options and do what they say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    measuring = commands.add_parser("measure", help="measure what is missing")
    measuring.add_argument("--output", type=Path, default=_CELLS, help="folder of the cells")
    measuring.add_argument("--detectors", help="names with commas between; default: all")
    measuring.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of lines")
    measuring.add_argument("--lines", help="names with commas between; default: all")
    measuring.add_argument(
        "--textures", default="magnetic_tile,solar_cell", help="lines that a detector of textures is asked about"
    )
    measuring.add_argument("--config", default="small", help="small, paper or a YAML file")
    measuring.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    measuring.add_argument(
        "--without-rim", action="store_true", help="inspect all but the rim, as a run proposes where that is oddest"
    )
    measuring.add_argument("--variant", default="", help="title of what is changed; makes a row of its own")
    measuring.add_argument("--seeds", nargs="+", type=int, default=[1])
    measuring.add_argument("--weights", type=Path, default=Path("../shared/weights"))
    measuring.add_argument("--threads", type=int, default=1)
    measuring.add_argument("--control", action="store_true", help="also untrained and without descent")
    measuring.add_argument("--control-only", action="store_true", help="the controls alone, which fit nothing")
    measuring.add_argument("--probe", action="store_true", help="also the nearest-neighbour probe")
    measuring.set_defaults(work=measure)
    telling = commands.add_parser("table", help="write the section of RESULTS.md")
    telling.add_argument("--output", type=Path, default=_CELLS, help="folder of the cells")
    telling.add_argument("--results", type=Path, default=_RESULTS)
    telling.set_defaults(work=write_table)
    options = parser.parse_args()
    sys.exit(options.work(options))


if __name__ == "__main__":
    main()
