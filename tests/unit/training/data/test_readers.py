"""Promises of the data-set readers and of the choice among them."""

import re
from pathlib import Path

import numpy as np
import pytest

from service.client import MEDIA_TYPES
from service.contract.frames import encode_png
from tests.rights import rights_of_an_ordinary_user
from tests.shared_material import require_shared
from training.data.detect import LAYOUTS, read_dataset
from training.data.passed_over import IMAGE_SUFFIXES
from training.data.samples import ANOMALOUS, NORMAL, DatasetFault


def _put(root, *names):
    """Write one small grey image for each name."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_png(np.full((4, 5), len(name), np.uint8)))


def _names(root, samples):
    return [s.path.relative_to(root).as_posix() for s in samples]


def test_read_dataset_of_mvtec_folders_pairs_masks_by_name(tmp_path):
    """Each anomalous frame gets the mask of its own name, whatever the suffix and the order."""
    _put(tmp_path, "train/good/000.png", "test/good/000.png", "test/hole/b.PNG", "test/hole/a.jpeg")
    _put(tmp_path, "ground_truth/hole/a_mask.png", "ground_truth/hole/b.bmp")

    dataset = read_dataset(tmp_path)

    assert dataset.layout == "mvtec"
    assert dataset.name == tmp_path.name
    assert dataset.has_masks
    assert {(s.path.name, s.kind, s.label, s.mask_path and s.mask_path.name) for s in dataset.test} == {
        ("000.png", "good", NORMAL, None),
        ("a.jpeg", "hole", ANOMALOUS, "a_mask.png"),
        ("b.PNG", "hole", ANOMALOUS, "b.bmp"),
    }


def test_read_dataset_of_mvtec_folders_without_masks_has_none(tmp_path):
    """A line without ground truth is measured by images only."""
    _put(tmp_path, "train/good/0.png", "test/good/0.png", "test/hole/0.png", "test/hole/1.png")

    dataset = read_dataset(tmp_path)

    assert not dataset.has_masks
    assert [s.mask_path for s in dataset.test] == [None] * 3


def test_read_dataset_passes_over_what_is_no_image(tmp_path):
    """Tables, hidden files and thumbnails' databases are not samples."""
    _put(tmp_path, "train/good/0.png", "train/good/deeper/1.tif", "train/good/.hidden.png", "test/good/2.png")
    (tmp_path / "train/good/Thumbs.db").write_bytes(b"x")
    (tmp_path / "boxes.csv").write_text("x1\n")

    dataset = read_dataset(tmp_path)

    assert _names(tmp_path, dataset.train_good) == ["train/good/0.png", "train/good/deeper/1.tif"]


def test_read_dataset_of_good_folders_in_capitals_takes_their_frames_for_good(tmp_path):
    """A folder's case is a habit of whoever made it; good parts never become defects by it."""
    _put(tmp_path, "train/Good/0.png", "validation/GOOD/1.png", "test/Good/2.png", "test/good/3.png", "test/hole/4.png")

    dataset = read_dataset(tmp_path)

    assert dataset.layout == "mvtec"
    assert _names(tmp_path, dataset.train_good) == ["train/Good/0.png"]
    assert _names(tmp_path, dataset.validation_good) == ["validation/GOOD/1.png"]
    assert [(s.path.name, s.label, s.kind) for s in dataset.test] == [
        ("2.png", NORMAL, "good"),
        ("3.png", NORMAL, "good"),
        ("4.png", ANOMALOUS, "hole"),
    ]


def test_read_dataset_of_good_frames_in_capitals_without_test_frames_is_plain(tmp_path):
    """The plain layout knows the folder by the same name."""
    _put(tmp_path, "train/GOOD/0.png")

    dataset = read_dataset(tmp_path)

    assert (dataset.layout, len(dataset.train_good)) == ("plain", 1)


@pytest.mark.parametrize("word", ["ok", "OK", "Pass", "gut", "normal", "IO", "i.O."])
@pytest.mark.parametrize("beside", [["test/good/1.png"], []], ids=["beside good", "instead of good"])
def test_read_dataset_of_a_test_folder_with_another_word_for_good_refuses(tmp_path, word, beside):
    """Its frames would count as defects that the detector misses, and no figure would be right."""
    _put(tmp_path, "train/good/0.png", f"test/{word}/2.png", "test/hole/3.png", *beside)

    sentence = f"test/{word} is named as if its frames were good.*put them into .*test/good"
    with pytest.raises(DatasetFault, match=sentence):
        read_dataset(tmp_path)


@pytest.mark.parametrize("kind", ["n.i.o.", "not_ok", "nok", "passivation"])
def test_read_dataset_of_a_defect_whose_name_holds_a_word_for_good_reads_it(tmp_path, kind):
    """Only the whole name is such a word; an empty folder of that name harms nobody."""
    _put(tmp_path, "train/good/0.png", "test/good/1.png", f"test/{kind}/2.png")
    (tmp_path / "test/ok").mkdir()

    assert [s.kind for s in read_dataset(tmp_path).test if s.label == ANOMALOUS] == [kind]


@pytest.mark.parametrize(
    ("files", "told"),
    [
        (
            ["train/good/1.pgm", "train/good/2.pgm", "train/good/3"],
            "3 files are .*: 2 .pgm, 1 without suffix in",
        ),
        (["train/1.png", "test/2.png"], "2 files are .*: 1 .png in .*/test; 1 .png in .*/train. Frames are read from"),
        (["train/bad/1.png"], "1 file is passed over: 1 .png in .*/train/bad"),
        (["val/1.png"], "1 file is passed over: 1 .png in .*/val"),
        ([f"{index}/1.png" for index in range(8)], "8 files are .* 1 .png in .*/4; and those of 3 more folders"),
    ],
    ids=["suffixes", "beside the folders", "a kind of training frames", "validation", "many folders"],
)
def test_read_dataset_says_which_files_it_passes_over(tmp_path, files, told):
    """No frame is lost in silence: whoever has them in another place or format learns of it."""
    _put(tmp_path, "train/good/0.png", "test/good/0.png", *files)

    (note,) = read_dataset(tmp_path).notes

    assert re.match(told, note)


def test_read_dataset_says_which_folder_it_can_not_look_into(tmp_path):
    """Nobody knows whether frames are in it; one that is read from ends the reading."""
    _put(tmp_path, "train/good/0.png", "train/good/day/0.png", "old/1.png", "test/1.png")
    (tmp_path / "old").chmod(0)

    with rights_of_an_ordinary_user():
        notes = read_dataset(tmp_path).notes
        (tmp_path / "train/good/day").chmod(0)
        with pytest.raises(PermissionError):
            read_dataset(tmp_path)

    files, folder = notes
    assert re.match("1 file is passed over: 1 .png in .*/test", files)
    assert re.match(r"1 folder can't be looked into: .*/old \(Permission denied\)", folder)


def test_read_dataset_of_a_flat_folder_says_that_folders_in_it_are_passed_over(tmp_path):
    """Frames of a second day in a folder of their own are not fitted on."""
    _put(tmp_path, "0.png", "1.png", "day2/2.png")

    dataset = read_dataset(tmp_path)

    assert len(dataset.train_good) == 2
    assert ["1 .png in" in note and "not from folders in it" in note for note in dataset.notes] == [True]


def test_read_dataset_minds_no_side_files(tmp_path):
    """Tables, texts, hidden files and what file browsers leave are no frames; a linked folder is read once."""
    _put(tmp_path, "train/good/0.png", "test/good/1.png", "test/hole/2.png", "ground_truth/hole/2_mask.png")
    for name in ("boxes.csv", "LICENSE", "readme.md", "train/good/Thumbs.db", ".DS_Store", ".cache/3.pgm"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "again").symlink_to(tmp_path / "train")

    assert read_dataset(tmp_path).notes == ()


def test_read_dataset_takes_jfif_for_jpeg(tmp_path):
    """Browsers and mail programs save JPEG under this suffix."""
    _put(tmp_path, "train/good/0.jfif", "train/good/1.JFIF")

    dataset = read_dataset(tmp_path)

    assert (len(dataset.train_good), dataset.notes) == (2, ())


def test_suffixes_that_are_trained_on_are_those_that_the_client_sends():
    """Frames that a detector was fitted on can be inspected from the same files."""
    assert MEDIA_TYPES.keys() == IMAGE_SUFFIXES


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        (["train/good/1.pgm"], "has no good frame to train on.*1 file is passed over: 1 .pgm in .*train/good"),
        (
            ["train/good/0.png", *(f"test/hole/{index}.png" for index in range(8)), "ground_truth/hole/0.png"]
            + [f"ground_truth/hole/{index}.pgm" for index in range(1, 8)],
            "has no mask, while others.*7 files are passed over: 7 .pgm in .*ground_truth/hole",
        ),
        (
            ["train/good/0.png", "test/hole/0.png", "test/hole/1.pgm", "ground_truth/hole/1.png"],
            "is a mask without an image.*1 file is passed over: 1 .pgm in .*test/hole",
        ),
    ],
    ids=["good frames", "masks", "defects"],
)
def test_read_dataset_without_what_it_passes_over_says_so_in_the_refusal(tmp_path, files, sentence):
    """Whoever sees the files in their folder must not be told only that they are missing."""
    _put(tmp_path, "test/good/9.png", *files)

    with pytest.raises(DatasetFault, match=sentence):
        read_dataset(tmp_path, "mvtec")


@pytest.mark.parametrize("folder", ["val", "validation"])
def test_read_dataset_with_a_validation_folder_keeps_it_apart(tmp_path, folder):
    """Good frames of the validation folder are neither fitted on nor tested."""
    _put(tmp_path, "train/good/0.png", f"{folder}/good/1.png")

    dataset = read_dataset(tmp_path)

    assert dataset.layout == "plain"
    assert _names(tmp_path, dataset.validation_good) == [f"{folder}/good/1.png"]


def test_read_dataset_of_bare_images_takes_them_all_as_good(tmp_path):
    """A folder of images is a folder of good frames, and nothing in it is tested."""
    _put(tmp_path, "b.png", "a.webp")

    dataset = read_dataset(tmp_path)

    assert _names(tmp_path, dataset.train_good) == ["a.webp", "b.png"]
    assert dataset.test == ()


def test_read_dataset_of_the_flat_variant_tests_some_normal_frames(tmp_path):
    """With `abnormal/` a fifth of the normal frames is tested beside it, and is not fitted on."""
    _put(tmp_path, *(f"normal/{i:03d}.png" for i in range(20)), "abnormal/x.png")

    dataset = read_dataset(tmp_path)

    assert dataset.layout == "plain"
    assert len(dataset.train_good) == 16
    assert sorted(s.label for s in dataset.test) == [NORMAL] * 4 + [ANOMALOUS]
    assert not set(dataset.train_good) & set(dataset.test)


def test_read_dataset_of_the_flat_variant_without_abnormal_trains_on_all(tmp_path):
    """Without anomalous frames nothing is taken away for a test."""
    _put(tmp_path, *(f"normal/{i}.png" for i in range(5)))

    dataset = read_dataset(tmp_path)

    assert len(dataset.train_good) == 5


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        (["train/good/0.txt", "test/good/0.png"], "no good frame"),
        (["train/good/0.png", "test/hole/0.png", "ground_truth/hole/1_mask.png"], "1_mask.png is a mask without"),
        (["train/good/0.png", "test/good/0.png", "ground_truth/dent/7.png"], "7.png is a mask without"),
        (["train/good/0.png", "test/good/0.png", "ground_truth/good/0_mask.png"], "0_mask.png is a mask for a good"),
        (
            ["train/good/0.png", "test/hole/0.png", "test/hole/1.png", "ground_truth/hole/1_mask.png"],
            "0.png is anomalous and has no mask",
        ),
        (["train/good/0.png", "test/hole/0.png", "test/hole/0.jpg", "ground_truth/hole/0.png"], "have the same name"),
        (["a/train/good/0.png", "a/test/good/0.png", "notes/0.txt"], "give one of a"),
        (["readme.txt"], "no layout that we know"),
        (["train/gut/0.png", "test/gut/0.png"], "no folder train/good, and .*train/gut is named .*into .*train/good"),
        (["train/OK/0.png"], "no folder train/good, and .*train/OK is named"),
        (
            ["train/good/0.png", "test/Bad/0.png", "ground_truth/bad/0.png"],
            "bad/0.png is a mask without an image, and .*test/Bad differs from .*test/bad in capitals alone",
        ),
        (["train/good/0.png", "test/good/1.png", "0.png"], None),
    ],
    ids=[
        "no good frame",
        "mask without image",
        "mask without folder",
        "mask of a good frame",
        "some masks missing",
        "two of one name",
        "root of several lines",
        "nothing",
        "another word for good",
        "another word for good in capitals",
        "masks in other capitals",
        "stray image beside the folders",
    ],
)
def test_read_dataset_with_faulty_folders_names_the_file(tmp_path, files, sentence):
    """A fault of the folders ends with the file's name and what to do; a stray image is no fault."""
    _put(tmp_path, *files)

    if sentence is None:
        assert read_dataset(tmp_path).layout == "mvtec"
    else:
        with pytest.raises(DatasetFault, match=sentence):
            read_dataset(tmp_path)


def test_read_dataset_of_a_missing_folder_or_layout_says_so(tmp_path):
    """A wrong path and a wrong layout name are told apart."""
    with pytest.raises(DatasetFault, match="is no folder"):
        read_dataset(tmp_path / "nowhere")
    with pytest.raises(DatasetFault, match=r"known are loco, .*mvtec, plain"):
        read_dataset(tmp_path, "vista")


def test_read_dataset_with_a_named_layout_does_not_guess(tmp_path):
    """The named layout is used even where the folders look otherwise."""
    _put(tmp_path, "train/good/0.png", "test/good/0.png")

    dataset = read_dataset(tmp_path, "plain")

    assert dataset.layout == "plain"


def test_layouts_do_not_claim_the_same_folder(tmp_path):
    """Every folder that a reader claims is claimed by it alone."""
    _put(tmp_path, "m/train/good/0.png", "m/test/good/0.png", "p/train/good/0.png", "n/normal/0.png", "f/0.png")

    claims = [[name for name, layout in LAYOUTS.items() if layout.matches(tmp_path / folder)] for folder in "mpnf"]

    assert claims == [["mvtec"], ["plain"], ["plain"], ["plain"]]


def test_read_dataset_that_two_layouts_claim_lists_both(tmp_path, monkeypatch):
    """Which layout a folder has is never a matter of the table's order."""
    _put(tmp_path, "0.png")
    monkeypatch.setitem(LAYOUTS, "twin", LAYOUTS["plain"])

    with pytest.raises(DatasetFault, match="as plain or as twin"):
        read_dataset(tmp_path)


def test_dataset_fault_with_many_faults_names_the_first_and_counts_the_rest():
    """A long list of faults stays readable and complete."""
    fault = DatasetFault(*(f"Fault {i}." for i in range(8)))

    assert str(fault).startswith("Fault 0. Fault 1.")
    assert str(fault).endswith("And 3 more like these.")
    assert len(fault.faults) == 8


@pytest.mark.parametrize(
    ("line", "masks", "good", "test"),
    [("magnetic_tile", True, 280, 216), ("solar_cell", False, 240, 200), ("pcb", True, 120, 101)],
    ids=["grey, sizes differ", "no masks", "table beside the folders"],
)
def test_read_dataset_of_a_real_line_finds_every_frame(line, masks, good, test):
    """The three real lines are read completely."""
    root: Path = require_shared(f"data/{line}")

    dataset = read_dataset(root)

    assert (dataset.has_masks, len(dataset.train_good), len(dataset.test)) == (masks, good, test)


def test_read_dataset_with_a_linked_folder_reads_its_frames(tmp_path):
    """A second day of frames that lies elsewhere counts like the first."""
    _put(tmp_path, "line/train/good/day1/0.png", "line/test/good/0.png", "elsewhere/1.png")
    (tmp_path / "line/train/good/day2").symlink_to(tmp_path / "elsewhere")

    good = read_dataset(tmp_path / "line").train_good

    assert _names(tmp_path / "line", good) == ["train/good/day1/0.png", "train/good/day2/1.png"]


@pytest.mark.parametrize(("target", "sentence"), [("nowhere", "a link that leads nowhere"), (".", "read already")])
def test_read_dataset_with_a_link_that_leads_nowhere_or_in_a_circle_names_it(tmp_path, target, sentence):
    """No frame is lost in silence, and no link is followed for ever."""
    _put(tmp_path, "train/good/0.png", "test/good/0.png")
    (tmp_path / "train/good/more").symlink_to(target)

    with pytest.raises(DatasetFault, match=f"more is .*{sentence}"):
        read_dataset(tmp_path)


@pytest.mark.parametrize(
    "files",
    [
        ["Train/1.PNG", "Test/2.PNG", "Test/2.bmp", "Test/Label/2_label.PNG"],
        ["train/3.png", "train/3.jpg", "train/3_GT.png", "test/4.png", "test/4_GT.png"],
    ],
    ids=["dagm", "kolektor_sdd2"],
)
def test_read_dataset_with_two_frames_of_one_name_names_both(tmp_path, files):
    """Neither becomes normal for want of the other's mask, and neither vanishes."""
    _put(tmp_path, *files)

    with pytest.raises(DatasetFault, match="have the same name"):
        read_dataset(tmp_path)


def test_read_dataset_of_visa_with_a_file_of_another_folder_names_the_row(tmp_path):
    """A row that leads out of its category is a fault of the table."""
    _put(tmp_path, "candle/Data/Images/Normal/0.JPG", "extra/a.JPG")
    table = tmp_path / "split_csv/1cls.csv"
    table.parent.mkdir()
    table.write_text("object,split,label,image,mask\ncandle,train,normal,extra/a.JPG,\n")

    with pytest.raises(DatasetFault, match=r"row of candle whose file extra/a.JPG lies outside"):
        read_dataset(tmp_path / "candle")
