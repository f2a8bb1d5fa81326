"""The lines of a run: read, checked and compared before the first hour is spent on fitting.

Comes first of all steps. Whatever would end the run later, or have the service refuse its bundle, ends it here. What
several lines must agree on is little: each keeps its own frames, held-out parts, region of interest and thresholds, and
the network's input is the only thing they share. So frames of other sizes are allowed and told, and lines whose aspect
ratios differ by more than a factor of two are refused: resized to one input, frames of one line would be squeezed to
less than half the width that frames of another keep.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

from models import DETECTORS
from models.detector import Recipe
from service.contract.bundle import newest_bundles, promised_lines
from service.contract.frames import FrameLimits
from service.contract.geometry import InputSpec
from service.contract.regions import Polygon
from service.errors import CalibrationRefused, ParameterInvalid
from training.calibrate import (
    read_region_of_interest,
    refuse_other_shape,
    refuse_unsupported_rates,
    refuse_unusable_region,
    tell_other_shapes,
)
from training.config import ConfigFault, RunConfig, map_size_of, score_rule_of
from training.data.check import CheckedDataset, check_dataset
from training.data.detect import read_dataset
from training.data.samples import ANOMALOUS, UNKNOWN, Dataset, DatasetFault, Sample, parts_of
from training.data.shots import choose_shots
from training.data.split import is_split_by_names, name_parts, split_good, tell_order
from training.progress import Reporter
from training.run_directory import LineRequest, RunRequest

_LARGEST_RATIO_OF_ASPECTS = 2.0
# Squeezed to a third of the height or width that it had beside the other side, a round defect is hardly seen as one.
_LARGEST_SQUEEZE = 3.0
# Each tile costs as much as a frame.
_MOST_SUGGESTED_TILES = 8
_FOR_SEVERAL_LINES = "inp_former"
# Their papers have a few-shot setting.
_MADE_FOR_FEW_FRAMES = ("ami_net", "inp_former", "inp_former_pp")


@dataclass(frozen=True, eq=False)
class GatheredLine:
    """The frames of one line, each of them looked at.

    Attributes:
        name: of the line.
        data: its data set.
        fitted_on: good frames that fitting sees.
        held_out: good frames that thresholds rest on.
        tested: labelled test frames; may be empty.
        copies: good frames that were left out because others have the same content.
        region_of_interest: polygons in fractions of the frame, or None for everything.
    """

    name: str
    data: CheckedDataset
    fitted_on: list[Sample]
    held_out: list[Sample]
    tested: list[Sample]
    copies: int
    region_of_interest: tuple[Polygon, ...] | None


@dataclass(frozen=True, eq=False)
class GatheredLines:
    """All lines of a run.

    Attributes:
        lines: in the order of the request, which is that of their indices.
        warnings: what is allowed but worth knowing of the lines together, one sentence each.
    """

    lines: tuple[GatheredLine, ...]
    warnings: tuple[str, ...]

    @property
    def fitting_digest(self) -> str:
        """SHA-256 in hex over names and contents of the frames that fitting sees, in order; of no other frame.

        Of the lines, another order would be another network.
        """
        lines = [[line.name, [line.data.content[sample.path] for sample in line.fitted_on]] for line in self.lines]
        return hashlib.sha256(json.dumps(lines).encode()).hexdigest()

    @property
    def content(self) -> dict[Path, str]:
        """SHA-256 in hex of each frame's file, of all lines."""
        return {path: digest for line in self.lines for path, digest in line.data.content.items()}

    @property
    def fitted_on(self) -> list[Path]:
        """The files to fit on, line by line."""
        return [sample.path for line in self.lines for sample in line.fitted_on]

    @property
    def fitted_on_lines(self) -> list[int]:
        """Which line each of these files shows."""
        return [index for index, line in enumerate(self.lines) for _ in line.fitted_on]


def gather_lines(request: RunRequest, reporter: Reporter) -> GatheredLines:
    """Read and check the frames of every line, the quick questions of all lines before the first slow one.

    Raises:
        ConfigFault: if there are several lines, and the detector holds a picture of one product.
        ParameterInvalid: if two lines have one name, another bundle of the store serves one of them, or a region of
            interest was not drawn on its line's frames.
        DatasetFault: if two lines have the same frames, a file can't be used, or frames are of too different a shape.
        CalibrationRefused: if a line holds out too few good parts for the wanted rates.
        UnreadableFrame: if a region of interest can't be read.
        BundleRefused: if one leaves nothing to inspect, or too little for this detector.
    """
    _refuse_repetitions(request.lines)
    _refuse_lines_together(request)
    served = [line.name for line in request.lines]
    refuse_taken_lines(request.store, request.name, served)
    many, released = len(request.lines) > 1, request.released is not None
    opened = [_open(line, request.config, is_one_of_many=many, is_released=released) for line in request.lines]
    lines = tuple(_check(line, request.config, reporter) for line in opened)
    _refuse_copies(lines)
    for line in lines:
        line.data.tell(line.name, reporter)
    warnings = (
        *_told_of_release(request),
        *lines_given_up(request.store, request.name, served),
        *_told_of_lines_together(request),
        *_told_of_copies(lines),
        *_told_of_order(lines, request),
        *_told_of_regions(lines, request.lines),
        *_told_of_oblong_frames(lines, request.config.frame_input),
        *_told_of_few_frames(lines, request.config),
        *_told_of_missing_masks(lines),
        *compare_frame_sizes(lines, request.config.frame_input),
    )
    for warning in warnings:
        reporter.note(warning)
    return GatheredLines(lines, warnings)


def lines_split_by_names(gathered: GatheredLines, request: RunRequest) -> tuple[str, ...]:
    """Return the lines whose good frames are split in another order than older releases took, by the last numbers.

    Fitting took the kept frames in that order too, so by every rule of holding out such a line's fit was another one.
    """
    if request.released is not None or request.config.shots is not None:
        return ()
    return tuple(line.name for line in gathered.lines if is_split_by_names(line.data.distinct))


def compare_frame_sizes(lines: Sequence[GatheredLine], spec: InputSpec) -> tuple[str, ...]:
    """Say what it means that lines have frames of other sizes; one sentence, or none where all are alike.

    Raises:
        DatasetFault: if the aspect ratios differ by more than a factor of two.
    """
    sizes = {line.name: line.data.frame_size for line in lines}
    if len(set(sizes.values())) == 1:
        return ()
    aspects = {name: width / height for name, (height, width) in sizes.items()}
    told = ", ".join(
        f"{name} {height}x{width} (aspect ratio {aspects[name]:.2f})" for name, (height, width) in sizes.items()
    )
    if max(aspects.values()) > _LARGEST_RATIO_OF_ASPECTS * min(aspects.values()):
        raise DatasetFault(
            f"The lines' frames are of too different a shape for one network, height x width: {told}. Crop them to a "
            "like shape, or train these lines in runs of their own."
        )
    resized = f"{spec.resize_height}x{spec.resize_width}"
    return (f"The lines' frames differ in size, height x width: {told}; the network takes all resized to {resized}.",)


def refuse_taken_lines(store: Path, name: str, lines: Sequence[str]) -> None:
    """Refuse lines that another bundle of the store serves, because the service would refuse the second bundle.

    Args:
        store: where the bundle goes.
        name: of the bundle.
        lines: that it shall serve.

    Raises:
        ParameterInvalid: naming the line and the other bundle.
    """
    for other, served in _served_lines(store).items():
        taken = sorted(set(lines).intersection(served))
        if other != name and taken:
            raise ParameterInvalid(
                f"The bundle {other} in {store} serves the line {taken[0]} already, and the service would "
                f"refuse a second one; give the line another name, or take {store / other} away."
            )


def lines_given_up(store: Path, name: str, lines: Sequence[str]) -> tuple[str, ...]:
    """Say which lines a new version of a bundle would no longer serve; arguments as `refuse_taken_lines`."""
    lost = [line for line in _served_lines(store).get(name, ()) if line not in lines]
    if not lost:
        return ()
    return (f"The newest version of {name} serves {', '.join(lost)} as well, and this one will not.",)


class _Opened(NamedTuple):
    request: LineRequest
    dataset: Dataset
    region_of_interest: tuple[Polygon, ...] | None
    is_one_of_many: bool
    is_released: bool


def _open(line: LineRequest, config: RunConfig, *, is_one_of_many: bool, is_released: bool) -> _Opened:
    region = None
    if line.region_of_interest is not None:
        region = read_region_of_interest(line.region_of_interest)
        own, spec = config.detector_config(), config.frame_input
        refuse_unusable_region(region, spec.stitched_size(*map_size_of(own)), score_rule_of(own), spec.window(1, 1))
    dataset = name_parts(read_dataset(line.folder, line.layout), config.hold_out)
    opened = _Opened(line, dataset, region, is_one_of_many, is_released)
    _split(opened, dataset, config)  # what all frames can't support, those without copies can't either
    return opened


def _check(line: _Opened, config: RunConfig, reporter: Reporter) -> GatheredLine:
    data = check_dataset(line.dataset, FrameLimits(), reporter, bit_depth=config.input.bit_depth)
    if line.request.region_of_interest is not None:
        refuse_other_shape(line.request.region_of_interest, data.frame_sizes)
    # Only now is known which frames are copies. A stated bound rests on parts that fitting never saw and that are
    # independent of each other: held out, a copy would be neither.
    fitted_on, held_out = _split(line, data.distinct, config)
    return GatheredLine(
        name=line.request.name,
        data=data,
        fitted_on=fitted_on,
        held_out=held_out,
        copies=len(line.dataset.samples) - len(data.distinct.samples),
        tested=[sample for sample in line.dataset.test if sample.label != UNKNOWN],
        region_of_interest=line.region_of_interest,
    )


def _split(line: _Opened, dataset: Dataset, config: RunConfig) -> tuple[list[Sample], list[Sample]]:
    """Return the good frames to fit on and those to calibrate on, of all frames of a line or of those left.

    Raises:
        DatasetFault: if there are too few to split.
        CalibrationRefused: if those held out can't support the wanted rates.
    """
    fitted_on: list[Sample]
    if line.is_released:
        fitted_on, held_out = [], [*dataset.train_good, *dataset.validation_good]
    elif config.shots is None:
        fitted_on, held_out = split_good(dataset, config.hold_out)
    else:
        fitted_on, held_out = choose_shots(dataset, config.shots, config.shot_seed)
    parts = len(set(parts_of(held_out)))
    try:
        refuse_unsupported_rates(parts, config.review_rate, config.fail_rate, frames=len(held_out))
    except CalibrationRefused as error:
        copies = len(line.dataset.samples) - len(dataset.samples)
        without = f"Good frames that are copies of others, {copies}, do not count. " if copies else ""
        of_line = f"{line.request.name}: " if line.is_one_of_many else ""
        raise CalibrationRefused(f"{of_line}{without}{error.sentence}") from error
    return fitted_on, held_out


def _refuse_repetitions(lines: Sequence[LineRequest]) -> None:
    folders: dict[Path, str] = {}
    for place, line in enumerate(lines):
        if line.name in {other.name for other in lines[:place]}:
            raise ParameterInvalid(f"The line {line.name} is named twice; each line has a name of its own.")
        folder = line.folder.resolve()
        if folder in folders:
            raise DatasetFault(f"{folders[folder]} and {line.name} are the same folder, {folder}; name it once.")
        folders[folder] = line.name


def _refuse_copies(lines: Sequence[GatheredLine]) -> None:
    names: dict[str, str] = {}
    for line in lines:
        if line.data.digest in names:
            raise DatasetFault(
                f"{names[line.data.digest]} and {line.name} hold the very same frames; name one of them."
            )
        names[line.data.digest] = line.name
    _refuse_fitted_frames(lines)


def _refuse_fitted_frames(lines: Sequence[GatheredLine]) -> None:
    """Refuse lines that calibrate or are measured on what the one network is fitted on for another of them."""
    fitted = {line.data.content[sample.path]: sample.path for line in lines for sample in line.fitted_on}
    for line in lines:
        uses = {
            "held out; take one away, or the false-reject rate would be promised of what was learnt.": line.held_out,
            "a test frame; take one away, or the figures would be measured on what was learnt.": line.tested,
        }
        for use, samples in uses.items():
            for sample in samples:
                if (twin := fitted.get(line.data.content[sample.path])) is not None:
                    raise DatasetFault(
                        f"{twin} is fitted on, and {sample.path} of the line {line.name}, which has the same content, "
                        f"is {use}"
                    )


def _refuse_lines_together(request: RunRequest) -> None:
    detector = request.config.detector
    if len(request.lines) > 1 and DETECTORS[detector].several_lines == "refused":
        raise ConfigFault(
            f"The detector {detector} compares every frame with a picture of one product, so frames of another line "
            "would be judged by it; give each line a run of its own, or take a detector for several lines: "
            f"--detector {_FOR_SEVERAL_LINES}."
        )


def _told_of_lines_together(request: RunRequest) -> tuple[str, ...]:
    detector = request.config.detector
    if len(request.lines) == 1 or DETECTORS[detector].several_lines != "unproven":
        return ()
    sentence = (
        f"{detector} is published for one line, and one network learns {len(request.lines)} here; if it finds less "
        f"than in runs of their own, take a detector for several lines: --detector {_FOR_SEVERAL_LINES}."
    )
    return (sentence,)


def _told_of_release(request: RunRequest) -> tuple[str, ...]:
    if request.released is None:
        return ()
    sentence = (
        f"Nothing was fitted here: the detector comes from {request.released}, and all good frames calibrate it. If "
        "its authors fitted it on these very frames, new good parts will be stopped more often than promised; then "
        "calibrate on frames that they never had."
    )
    return (sentence,)


def _told_of_copies(lines: Sequence[GatheredLine]) -> tuple[str, ...]:
    return tuple(
        f"{line.name}: the number of good frames that are copies of others is {line.copies}; they say nothing new and "
        "are left out."
        for line in lines
        if line.copies
    )


def _told_of_order(lines: Sequence[GatheredLine], request: RunRequest) -> tuple[str, ...]:
    """Say of which lines numbers in names don't tell the frames that were recorded one after another."""
    if request.released is not None or request.config.shots is not None:
        return ()
    told = ((line.name, tell_order(line.data.distinct, request.config.hold_out)) for line in lines)
    return tuple(f"{name}: {sentence}" for name, sentence in told if sentence is not None)


def _told_of_regions(lines: Sequence[GatheredLine], requests: Sequence[LineRequest]) -> tuple[str, ...]:
    """Say over which frames the one mask of their line is squeezed."""
    told = (
        (line.name, tell_other_shapes(request.region_of_interest, line.data.frame_sizes))
        for line, request in zip(lines, requests, strict=True)
        if request.region_of_interest is not None
    )
    return tuple(f"{name}: {sentence}" for name, sentence in told if sentence is not None)


def _told_of_oblong_frames(lines: Sequence[GatheredLine], spec: InputSpec) -> tuple[str, ...]:
    """Say which lines' frames are squeezed to another shape, and into how many tiles they could be cut instead."""
    told = []
    for line in lines:
        height, width = line.data.frame_size
        wider = (width / height) / (spec.resize_width / spec.resize_height)
        if max(wider, 1 / wider) > _LARGEST_SQUEEZE:
            count = min(round(max(wider, 1 / wider)), _MOST_SUGGESTED_TILES)
            tiles = f"1x{count}" if wider > 1 else f"{count}x1"
            told.append(
                f"{line.name}: its frames, {height}x{width} (height x width), are resized to "
                f"{spec.resize_height}x{spec.resize_width}, which squeezes them {max(wider, 1 / wider):.1f} times more "
                f"along one side than along the other; to see small defects, cut them into tiles: --tiles {tiles}."
            )
    return tuple(told)


def _told_of_few_frames(lines: Sequence[GatheredLine], config: RunConfig) -> tuple[str, ...]:
    """Say which lines have fewer frames than a step takes, unless that is what the method is asked for."""
    if config.shots is not None and config.detector in _MADE_FOR_FEW_FRAMES:
        return ()
    own = config.detector_config(len(lines))
    recipes = [value for field in fields(own) if isinstance(value := getattr(own, field.name), Recipe)]
    step = max((recipe.batch_size for recipe in recipes), default=0)
    return tuple(
        f"{line.name}: the number of good frames to fit on is {count}, and {config.detector} takes {step} in a step; "
        "of so few it hardly learns how good parts differ. Add good frames, or take a detector that is made for few: "
        f"--detector inp_former --shots {count}."
        for line in lines
        if 0 < (count := len(line.fitted_on)) < step
    )


def _told_of_missing_masks(lines: Sequence[GatheredLine]) -> tuple[str, ...]:
    """Say of which lines no pixel figure will come, for whoever has masks and put them elsewhere."""
    return tuple(
        f"{line.name}: its defective test frames have no masks, so image figures are measured and pixel figures like "
        "AUPRO are not. If you have masks, put each into ground_truth/<kind>/<frame>_mask.png, as MVTec AD does."
        for line in lines
        if any(sample.label == ANOMALOUS for sample in line.tested) and not line.data.dataset.has_masks
    )


def _served_lines(store: Path) -> dict[str, tuple[str, ...]]:
    """Return which lines the newest bundle of each name means to serve."""
    return {name: promised_lines(path, name) for name, path in newest_bundles(store).items()}
