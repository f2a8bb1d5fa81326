"""What the training commands do: values from the command line in, one sentence for every expected fault, a table out.

`__main__.py` only names options and imports this file when a command runs, because everything here needs torch.
"""

import contextlib
import json
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
import typer
from pydantic import TypeAdapter, ValidationError
from rich.console import Console

from models import DETECTORS
from service.client import ClientFault
from service.contract.bundle import (
    MANIFEST_FILE,
    REPORT_FILE,
    Bundle,
    FramesRecord,
    LineName,
    MetricRecord,
    load_bundle,
)
from service.contract.frames import FrameLimits
from service.contract.geometry import InputSpec
from service.contract.policy import may_judge, policy_digest
from service.contract.tiling import by_tiles
from service.errors import ParameterInvalid
from training.backbones.weights import read_weights_option, tell_idle_folder
from training.bundling.export import GraphRun
from training.bundling.fitted_frames import read_fitted_frames, those_fitted_on
from training.bundling.store import is_machines_fault
from training.config import ConfigFault, RunConfig, load_config
from training.data.check import check_dataset
from training.data.detect import read_dataset
from training.data.samples import ANOMALOUS, NORMAL, UNKNOWN, DatasetFault, Sample
from training.demo import DemoFailed, run_demo
from training.faults import CALLERS, OURS
from training.fitting.checkpoint import has_checkpoint
from training.fitting.fit import FitStopped
from training.fitting.import_checkpoint import keep_released, read_released, tell_softened
from training.fitting.peers import Peers, meet_peers, process_number, refuse_company
from training.golden import contrast_asked_for
from training.measuring.answers import ask
from training.measuring.evaluate import Evaluation, evaluate, inspected_share, needs_held_out, to_records
from training.progress import Reporter, choose_reporter
from training.recalibrate import (
    CheckedFrames,
    pattern_of_parts,
    read_good_folder,
    recalibrate,
    tell_other_frames,
)
from training.reporting.page_data import Inspected, LineReport, ReportData
from training.reporting.report import render
from training.reproduction.published import KindOfSetting, read_published
from training.run import Beginning, help_to_fit, train
from training.run_directory import (
    LineRequest,
    RunDirectoryFault,
    RunRequest,
    has_report,
    new_directory,
    read_report,
    read_request,
)
from training.stops import termination_interrupts
from training.zero_shot import Calibration, ZeroShotRequest, make_zero_shot, zero_shot_config

Device = Literal["auto", "cpu", "cuda"]

_OURS, _CALLERS, _STOPPED = 1, 2, 130
_NAMED_LINE = "--line NAME=FOLDER"
# The demo's own, beside those of every run.
_FAULTS_OF_OURS: tuple[type[Exception], ...] = (ClientFault, DemoFailed, *OURS)


@dataclass(frozen=True)
class Wishes:
    """What the options of a run say.

    Attributes:
        store: where the bundle goes.
        runs: where the run's directory is made.
        detector: method, or None for the usual one, or that of the file.
        config: `small`, `paper` or a file.
        weights: a file, a folder, "untrained", or None.
        name: of the bundle, or None for the folder's or the only line's.
        lines: `NAME=FOLDER` each, in the order of their indices; none where one folder is given by itself.
        regions_of_interest: a mask image, or `NAME=MASK` each where lines are named.
        layouts: how the folders are read, or `NAME=LAYOUT` each where that differs; none to find out.
        labelled_defects: folder of marked defects to learn from beside good frames, or None.
        device: where to fit.
        settings: `key=value`, in order.
        weights_of_environment: whether a variable names the weights, and not the command.
    """

    store: Path
    runs: Path
    detector: str | None
    config: str
    weights: str | None
    name: str | None
    lines: Sequence[str]
    regions_of_interest: Sequence[str]
    layouts: Sequence[str]
    labelled_defects: Path | None
    device: Device
    settings: Sequence[str]
    weights_of_environment: bool = False


@dataclass(frozen=True)
class ZeroShotWishes:
    """What the options of a zero-shot export say; None where nothing was said.

    Attributes:
        name: of the bundle and its line.
        store: where the bundle goes.
        config: `small`, `paper` or a file.
        weights: a file, a folder, or "untrained".
        calibration: what verdicts rest on.
        settings: `key=value`, in order.
    """

    name: str | None
    store: Path | None
    config: str | None
    weights: str | None
    calibration: Calibration
    settings: Sequence[str]


@contextlib.contextmanager
def faults_as_sentences(*, shares_work: bool = False) -> Iterator[None]:
    """Turn every expected fault into one sentence on stderr and an exit code: 1 ours or the machine's, 2 the caller's.

    A termination signal ends the command as Ctrl-C does.

    Args:
        shares_work: whether the command knows what to do where torchrun started several of it.

    Raises:
        typer.Exit: with that code.
    """
    try:
        with termination_interrupts():
            if not shares_work:
                refuse_company()
            yield
    except _FAULTS_OF_OURS as error:
        raise _leave(str(error), _OURS) from error
    except torch.OutOfMemoryError as error:
        sentence = "The GPU's memory is full; lower batch_size and hyperparameters.recipe.batch_size with --set."
        raise _leave(sentence, _OURS, own=True) from error
    except CALLERS as error:
        raise _leave(str(error), _CALLERS) from error
    except OSError as error:
        code = _OURS if is_machines_fault(error) else _CALLERS
        raise _leave(_tell_fault(error), code, own=True) from error


def train_lines(line_folder: Path | None, wishes: Wishes, threads: int | None) -> None:
    """Fit one line, or several together, anew and tell the result."""
    lines = _named_lines(wishes) if line_folder is None else (_only_line(line_folder, wishes),)
    if wishes.name is None and len(lines) > 1:
        raise ParameterInvalid("Several lines make one bundle; give its name with --name.")
    config = load_config(wishes.config, wishes.detector, wishes.settings)
    idle = tell_idle_folder(wishes.weights, config.backbone, of_environment=wishes.weights_of_environment)
    weights, weight_folders = read_weights_option(wishes.weights)
    peers = meet_peers(wishes.device)
    request = RunRequest(
        name=_line_name(wishes.name or lines[0].name),
        lines=lines,
        store=wishes.store.resolve(),
        config=config,
        weights=weights,
        weight_folders=weight_folders,
        labelled_defects=None if wishes.labelled_defects is None else wishes.labelled_defects.resolve(),
        device=wishes.device,
        processes=peers.count,
    )
    if peers.number == 0:
        if idle is not None:
            _reporter().note(idle)
        _tell_paper(request, wishes)
    # The first process makes it, and the others hear which.
    own = new_directory(wishes.runs, request.name, datetime.now(UTC)) if peers.number == 0 else Path()
    _run(request, Path(peers.hear_first(bytes(own)).decode()), "new", threads, peers)


def _tell_paper(request: RunRequest, wishes: Wishes) -> None:
    """Say where the paper's own setting for so few frames, or so many products, is not what its configuration says."""
    config = request.config
    told = read_published().get(config.detector)
    if told is None or wishes.config != "paper":
        return
    kind: KindOfSetting = (
        "few-shot" if config.shots is not None else "multi-class" if len(request.lines) > 1 else "single-class"
    )
    missing = [
        change
        for change in told.changes.get(kind, ())
        if load_config("paper", config.detector, [*wishes.settings, change]) != config
    ]
    if missing:
        options = " ".join(f"--set {change}" for change in missing)
        _reporter().note(f"the paper's {kind} setting has {', '.join(missing)}; to follow it, add {options}")


def import_released(
    detector: str, checkpoint: Path, line_folders: Sequence[str], side: int | None, wishes: Wishes, threads: int | None
) -> None:
    """Take over what the method's authors fitted: calibrate, evaluate, export and publish it, and tell the result.

    Args:
        detector: method.
        checkpoint: the authors' file.
        line_folders: `FOLDER` or `NAME=FOLDER` each.
        side: of the image to run at, or None for the one that the authors used.
        wishes: of the run; the checkpoint decides the sizes of the network.
        threads: of one computation, or None for torch's choice.
    """
    lines = tuple(_named_or_not(given) for given in line_folders)
    layouts = layouts_of([line.name for line in lines], wishes.layouts)
    lines = tuple(line.model_copy(update={"layout": layouts.get(line.name)}) for line in lines)
    if wishes.name is None and len(lines) > 1:
        raise ParameterInvalid("Several lines make one bundle; give its name with --name.")
    name = _line_name(wishes.name or lines[0].name)
    released = read_released(detector, checkpoint, side)
    config = load_config("paper", detector, [*released.settings, *wishes.settings])
    if (softened := tell_softened(config)) is not None:
        _reporter().note(softened)
    weights, weight_folders = read_weights_option(wishes.weights)
    directory = new_directory(wishes.runs, name, datetime.now(UTC)).resolve()
    request = RunRequest(
        name=name,
        lines=lines,
        store=wishes.store.resolve(),
        config=config,
        weights=keep_released(released, directory) or weights,
        weight_folders=weight_folders,
        released=released.told,
        device=wishes.device,
    )
    _run(request, directory, "import", threads)
    if hasattr(DETECTORS[detector].config, "zero_shot_settings"):
        command = shlex.join(("flawline", "export", str(directory), "--zero-shot", "--name"))
        _reporter().note(f"for a line that has no frames yet: {command} NAME")


def _named_or_not(given: str) -> LineRequest:
    name, path = name_and_path(given)
    return LineRequest(name=_line_name(name or path.name, _NAMED_LINE), folder=path)


def refuse_beside_resume(options: Collection[str], directory: Path) -> None:
    """Refuse what is asked for beside going on with a run: it goes on as it began.

    Raises:
        ConfigFault: naming the options that do not belong here.
    """
    if options:
        raise ConfigFault(
            f"{' and '.join(sorted(options))} can't be given beside --resume: a run goes on as it began. Leave that "
            "out; once the run is fitted, it can be published at other rates, in another precision, inspecting less, "
            f"or into another store: {_export_of(directory)}. All else takes a run of its own."
        )


def _export_of(directory: Path) -> str:
    return shlex.join(("flawline", "export", str(directory)))


def resume_run(directory: Path, threads: int | None) -> None:
    """Go on with a stopped run; one that was stopped before its first checkpoint begins again in the same place.

    Raises:
        ConfigFault: if so many processes can't go on with it.
        RunDirectoryFault: if the run is finished, or the directory is none's.
    """
    request = read_request(directory)
    if has_report(directory):
        raise RunDirectoryFault(
            f"{directory} is finished already, so there is nothing to go on with; to publish it (again): "
            f"{_export_of(directory)}"
        )
    beginning: Beginning = "resume" if has_checkpoint(directory) else "new"
    peers = meet_peers(request.device)
    if request.processes % peers.count:
        raise ConfigFault(
            f"The run splits each batch into as many shares as it had processes, {request.processes}, and "
            f"{peers.count} processes can't have equally many of them; give torchrun "
            f"--nproc-per-node={request.processes}, or go on without torchrun."
        )
    _run(request, directory, beginning, threads, peers)


def export_run(
    directory: Path,
    store: Path | None,
    changes: Mapping[str, Any],
    threads: int | None,
    regions_of_interest: Sequence[str] = (),
) -> None:
    """Evaluate, calibrate and export a fitted run again, with other rates, in another precision, or inspecting less.

    What is given holds for this export alone; all else is as the run was asked for, whatever was exported meanwhile.

    Args:
        directory: of the run.
        store: receives the bundle, or None for the run's own.
        changes: values of the run's configuration; None keeps one.
        threads: of one computation, or None for torch's choice.
        regions_of_interest: mask images of its lines, `MASK` of the only one, else `NAME=MASK`; others keep theirs.
    """
    request = read_request(directory)
    given = {key: value for key, value in changes.items() if value is not None}
    try:
        config = RunConfig.model_validate(request.config.model_dump(mode="json") | given)
    except ValidationError as error:
        raise ConfigFault("A rate lies between 0 and 1, for example 0.05.") from error
    masks = masks_of([line.name for line in request.lines], regions_of_interest)
    lines = tuple(
        line.model_copy(update={"region_of_interest": masks.get(line.name, line.region_of_interest)})
        for line in request.lines
    )
    update = {"config": config, "lines": lines} | ({} if store is None else {"store": store.resolve()})
    _run(request.model_copy(update=update), directory, "export", threads)


def is_zero_shot(
    source: str,
    *,
    asked: bool,
    rates: Sequence[float | None],
    precision: object | None,
    regions_of_interest: Sequence[str],
    others: Mapping[str, object | None],
) -> bool:
    """Tell which of its two exports is meant, and refuse options of the other one.

    Raises:
        ConfigFault: naming the options that do not belong here.
    """
    wanted = asked or source in DETECTORS
    if wanted and any(rate is not None for rate in rates):
        raise ConfigFault(
            "Without frames there is nothing to choose rates by; leave --review-rate and --fail-rate out, and give "
            "them to flawline calibrate."
        )
    if wanted and precision:
        raise ConfigFault(
            "Without frames nobody can tell whether another precision gives the same verdicts; leave --precision and "
            "--keep-float out."
        )
    if wanted and regions_of_interest:
        raise ConfigFault(
            "Without frames there is no map to look at; leave --roi out, and give it to flawline calibrate."
        )
    strange = [option for option, value in others.items() if value is not None]
    if not wanted and strange:
        raise ConfigFault(f"{' and '.join(strange)} belong to a zero-shot export; add --zero-shot, or leave them out.")
    return wanted


def export_zero_shot(source: str, wishes: ZeroShotWishes, threads: int | None) -> None:
    """Publish a bundle that no frame of its line has made, from a detector's name or a run on other lines."""
    _use_threads(threads)
    if wishes.name is None:
        raise ConfigFault("Nothing names the new line; add --name, for example --name leather.")
    directory = fitted_for = None
    if source in DETECTORS:
        config = load_config(wishes.config or "small", source, wishes.settings)
    elif wishes.config is not None or wishes.settings:
        raise ConfigFault("A run knows its configuration; leave --config, --set and --product out.")
    else:
        directory = Path(source)
        fitted_for = read_request(directory)
        config = zero_shot_config(fitted_for.config)
    weights, weight_folders = read_weights_option(wishes.weights)
    reporter = _reporter()
    bundle = make_zero_shot(
        ZeroShotRequest(
            name=_line_name(wishes.name),
            store=(wishes.store or (Path("store") if fitted_for is None else fitted_for.store)).resolve(),
            config=config,
            calibration=wishes.calibration,
            weights=fitted_for.weights if wishes.weights is None and fitted_for is not None else weights,
            weight_folders=weight_folders + (() if fitted_for is None else fitted_for.weight_folders),
            fitted_in=directory,
            fitted_for=fitted_for,
        ),
        reporter,
    )
    reporter.note(f"bundle: {bundle}")
    reporter.note(f"report: {bundle / REPORT_FILE}")
    if wishes.calibration == "none":
        reporter.note(f"no verdicts yet: calibrate it with good parts, flawline calibrate {bundle} GOOD_FOLDER")


def tile_settings(tiles: str | None, overlap: float | None) -> list[str]:
    """Return what `--tiles ROWSxCOLUMNS` and `--tile-overlap` set.

    Raises:
        ParameterInvalid: if they don't say how frames are cut.
    """
    settings = []
    if tiles is not None:
        rows, _, columns = tiles.lower().partition("x")
        if not (rows.isdecimal() and columns.isdecimal()):
            raise ParameterInvalid(f"--tiles {tiles!r} says no rows and columns; write for example 3x2.")
        settings += [f"tiles.rows={int(rows)}", f"tiles.columns={int(columns)}"]
    return settings if overlap is None else [*settings, f"tiles.overlap={overlap}"]


def evaluate_bundle(
    path: Path, line: str | None, line_folder: Path, layout: str | None, output: Path | None, threads: int
) -> None:
    """Measure a bundle on a line's test frames and tell the figures.

    Intervals are drawn with the bundle's seed, so that on the same frames they are those of its report.
    """
    bundle, reporter = load_bundle(path), _reporter()
    manifest = bundle.manifest
    name = _line_of(bundle, line)
    checked, kept_out = _frames_to_test(line_folder, layout, manifest.input, reporter)
    tell_other_frames(bundle, name, checked, reporter)
    tested = checked.samples
    if learnt := those_fitted_on(tested, checked.content, read_fitted_frames(bundle) or frozenset()):
        reporter.note(
            f"The detector was fitted on {len(learnt)} of the {len(tested)} test frames, for one {learnt[0].path}; "
            "figures are better than those of new frames would be."
        )
    spec, rule = manifest.input, manifest.output.score_rule
    run, index = by_tiles(GraphRun(bundle.model, threads), spec, rule), manifest.lines.index(name)
    answers = ask(run, tested, spec, reporter, title="test frames", content=checked.content, line_index=index)
    held_out = None
    if kept_out and needs_held_out(tested):
        held_out = ask(
            run, kept_out, spec, reporter, title="validation frames", content=checked.content, line_index=index
        )
    policy = bundle.policies[name]
    found = evaluate(
        answers,
        policy,
        rule,
        spec,
        manifest.evaluation_resolution,
        held_out=held_out,
        seed=manifest.seed,
        least_contrast=contrast_asked_for(bundle, name),
    )
    judges = may_judge(policy, is_calibrated=name in bundle.calibrations)
    if judges:
        of_kinds = found.verdict_counts()
        rows = [(kind, *(str(count) for count in counts.values())) for kind, counts in of_kinds.items()]
        reporter.table("Verdicts", ("frames", *next(iter(of_kinds.values()))), rows)
    else:
        reporter.note("The line is not calibrated, so there are no verdicts, only how well frames are ranked.")
    if found.unscored:
        reporter.note(
            f"{len(found.unscored)} of the {len(tested)} test frames are flat and have no score, since frames of this "
            f"line are measured by themselves; for one {found.unscored[0].path}. They have no verdict, which stops a "
            "part, and no figure counts them: figures are those of the other frames."
        )
    share = inspected_share(policy, manifest.map_size, spec)
    if share is not None:
        reporter.note(str(Inspected(share=share, defects_outside=found.defects_outside)))
    by_kind = {f"i_auroc of {kind}": record for kind, record in to_records(found.by_kind).items()}
    figures = to_records(found.metrics) | by_kind
    reporter.table("Figures", ("figure", "value", "95 % interval"), _figure_rows(figures))
    if output is not None:
        told = _tell_evaluation(bundle, name, checked.record, found, figures, judges=judges)
        output.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def _tell_evaluation(
    bundle: Bundle,
    line: str,
    frames: FramesRecord,
    found: Evaluation,
    figures: Mapping[str, MetricRecord],
    *,
    judges: bool,
) -> dict[str, Any]:
    """Return what a file of figures says: of what, on what, by which thresholds; no thresholds without verdicts."""
    manifest, policy = bundle.manifest, bundle.policies[line]
    labels = [sample.label for sample in (*found.answers.samples, *found.unscored)]
    verdicts = {
        kind: {str(verdict): count for verdict, count in counts.items()}
        for kind, counts in found.verdict_counts().items()
    }
    return {
        "bundle": {"name": manifest.name, "version": manifest.version, "digest": bundle.digest},
        "line": line,
        "policy": {
            "version": policy.version,
            "digest": policy_digest(policy),
            "review_threshold": policy.review_threshold if judges else None,
            "fail_threshold": policy.fail_threshold if judges else None,
        },
        "data": {
            **frames.model_dump(include={"name", "digest"}),
            "normal": labels.count(NORMAL),
            "anomalous": labels.count(ANOMALOUS),
            "without_score": len(found.unscored),
        },
        "evaluation_resolution": found.resolution,
        "seed": manifest.seed,
        "verdicts": verdicts if judges else None,
        "figures": {name: record.model_dump() for name, record in figures.items()},
    }


def recalibrate_bundle(
    path: Path,
    line: str | None,
    good_folder: Path,
    line_folder: Path | None,
    layout: str | None,
    rates: Mapping[str, float | None],
    regions_of_interest: Sequence[str],
    group_by: str | None,
    threads: int,
) -> None:
    """Publish a bundle again with one line's thresholds from other good parts and tell the result."""
    bundle, reporter = load_bundle(path.resolve()), _reporter()
    name = _line_of(bundle, line)
    record = bundle.manifest.by_line[name]
    masks = masks_of([name], regions_of_interest)
    published, report = recalibrate(
        bundle,
        name,
        read_good_folder(
            good_folder, pattern_of_parts(bundle, name, group_by), bundle.manifest.input.bit_depth, reporter
        ),
        None if line_folder is None else _frames_to_test(line_folder, layout, bundle.manifest.input, reporter)[0],
        reporter,
        review_rate=_rate("review_rate", rates["review_rate"], record.review_rate),
        fail_rate=_rate("fail_rate", rates["fail_rate"], record.fail_rate),
        region_of_interest=masks.get(name),
        threads=threads,
    )
    _tell(report, reporter, {"bundle": published, "report": published / REPORT_FILE})


def write_report(source: Path, output: Path) -> None:
    """Write the page of a bundle as it was published, or render that of a run anew."""
    if (source / MANIFEST_FILE).exists():
        bundle = load_bundle(source)
        page = bundle.files[REPORT_FILE]
        _reporter().note(f"version {bundle.manifest.version} of {bundle.manifest.name}, digest {bundle.digest}")
    else:
        page = render(read_report(source)).encode()
    output.write_bytes(page)
    _reporter().note(f"{output} is written; open it in a browser.")


def demonstrate(
    line: Path | None,
    folder: Path,
    config: str,
    detector: str | None,
    weights: str | None,
    settings: Sequence[str],
    threads: int | None,
) -> None:
    """Fit, export, serve and inspect one line over HTTP."""
    _use_threads(threads)
    description = load_config(config, detector, settings)
    run_demo(line, folder, description, *read_weights_option(weights), _reporter())


def _run(
    request: RunRequest, directory: Path, beginning: Beginning, threads: int | None, peers: Peers | None = None
) -> None:
    _use_threads(threads)
    if peers is not None and peers.number > 0:
        _help(request, directory, beginning, peers)
        return
    reporter = _reporter()
    try:
        finished = train(request, directory, reporter, beginning, peers)
    except (FitStopped, KeyboardInterrupt) as stop:
        raise _leave(f"Stopped.{_how_to_go_on(directory, beginning, peers)}", _STOPPED) from stop
    except OSError as error:
        if not is_machines_fault(error):
            raise
        raise _leave(f"{_tell_fault(error)}{_how_to_go_on(directory, beginning, peers)}", _OURS) from error
    finally:
        # A run that was refused before it began leaves nothing behind.
        if directory.is_dir() and not any(directory.iterdir()):
            directory.rmdir()
    places = {"bundle": finished.bundle, "report": finished.bundle / REPORT_FILE, "run": directory}
    _tell(finished.report, reporter, places)


def _how_to_go_on(directory: Path, beginning: Beginning, peers: Peers | None) -> str:
    """Return what to do about a run that ended before its time, after a space; nothing where it left nothing."""
    if not any(directory.iterdir()):
        return ""
    if beginning == "export":
        return " The run is as it was; give the same command again."
    if has_report(directory):
        return f" All but publishing is done: {_export_of(directory)}"
    by_torchrun = "" if peers is None or peers.count == 1 else ", by torchrun again or without it"
    return f" To go on where it stood: {shlex.join(('flawline', 'train', '--resume', str(directory)))}{by_torchrun}"


def _help(request: RunRequest, directory: Path, beginning: Beginning, peers: Peers) -> None:
    try:
        help_to_fit(request, directory, beginning, peers)
    except (FitStopped, KeyboardInterrupt) as stop:
        raise _leave("Stopped.", _STOPPED) from stop


def _tell(report: ReportData, reporter: Reporter, places: Mapping[str, Path]) -> None:
    for line in report.lines:
        _tell_line(line, "" if len(report.lines) == 1 else f" of {line.line}", reporter)
    for name, path in places.items():
        reporter.note(f"{name}: {path}")


def _tell_line(line: LineReport, of_line: str, reporter: Reporter) -> None:
    rows = [(row.kind, str(row.passed), str(row.review), str(row.failed)) for row in line.verdicts]
    reporter.table(f"Verdicts{of_line}", ("frames", "PASS", "REVIEW", "FAIL"), rows)
    promises = [
        (name, f"{promise.value:.4g}", f"{100 * promise.rate:.3g} %", f"{100 * promise.bound:.3g} %")
        for name, promise in (("review", line.review), ("fail", line.fail))
    ]
    columns = ("from", "score", "good parts stopped, on average", "with 95 % confidence")
    reporter.table(f"Thresholds{of_line}", columns, promises)
    if line.inspected is not None:
        reporter.note(f"{line.line}: {line.inspected}" if of_line else str(line.inspected))
    reporter.table(f"Figures{of_line}", ("figure", "value", "95 % interval"), _figure_rows(line.metrics))


def _figure_rows(figures: Mapping[str, MetricRecord]) -> list[tuple[str, str, str]]:
    rows = []
    for name, figure in figures.items():
        if figure.value is None:
            rows.append((name, f"not defined: {figure.reason}", ""))
            continue
        told = [] if figure.reason is None else [figure.reason]
        if figure.low is not None and figure.high is not None:
            told.insert(0, f"{100 * figure.low:.1f} to {100 * figure.high:.1f} %")
        rows.append((name, f"{100 * figure.value:.1f} %", "; ".join(told)))
    return rows


def _frames_to_test(
    line_folder: Path, layout: str | None, spec: InputSpec, reporter: Reporter
) -> tuple[CheckedFrames, tuple[Sample, ...]]:
    """Return a line's labelled test frames, and the good frames that it keeps out of fitting; often none.

    Raises:
        DatasetFault: if there is no test frame, or a file can't be used.
    """
    checked = check_dataset(read_dataset(line_folder, layout), FrameLimits(), reporter, bit_depth=spec.bit_depth)
    checked.tell(line_folder.resolve().name, reporter)
    samples = tuple(sample for sample in checked.dataset.test if sample.label != UNKNOWN)
    if not samples:
        raise DatasetFault(f"{line_folder} has no test frames; put some into test/good and test/<kind>.")
    record = FramesRecord(name=checked.dataset.name, digest=checked.digest)
    return CheckedFrames(samples, record, checked.content, checked.frame_sizes), checked.dataset.validation_good


def _rate(name: str, given: float | None, old: float | None) -> float:
    """Return the rate that is asked for, or the line's own, or that of a run where nobody chose one."""
    chosen = old if given is None else given
    return float(RunConfig.model_fields[name].default) if chosen is None else chosen


def _only_line(folder: Path, wishes: Wishes) -> LineRequest:
    name = _line_name(wishes.name or folder.resolve().name)
    named = [given for given in wishes.layouts if "=" in given]
    if named or len(wishes.layouts) > 1:
        raise ParameterInvalid("One line has one layout; give --layout once, without a name.")
    return LineRequest(
        name=name,
        folder=folder.resolve(),
        region_of_interest=masks_of([name], wishes.regions_of_interest).get(name),
        layout=next(iter(wishes.layouts), None),
    )


def _named_lines(wishes: Wishes) -> tuple[LineRequest, ...]:
    pairs = [_name_and_path("--line", given, "lines/bottle") for given in wishes.lines]
    names = [name for name, _ in pairs]
    masks, layouts = masks_of(names, wishes.regions_of_interest), layouts_of(names, wishes.layouts)
    return tuple(
        LineRequest(
            name=_line_name(name, _NAMED_LINE),
            folder=folder,
            region_of_interest=masks.get(name),
            layout=layouts.get(name),
        )
        for name, folder in pairs
    )


def masks_of(lines: Sequence[str], given: Sequence[str]) -> dict[str, Path]:
    """Return the region of interest of each line that has one: a mask image, white where parts are inspected.

    Args:
        lines: their names.
        given: `NAME=MASK` each, or `MASK` where there is one line.

    Raises:
        ParameterInvalid: if a line has two, or one is given for a line that there is not.
    """
    if len(lines) == 1 and all("=" not in mask or Path(mask).exists() for mask in given):
        if len(given) > 1:
            raise ParameterInvalid("One line has one region of interest; give --roi once.")
        return {line: Path(mask).resolve() for line, mask in zip(lines, given, strict=False)}
    masks: dict[str, Path] = {}
    for name, mask in (_name_and_path("--roi", one, "bottle_mask.png") for one in given):
        if name not in lines:
            raise ParameterInvalid(f"--roi {name}={mask}: there is no line {name}.")
        if name in masks:
            raise ParameterInvalid(f"The line {name} has two regions of interest; give --roi once a line.")
        masks[name] = mask
    return masks


def layouts_of(lines: Sequence[str], given: Sequence[str]) -> dict[str, str]:
    """Return the layout of each line that has one: its own, or the one that is given without a name.

    Args:
        lines: their names.
        given: `LAYOUT` or `NAME=LAYOUT` each.

    Raises:
        ParameterInvalid: if two are given for all lines, or one for a line that there is not.
    """
    of_all = [layout for layout in given if "=" not in layout]
    if len(of_all) > 1:
        raise ParameterInvalid("Two layouts are given for all lines; write --layout NAME=LAYOUT where they differ.")
    layouts = {line: layout for line in lines for layout in of_all}
    for name, _, layout in (one.partition("=") for one in given if "=" in one):
        if name not in lines:
            raise ParameterInvalid(f"--layout {name}={layout}: there is no --line {name}.")
        layouts[name] = layout
    return layouts


def _name_and_path(option: str, given: str, example: str) -> tuple[str, Path]:
    name, path = name_and_path(given)
    if not name:
        raise ParameterInvalid(f"{option} {given!r} names no line; write NAME=PATH, for example bottle={example}.")
    return name, path


def name_and_path(given: str) -> tuple[str, Path]:
    """Read `NAME=PATH`, or `PATH` alone, which may hold equals signs where it exists; then the name is empty."""
    name, equals, path = given.partition("=")
    if not equals or not name or not path or Path(given).exists():
        return "", Path(given).resolve()
    return name, Path(path).resolve()


def _line_of(bundle: Bundle, wanted: str | None) -> str:
    """Return the line that an option names, or the only one."""
    lines = bundle.manifest.lines
    if wanted is None and len(lines) == 1:
        return lines[0]
    if wanted not in lines:
        asked = "" if wanted is None else f", and not {wanted}"
        raise ParameterInvalid(f"The bundle serves {', '.join(lines)}{asked}; name one of them with --line.")
    return wanted


def _line_name(name: str, option: str = "--name NAME") -> str:
    try:
        return TypeAdapter(LineName).validate_python(name)
    except ValidationError as error:
        raise ParameterInvalid(
            f"{name!r} can't name a line or bundle; give a name of letters, digits, dots, dashes and underscores, at "
            f"most 64: {option}."
        ) from error


def _tell_fault(error: OSError) -> str:
    return f"{error.filename or 'A file'}: {error.strerror or error}."


def _use_threads(threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)


def _reporter() -> Reporter:
    return choose_reporter(Console())


def _leave(sentence: str, code: int, *, own: bool = False) -> typer.Exit:
    """Say why; of several processes the first one says it for all, but for what may be each one's `own` matter."""
    number = process_number()
    if number == 0 or own:
        of_whom = f"Process {number}: " if number else ""
        Console(stderr=True, soft_wrap=True).print(f"{of_whom}{sentence}", markup=False, highlight=False)
    return typer.Exit(code)
