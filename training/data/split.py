"""Which good frames are held out of fitting, so that thresholds are calibrated on frames the detector never saw.

Frames of a line are recorded one after another, and neighbours are near-copies: one tile photographed six times under
other exposures has nearby numbers. Held out one by one, almost every calibration frame would have a near-copy among the
fitted ones, scores would be too low and the false-reject bound would not hold on new parts. So whole blocks of
consecutive frames are held out by default, and a block's edges move to the widest gap in the numbering nearby.

Names tell which frames are consecutive: by the last number in each, where no two have the same and it counts frames
over the whole folder. A number that begins again, as in a folder for each day, or that is a fraction of a second does
not; then folders and whole names are sorted, numbers in them as numbers.

Pure: names in, two lists out; the same seed gives the same split on every machine.
"""

import math
import random
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Literal

from training.data.samples import Dataset, DatasetFault, Sample

# An edge moves by at most a quarter of a block, so that no block can vanish, and by at most so many frames.
_LARGEST_SHIFT = 8
# So many good parts support the default review rate. Moved edges never take a split that wants them below that.
_ENOUGH_HELD = 19
# A time of day with something after it that is a part of a second: 130235_123, 13-02-35.123456, 20261122T130235_1.
_TIME_AND_FRACTION = re.compile(r"(?:[01]\d|2[0-3])([-_.:]?)[0-5]\d\1[0-5]\d\D+\d+\D*$")

Gap = tuple[float, float]


@dataclass(frozen=True)
class HoldOut:
    """How good frames are held out.

    Attributes:
        fraction: share of the good frames, in (0, 1).
        rule: "blocks" of consecutive frames; "groups" that stay together; "random" frames, for sets whose frames are
            independent of each other.
        blocks: number of evenly spread blocks.
        group_by: for "groups", a pattern searched in the file name; frames with the same first captured text (the
            whole match where nothing is captured) form a group, and count as one part wherever parts are counted.
            Without it, `Sample.group` does.
        seed: chooses where the blocks begin, or which groups or frames are taken.
    """

    fraction: float = 0.25
    rule: Literal["blocks", "groups", "random"] = "blocks"
    blocks: int = 4
    group_by: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse values that no split can follow."""
        if not 0 < self.fraction < 1:
            raise ValueError(f"the held-out fraction must lie between 0 and 1, got {self.fraction}")
        if self.blocks < 1:
            raise ValueError(f"at least one block is needed, got {self.blocks}")
        if self.group_by is not None:
            if self.rule != "groups":
                raise ValueError("a group pattern needs the rule 'groups'")
            try:
                re.compile(self.group_by)
            except re.error as error:
                raise ValueError(f"the group pattern {self.group_by!r} is no regular expression: {error}") from error


def name_parts(dataset: Dataset, rule: HoldOut) -> Dataset:
    """Return a data set whose good frames say which part they show, where a pattern finds it in their names.

    Whoever counts parts must know them, also where a validation folder or a few shots leave nothing to split.

    Raises:
        DatasetFault: if a name does not match the pattern.
    """
    if rule.group_by is None:
        return dataset
    good = {*dataset.train_good, *dataset.validation_good}
    samples = (replace(s, group=_group(s, rule.group_by)) if s in good else s for s in dataset.samples)
    return replace(dataset, samples=tuple(samples))


def split_good(dataset: Dataset, rule: HoldOut) -> tuple[list[Sample], list[Sample]]:
    """Return the good frames to fit on and those to calibrate on.

    A data set that brings a validation folder has made the choice itself; then `rule` is not used.

    Raises:
        DatasetFault: if there are too few frames or groups to split.
    """
    if dataset.validation_good:
        return list(dataset.train_good), list(dataset.validation_good)
    return hold_out(dataset.train_good, rule)


class RecordingOrder:
    """Which of a folder's frames are consecutive, by their names.

    Args:
        samples: all frames of the folder; views of one piece may share a number.

    Attributes:
        by_last_number: whether the last number in each name tells; else folders and whole names do.
    """

    def __init__(self, samples: Iterable[Sample]) -> None:
        pieces_of: dict[int | None, set[str | Path]] = defaultdict(set)
        are_times = True
        for sample in samples:
            pieces_of[_last_number(sample)].add(sample.path if sample.group is None else sample.group)
            are_times = are_times and _TIME_AND_FRACTION.search(sample.path.stem) is not None
        self.by_last_number = not are_times and all(len(pieces) == 1 for pieces in pieces_of.values())

    def key(self, sample: Sample) -> tuple[object, ...]:
        """Return what sorts frames."""
        if self.by_last_number:
            number = _last_number(sample)
            return number is None, number or 0, sample.path.as_posix()
        return _words_and_numbers(sample), sample.path.as_posix()

    def gap(self, before: Sample, after: Sample) -> Gap:
        """Return how far two frames are apart: names that begin to differ earlier are, then those of other words."""
        if self.by_last_number:
            first, second = _last_number(before), _last_number(after)
            return 0.0, 0.0 if first is None or second is None else float(second - first)
        names = (chain.from_iterable(_words_and_numbers(sample)) for sample in (before, after))
        for place, (first, second) in enumerate(zip(*names, strict=False)):
            if first != second:
                is_counted = isinstance(first, int) and isinstance(second, int)
                return -place, float(second - first) if is_counted else math.inf
        return -math.inf, 0.0


def _last_number(sample: Sample) -> int | None:
    numbers = re.findall(r"\d+", sample.path.stem)
    return int(numbers[-1]) if numbers else None


def _words_and_numbers(sample: Sample) -> tuple[tuple[str | int, ...], ...]:
    """Take the folders and the name apart, each to a word (perhaps empty), a number, a word, and so on."""
    parts = (*sample.path.parent.parts, sample.path.stem)
    return tuple(
        tuple(int(text) if at % 2 else text for at, text in enumerate(re.split(r"(\d+)", part))) for part in parts
    )


def is_split_by_names(dataset: Dataset) -> bool:
    """Tell whether a split orders good frames by folders and whole names, not by the last numbers in names."""
    return not dataset.validation_good and not RecordingOrder(dataset.train_good).by_last_number


def tell_order(dataset: Dataset, rule: HoldOut) -> str | None:
    """Say how consecutive good frames were found, where blocks of them are held out and numbers in names don't tell."""
    if rule.rule != "blocks" or not is_split_by_names(dataset):
        return None
    if all(_last_number(sample) is None for sample in dataset.train_good):
        return None
    first, *_, last = sorted(dataset.train_good, key=RecordingOrder(dataset.train_good).key)
    return (
        "The last numbers in the names of good frames don't count them, so folders and whole names say which are "
        f"consecutive and held out in blocks, from {first.path.relative_to(dataset.root)} to "
        f"{last.path.relative_to(dataset.root)}. If frames were recorded in another order, number them."
    )


def hold_out(samples: Sequence[Sample], rule: HoldOut) -> tuple[list[Sample], list[Sample]]:
    """Split samples into kept and held-out ones, each in recording order; both get at least one.

    Samples of one group (views of one piece) are on one side by every rule: they count as one frame of it. By blocks,
    about the wanted number is held, because edges move into gaps.

    Raises:
        DatasetFault: if there are fewer than two frames or groups, or a name does not match the group pattern.
    """
    order = RecordingOrder(samples)
    ordered = sorted(samples, key=order.key)
    if len(ordered) < 2:
        raise DatasetFault("A split needs at least two good frames; add frames, or a validation/good folder.")
    if rule.rule == "groups":
        held = _groups([_group(s, rule.group_by) for s in ordered], _wanted(len(ordered), rule), rule.seed)
        return _sides([[sample] for sample in ordered], held, order)
    pieces = _pieces(ordered)
    if len(pieces) < 2:
        raise DatasetFault(f"All good frames show one piece, {ordered[0].group!r}; add frames of other pieces.")
    wanted = _wanted(len(pieces), rule)
    if rule.rule == "blocks":
        gaps = [order.gap(before[0], after[0]) for before, after in pairwise(pieces)]
        held = _blocks(gaps, wanted, rule)
    else:
        held = set(random.Random(rule.seed).sample(range(len(pieces)), wanted))  # noqa: S311 -- no secret is drawn
    return _sides(pieces, held, order)


def _wanted(count: int, rule: HoldOut) -> int:
    return min(max(1, round(count * rule.fraction)), count - 1)


def _pieces(ordered: Sequence[Sample]) -> list[list[Sample]]:
    """Put the views of one piece together, at the place of the first; a frame without a group is a piece."""
    pieces: dict[str | Path, list[Sample]] = {}
    for sample in ordered:
        pieces.setdefault(sample.path if sample.group is None else sample.group, []).append(sample)
    return list(pieces.values())


def _sides(
    pieces: Sequence[Sequence[Sample]], held: set[int], order: RecordingOrder
) -> tuple[list[Sample], list[Sample]]:
    sides: tuple[list[Sample], list[Sample]] = ([], [])
    for index, piece in enumerate(pieces):
        sides[index in held].extend(piece)
    kept, out = (sorted(side, key=order.key) for side in sides)
    return kept, out


def _blocks(gaps: Sequence[Gap], wanted: int, rule: HoldOut) -> set[int]:
    """Choose pieces by their places; `gaps` lie between each and the next."""
    count = len(gaps) + 1
    blocks = min(rule.blocks, wanted)
    period, length = count / blocks, wanted / blocks
    phase = random.Random(rule.seed).random() * (period - length)  # noqa: S311 -- no secret is drawn
    reach = min(_LARGEST_SHIFT, int(length / 4), int((period - length) / 4))
    held: set[int] = set()
    for block in range(blocks):
        begin = round(block * period + phase)
        end = min(max(begin + 1, round(block * period + phase + length)), count)
        held.update(range(_widest_gap(gaps, begin, reach), _widest_gap(gaps, end, reach)))
    if len(held) == count:  # rounded edges have left no gap between the blocks
        return set(range(wanted))
    while len(held) < min(wanted, _ENOUGH_HELD):
        held.add(next(at for at in range(count) if at not in held and not held.isdisjoint((at - 1, at + 1))))
    return held


def _widest_gap(gaps: Sequence[Gap], edge: int, reach: int) -> int:
    """Move an edge (between pieces `edge - 1` and `edge`) to the widest gap within reach, the nearest among equals."""
    if not 0 < edge <= len(gaps):
        return edge
    within = range(max(1, edge - reach), min(len(gaps), edge + reach) + 1)
    return max(within, key=lambda at: (gaps[at - 1], -abs(at - edge), -at))


def _group(sample: Sample, pattern: str | None) -> str:
    if pattern is None:
        if sample.group is None:
            raise DatasetFault(f"{sample.path} belongs to no group; give a pattern that finds one in the file name.")
        return sample.group
    match = re.search(pattern, sample.path.name)
    found = None if match is None else match.group(1 if match.re.groups else 0)
    if found is None:
        raise DatasetFault(f"{sample.path} does not match the group pattern {pattern!r}; widen the pattern.")
    return found


def _groups(groups: Sequence[str], wanted: int, seed: int) -> set[int]:
    members: dict[str, list[int]] = defaultdict(list)
    for index, group in enumerate(groups):
        members[group].append(index)
    if len(members) < 2:
        raise DatasetFault(f"All good frames belong to the group {groups[0]!r}; use a pattern that tells more apart.")
    names = sorted(members)
    random.Random(seed).shuffle(names)  # noqa: S311 -- no secret is drawn
    held: set[int] = set(members[names[0]])
    for name in names[1:-1]:
        # Whole groups only: take one more as long as that comes nearer to the wanted number.
        if len(held) + len(members[name]) / 2 > wanted:
            break
        held.update(members[name])
    return held
