"""Promises of fitting on a few frames: the same ones everywhere, and INP-Former's 22 views of each."""

import numpy as np
import pytest

from service.errors import CalibrationRefused
from tests.tiny_line import make_config, make_request, write_line
from training.data.detect import read_dataset
from training.data.loader import MemoryFrames
from training.data.samples import NORMAL, Dataset, DatasetFault, Sample
from training.data.shots import ShotViews, choose_shots
from training.lines import gather_lines
from training.progress import SilentReporter


def _frame(height=32, width=32):
    """Return a smooth frame whose channels differ, so that a turn, a mirror and a mixed channel all show."""
    y, x = np.mgrid[:height, :width]
    return np.stack([4 * x + 20, 3 * y + 60, 2 * (x + y) + 10], axis=2).astype(np.uint8)


def test_choose_shots_with_one_seed_names_the_same_frames_and_leaves_the_others(tmp_path):
    """A seed's frames are the same on every call, and no frame is both fitted on and calibrated on."""
    dataset = read_dataset(write_line(tmp_path / "line", good=12, tested=False))

    shots, others = choose_shots(dataset, 4, seed=1)

    assert shots == choose_shots(dataset, 4, seed=1)[0]
    assert shots != choose_shots(dataset, 4, seed=2)[0]
    assert sorted([*shots, *others], key=lambda s: s.path) == list(dataset.train_good)
    assert len(shots) == 4


def test_choose_shots_with_validation_frames_calibrates_on_those(tmp_path):
    """A data set that made the choice itself is followed."""
    line = write_line(tmp_path / "line", good=5, tested=False)
    (line / "validation/good").mkdir(parents=True)
    (line / "train/good/004.png").rename(line / "validation/good/004.png")

    _, others = choose_shots(read_dataset(line), 1, seed=1)

    assert [sample.split for sample in others] == ["validation"]


def test_choose_shots_of_too_few_frames_says_how_many_there_are(tmp_path):
    """More shots than frames is the caller's mistake, told before fitting."""
    dataset = read_dataset(write_line(tmp_path / "line", good=3, tested=False))

    with pytest.raises(DatasetFault, match="has 3 good frames to train on and 4 are wanted"):
        choose_shots(dataset, 4, seed=1)


def test_gather_lines_with_shots_refuses_rates_that_the_other_frames_cannot_support(tmp_path):
    """Thresholds from a handful of frames would promise nothing; the sentence says how many are needed."""
    line = write_line(tmp_path / "line", good=8, tested=False)
    request = make_request(line, tmp_path / "store", config=make_config(shots=4))

    with pytest.raises(CalibrationRefused, match="at least 19 good parts that fitting never saw, and 4 are held out"):
        gather_lines(request, SilentReporter())


def test_gather_lines_with_shots_fits_on_them_and_calibrates_on_all_others(tmp_path):
    """Few frames are fitted on, and no good frame is wasted."""
    line = write_line(tmp_path / "line", good=24, tested=False)
    request = make_request(line, tmp_path / "store", config=make_config(shots=2))

    (gathered,) = gather_lines(request, SilentReporter()).lines

    assert (len(gathered.fitted_on), len(gathered.held_out)) == (2, 22)


def test_shot_views_of_two_frames_are_22_of_each_in_order():
    """The first of a frame's views is the frame, and every view keeps its line."""
    frames = np.stack([_frame(), 255 - _frame()])
    source = ShotViews(MemoryFrames(frames, [0, 1]))

    taken = source.take([22, 0])

    assert len(source) == 44
    np.testing.assert_array_equal(taken, frames[::-1])
    np.testing.assert_array_equal(source.line_index, [0] * 22 + [1] * 22)


def test_shot_views_are_those_of_the_published_setting():
    """Eight rotations, eight shifts, mirrored, grey, and three quarter turns, which are exact on a square frame."""
    frame = _frame()
    source = ShotViews(MemoryFrames(frame[None]))

    views = source.take(range(22))

    np.testing.assert_array_equal(views[17], frame[:, ::-1])
    assert (views[18] == views[18][..., :1]).all()
    turns = [np.rot90(frame, quarters) for quarters in (1, 2, 3)]
    for view, turn in zip((views[19], views[20], views[21]), turns, strict=True):
        np.testing.assert_array_equal(view, turn)
    assert len({view.tobytes() for view in views}) == 22


def test_shot_views_that_shift_move_by_a_tenth_of_the_frame_and_reflect():
    """A shift of 0.2 in units of half a frame moves by a tenth of it; what comes in is the frame's own mirror image."""
    frame = _frame(40, 40)

    view = ShotViews(MemoryFrames(frame[None])).take([9])[0]

    np.testing.assert_array_equal(view[:36, :36], frame[4:, 4:])
    np.testing.assert_array_equal(view[:36, 36:], frame[4:, ::-1][:, :4])


def test_choose_shots_leaves_out_further_views_of_a_piece_that_is_fitted_on(tmp_path):
    """No piece is both fitted on and calibrated on."""
    views = [
        Sample(tmp_path / f"{piece}_{view}.png", "train", NORMAL, "good", group=f"S{piece}")
        for piece in range(6)
        for view in range(5)
    ]

    shots, others = choose_shots(Dataset("line", tmp_path, "real_iad", tuple(views)), 2, seed=1)

    assert len(shots) == 2
    assert {s.group for s in others} == {f"S{piece}" for piece in range(6)} - {s.group for s in shots}
