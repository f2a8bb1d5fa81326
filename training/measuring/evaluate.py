"""Measures what a detector answered of frames (`answers.py`): verdicts and figures.

Scores are judged by the service's own policy, so that a figure here is a figure of the line.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from service.contract.bundle import MetricRecord
from service.contract.frames import resize_map, resize_mask
from service.contract.geometry import InputSpec
from service.contract.policy import Judgement, Policy, ScoreRule, Verdict, bring_to_units, inspected_mask, judge
from service.contract.regions import label_components
from service.errors import FrameNotComparable
from training.data.loader import load_channels, load_mask
from training.data.samples import ANOMALOUS, AUPRO_LIMIT, NORMAL, Sample
from training.measuring.answers import Answers
from training.measuring.metrics import (
    Curve,
    Metric,
    aupro_name,
    auroc,
    image_metrics,
    pixel_metrics,
    precision_recall_curve,
    roc_curve,
    saturation_area,
    seg_f1,
    spro,
)

Resolution = Literal["original", "model"]

_IMAGE_FIGURES = ("i_auroc", "i_ap", "i_f1max")
_PIXEL_FIGURES = ("p_auroc", "p_ap", "p_f1max")
# Pixel figures hold every pixel of every test frame several times over: 16 bytes each at the peak.
_LARGEST_PIXEL_COUNT = 400_000_000
_NONE_INSIDE = Metric(None, "no marked defect lies in the region of interest")
_NONE_SCORED = Metric(None, "none of its frames has a score")


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The figures of one line's test frames under one policy.

    Attributes:
        answers: raw answers, one a frame that has a score; frames of unknown label are left out.
        judgements: verdict, compared score and regions, one for each of these.
        metrics: image and pixel figures by name; an undefined one has a reason.
        by_kind: I-AUROC of each kind of defect against all good frames.
        roc: of the images.
        precision_recall: of the images.
        resolution: at which pixel figures were measured.
        defects_outside: how many defective frames have a mask whose marks all lie outside of the region of interest;
            None where there is no region, or no mask to tell it by.
        unscored: frames without a score that could be ranked: flat ones, where each is measured by itself. They have no
            verdict, and no part in any figure.
    """

    answers: Answers
    judgements: tuple[Judgement, ...]
    metrics: dict[str, Metric]
    by_kind: dict[str, Metric]
    roc: Curve
    precision_recall: Curve
    resolution: Resolution
    defects_outside: int | None = None
    unscored: tuple[Sample, ...] = ()

    @property
    def scores(self) -> NDArray[np.float32]:
        """`(n,)` float32, the scores that the policy compares."""
        return np.array([judgement.score for judgement in self.judgements], np.float32)

    def verdict_counts(self) -> dict[str, dict[Verdict, int]]:
        """Count verdicts by kind, good frames first; `NO_VERDICT` is named only where there is any."""
        given = [
            *zip(self.answers.samples, (judgement.verdict for judgement in self.judgements), strict=True),
            *((sample, Verdict.NO_VERDICT) for sample in self.unscored),
        ]
        verdicts = _VERDICTS
        if any(verdict is Verdict.NO_VERDICT for _, verdict in given):
            verdicts = (*_VERDICTS, Verdict.NO_VERDICT)
        counts: dict[str, dict[Verdict, int]] = defaultdict(lambda: dict.fromkeys(verdicts, 0))
        for sample, verdict in given:
            counts[sample.kind][verdict] += 1
        labels = {sample.kind: sample.label for sample, _ in given}
        return {kind: counts[kind] for kind in sorted(counts, key=lambda kind: (labels[kind], kind))}


_VERDICTS: tuple[Verdict, ...] = (Verdict.PASS, Verdict.REVIEW, Verdict.FAIL)


def judge_all(
    answers: Answers, policy: Policy, rule: ScoreRule, spec: InputSpec, least_contrast: float = 0.0
) -> tuple[Judgement, ...]:
    """Judge every answer by a policy, as the service would; a frame of less contrast than asked for has no verdict.

    Raises:
        FrameNotComparable: if a frame shall be measured by itself and is flat (`with_score`).
    """
    inspected = inspected_mask(policy, *answers.maps.shape[1:], window=spec.window(1, 1))
    judged = (
        judge(float(score), anomaly_map, policy, rule, spec.window(*size), inspected)
        for score, anomaly_map, size in zip(answers.scores, answers.maps, answers.frame_sizes, strict=True)
    )
    return tuple(
        replace(judgement, verdict=Verdict.NO_VERDICT) if contrast < least_contrast else judgement
        for judgement, contrast in zip(judged, answers.contrasts, strict=True)
    )


def with_score(
    answers: Answers, policy: Policy, rule: ScoreRule, spec: InputSpec
) -> tuple[Answers, tuple[Sample, ...]]:
    """Part frames that have a score under a policy from those that have none, black ones among them.

    A flat frame that is measured by itself has none. The service gives it no verdict, and among others it has no rank:
    any would be made up.
    """
    inspected = inspected_mask(policy, *answers.maps.shape[1:], window=spec.window(1, 1))
    flat = set()
    for index, (score, anomaly_map) in enumerate(zip(answers.scores, answers.maps, strict=True)):
        try:
            bring_to_units(float(score), anomaly_map, policy, rule, inspected)
        except FrameNotComparable:
            flat.add(index)
    return answers.take([i for i in range(len(answers.samples)) if i not in flat]), tuple(
        answers.samples[i] for i in sorted(flat)
    )


def evaluate(
    answers: Answers,
    policy: Policy,
    rule: ScoreRule,
    spec: InputSpec,
    resolution: Resolution = "original",
    *,
    held_out: Answers | None = None,
    seed: int = 0,
    least_contrast: float = 0.0,
) -> Evaluation:
    """Measure a line's test frames under a policy.

    Pixel figures are, as scores are, those of the inspected region: the cells of the map that a verdict looks at.
    Frames without a score are left out of all figures.

    Args:
        answers: what was said of the test frames.
        policy: the rules that scores and verdicts follow.
        rule: how scores are reduced from maps.
        spec: the network's input.
        resolution: size at which pixel figures are measured: each frame's own, or the model's.
        held_out: what was said of good frames that fitting never saw, where there are any; SegF1 rests on them.
        seed: of the bootstrap behind the intervals.
        least_contrast: of a frame that shows a picture, as the line's golden frames say; others have no verdict, and
            count in the figures, which are of the detector.
    """
    inspected = inspected_mask(policy, *answers.maps.shape[1:], window=spec.window(1, 1))
    defects_outside = None if inspected is None else _defects_outside(answers, spec, inspected)
    unscored: tuple[Sample, ...] = ()
    if policy.calibration == "self":
        answers, unscored = with_score(answers, policy, rule, spec)
    judgements = judge_all(answers, policy, rule, spec, least_contrast)
    scores = np.array([judgement.score for judgement in judgements], np.float32)
    labels = answers.labels
    kinds_without = {sample.kind for sample in unscored if sample.label == ANOMALOUS}
    by_kind = dict.fromkeys(sorted(kinds_without), _NONE_SCORED) | _by_kind(answers.samples, scores)
    return Evaluation(
        answers=answers,
        judgements=judgements,
        metrics={
            **image_metrics(scores, labels, seed=seed),
            **_pixel_metrics(answers, spec, resolution, inspected, seed),
            **_figure_at_a_fixed_threshold(answers, held_out, spec, resolution, inspected),
            **_figures_of_kinds(answers, spec, resolution, inspected, by_kind),
            **_figures_of_pieces(answers.samples, scores),
        },
        by_kind=by_kind,
        roc=roc_curve(scores, labels),
        precision_recall=precision_recall_curve(scores, labels),
        resolution=resolution,
        defects_outside=defects_outside,
        unscored=unscored,
    )


def inspected_share(policy: Policy, map_size: tuple[int, int], spec: InputSpec) -> float | None:
    """Return which share of the frame verdicts look at under a policy's region of interest; None without one.

    Args:
        policy: the line's rules.
        map_size: `(height, width)` of a frame's map.
        spec: the network's input, which may see a part of the frame only.
    """
    window = spec.window(1, 1)
    inspected = inspected_mask(policy, *map_size, window=window)
    return None if inspected is None else float(inspected.mean()) * window[2] * window[3]


def needs_held_out(tested: Sequence[Sample]) -> bool:
    """Tell whether a figure of test frames rests on held-out good frames, which have to be asked about as well."""
    return any(sample.seg_f1 for sample in tested)


def without_test_frames() -> dict[str, Metric]:
    """Return every figure as undefined, for lines that bring good frames only."""
    missing = Metric(None, "the line has no test frames")
    return dict.fromkeys((*_IMAGE_FIGURES, *_PIXEL_FIGURES, aupro_name(AUPRO_LIMIT)), missing)


def to_records(metrics: dict[str, Metric]) -> dict[str, MetricRecord]:
    """Return figures as the manifest keeps them."""
    return {
        name: MetricRecord(
            value=metric.value,
            reason=metric.reason,
            low=metric.interval[0] if metric.interval else None,
            high=metric.interval[1] if metric.interval else None,
        )
        for name, metric in metrics.items()
    }


def _by_kind(samples: Sequence[Sample], scores: NDArray[np.float32]) -> dict[str, Metric]:
    kinds = sorted({sample.kind for sample in samples if sample.label == ANOMALOUS})
    figures = {}
    for kind in kinds:
        chosen = [i for i, sample in enumerate(samples) if sample.label == NORMAL or sample.kind == kind]
        figures[kind] = auroc(scores[chosen], [samples[i].label for i in chosen])
    return figures


def _pixel_metrics(
    answers: Answers, spec: InputSpec, resolution: Resolution, inspected: NDArray[np.bool_] | None, seed: int
) -> dict[str, Metric]:
    # A data set with a limit of its own has AUPRO at the usual one as well, to be compared with others.
    limits = sorted({AUPRO_LIMIT, *(sample.aupro_limit for sample in answers.samples)})
    figures = (*_PIXEL_FIGURES, *map(aupro_name, limits))
    if (missing := _unmarked(answers.samples)) is not None:
        return dict.fromkeys(figures, missing)
    sizes = _measured_sizes(answers, spec, resolution)
    if resolution == "original" and (crowd := _too_many(sizes)) is not None:
        return dict.fromkeys(figures, Metric(None, f"{crowd}; use evaluation_resolution: model"))
    maps, masks = list(_maps_at(answers, sizes)), list(_masks_at(answers, sizes, spec))
    seen = _inspected_at(sizes, inspected)
    if not _marks_something(masks, seen):
        return dict.fromkeys(figures, _NONE_INSIDE)
    found = pixel_metrics(maps, masks, answers.labels, limits, inspected=seen, seed=seed)
    lost = _lost_regions(answers, spec, inspected) if resolution == "model" else None
    return found if lost is None else {name: _weakened(metric, lost) for name, metric in found.items()}


def _lost_regions(answers: Answers, spec: InputSpec, inspected: NDArray[np.bool_] | None) -> str | None:
    """Say how many marked regions have no pixel left once masks are resized to the maps; None where each has one."""
    marked, kept = 0, 0
    for sample, frame_size, anomaly_map in zip(answers.samples, answers.frame_sizes, answers.maps, strict=True):
        top, left, bottom, right = _crop_of(spec, frame_size)
        regions, _ = label_components(load_mask(sample, *frame_size)[top:bottom, left:right])
        if inspected is not None:
            regions *= resize_mask(inspected, *regions.shape)
        # The nearest neighbours that `resize_mask` takes, of numbers instead of marks.
        nearest = (
            ((np.arange(new) + 0.5) * old / new).astype(np.int64)
            for new, old in zip(anomaly_map.shape, regions.shape, strict=True)
        )
        marked += int(np.count_nonzero(np.unique(regions)))
        kept += int(np.count_nonzero(np.unique(regions[np.ix_(*nearest)])))
    if marked == kept:
        return None
    are = "lies" if marked - kept == 1 else "lie"
    return (
        f"{marked - kept} of {marked} marked regions {are} between the cells of the map and can't be measured at its "
        "size; use evaluation_resolution: original"
    )


def _weakened(metric: Metric, reason: str) -> Metric:
    return replace(metric, reason=reason if metric.reason is None else f"{metric.reason}; {reason}")


def _figure_at_a_fixed_threshold(
    answers: Answers,
    held_out: Answers | None,
    spec: InputSpec,
    resolution: Resolution,
    inspected: NDArray[np.bool_] | None,
) -> dict[str, Metric]:
    """Return SegF1; empty for lines of data sets whose makers don't measure it.

    Nothing is ranked, so maps are brought to size one by one, and no number of pixels is too many.
    """
    if not needs_held_out(answers.samples):
        return {}
    if (missing := _unmarked(answers.samples)) is not None:
        return {"seg_f1": missing}
    sizes = _measured_sizes(answers, spec, resolution)
    seen = _inspected_at(sizes, inspected)
    if not _marks_something(_masks_at(answers, sizes, spec), seen):
        return {"seg_f1": _NONE_INSIDE}
    good_sizes = [] if held_out is None else _measured_sizes(held_out, spec, resolution)
    found = seg_f1(
        _maps_at(answers, sizes),
        _masks_at(answers, sizes, spec),
        [] if held_out is None else _maps_at(held_out, good_sizes),
        inspected=seen,
        good_inspected=_inspected_at(good_sizes, inspected),
    )
    return {"seg_f1": found}


def _unmarked(samples: Sequence[Sample]) -> Metric | None:
    """Say why frames have no pixel figures, or return None where they may."""
    anomalous = [sample for sample in samples if sample.label == ANOMALOUS]
    if not anomalous:
        return Metric(None, "there is no anomalous sample")
    if not all(sample.mask_paths for sample in anomalous):
        return Metric(None, "the line has image labels only, no masks")
    return None


def _measured_sizes(answers: Answers, spec: InputSpec, resolution: Resolution) -> list[tuple[int, int]]:
    """Return the size `(height, width)` at which each frame's pixels are measured."""
    if resolution == "model":
        return [anomaly_map.shape for anomaly_map in answers.maps]
    windows = [_crop_of(spec, size) for size in answers.frame_sizes]
    return [(bottom - top, right - left) for top, left, bottom, right in windows]


def _maps_at(answers: Answers, sizes: Sequence[tuple[int, int]]) -> Iterator[NDArray[np.float32]]:
    return (resize_map(anomaly_map, *size) for anomaly_map, size in zip(answers.maps, sizes, strict=True))


def _masks_at(answers: Answers, sizes: Sequence[tuple[int, int]], spec: InputSpec) -> Iterator[NDArray[np.bool_]]:
    for sample, frame_size, size in zip(answers.samples, answers.frame_sizes, sizes, strict=True):
        top, left, bottom, right = _crop_of(spec, frame_size)
        yield resize_mask(load_mask(sample, *frame_size)[top:bottom, left:right], *size)


def _inspected_at(
    sizes: Sequence[tuple[int, int]], inspected: NDArray[np.bool_] | None
) -> list[NDArray[np.bool_]] | None:
    """Return which pixels of maps of these sizes lie in an inspected cell; None where all do."""
    if inspected is None:
        return None
    of_size = {size: resize_mask(inspected, *size) for size in set(sizes)}
    return [of_size[size] for size in sizes]


def _marks_something(masks: Iterable[NDArray[np.bool_]], seen: Sequence[NDArray[np.bool_]] | None) -> bool:
    """Tell whether a mark lies in the region of interest; where all is inspected, nothing needs to be looked at."""
    return seen is None or any((mask & part).any() for mask, part in zip(masks, seen, strict=True))


def _defects_outside(answers: Answers, spec: InputSpec, inspected: NDArray[np.bool_]) -> int | None:
    told = [i for i, sample in enumerate(answers.samples) if sample.label == ANOMALOUS and sample.mask_paths]
    outside = 0
    for index in told:
        size = answers.frame_sizes[index]
        mask = load_mask(answers.samples[index], *size)
        top, left, bottom, right = _crop_of(spec, size)
        seen = mask[top:bottom, left:right]
        outside += bool(mask.any() and not (seen & resize_mask(inspected, *seen.shape)).any())
    return outside if told else None


def _figures_of_kinds(
    answers: Answers,
    spec: InputSpec,
    resolution: Resolution,
    inspected: NDArray[np.bool_] | None,
    by_kind: dict[str, Metric],
) -> dict[str, Metric]:
    """Return sPRO and image AUROC of each kind of anomaly, and MVTec LOCO's headlines: means over kinds, not pooled.

    Empty for lines whose defects have no masks of their own.
    """
    if not any(sample.channels for sample in answers.samples):
        return {}
    of_kind = {kind: _spro(answers, kind, spec, resolution, inspected) for kind in by_kind}
    return {
        **{f"spro_{kind}": metric for kind, metric in of_kind.items()},
        "spro": _mean(of_kind),
        **{f"i_auroc_{kind}": metric for kind, metric in by_kind.items()},
        "i_auroc_of_kinds": _mean(by_kind),
    }


def _figures_of_pieces(samples: Sequence[Sample], scores: NDArray[np.float32]) -> dict[str, Metric]:
    """Return Real-IAD's S-AUROC: a piece scores as its worst frame, and is anomalous where any of its frames is.

    Empty for data sets whose makers don't measure it (the frames of a piece in MVTec AD 2 are lights, each judged
    alone), and for lines whose test frames each show a piece of their own.
    """
    if not any(sample.s_auroc for sample in samples):
        return {}
    pieces: dict[str, tuple[float, int]] = {}
    for sample, score in zip(samples, scores, strict=True):
        piece = sample.group or str(sample.path)
        worst, label = pieces.get(piece, (float("-inf"), 0))
        pieces[piece] = max(worst, float(score)), max(label, sample.label)
    if len(pieces) == len(samples):
        return {}
    worst_scores, labels = zip(*pieces.values(), strict=True)
    return {"s_auroc": auroc(np.array(worst_scores, np.float32), labels)}


def _spro(
    answers: Answers, kind: str, spec: InputSpec, resolution: Resolution, inspected: NDArray[np.bool_] | None
) -> Metric:
    """Measure one kind of anomaly against all good frames, by the rules of MVTec LOCO's evaluation kit."""
    if resolution == "model":
        of_size = "saturation areas are given in pixels of the original frames; use evaluation_resolution: original"
        return Metric(None, of_size)
    chosen = [i for i, sample in enumerate(answers.samples) if sample.label == NORMAL or sample.kind == kind]
    windows = [_crop_of(spec, answers.frame_sizes[i]) for i in chosen]
    sizes = [(bottom - top, right - left) for top, left, bottom, right in windows]
    if (reason := _too_many(sizes)) is not None:
        return Metric(None, reason)
    maps, channels, saturations = [], [], []
    for index, (top, left, bottom, right) in zip(chosen, windows, strict=True):
        maps.append(resize_map(answers.maps[index], bottom - top, right - left))
        found = [(mask[top:bottom, left:right], rule) for mask, rule in load_channels(answers.samples[index])]
        if inspected is not None:  # of a defect that is cut, the share of the part inside is enough
            seen = resize_mask(inspected, bottom - top, right - left)
            found = [(mask & seen, rule) for mask, rule in found]
        channels.append([mask for mask, _ in found])
        saturations.append([saturation_area(int(mask.sum()), r.threshold, relative=r.relative) for mask, r in found])
    return spro(maps, channels, saturations, inspected=_inspected_at(sizes, inspected))


def _mean(figures: dict[str, Metric]) -> Metric:
    values = [metric.value for metric in figures.values() if metric.value is not None]
    missing = [kind for kind, metric in figures.items() if metric.value is None]
    return Metric(None, f"there is none for {', '.join(missing)}") if missing else Metric(sum(values) / len(values))


def _too_many(sizes: Sequence[tuple[int, int]]) -> str | None:
    pixels = sum(height * width for height, width in sizes)
    return f"{pixels} pixels at original size are too many to rank" if pixels > _LARGEST_PIXEL_COUNT else None


def _crop_of(spec: InputSpec, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return the inspected window in whole pixels of the original frame: top, left, bottom, right."""
    top, left, height, width = spec.window(*size)
    return round(top), round(left), round(top + height), round(left + width)
