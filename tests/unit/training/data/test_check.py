"""Promises of the check that opens every file before training starts."""

import re
import shutil

import numpy as np
import pytest

from service.contract.frames import FrameLimits, encode_jpeg, encode_png
from service.contract.legible import is_legible, legible
from tests.factories import encode
from tests.tiny_line import make_request, write_line
from training.data.check import check_dataset
from training.data.detect import read_dataset
from training.data.samples import DatasetFault
from training.lines import gather_lines
from training.progress import SilentReporter
from training.recalibrate import read_good_folder


def _write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _picture(value, height=16, width=12):
    return np.full((height, width, 3), value, np.uint8)


@pytest.fixture
def root(tmp_path):
    """A small sound line of both codecs, with one mask."""
    mask = np.zeros((16, 12), np.uint8)
    mask[2:5, 2:5] = 255
    _write(tmp_path / "train/good/0.png", encode_png(_picture(0)))
    _write(tmp_path / "train/good/1.jpg", encode_jpeg(_picture(60)))
    _write(tmp_path / "test/good/0.png", encode_png(_picture(120)))
    _write(tmp_path / "test/hole/0.png", encode_png(_picture(180)))
    _write(tmp_path / "ground_truth/hole/0_mask.png", encode_png(mask))
    return tmp_path


def _check(root, limits=FrameLimits()):  # noqa: B008 -- frozen
    return check_dataset(read_dataset(root), limits, SilentReporter())


def test_check_of_a_sound_line_counts_frames_by_kind(root):
    """A sound line passes, without warnings."""
    checked = _check(root)

    assert checked.counts == {"test/good": 1, "test/hole": 1, "train/good": 2}
    assert checked.warnings == ()
    assert len(checked.digest) == 64


@pytest.mark.parametrize("place", ["train/good/{}.png", "test/{}/0.png", "test/{}/deep/0.png"], ids=str)
@pytest.mark.parametrize("odd", ["\x1b[31m", "a\nb", "\x9b2J", "\udcff"], ids=ascii)
def test_reading_of_a_name_that_a_terminal_would_obey_is_refused_and_shown_legibly(tmp_path, place, odd):
    """Reports, bundles and terminals name frames and kinds of defects."""
    _write(tmp_path / "train/good/0.png", encode_png(_picture(0)))
    _write(tmp_path / place.format(odd), encode_png(_picture(1)))

    with pytest.raises(DatasetFault, match="rename it") as refused:
        read_dataset(tmp_path)

    assert legible(place.format(odd)) in str(refused.value)
    assert is_legible(str(refused.value))


def test_reading_of_a_mask_whose_name_a_terminal_would_obey_is_refused(root):
    """A mask is told of like its frame."""
    (root / "test/hole/0.png").rename(root / "test/hole/\x07.png")
    (root / "ground_truth/hole/0_mask.png").rename(root / "ground_truth/hole/\x07_mask.png")

    with pytest.raises(DatasetFault, match=r"\\x07_mask\.png .*rename it.*\\x07\.png"):
        read_dataset(root)


def test_fault_of_a_folder_whose_name_a_terminal_would_obey_is_legible(tmp_path):
    """Whichever reader complains of whatever file."""
    with pytest.raises(DatasetFault, match=r"\\x1bc is no folder"):
        read_dataset(tmp_path / "\x1bc")


def test_check_of_files_that_the_reader_passed_over_shows_their_names_legibly(root):
    """What is no frame does not stop a run, and writes on no terminal."""
    _write(root / "train/good/2.p\x1bm", b"P5 1 1 255 x")

    assert ["1 .p\\x1bm in" in warning for warning in _check(root).warnings] == [True]


def test_check_of_files_that_the_reader_passed_over_warns_of_them(root):
    """What the reader notes reaches the run's report and page."""
    _write(root / "train/good/2.pgm", b"P5 1 1 255 x")

    assert ["1 .pgm in" in warning for warning in _check(root).warnings] == [True]


@pytest.mark.parametrize(
    ("height", "width", "told"),
    [(16, 25, True), (33, 12, True), (3, 2, True), (16, 23, False), (32, 24, False)],
    ids=["wide", "tall", "tiny", "less than twice as wide", "larger"],
)
def test_check_of_a_frame_of_quite_another_shape_names_it(root, height, width, told):
    """Resized to the one input it would show another part; a zoom or a slight crop would not."""
    _write(root / "train/good/odd.png", encode_png(_picture(200, height, width)))

    warnings = _check(root).warnings

    assert ["quite another shape" in warning for warning in warnings] == [told]
    if told:
        assert "Of 5 frames 1 are of quite another shape than the usual 16x12" in warnings[0]
        assert f"train/good/odd.png with {height}x{width}" in warnings[0]


def test_check_of_frames_that_are_cut_to_their_part_warns_of_no_shape(tmp_path):
    """Where hardly two frames have one size, as of magnetic tiles, no shape is the usual one."""
    for value, (height, width) in enumerate([(16, 40), (16, 14), (40, 16), (18, 16), (30, 16)]):
        _write(tmp_path / f"train/good/{value}.png", encode_png(_picture(value, height, width)))

    assert _check(tmp_path).warnings == ()


def test_check_of_frames_of_two_cameras_tells_their_sizes(root):
    """Frames of a camera each belong to a line each, and an aspect ratio a third wider is easily overlooked."""
    for value in range(2):
        _write(root / f"train/good/second_{value}.png", encode_png(_picture(20 + value, 15, 15)))

    (told,) = _check(root).warnings

    assert told.startswith("Frames differ in size, height x width: 16x12 (4), 15x15 (2).")


@pytest.mark.parametrize(("widest", "count"), [(32, 1), (27, 0)])
def test_check_of_frames_of_many_sizes_tells_their_shapes_where_they_differ(root, widest, count):
    """Another magnification for each frame is nothing to tell; squeezing what some show is."""
    for value, (height, width) in enumerate([(20, 15), (24, 18), (28, 21), (32, 24), (36, widest)]):
        _write(root / f"train/good/cut_{value}.png", encode_png(_picture(20 + value, height, width)))

    warnings = _check(root).warnings

    assert ["6 of them, with aspect ratios from 0.75 to 0.89" in warning for warning in warnings] == [True] * count


def test_check_of_defective_test_frames_without_good_ones_says_so(root):
    """Without a good test frame nobody learns how many good parts would be stopped."""
    shutil.rmtree(root / "test/good")

    assert ["no good ones" in warning for warning in _check(root).warnings] == [True]


def test_digest_depends_on_content_and_relative_names_only(root, tmp_path_factory):
    """A copy elsewhere has the same digest; another name, image or mask has another one."""
    before = _check(root).digest
    copy = tmp_path_factory.mktemp("copy") / "line"
    shutil.copytree(root, copy)
    copied = _check(copy).digest
    (copy / "train/good/0.png").rename(copy / "train/good/2.png")
    renamed = _check(copy).digest
    _write(copy / "ground_truth/hole/0_mask.png", encode_png(np.full((16, 12), 255, np.uint8)))
    redrawn = _check(copy).digest

    assert copied == before
    assert len({before, renamed, redrawn}) == 3


@pytest.mark.parametrize("name", ["train/good/1.jpg", "test/hole/0.png", "ground_truth/hole/0_mask.png"])
@pytest.mark.parametrize("keep", [0, 0.6], ids=["empty", "truncated"])
def test_check_with_a_damaged_file_names_it(root, name, keep):
    """An empty or truncated image or mask is found, of either codec."""
    data = (root / name).read_bytes()
    _write(root / name, data[: int(len(data) * keep)])

    with pytest.raises(DatasetFault, match=name):
        _check(root)


def test_check_with_a_mask_of_another_size_names_both_files(root):
    """A mask must have its image's size."""
    _write(root / "ground_truth/hole/0_mask.png", encode_png(np.full((12, 16), 255, np.uint8)))

    with pytest.raises(DatasetFault, match=r"0_mask.png has 16x12 pixels and its image 12x16.*test/hole/0.png"):
        _check(root)


def test_check_with_a_frame_over_the_limit_names_it(root):
    """A frame that the service would refuse is not trained on."""
    with pytest.raises(DatasetFault, match=r"0.png.*more than 100 pixels"):
        _check(root, FrameLimits(max_pixels=100))


def test_check_with_the_same_content_in_two_splits_names_both(root):
    """A test frame that was also fitted on would flatter every figure."""
    shutil.copy(root / "train/good/0.png", root / "test/good/9.png")

    with pytest.raises(DatasetFault, match=r"9.png \(test\) and .*train/good/0.png \(train\)"):
        _check(root)


def test_check_with_the_same_content_under_two_labels_names_both(root):
    """One picture can't be good and anomalous."""
    shutil.copy(root / "test/good/0.png", root / "test/hole/9.png")
    shutil.copy(root / "ground_truth/hole/0_mask.png", root / "ground_truth/hole/9_mask.png")

    with pytest.raises(DatasetFault, match="different labels"):
        _check(root)


def test_check_of_a_set_as_published_tells_what_a_plant_would_be_refused(root):
    """Frames that a publisher has in two splits stay, because others measured on them, and both are named."""
    shutil.copyfile(root / "train/good/0.png", root / "test/good/9.png")

    checked = check_dataset(read_dataset(root), FrameLimits(), SilentReporter(), as_published=True)

    assert checked.counts["test/good"] == 2
    assert [("9.png" in text, "have the same content" in text) for text in checked.warnings] == [(True, True)]


def test_check_with_a_repeated_frame_in_one_split_warns(root):
    """Copies inside a split are allowed and told."""
    shutil.copy(root / "train/good/0.png", root / "train/good/9.png")

    checked = _check(root)

    assert [w.endswith("0.png.") and "9.png" in w for w in checked.warnings] == [True]


def test_check_with_an_empty_mask_warns(root):
    """An anomalous frame without a marked pixel is allowed and told."""
    _write(root / "ground_truth/hole/0_mask.png", encode_png(np.zeros((16, 12), np.uint8)))

    checked = _check(root)

    assert ["marks no pixel" in w for w in checked.warnings] == [True]


@pytest.mark.parametrize(
    ("ground", "defect", "told"),
    [(255, 0, True), (0, 255, False)],
    ids=["inverted", "as it should be"],
)
@pytest.mark.parametrize(("top", "bottom"), [(2, 5), (1, 15)], ids=["small", "large"])
def test_check_with_a_mask_that_looks_inverted_says_what_is_marked(root, ground, defect, told, top, bottom):
    """Figures of the ground would be taken for those of defects; the run goes on, for a whole part may be defective."""
    mask = np.full((16, 12), ground, np.uint8)
    mask[top:bottom, 1:6] = defect
    _write(root / "ground_truth/hole/0_mask.png", encode_png(mask))

    warnings = _check(root).warnings

    assert bool(warnings) is told
    if told:
        assert "Of 1 frames with masks 1 are marked on more than half" in warnings[0]
        assert "hole/0_mask.png on" in warnings[0]


def test_check_with_a_mask_that_a_codec_has_changed_says_how_it_is_read(root):
    """Greys beside an edge are noise of the codec, and a mask of nothing else marks nothing."""
    (root / "ground_truth/hole/0_mask.png").unlink()
    _write(root / "ground_truth/hole/0_mask.jpg", encode_jpeg(np.full((16, 12, 3), 9, np.uint8)))

    told = _check(root).warnings

    assert ["marks no pixel" in text for text in told] == [False, True]
    assert re.search(r"1 have lossy ones, like .*hole/0_mask\.jpg,.*Save masks as PNG", told[0])


def test_check_with_a_file_that_vanished_names_it(root):
    """A file that can't be opened any more is a fault of the data set."""
    dataset = read_dataset(root)
    (root / "train/good/0.png").unlink()

    with pytest.raises(DatasetFault, match=r"0.png can't be read \(No such file"):
        check_dataset(dataset, FrameLimits(), SilentReporter())


def _deep_line(root, largest):
    """Write a line whose 16-bit frames hold values up to a largest one."""
    for index in range(3):
        deep = np.full((8, 6), index, np.uint16)
        deep[3, 3] = largest
        _write(root / f"train/good/{index}.png", encode(deep))
    return root


def test_check_when_deep_frames_would_be_black_then_says_how_many_bits_they_have(tmp_path):
    """A 12-bit camera's frames in 16-bit files are told of, with the setting that makes them visible."""
    (warning,) = (one for one in _check(_deep_line(tmp_path, 0x0FFF)).warnings if "bits" in one)

    assert "--set input.bit_depth=12" in warning


@pytest.mark.parametrize(("largest", "bit_depth"), [(0xFFFF, 16), (0x0FFF, 12), (0x4000, 16)])
def test_check_when_deep_frames_use_their_range_then_says_nothing_of_it(tmp_path, largest, bit_depth):
    """Frames that are as deep as was said, or merely not overexposed, are nothing to warn of."""
    dataset = read_dataset(_deep_line(tmp_path, largest))

    checked = check_dataset(dataset, FrameLimits(), SilentReporter(), bit_depth=bit_depth)

    assert not [warning for warning in checked.warnings if "bits" in warning]


def test_check_when_a_frame_is_deeper_than_was_said_then_names_it(tmp_path):
    """A value that does not fit is found in the first minute, not in the middle of a run."""
    dataset = read_dataset(_deep_line(tmp_path, 0x1000))

    with pytest.raises(DatasetFault, match=r"train/good/0\.png: A pixel has more than 12 bits"):
        check_dataset(dataset, FrameLimits(), SilentReporter(), bit_depth=12)


def test_gather_lines_when_the_check_warns_then_it_is_said_with_the_lines_name(tmp_path):
    """What is worth knowing of frames is told before they are fitted on, and not in the report alone."""
    line = write_line(tmp_path / "tex", masks=False)
    shutil.copyfile(line / "test/good/000.png", line / "test/good/copy.png")
    reporter = _Notes()

    gather_lines(make_request(line, tmp_path / "store"), reporter)

    assert any(re.match(r"tex: .*has the same content as", note) for note in reporter.notes)


def test_read_good_folder_with_a_name_that_a_terminal_would_obey_is_refused(tmp_path):
    """Frames of a later calibration are told of by their names, too."""
    _write(tmp_path / "\x1bc.png", encode_png(_picture(40)))

    with pytest.raises(DatasetFault, match=r"\\x1bc\.png .*rename it"):
        read_good_folder(tmp_path, None, 16, _Notes())


def test_read_good_folder_with_files_of_another_format_counts_them(tmp_path):
    """A bound that rests on fewer parts than the folder holds must not go unexplained; without any, neither."""
    _write(tmp_path / "day/0.pgm", b"P5 1 1 255 x")
    reporter = _Notes()

    with pytest.raises(DatasetFault, match=r"holds no image.*1 file is passed over: 1 .pgm in .*day"):
        read_good_folder(tmp_path, None, 16, reporter)
    _write(tmp_path / "1.png", encode_png(_picture(40)))
    read_good_folder(tmp_path, None, 16, reporter)

    assert ["1 .pgm in" in note for note in reporter.notes] == [True]


def test_read_good_folder_with_copies_of_one_frame_counts_it_once(tmp_path):
    """A stated bound rests on independent parts; twenty copies of one part are one part."""
    for index in range(20):
        _write(tmp_path / f"{index:02d}.png", encode_png(_picture(40)))
    reporter = _Notes()

    good = read_good_folder(tmp_path, None, 16, reporter)

    assert [sample.path.name for sample in good.samples] == ["00.png"]
    assert "19 frames are copies" in reporter.notes[-1]


class _Notes(SilentReporter):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)
