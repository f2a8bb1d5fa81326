"""Promises of the split that keeps calibration frames away from fitting."""

import datetime as dt
import itertools
import random
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from training.data.samples import Dataset, DatasetFault, Sample
from training.data.split import HoldOut, hold_out, split_good


def _samples(names, group=None):
    return [Sample(Path(f"train/good/{name}.png"), "train", 0, "good", group=group) for name in names]


def _numbers(samples):
    return [int(s.path.stem) for s in samples]


@given(
    st.integers(2, 200),
    st.floats(0.01, 0.99),
    st.integers(1, 9),
    st.integers(0, 5),
    st.sampled_from(["blocks", "random"]),
)
@example(8, 0.75, 4, 0, "blocks")
@example(40, 0.95, 4, 0, "blocks")
def test_hold_out_puts_every_frame_on_exactly_one_side(count, fraction, blocks, seed, rule):
    """No frame is lost or on both sides, neither side is empty, and the size is near the wanted one."""
    samples = _samples(range(count))

    kept, held = hold_out(samples, HoldOut(fraction, rule, blocks, seed=seed))

    assert sorted(_numbers(kept) + _numbers(held)) == list(range(count))
    assert kept
    assert held
    assert abs(len(held) - count * fraction) <= 1 + blocks


def test_hold_out_by_default_takes_four_evenly_spread_blocks():
    """Held-out frames are four runs of consecutive frames, in the order of their numbers."""
    kept, held = hold_out(_samples(range(80)), HoldOut())

    starts = [n for n in _numbers(held) if n - 1 not in _numbers(held)]
    assert len(held) == 20
    assert [b - a for a, b in itertools.pairwise(starts)] == [20, 20, 20]
    assert len(kept) == 60


def test_hold_out_with_another_seed_takes_other_blocks_and_repeats_itself():
    """The seed moves the blocks, and the same seed gives the same blocks."""
    samples = _samples(range(200))

    splits = [hold_out(samples, HoldOut(seed=seed))[1] for seed in (1, 1, 2)]

    assert splits[0] == splits[1]
    assert splits[0] != splits[2]


def test_hold_out_of_near_copies_moves_the_edges_into_the_gaps():
    """Six exposures of one tile, with nearby numbers, stay on one side."""
    tiles = [[f"exp{view}_num_{1000 * tile + 17 * view}" for view in range(6)] for tile in range(40)]

    kept, held = hold_out(_samples(name for tile in tiles for name in tile), HoldOut())

    tile_of = {name: index for index, tile in enumerate(tiles) for name in tile}
    assert not {tile_of[s.path.stem] for s in kept} & {tile_of[s.path.stem] for s in held}


@pytest.mark.parametrize("seed", range(6))
def test_hold_out_of_uneven_numbers_still_holds_enough_for_the_default_rate(seed):
    """Edges that move into gaps do not take a wanted 19 below what the default review rate needs."""
    numbers = itertools.accumulate(random.Random(seed).choices([1, 1, 1, 40], k=76))  # noqa: S311

    kept, held = hold_out(_samples(numbers), HoldOut(seed=seed))

    assert len(held) >= 19
    assert len(kept) + len(held) == 76


@pytest.mark.parametrize("rule", ["blocks", "random"])
def test_hold_out_keeps_the_views_of_a_piece_together_by_every_rule(rule):
    """Five views of each piece are never on both sides, whatever their names are."""
    views = [s for piece in range(20) for s in _samples((f"{v}_{piece}" for v in range(5)), group=f"piece{piece}")]

    kept, held = hold_out(views, HoldOut(rule=rule, seed=3))

    assert not {s.group for s in kept} & {s.group for s in held}
    assert len(held) % 5 == 0
    assert 0 < len(held) < 100


def test_hold_out_sorts_by_the_last_number_and_not_by_the_alphabet():
    """Frame 10 comes after frame 9, and the text before the number does not matter."""
    kept, held = hold_out(_samples(["b_2", "a_10", "c_9", "a_1"]), HoldOut(0.5, blocks=1, seed=3))

    order = ["a_1", "b_2", "c_9", "a_10"]
    places = [order.index(s.path.stem) for s in held]
    assert places[1] - places[0] == 1
    assert len(kept) == 2


def _neighbours_apart(recorded, fitted, held):
    """Count held-out frames beside which a fitted one was recorded."""
    place = {path: index for index, path in enumerate(recorded)}
    fitted_at = {place[s.path] for s in fitted}
    return sum(not fitted_at.isdisjoint((place[s.path] - 1, place[s.path] + 1)) for s in held)


_START = dt.datetime(2026, 11, 22, 13, 59, 40)  # noqa: DTZ001 -- a camera's clock
_TIMES = [_START + dt.timedelta(seconds=0.73 * index) for index in range(160)]


@pytest.mark.parametrize(
    "names",
    [
        [f"{time:%Y%m%d_%H%M%S}_{time.microsecond // 1000:03d}" for time in _TIMES],
        [f"{time:%Y%m%d_%H%M%S_%f}" for time in _TIMES],
        [f"{time:%Y-%m-%dT%H-%M-%S}.{time.microsecond}" for time in _TIMES],
        [f"{time:%H%M%S}{time.microsecond // 1000:03d}_exp{500 + index % 3}" for index, time in enumerate(_TIMES)],
        [f"day{day}/{index:04d}" for day in range(9, 13) for index in range(40)],
        [f"part{part}_{shot}" for part in range(8, 62) for shot in range(3)],
    ],
    ids=["milliseconds", "microseconds", "unpadded fractions", "exposures", "a folder a day", "shots of parts"],
)
def test_hold_out_when_the_last_number_does_not_count_frames_still_holds_whole_blocks(names):
    """Times with fractions, numbers that begin again and settings at the end leave no near-copies on both sides."""
    samples = _samples(names)

    kept, held = hold_out(random.Random(1).sample(samples, len(samples)), HoldOut())  # noqa: S311

    assert 0 < _neighbours_apart([sample.path for sample in samples], kept, held) <= 8
    assert len(held) >= len(names) // 5


def test_hold_out_of_folders_whose_numbers_begin_again_moves_an_edge_to_where_one_begins():
    """Between two folders lies more than between two numbers, however far apart these are."""
    names = [f"{folder}/{number}" for folder in ("a", "b") for number in (*range(20), *range(90, 110))]

    for seed in range(20):
        _, held = hold_out(_samples(names), HoldOut(0.5, blocks=1, seed=seed))
        begin = names.index(held[0].path.relative_to("train/good").with_suffix("").as_posix())
        if abs(begin - 40) <= 8:
            assert begin == 40
            break
    else:
        pytest.fail("no seed begins near the second folder")


def test_hold_out_of_frames_that_differ_in_their_suffix_alone_splits_them():
    """Two files of one stem are two frames."""
    samples = [Sample(Path(f"train/good/1{suffix}"), "train", 0, "good") for suffix in (".png", ".jpg", ".bmp")]

    kept, held = hold_out(samples, HoldOut(0.4))

    assert {len(kept), len(held)} == {1, 2}


def test_hold_out_of_names_without_numbers_follows_the_alphabet():
    """Names without numbers are split as well."""
    kept, held = hold_out(_samples(["b", "d", "a", "c"]), HoldOut(0.5, blocks=1))

    names = [s.path.stem for s in held]
    assert "".join(names) in "abcd"
    assert len(kept) == 2


def test_hold_out_by_group_pattern_keeps_groups_together():
    """Frames with the same captured text are on the same side."""
    samples = _samples(f"panel{i // 7}_{i}" for i in range(70))

    kept, held = hold_out(samples, HoldOut(rule="groups", group_by=r"panel(\d+)_"))

    sides = [{s.path.stem.split("_")[0] for s in side} for side in (kept, held)]
    assert not sides[0] & sides[1]
    assert len(held) in (14, 21)


@pytest.mark.parametrize(
    ("size", "fraction", "expected"), [(5, 0.3, 5), (5, 0.4, 10), (2, 0.95, 18)], ids=["fewer", "more", "not all"]
)
def test_hold_out_by_groups_takes_as_many_as_come_nearest_to_what_is_wanted_and_leaves_one(size, fraction, expected):
    """Whole groups can't give every share, and fitting needs one of them; the seed says which are taken."""
    samples = [sample for piece in range(20 // size) for sample in _views(piece, size)]

    splits = [hold_out(samples, HoldOut(fraction, "groups", seed=seed)) for seed in range(9)]

    assert {len(held) for _, held in splits} == {expected}
    assert {len(kept) for kept, _ in splits} == {20 - expected}
    assert len({frozenset(sample.group for sample in held) for _, held in splits}) > 1


def _views(piece, count):
    return _samples([f"{piece}_{view}" for view in range(count)], group=str(piece))


def test_hold_out_by_the_samples_own_groups_keeps_them_together():
    """Without a pattern the group of the sample counts."""
    samples = _samples("abc", group="left") + _samples("de", group="right")

    kept, held = hold_out(samples, HoldOut(rule="groups"))

    assert {s.group for s in kept} != {s.group for s in held}


@pytest.mark.parametrize(
    ("samples", "rule", "sentence"),
    [
        (_samples(["1"]), HoldOut(), "at least two good frames"),
        (_samples(["a1", "a2"]), HoldOut(rule="groups", group_by="a"), "belong to the group 'a'"),
        (_samples(["a1", "b2"]), HoldOut(rule="groups", group_by=r"a(\d)"), "b2.png does not match"),
        (_samples(["1", "2"]), HoldOut(rule="groups"), "belongs to no group"),
        (_samples(["1", "2"], group="S1"), HoldOut(), "show one piece, 'S1'"),
    ],
    ids=["one frame", "one group", "no match", "no group", "one piece"],
)
def test_hold_out_that_can_not_split_says_why(samples, rule, sentence):
    """Too few frames or groups end with what to do."""
    with pytest.raises(DatasetFault, match=sentence):
        hold_out(samples, rule)


@pytest.mark.parametrize(
    "values",
    [{"fraction": 0.0}, {"fraction": 1.0}, {"blocks": 0}, {"group_by": "a"}, {"rule": "groups", "group_by": "("}],
    ids=["nothing", "everything", "no block", "pattern without its rule", "no pattern"],
)
def test_hold_out_rule_that_nothing_can_follow_is_refused(values):
    """Values out of range are refused before any file is read."""
    with pytest.raises(ValueError, match=r"fraction|block|pattern"):
        HoldOut(**values)


def test_split_good_with_a_validation_folder_uses_it():
    """The data set's own choice wins over the rule."""
    validation = Sample(Path("validation/good/7.png"), "validation", 0, "good")
    dataset = Dataset("line", Path(), "plain", (*_samples("12"), validation))

    kept, held = split_good(dataset, HoldOut())

    assert _numbers(kept) == [1, 2]
    assert held == [validation]


def test_split_good_without_a_validation_folder_follows_the_rule():
    """Without such a folder some training frames are held out."""
    dataset = Dataset("line", Path(), "plain", tuple(_samples(range(8))))

    kept, held = split_good(dataset, HoldOut())

    assert (len(kept), len(held)) == (6, 2)
