"""A bundle with new thresholds for one line: the same network and input, other good parts, rates or region of interest.

For a line whose light or product has moved a little, or whose rates were not right: no fitting, no torch. The result is
a new version in the same store; the old one stays as it is, and so do the other lines of the bundle: their calibration,
policy, golden frames and figures are carried over.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import yaml

from service.contract.bundle import (
    MODEL_FILE,
    Bundle,
    FramesRecord,
    LineRecord,
    Manifest,
    MetricRecord,
    ParentRecord,
)
from service.contract.frames import FrameLimits
from service.contract.golden import read_golden
from service.contract.policy import Policy
from service.contract.tiling import by_tiles
from service.errors import CalibrationRefused, ParameterInvalid
from training.bundling.bundles import bundle_files
from training.bundling.export import GraphRun
from training.bundling.fitted_frames import (
    carry_fitted_frames_over,
    read_fitted_frames,
    remembers_fitted_frames,
    those_fitted_on,
)
from training.bundling.store import probe_store, publish
from training.calibrate import (
    Calibrated,
    calibrate,
    has_shape_of,
    read_region_of_interest,
    refuse_other_shape,
    refuse_unsupported_rates,
    tell_other_shapes,
)
from training.data.check import check_dataset
from training.data.folders import good_samples
from training.data.passed_over import tell_passed_over
from training.data.samples import ANOMALOUS, NORMAL, Dataset, DatasetFault, Sample, parts_of, refuse_illegible
from training.data.split import HoldOut, name_parts
from training.golden import GoldenChooser, carry_golden_over, contrast_asked_for, golden_files
from training.measuring.answers import Answers, ask
from training.measuring.evaluate import Evaluation, evaluate, inspected_share, to_records
from training.progress import Reporter
from training.reporting.collect import carry_over, collect
from training.reporting.page_data import Fact, LineReport, ReportData, RunFacts
from training.reporting.report import render

# Of the run's configuration, what another calibration replaces.
_RATES = ("review_rate", "fail_rate")
_NOT_MEASURED_INSIDE = MetricRecord(
    value=None, reason="the region of interest is another one, and no test frames were given to measure inside of it"
)


@dataclass(frozen=True)
class CheckedFrames:
    """Frames that were looked at, and what the manifest says of them.

    Attributes:
        samples: one a frame.
        record: of the folder that they come from.
        content: SHA-256 in hex of each frame's file.
        frame_sizes: `(height, width)` in pixels that frames have, the most common one first.
    """

    samples: tuple[Sample, ...]
    record: FramesRecord
    content: Mapping[Path, str]
    frame_sizes: tuple[tuple[int, int], ...]


def read_good_folder(folder: Path, group_by: str | None, bit_depth: int, reporter: Reporter) -> CheckedFrames:
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
    notes = tell_passed_over(folder, (sample.path for sample in samples), str(folder))
    if not samples:
        raise DatasetFault(f"{folder} holds no image; give the folder with good frames that fitting never saw.", *notes)
    dataset = Dataset(folder.resolve().name, folder, "plain", tuple(samples), notes)
    refuse_illegible(dataset)
    if group_by is not None:
        try:
            dataset = name_parts(dataset, HoldOut(rule="groups", group_by=group_by))
        except ValueError as error:
            raise ParameterInvalid(f"--group-by: {error}.") from error
    checked = check_dataset(dataset, FrameLimits(), reporter, bit_depth=bit_depth)
    checked.tell(folder.resolve().name, reporter)
    if checked.copies:
        reporter.note(f"{len(checked.copies)} frames are copies of others; they say nothing new and are left out.")
    record = FramesRecord(name=dataset.name, digest=checked.digest, copies_left_out=len(checked.copies))
    return CheckedFrames(checked.distinct.validation_good, record, checked.content, checked.frame_sizes)


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


def without_fitted(good: CheckedFrames, fitted: frozenset[str] | None, reporter: Reporter) -> CheckedFrames:
    """Return good frames without those that fitting saw, and without the other views of their parts.

    Args:
        good: the frames that were given.
        fitted: what the bundle remembers of its fitted frames; None where it does not.
        reporter: says how many are left out.

    Raises:
        DatasetFault: if none is left.
    """
    if fitted is None:
        reporter.note(
            "The bundle does not know which frames its detector was fitted on. See to it that none of these good "
            "frames is among them, or more good parts will be stopped than promised."
        )
        return good
    seen = set(those_fitted_on(good.samples, good.content, fitted))
    parts = {sample.group for sample in seen if sample.group is not None}
    left = tuple(sample for sample in good.samples if sample not in seen and sample.group not in parts)
    if not seen:
        return good
    if not left:
        raise DatasetFault(
            f"The detector was fitted on all good frames of {good.record.name}; give good frames that fitting never "
            "saw."
        )
    count = len(good.samples) - len(left)
    reporter.note(
        f"The detector was fitted on good frames of {good.record.name}, or on other views of their parts; {count} are "
        "left out, because thresholds rest on good parts that fitting never saw."
    )
    return replace(good, samples=left, record=good.record.model_copy(update={"fitted_left_out": count}))


def refuse_known_test_frames(tested: CheckedFrames, good: CheckedFrames, fitted: frozenset[str] | None) -> None:
    """Refuse test frames that calibrate as well, or that fitting saw: figures would be measured on what was learnt.

    Raises:
        DatasetFault: naming the files.
    """
    calibrating = {good.content[sample.path]: sample.path for sample in good.samples}
    twins = [(sample.path, calibrating.get(tested.content[sample.path])) for sample in tested.samples]
    faults = [
        f"{path} is a test frame, and {twin} of the same content calibrates; take one away, or the figures would be "
        "measured on what set the thresholds."
        for path, twin in twins
        if twin is not None
    ]
    learnt = those_fitted_on(tested.samples, tested.content, fitted or frozenset())
    faults += [
        f"{sample.path} is a test frame, and the detector was fitted on it; take it away, or the figures would be "
        "measured on what was learnt."
        for sample in learnt
    ]
    if faults:
        raise DatasetFault(*faults)


def refuse_other_frames(
    bundle: Bundle, line: str, good: CheckedFrames, reporter: Reporter, *, keeps_region: bool
) -> None:
    """Refuse frames of another shape than the line's where its region of interest is laid over them, else tell of them.

    Args:
        bundle: verified.
        line: one of the bundle's.
        good: frames that shall calibrate it.
        reporter: says of frames of another size that they are.
        keeps_region: whether a region of interest that was drawn on the line's frames before is carried over.

    Raises:
        ParameterInvalid: if a frame has another aspect ratio, and the region would cover other places of the part.
    """
    told, is_of_other_shape = _other_sizes(bundle, line, good)
    if told is None:
        return
    if is_of_other_shape and keeps_region:
        raise ParameterInvalid(
            f"The new frames have {told}, which is another aspect ratio, so the line's region of interest would lie on "
            "other places of the part; give frames of this line, or with --roi a mask that is drawn on the new ones."
        )
    reporter.note(
        f"New frames have {told}. See to it that they are of this line; thresholds from frames of another product or "
        "camera are none for it."
    )


def tell_other_frames(bundle: Bundle, line: str, tested: CheckedFrames, reporter: Reporter) -> None:
    """Say that test frames are of another size than the line's, as those of another camera are.

    Args:
        bundle: verified.
        line: one of the bundle's.
        tested: frames that it shall be measured on.
        reporter: says it.
    """
    told, is_of_other_shape = _other_sizes(bundle, line, tested)
    if told is None:
        return
    elsewhere = ""
    if is_of_other_shape and bundle.policies[line].region_of_interest is not None:
        elsewhere = " The line's region of interest lies on other places of them than it was painted on."
    reporter.note(
        f"Test frames have {told}. See to it that they are of this line; figures from frames of another product or "
        f"camera say nothing of it.{elsewhere}"
    )


def _check_region(mask: Path, good: CheckedFrames, reporter: Reporter) -> None:
    """Refuse a new region of interest that was drawn on none of the frames, or tell that it was not drawn on some."""
    refuse_other_shape(mask, good.frame_sizes)
    if (told := tell_other_shapes(mask, good.frame_sizes)) is not None:
        reporter.note(told)


def _other_sizes(bundle: Bundle, line: str, frames: CheckedFrames) -> tuple[str | None, bool]:
    """Return what is said of frames whose size none of the line's has, and whether their aspect ratio is another."""
    recorded = bundle.manifest.by_line[line].data.frame_sizes
    known = recorded or _sizes_of_golden(bundle, line)
    of_other_shape = [size for size in frames.frame_sizes if known and not has_shape_of(size, known)]
    # Golden frames are stored smaller than the camera's, so only their shape tells something.
    others = of_other_shape or [size for size in frames.frame_sizes if recorded and size not in recorded]
    if not others:
        return None, False
    height, width = others[0]
    told = f"{width}x{height} pixels and those of the line {line} before {known[0][1]}x{known[0][0]}"
    return told, bool(of_other_shape)


def recalibrate(
    bundle: Bundle,
    line: str,
    good: CheckedFrames,
    tested: CheckedFrames | None,
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
        good: good frames; those that fitting saw are left out, as far as the bundle knows them.
        tested: labelled test frames to measure the new verdicts on, or None.
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
        DatasetFault: if fitting saw all good frames, or a test frame calibrates as well or was fitted on.
        GoldenFailed: if no golden frame is clear of the new thresholds.
        FlawlineError: if a frame or mask can't be read, the mask was not drawn on frames of the line, nor the bundle's
            region on frames of this shape, or it leaves too little to inspect.
    """
    manifest, index = bundle.manifest, bundle.manifest.lines.index(line)
    store = bundle.path.parent.parent
    probe_store(store, manifest.name)
    old, record = bundle.policies[line], manifest.by_line[line]
    spec, rule = manifest.input, manifest.output.score_rule
    region = old.region_of_interest if region_of_interest is None else read_region_of_interest(region_of_interest)
    refuse_other_frames(bundle, line, good, reporter, keeps_region=region_of_interest is None and region is not None)
    good = _unseen_frames(bundle, good, tested, reporter, review_rate=review_rate, fail_rate=fail_rate)
    graph = GraphRun(bundle.model, threads)
    whole = by_tiles(graph, spec, rule)
    held_out = ask(whole, good.samples, spec, reporter, title="good frames", content=good.content, line_index=index)
    if region_of_interest is not None:
        _check_region(region_of_interest, good, reporter)
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
    if tested is not None:
        answers = ask(
            whole, tested.samples, spec, reporter, title="test frames", content=tested.content, line_index=index
        )
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
    if not record.is_calibrated:  # generated frames were all there was
        chosen = chooser.choose(held_out, answers, len(old_golden.answers))
    elif min(held_out.contrasts) < contrast_asked_for(bundle, line):
        reporter.note(
            "Some good frames have less than a quarter of the contrast of the golden ones, and would be refused as "
            "frames without a picture; golden frames are chosen anew, among all good ones. Do these show the part?"
        )
        chosen = chooser.choose(held_out, answers, sum(answer.line == line for answer in old_golden.answers))
    else:
        chosen = chooser.choose_again(old_golden)
    golden = golden_files([*chosen, *carry_golden_over(bundle, old_golden, without=line)])

    data = _data_again(calibrated, held_out, good)
    if evaluation is not None and tested is not None:
        data |= _tested_again(evaluation, tested)
        metrics = to_records(evaluation.metrics)
    elif region == old.region_of_interest:  # figures rank frames, whatever the thresholds are
        metrics = record.metrics
    else:
        data |= {"tested_on_normal": 0, "tested_on_anomalous": 0, "test_frames": None}
        metrics = dict.fromkeys(record.metrics, _NOT_MEASURED_INSIDE)
    record_again = LineRecord(
        data=record.data.model_copy(update=data), review_rate=review_rate, fail_rate=fail_rate, metrics=metrics
    )
    created_at = datetime.now(UTC).isoformat(timespec="seconds")
    again = manifest.model_copy(
        update={
            "by_line": manifest.by_line | {line: record_again},
            "hyperparameters": {
                key: manifest.hyperparameters[key] for key in manifest.hyperparameters if key not in _RATES
            },
            "parity": manifest.parity.model_copy(update={"verdicts_differ": None, "verdicts_at_threshold": None}),
            "parent": ParentRecord(version=manifest.version, digest=bundle.digest),
            "created_at": created_at,
        }
    )
    facts = _line_facts(record_again, manifest.version, is_measured=evaluation is not None)
    section = collect(line, facts, (), calibrated, held_out, evaluation, rule, spec)
    section = section.model_copy(
        update={"metrics": metrics or section.metrics, "is_unseen": remembers_fitted_frames(bundle)}
    )
    report = ReportData(
        run=_facts(bundle, again, line),
        resolution=manifest.evaluation_resolution,
        lines=tuple(
            section if name == line else _carried_section(bundle, name)
            for name in manifest.lines
            if name == line or name in bundle.calibrations
        ),
    )
    calibrations = {**bundle.calibrations, line: calibrated.calibration}
    policies = {**bundle.policies, line: calibrated.policy}
    files = bundle_files(bundle.model, calibrations, policies, golden) | carry_fitted_frames_over(bundle)
    path = publish(
        store,
        again,
        files,
        graph,
        page=lambda version: render(report, version),
    )
    return path, report


def _sizes_of_golden(bundle: Bundle, line: str) -> tuple[tuple[int, int], ...]:
    if not bundle.manifest.by_line[line].is_calibrated:  # generated frames were all there was
        return ()
    golden = read_golden(bundle)
    return tuple(
        (frame.height, frame.width)
        for answer, frame in zip(golden.answers, golden.frames, strict=True)
        if answer.line == line
    )


def _unseen_frames(
    bundle: Bundle,
    good: CheckedFrames,
    tested: CheckedFrames | None,
    reporter: Reporter,
    *,
    review_rate: float,
    fail_rate: float,
) -> CheckedFrames:
    """Return the good frames that thresholds may rest on; before the first one is asked about."""
    fitted = read_fitted_frames(bundle)
    unseen = without_fitted(good, fitted, reporter)
    _refuse_too_few(unseen, review_rate, fail_rate)
    if tested is not None:
        refuse_known_test_frames(tested, unseen, fitted)
    return unseen


def _refuse_too_few(good: CheckedFrames, review_rate: float, fail_rate: float) -> None:
    try:
        parts = len(set(parts_of(good.samples)))
        refuse_unsupported_rates(parts, review_rate, fail_rate, frames=len(good.samples), splits=False)
    except CalibrationRefused as error:
        count = good.record.fitted_left_out
        without = f"Good frames that fitting saw, {count}, do not count. " if count else ""
        raise CalibrationRefused(f"{without}{error.sentence}") from error


def _with_filters_of(old: Policy, calibrated: Calibrated) -> Calibrated:
    filters = {"min_region_area_px": old.min_region_area_px, "max_regions": old.max_regions}
    return replace(calibrated, policy=calibrated.policy.model_copy(update=filters))


def _next_version(version: str) -> str:
    return str(int(version) + 1) if version.isdecimal() else f"{version[:60]}.1"


def _data_again(calibrated: Calibrated, held_out: Answers, good: CheckedFrames) -> dict[str, object]:
    """Return what is new of a line's data: the frames that now set its thresholds."""
    return {
        "calibrated_on": len(held_out.samples),
        "calibrated_parts": calibrated.calibration.good_parts,
        "calibration_frames": good.record,
        "frame_sizes": good.frame_sizes,
    }


def _tested_again(evaluation: Evaluation, tested: CheckedFrames) -> dict[str, object]:
    labels = evaluation.answers.labels
    return {
        "tested_on_normal": int((labels == NORMAL).sum()),
        "tested_on_anomalous": int((labels == ANOMALOUS).sum()),
        "test_frames": tested.record,
    }


def _carried_section(bundle: Bundle, line: str) -> LineReport:
    manifest = bundle.manifest
    policy = bundle.policies[line]
    share = inspected_share(policy, manifest.map_size, manifest.input)
    record = manifest.by_line[line]
    section = carry_over(line, manifest.version, policy, bundle.calibrations[line], record, share)
    # Runs hold out what they calibrate on; of frames that came later, only a bundle that remembers can tell.
    of_run = record.data.calibration_frames is None and record.data.fitted_on > 0
    return section.model_copy(update={"is_unseen": of_run or remembers_fitted_frames(bundle)})


def _line_facts(record: LineRecord, parent: str, *, is_measured: bool) -> tuple[Fact, ...]:
    """Say which frames a line was calibrated on, which were measured, and on which its detector was fitted."""
    data, frames = record.data, record.data.calibration_frames
    if frames is None:
        raise ValueError("a line that was calibrated again has the frames of that")
    of_parts = "" if data.calibrated_parts == data.calibrated_on else f" that show {data.calibrated_parts} parts"
    without = f", {frames.copies_left_out} left out as copies" if frames.copies_left_out else ""
    without += f", {frames.fitted_left_out} left out because fitting saw them" if frames.fitted_left_out else ""
    facts = {
        "Calibrated on": f"{data.calibrated_on} good frames of {frames.name}{of_parts}{without}",
        "Digest of these": frames.digest,
        "Fitted on": f"{data.fitted_on} good frames of {data.name}",
        "Digest of that data": data.digest,
    }
    if data.test_frames is not None:
        facts |= {"Test frames": f"those of {data.test_frames.name}", "Digest of those": data.test_frames.digest}
    if not is_measured and any(metric.value is not None for metric in record.metrics.values()):
        facts["Figures"] = f"as in version {parent}; how well frames are ranked depends on no threshold"
    return tuple(Fact(name=name, value=value) for name, value in facts.items())


def _facts(bundle: Bundle, again: Manifest, line: str) -> RunFacts:
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
        created_at=again.created_at,
        facts=tuple(Fact(name=name, value=value) for name, value in facts.items()),
        configuration=yaml.safe_dump(again.hyperparameters, sort_keys=False),
        losses=(),
        parity=again.parity,
        warnings=tuple(
            f"The line {name} is not calibrated yet, so there is nothing to tell of it."
            for name in manifest.lines
            if name not in (line, *bundle.calibrations)
        ),
    )
