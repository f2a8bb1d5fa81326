"""A bundle with new thresholds for one line: the same network and input, other good parts, rates or region of interest.

For a line whose light or product has moved a little, or whose rates were not right: no fitting, no torch. The result is
a new version in the same store; the old one stays as it is, and so do the other lines of the bundle: their calibration,
policy, golden frames and figures are carried over.
"""

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import yaml

from service.contract.bundle import MODEL_FILE, Bundle, LineRecord
from service.contract.frames import FrameLimits
from service.contract.golden import read_golden
from service.contract.policy import Policy
from service.contract.tiling import by_tiles
from service.errors import ParameterInvalid
from training.bundles import bundle_files, verify_bundle
from training.calibrate import Calibrated, calibrate, read_region_of_interest, refuse_other_shape
from training.data.check import check_dataset
from training.data.folders import good_samples
from training.data.samples import ANOMALOUS, NORMAL, Dataset, DatasetFault, Sample
from training.data.split import HoldOut, name_parts
from training.evaluate import Answers, Evaluation, ask, evaluate, inspected_share, to_records
from training.export import GraphRun
from training.golden import GoldenChooser, carry_golden_over, golden_files
from training.progress import Reporter
from training.report import Fact, LineReport, ReportData, RunFacts, carry_over, collect, render
from training.store import probe_store, publish


def read_good_folder(folder: Path, group_by: str | None, bit_depth: int, reporter: Reporter) -> list[Sample]:
    """Return every image under a folder as a good frame, each looked at; of the same content, the first.

    A stated bound rests on parts that are independent of each other, so copies of one frame count once, and so do views
    of one part.

    Args:
        folder: of good frames alone.
        group_by: pattern that finds in a file's name which part it shows, as `HoldOut.group_by`; None where each frame
            shows one of its own.
        bit_depth: how many bits the values of 16-bit frames have.
        reporter: shows how far the check is, and says what it found.

    Raises:
        DatasetFault: if there is none, one can't be used or named after its part, or the folder is a whole line with
            defects in it.
        ParameterInvalid: if the pattern is none.
    """
    if (folder / "test").is_dir() or (folder / "train").is_dir():
        raise DatasetFault(f"{folder} is a whole line; give the folder with its new good frames alone.")
    samples = good_samples(folder, "validation")
    if not samples:
        raise DatasetFault(f"{folder} holds no image; give the folder with good frames that fitting never saw.")
    dataset = Dataset(folder.resolve().name, folder, "plain", tuple(samples))
    if group_by is not None:
        try:
            dataset = name_parts(dataset, HoldOut(rule="groups", group_by=group_by))
        except ValueError as error:
            raise ParameterInvalid(f"--group-by: {error}.") from error
    checked = check_dataset(dataset, FrameLimits(), reporter, bit_depth=bit_depth)
    checked.tell(folder.resolve().name, reporter)
    if checked.copies:
        reporter.note(f"{len(checked.copies)} frames are copies of others; they say nothing new and are left out.")
    return list(checked.distinct.validation_good)


def pattern_of_parts(bundle: Bundle, line: str, given: str | None) -> str | None:
    """Return the pattern by which new good frames of a line are counted as parts: the given one, or that of its run.

    Raises:
        ParameterInvalid: if the line's parts had several frames each, and nothing says which new frames belong
            together.
    """
    hold_out = bundle.manifest.hyperparameters.get("hold_out")
    of_run = hold_out.get("group_by") if isinstance(hold_out, dict) else None
    pattern = of_run if given is None and isinstance(of_run, str) else given
    old = bundle.calibrations.get(line)
    if pattern is None and old is not None and old.good_parts < old.scores.size:
        raise ParameterInvalid(
            f"The line {line} was calibrated on {old.good_parts} parts in {old.scores.size} frames, and nothing says "
            "which of the new frames show the same part; give a pattern that finds the part in a file's name, for "
            "example --group-by '^(.*)_C[0-9]', or --group-by '.*' where each frame shows another part."
        )
    return pattern


def recalibrate(
    bundle: Bundle,
    line: str,
    good: Sequence[Sample],
    tested: Sequence[Sample],
    reporter: Reporter,
    *,
    review_rate: float,
    fail_rate: float,
    region_of_interest: Path | None = None,
    threads: int = 1,
) -> tuple[Path, ReportData]:
    """Publish a bundle again with one line's thresholds from other good parts.

    Args:
        bundle: verified.
        line: one of the bundle's.
        good: good frames that fitting never saw.
        tested: labelled test frames to measure the new verdicts on; may be empty.
        reporter: shows how far the work is.
        review_rate: wanted share of good parts that are at least `REVIEW`.
        fail_rate: wanted share of good parts that are `FAIL`.
        region_of_interest: a mask image, white where parts are inspected, which replaces that of the bundle's policy;
            None keeps it.
        threads: of one inference.

    Returns:
        The new bundle's directory, and what its report shows.

    Raises:
        StoreRefused, StoreFailed: if the bundle's store can't be written.
        CalibrationRefused: if there are too few good parts for a rate.
        GoldenFailed: if no golden frame is clear of the new thresholds.
        FlawlineError: if a frame or mask can't be read, the mask was not drawn on frames of the line, or it leaves too
            little to inspect.
    """
    manifest, index = bundle.manifest, bundle.manifest.lines.index(line)
    store = bundle.path.parent.parent
    probe_store(store, manifest.name)
    old, record = bundle.policies[line], manifest.by_line[line]
    spec, rule = manifest.input, manifest.output.score_rule
    region = old.region_of_interest if region_of_interest is None else read_region_of_interest(region_of_interest)
    graph = GraphRun(bundle.model, threads)
    whole = by_tiles(graph, spec, rule)
    held_out = ask(whole, good, spec, reporter, title="good frames", line_index=index)
    if region_of_interest is not None:
        refuse_other_shape(region_of_interest, held_out.frame_sizes)
    calibrated = calibrate(
        held_out.scores,
        held_out.maps,
        rule,
        review_rate=review_rate,
        fail_rate=fail_rate,
        version=_next_version(old.version),
        region_of_interest=region,
        window=spec.window(1, 1),
        parts=held_out.parts,
    )
    calibrated = _with_filters_of(old, calibrated)
    evaluation = answers = None
    if tested:
        answers = ask(whole, tested, spec, reporter, title="test frames", line_index=index)
        evaluation = evaluate(
            answers,
            calibrated.policy,
            rule,
            spec,
            manifest.evaluation_resolution,
            held_out=held_out,
            seed=manifest.seed,
        )
    chooser = GoldenChooser(whole, line, index, calibrated.policy, rule, spec, manifest.golden, manifest.seed)
    old_golden = read_golden(bundle)
    if record.is_calibrated:
        chosen = chooser.choose_again(old_golden)
    else:  # generated frames were all there was
        chosen = chooser.choose(held_out, answers, len(old_golden.answers))
    golden = golden_files([*chosen, *carry_golden_over(bundle, old_golden, without=line)])

    created_at = datetime.now(UTC).isoformat(timespec="seconds")
    again = manifest.model_copy(
        update={
            "by_line": manifest.by_line | {line: _measured_again(record, held_out, evaluation, review_rate, fail_rate)},
            "created_at": created_at,
        }
    )
    section = collect(line, _line_facts(record, held_out), (), calibrated, held_out, evaluation, rule, spec)
    report = ReportData(
        run=_facts(bundle, line, created_at),
        resolution=manifest.evaluation_resolution,
        lines=tuple(
            section if name == line else _carried_section(bundle, name)
            for name in manifest.lines
            if name == line or name in bundle.calibrations
        ),
    )
    calibrations = {**bundle.calibrations, line: calibrated.calibration}
    policies = {**bundle.policies, line: calibrated.policy}
    files = bundle_files(bundle.model, calibrations, policies, golden, render(report))
    path = publish(store, again, files, check=lambda place: verify_bundle(place, graph))
    return path, report


def _with_filters_of(old: Policy, calibrated: Calibrated) -> Calibrated:
    filters = {"min_region_area_px": old.min_region_area_px, "max_regions": old.max_regions}
    return replace(calibrated, policy=calibrated.policy.model_copy(update=filters))


def _next_version(version: str) -> str:
    return str(int(version) + 1) if version.isdecimal() else f"{version[:60]}.1"


def _measured_again(
    record: LineRecord, held_out: Answers, evaluation: Evaluation | None, review_rate: float, fail_rate: float
) -> LineRecord:
    data: dict[str, int] = {"calibrated_on": len(held_out.samples)}
    metrics = record.metrics
    if evaluation is not None:
        labels = evaluation.answers.labels
        data["tested_on_normal"] = int((labels == NORMAL).sum())
        data["tested_on_anomalous"] = int((labels == ANOMALOUS).sum())
        metrics = to_records(evaluation.metrics)
    return LineRecord(
        data=record.data.model_copy(update=data), review_rate=review_rate, fail_rate=fail_rate, metrics=metrics
    )


def _carried_section(bundle: Bundle, line: str) -> LineReport:
    manifest = bundle.manifest
    policy = bundle.policies[line]
    share = inspected_share(policy, manifest.map_size, manifest.input)
    return carry_over(line, manifest.version, policy, bundle.calibrations[line], manifest.by_line[line], share)


def _line_facts(record: LineRecord, held_out: Answers) -> tuple[Fact, ...]:
    return (
        Fact(name="Good frames", value=f"{len(held_out.samples)}, none of them fitted on"),
        Fact(name="Fitted on", value=f"{record.data.fitted_on} good frames of {record.data.name}"),
    )


def _facts(bundle: Bundle, line: str, created_at: str) -> RunFacts:
    manifest = bundle.manifest
    what = "" if len(manifest.lines) == 1 else f"{line}, "
    facts = {
        "Calibrated again": f"{what}from version {manifest.version} of {manifest.created_at}; the network is the same",
        "Digest of that version": bundle.digest,
        "Network digest": manifest.files[MODEL_FILE],
        "Seed": str(manifest.seed),
    }
    return RunFacts(
        name=manifest.name,
        detector=manifest.detector,
        backbone=None if manifest.backbone is None else manifest.backbone.name,
        created_at=created_at,
        facts=tuple(Fact(name=name, value=value) for name, value in facts.items()),
        configuration=yaml.safe_dump(manifest.hyperparameters, sort_keys=False),
        losses=(),
        parity=manifest.parity,
        warnings=tuple(
            f"The line {name} is not calibrated yet, so there is nothing to tell of it."
            for name in manifest.lines
            if name not in (line, *bundle.calibrations)
        ),
    )
