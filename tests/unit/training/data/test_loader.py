"""Promises of the frame sources."""

import hashlib

import numpy as np
import pytest

from service.contract.frames import FrameLimits, encode_png
from service.contract.geometry import InputSpec, plain_input
from training.data.loader import FileFrames, MemoryFrames, load_mask
from training.data.samples import DatasetFault, Sample


@pytest.fixture
def paths(tmp_path):
    """Five frames whose value tells them apart."""
    found = [tmp_path / f"{i}.png" for i in range(5)]
    for value, path in enumerate(found):
        path.write_bytes(encode_png(np.full((10, 20, 3), value, np.uint8)))
    return found


@pytest.mark.parametrize("memory_bytes", [0, 2**20], ids=["nothing kept", "kept"])
def test_file_frames_taken_twice_come_in_the_order_of_the_indices(paths, memory_bytes):
    """Frames come in the order asked for, each time."""
    source = FileFrames(paths, plain_input(6, 8), FrameLimits(), memory_bytes=memory_bytes)

    taken = [source.take([3, 0, 3]), source.take([4, 3])]
    source.close()

    assert len(source) == 5
    assert taken[0].shape == (3, 6, 8, 3)
    assert [batch[:, 0, 0, 0].tolist() for batch in taken] == [[3, 0, 3], [4, 3]]


def test_file_frames_with_room_do_not_read_a_file_twice(paths):
    """A frame that was kept no longer needs its file."""
    source = FileFrames(paths, plain_input(6, 8), FrameLimits())
    first = source.take([2])
    paths[2].unlink()

    second = source.take([2])
    source.close()

    assert np.array_equal(first, second)


def test_file_frames_without_room_keep_no_more_than_they_may(paths):
    """The bound on memory holds: of two frames the first is kept, and the second needs its file."""
    source = FileFrames(paths, plain_input(6, 8), FrameLimits(), threads=1, memory_bytes=6 * 8 * 3)
    source.take([2, 3])
    paths[2].unlink()

    assert source.take([2])[0, 0, 0, 0] == 2
    paths[3].unlink()
    with pytest.raises(FileNotFoundError):
        source.take([3])
    source.close()


def test_file_frames_with_a_crop_cut_the_rim(paths):
    """The source applies the bundle's own resize and crop."""
    spec = InputSpec(height=4, width=4, resize_height=8, resize_width=8)
    source = FileFrames(paths, spec, FrameLimits())

    taken = source.take([0])
    source.close()

    assert taken.shape == (1, 4, 4, 3)


def test_file_frames_that_changed_since_they_were_checked_are_refused_by_name(paths):
    """What is learnt is what the manifest's digests name, though somebody writes to the folder meanwhile."""
    content = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    source = FileFrames(paths, plain_input(6, 8), FrameLimits(), content=content)
    paths[1].write_bytes(paths[2].read_bytes())

    unchanged = source.take([0])
    with pytest.raises(DatasetFault, match=r"1\.png has changed since this command checked it"):
        source.take([1])
    source.close()

    assert unchanged[0, 0, 0, 0] == 0


def test_memory_frames_give_what_they_hold():
    """Frames in memory are taken by number."""
    pixels = np.arange(4, dtype=np.uint8)[:, None, None, None].repeat(3, axis=3)

    source = MemoryFrames(pixels)

    assert len(source) == 4
    assert source.take([2, 1])[:, 0, 0, 0].tolist() == [2, 1]


def test_frames_tell_the_line_that_each_shows(paths):
    """Without a word all frames show the first line; what is told is kept."""
    pixels = np.zeros((3, 4, 4, 3), np.uint8)
    several = FileFrames(paths, plain_input(6, 8), FrameLimits(), [0, 0, 1, 2, 1])
    several.close()

    assert MemoryFrames(pixels).line_index.tolist() == [0, 0, 0]
    assert MemoryFrames(pixels, [1, 0, 1]).line_index.tolist() == [1, 0, 1]
    assert several.line_index.tolist() == [0, 0, 1, 2, 1]


@pytest.mark.parametrize("line_index", [[0, 1], [0, -1, 0]], ids=["too few", "negative"])
def test_frames_of_lines_that_do_not_fit_are_refused(line_index):
    """There is one line for each frame, counted from 0."""
    with pytest.raises(ValueError, match="one line, from 0 up, for each of 3 frames"):
        MemoryFrames(np.zeros((3, 4, 4, 3), np.uint8), line_index)


@pytest.mark.parametrize(
    "pixels", [np.zeros((2, 3, 4, 4), np.uint8), np.zeros((2, 4, 4, 3), np.float32)], ids=["channels first", "float"]
)
def test_memory_frames_of_another_layout_are_refused(pixels):
    """Only uint8 frames with the channels last are taken."""
    with pytest.raises(ValueError, match=r"expected \(n, H, W, 3\) uint8"):
        MemoryFrames(pixels)


def test_load_mask_of_a_frame_without_one_marks_nothing(tmp_path):
    """A good frame has an empty mask of its own size; a mask file is read as it is."""
    path = tmp_path / "m.png"
    path.write_bytes(encode_png(np.eye(4, dtype=np.uint8)))
    bare, masked = (Sample(tmp_path / "x.png", "test", 1, "hole", p) for p in (None, path))

    masks = [load_mask(sample, 4, 4) for sample in (bare, masked)]

    assert not masks[0].any()
    assert np.array_equal(masks[1], np.eye(4, dtype=bool))


def test_load_mask_of_defects_with_masks_of_their_own_marks_all_of_them(tmp_path):
    """What any of the files marks is anomalous."""
    files = (tmp_path / "000.png", tmp_path / "001.png")
    for row, path in enumerate(files):
        path.write_bytes(encode_png((np.arange(16).reshape(4, 4) // 4 == row).astype(np.uint8)))

    mask = load_mask(Sample(tmp_path / "x.png", "test", 1, "hole", channels=files), 4, 4)

    assert mask.tolist() == [[True] * 4] * 2 + [[False] * 4] * 2
