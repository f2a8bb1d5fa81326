"""Promises of the reader of marked defects that a detector learns from."""

import numpy as np
import pytest

from service.contract.frames import FrameLimits, encode_jpeg, encode_png
from service.contract.geometry import InputSpec, Tiling
from training.data.labelled_defects import read_labelled_defects
from training.data.samples import ANOMALOUS, NORMAL, DatasetFault, Sample

_SPEC = InputSpec(height=12, width=16, resize_height=12, resize_width=16)


def _write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _picture(value, height=24, width=32):
    return np.full((height, width, 3), value, np.uint8)


def _mask(top, left, size=4, height=24, width=32):
    mask = np.zeros((height, width), np.uint8)
    mask[top : top + size, left : left + size] = 255
    return encode_png(mask)


def _inverted(top, left, size=4):
    mask = np.full((24, 32), 255, np.uint8)
    mask[top : top + size, left : left + size] = 0
    return encode_png(mask)


@pytest.fixture
def root(tmp_path):
    """Two kinds of defect with a mask each, of both codecs; a good frame beside them is no defect."""
    _write(tmp_path / "test/hole/0.png", encode_png(_picture(60)))
    _write(tmp_path / "ground_truth/hole/0_mask.png", _mask(4, 8))
    _write(tmp_path / "test/stain/7.jpg", encode_jpeg(_picture(180)))
    _write(tmp_path / "ground_truth/stain/7_mask.png", _mask(20, 28))
    _write(tmp_path / "test/good/0.png", encode_png(_picture(120)))
    return tmp_path


def _read(root, known=()):
    return read_labelled_defects(root, _SPEC, FrameLimits(), known)


def test_defects_when_read_then_frames_and_masks_have_the_networks_size(root):
    """Frames and masks are resized alike, height first, and good frames are left out."""
    defects = _read(root)

    assert defects.frames.shape == (2, 12, 16, 3)
    assert defects.masks.shape == (2, 12, 16)
    assert defects.frames[:, 0, 0, 0].tolist() == [60, pytest.approx(180, abs=2)]
    assert defects.masks[0, 2:4, 4:6].all()
    assert defects.masks[1, 10:, 14:].all()
    assert defects.masks.sum(axis=(1, 2)).max() <= 16


def test_good_folder_when_it_is_in_capitals_then_is_left_out(root):
    """Good frames never become defects to learn from by the case of their folder."""
    (root / "test/good").rename(root / "test/Good")

    assert _read(root).marked == 2


def test_mask_when_it_is_thinner_than_a_pixel_of_the_input_then_stays(root):
    """A scratch of one pixel in a frame of twice the size does not vanish."""
    _write(root / "ground_truth/hole/0_mask.png", _mask(5, 9, size=1))

    assert _read(root).masks[0].any()


def test_digest_when_a_frame_or_a_mask_changes_then_changes(root):
    """What was learnt from can be told apart; good frames do not count."""
    first = _read(root).digest
    _write(root / "test/good/0.png", encode_png(_picture(121)))
    same = _read(root).digest
    _write(root / "ground_truth/hole/0_mask.png", _mask(4, 9))
    redrawn = _read(root).digest
    _write(root / "test/hole/0.png", encode_png(_picture(61)))
    repainted = _read(root).digest

    assert same == first
    assert len({first, redrawn, repainted}) == 3


@pytest.mark.parametrize(
    ("split", "label", "words"),
    [("test", ANOMALOUS, "measured on what was learnt"), ("train", NORMAL, "the good frame")],
)
def test_defects_when_the_run_knows_a_frame_then_are_refused(root, tmp_path, split, label, words):
    """A frame with the content of a test frame, or of a good one, ends the run, whatever its name."""
    copy = tmp_path / "line" / "other_name.png"
    _write(copy, (root / "test/hole/0.png").read_bytes())

    with pytest.raises(DatasetFault, match=words) as refusal:
        _read(root, [Sample(copy, split, label, "any")])

    assert str(copy) in str(refusal.value)


def test_defects_when_they_are_the_lines_own_test_frames_then_one_sentence_says_so(root):
    """Nobody is told that a file has the content of itself, file by file."""
    known = [Sample(path, "test", ANOMALOUS, path.parent.name) for path in sorted((root / "test").glob("[hs]*/*"))]

    with pytest.raises(
        DatasetFault, match=r"are test frames of the run, for one .*0\.png; move .* another folder"
    ) as refusal:
        _read(root, known)

    assert str(refusal.value).count("test/hole") == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda root: (root / "ground_truth/hole/0_mask.png").rename(root / "kept.png"), "without a mask"),
        (
            lambda root: (root / "ground_truth/hole").rename(root / "ground_truth/Hole"),
            "ground_truth/Hole has other cap",
        ),
        (lambda root: _write(root / "ground_truth/hole/0_mask.png", _mask(0, 0, size=0)), "marks nothing"),
        (lambda root: _write(root / "ground_truth/hole/0_mask.png", _mask(0, 0, height=12)), "32x12 pixels"),
        (lambda root: _write(root / "ground_truth/hole/0_mask.png", _inverted(4, 8)), "marks 98% .*looks inverted"),
        (lambda root: _write(root / "ground_truth/hole/0_mask.png", _inverted(1, 1, 22)), "marks 37% .*looks inverted"),
        (lambda root: _write(root / "ground_truth/hole/0_mask.png", b"no image"), "0_mask.png: "),
        (lambda root: _write(root / "test/hole/0.png", b"no image"), "0.png: "),
        (lambda root: _write(root / "ground_truth/hole/9_mask.png", _mask(0, 0)), "mask without an image"),
    ],
    ids=[
        "bare",
        "capitals",
        "empty",
        "size",
        "inverted",
        "border",
        "broken mask",
        "broken frame",
        "stray mask",
    ],
)
def test_defects_when_a_file_is_wrong_then_it_is_named(root, change, words):
    """Each frame has a sound mask of its own size that marks something."""
    change(root)

    with pytest.raises(DatasetFault, match=words):
        _read(root)


def test_defects_when_there_are_none_then_the_expected_folders_are_told(tmp_path):
    """An empty or wrong folder never leads to a run that silently learns from nothing."""
    with pytest.raises(DatasetFault, match="holds no labelled defect"):
        _read(tmp_path)


def test_defects_when_frames_are_cut_then_are_the_tiles_that_show_one(root):
    """A defect in one corner is learnt from that corner's tile; tiles without a defect are no defects."""
    tiles = Tiling(rows=2, columns=2, overlap_height=0, overlap_width=0)
    spec = InputSpec(height=12, width=16, resize_height=24, resize_width=32, tiles=tiles)

    defects = read_labelled_defects(root, spec, FrameLimits(), ())

    assert (defects.marked, defects.frames.shape, defects.masks.shape) == (2, (2, 12, 16, 3), (2, 12, 16))
    assert defects.masks[0, 4:8, 8:12].all()
    assert defects.masks[1, 8:, 12:].all()
