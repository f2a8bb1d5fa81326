"""Promises of the readers of published data sets: each layout as it is packed, traps and stray files included."""

import json
from zlib import crc32

import numpy as np
import pytest

from service.contract.frames import FrameLimits, encode_jpeg, encode_png
from training.data.benchmarks import BENCHMARKS, identify
from training.data.check import check_dataset
from training.data.detect import LAYOUTS, categories, read_dataset
from training.data.loader import load_mask
from training.data.samples import ANOMALOUS, NORMAL, UNKNOWN, DatasetFault, Saturation
from training.progress import SilentReporter

_HEIGHT, _WIDTH = 6, 8
_LOCO_CONFIG = [
    {"defect_name": "scratch", "pixel_value": 255, "saturation_threshold": 0.5, "relative_saturation": True},
    {"defect_name": "missing", "pixel_value": 248, "saturation_threshold": 7, "relative_saturation": False},
]


def _put(root, *names):
    """Write one small frame for each name, each with other content."""
    for name in names:
        pixels = np.random.default_rng(crc32(name.encode())).integers(1, 255, (_HEIGHT, _WIDTH), dtype=np.uint8)
        _write(root / name, encode_jpeg(pixels) if name.lower().endswith("jpg") else encode_png(pixels))


def _put_mask(path, value=255, rows=2):
    """Write a mask that marks the first rows with one value."""
    mask = np.zeros((_HEIGHT, _WIDTH), np.uint8)
    mask[:rows] = value
    _write(path, encode_png(mask))


def _write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())


def _told(dataset):
    return {
        (s.path.relative_to(dataset.root).as_posix(), s.split, s.label, s.kind, tuple(m.name for m in s.mask_paths))
        for s in dataset.samples
    }


def make_mvtec(root):
    """Write two categories, and the texts that lie beside them."""
    for name in ("bottle", "grid"):
        _put(root / name, "train/good/000.png", "test/good/000.png", "test/bent/000.png")
        _put_mask(root / name / "ground_truth/bent/000_mask.png")
        _write(root / name / "license.txt", "CC BY-NC-SA 4.0")
        _write(root / name / "readme.txt", "read me")
    _write(root / "license.txt", "CC BY-NC-SA 4.0")
    return root


def make_loco(root):
    """Write one category with two defects in one image."""
    line = root / "pushpins"
    _put(line, "train/good/000.png", "validation/good/000.png", "test/good/000.png")
    _put(line, "test/logical_anomalies/000.png", "test/structural_anomalies/000.png")
    _put_mask(line / "ground_truth/logical_anomalies/000/000.png", 248, rows=1)
    _put_mask(line / "ground_truth/logical_anomalies/000/001.png", 255, rows=3)
    _put_mask(line / "ground_truth/structural_anomalies/000/000.png", 255)
    _write(line / "defects_config.json", json.dumps(_LOCO_CONFIG))
    _write(root / "license.txt", "CC BY-NC-SA 4.0")
    return root


def make_mvtec_ad2(root):
    """Write one category with two lights."""
    line = root / "vial"
    for light in ("regular", "overexposed"):
        _put(line, f"train/good/000_{light}.png", f"validation/good/000_{light}.png")
        _put(line, f"test_public/good/000_{light}.png", f"test_public/bad/000_{light}.png")
        _put_mask(line / f"test_public/ground_truth/bad/000_{light}_mask.png")
    _put(line, "test_private/000_regular.png", "test_private_mixed/000_mixed.png")
    return root


def make_visa(root):
    """Write two categories and the table of splits, with files that nobody asked for."""
    rows = ["object,split,label,image,mask"]
    for name in ("candle", "pcb1"):
        normal = [f"{name}/Data/Images/Normal/{i:04d}.JPG" for i in (0, 836)]
        _put(root, *normal, f"{name}/Data/Images/Anomaly/000.JPG")
        _put_mask(root / name / "Data/Masks/Anomaly/000.png", value=1)
        _write(root / name / "image_anno.csv", "image,label,mask\n")
        rows += [
            f"{name},train,normal,{normal[0]},",
            f"{name},test,normal,{normal[1]},",
            f"{name},test,anomaly,{name}/Data/Images/Anomaly/000.JPG,{name}/Data/Masks/Anomaly/000.png",
        ]
    _write(root / "split_csv/1cls.csv", "\r\n".join(rows))
    _write(root / "split_csv/2cls_highshot.csv", "object,split,label,image,mask\n")
    _write(root / "LICENSE-DATASET", "CC BY 4.0")
    return root


def make_real_iad(root, splits="realiad_jsons"):
    """Write one category in one size; one mask has the suffix of a mask and one has not."""
    line = root / "realiad_256" / "toy_brick"
    good = ["OK/S0001/toy_brick_0001_OK_C1_20230101.jpg", "OK/S0001/toy_brick_0001_OK_C2_20230101.jpg"]
    bad = [f"NG/QS/S0002/toy_brick_0002_NG_QS_C{view}_20230101.jpg" for view in (1, 2)]
    masks = [bad[0].replace(".jpg", ".png"), bad[1].replace(".jpg", "_mask.png")]
    _put(line, *good, *bad)
    for mask in masks:
        _put_mask(line / mask)

    def row(kind, image, mask=None):
        return {"category": "toy_brick", "anomaly_class": kind, "image_path": image, "mask_path": mask}

    table = {
        "meta": {"prefix": "toy_brick/", "normal_class": "OK"},
        "train": [row("OK", good[0])],
        "test": [row("OK", good[1]), *(row("QS", image, mask) for image, mask in zip(bad, masks, strict=True))],
    }
    _write(root / splits / "toy_brick.json", json.dumps(table))
    return root


def make_btad(root):
    """Write three products whose suffixes differ, between frames and masks too."""
    for name, frame, mask in (("01", "bmp", "png"), ("02", "png", "png"), ("03", "bmp", "bmp")):
        _put(root / name, f"train/ok/0000.{frame}", f"test/ok/0001.{frame}", f"test/ko/0002.{frame}")
        _put_mask(root / name / f"ground_truth/ko/0002.{mask}")
        _write(root / name / "test/ok/Thumbs.db", b"\x00")
    return root


def make_magnetic_tile(root):
    """Write two classes of defects and ten good tiles, all with masks, under two exposures."""
    for exposure in (1, 2):
        for number in range(5):
            stem = f"MT_Free/Imgs/exp{exposure}_num_{number}"
            _put(root, f"{stem}.jpg")
            _put_mask(root / f"{stem}.png", value=0)
    for kind in ("Blowhole", "Crack"):
        _put(root, f"MT_{kind}/Imgs/exp1_num_7.jpg")
        _put_mask(root / f"MT_{kind}/Imgs/exp1_num_7.png")
    _write(root / "README.md", "# Magnetic tile")
    return root


def make_dagm(root):
    """Write two classes with a defect in both splits."""
    for name in ("Class1", "Class10"):
        for split in ("Train", "Test"):
            _put(root / name, f"{split}/0001.PNG", f"{split}/0002.PNG")
            _put_mask(root / name / split / "Label/0002_label.PNG")
            _write(root / name / split / "Label/Labels.txt", "1\n1\t0\t0001.PNG\t0\t0\n")
            _write(root / name / split / "Thumbs.db", b"\x00")
    return root


def make_kolektor_sdd2(root):
    """Write both splits with one empty and one marked mask each."""
    for split, first in (("train", 10000), ("test", 20000)):
        for number, value in ((first, 0), (first + 1, 255)):
            _put(root, f"{split}/{number}.png")
            _put_mask(root / split / f"{number}_GT.png", value)
    return root


def make_elpv(root):
    """Write fourteen cells of each type, the last two of each doubtful and defective."""
    data = root / "src/elpv_dataset/data"
    rows = []
    for offset, kind in ((0, "mono"), (100, "poly")):
        for number, probability in enumerate([0.0] * 11 + [1 / 3, 2 / 3, 1.0], start=offset):
            _put(data, f"images/cell{number:04d}.png")
            rows.append(f"images/cell{number:04d}.png  {probability}   {kind}")
    _write(data / "labels.csv", "\n".join(rows) + "\n")
    _write(root / "README.md", "# elpv")
    return root


MAKERS = {
    "mvtec": (make_mvtec, "mvtec_ad", ["bottle", "grid"]),
    "loco": (make_loco, "mvtec_loco", ["pushpins"]),
    "mvtec_ad2": (make_mvtec_ad2, "mvtec_ad2", ["vial"]),
    "visa": (make_visa, "visa", ["candle", "pcb1"]),
    "real_iad": (make_real_iad, "real_iad", ["toy_brick"]),
    "btad": (make_btad, "btad", ["01", "02", "03"]),
    "magnetic_tile": (make_magnetic_tile, "magnetic_tile", ["root"]),
    "dagm": (make_dagm, "dagm", ["Class1", "Class10"]),
    "kolektor_sdd2": (make_kolektor_sdd2, "kolektor_sdd2", ["root"]),
    "elpv": (make_elpv, "elpv", ["mono", "poly"]),
}
_ALL = pytest.mark.parametrize(("make", "benchmark", "names"), MAKERS.values(), ids=MAKERS)


@_ALL
def test_categories_of_a_published_set_names_its_lines_and_the_set(tmp_path, make, benchmark, names):
    """A folder as its publisher packs it is known, with all its lines, whatever texts lie beside them."""
    lines = categories(make(tmp_path / "root"))

    assert [line.name for line in lines] == names
    assert identify(lines) == benchmark


@_ALL
def test_check_of_every_category_finds_nothing_to_refuse(tmp_path, make, benchmark, names):
    """Every line is read and checked without a warning: good frames to fit on, good and anomalous ones to test."""
    lines = categories(make(tmp_path / "root"))

    checked = [
        check_dataset(read_dataset(line.folder, line.layout), FrameLimits(), SilentReporter(), threads=1)
        for line in lines
    ]

    assert len(checked) == len(names)
    assert all(found.dataset.train_good for found in checked)
    assert all({NORMAL, ANOMALOUS} <= {s.label for s in found.dataset.test} for found in checked)
    assert all(found.dataset.has_masks == (benchmark != "elpv") for found in checked)
    assert [found.warnings for found in checked] == [()] * len(names)


@_ALL
def test_layouts_claim_no_folder_of_another_set(tmp_path, make, benchmark, names):
    """Each line's folder is claimed by one layout that is not general, or by MVTec's alone."""
    lines = categories(make(tmp_path / "root"))

    for line in lines:
        special = [name for name, row in LAYOUTS.items() if not row.is_general and row.matches(line.folder)]
        assert len(special) == (0 if benchmark == "mvtec_ad" else 1)
    assert len(lines) == len(names)


def test_benchmarks_name_as_many_categories_as_were_published():
    """The tables hold every category, so that a mean over them is the data set's."""
    counts = {key: len(benchmark.categories) for key, benchmark in BENCHMARKS.items()}

    assert counts == {
        "mvtec_ad": 15,
        "mvtec_loco": 5,
        "mvtec_ad2": 8,
        "visa": 12,
        "real_iad": 30,
        "btad": 3,
        "magnetic_tile": 0,
        "dagm": 10,
        "kolektor_sdd2": 0,
        "elpv": 2,
    }


def test_identify_of_a_line_of_nobodys_returns_none(tmp_path):
    """A plant's own line in MVTec's layout is not taken for MVTec's."""
    _put(tmp_path / "screws_of_ours", "train/good/0.png", "test/good/0.png")

    assert identify(categories(tmp_path)) is None


def test_read_loco_gives_each_defect_its_file_and_the_table_of_saturations(tmp_path):
    """Two defects of one image stay two files, in order, with the rules that their values refer to."""
    dataset = read_dataset(make_loco(tmp_path) / "pushpins")

    logical = next(s for s in dataset.test if s.kind == "logical_anomalies")
    assert [path.name for path in logical.channels] == ["000.png", "001.png"]
    assert logical.saturations == (Saturation(255, 0.5, True), Saturation(248, 7, False))
    assert load_mask(logical, _HEIGHT, _WIDTH).sum() == 3 * _WIDTH
    assert len(dataset.validation_good) == 1


@pytest.mark.parametrize(
    ("value", "config", "sentence"),
    [
        (17, None, "marks the defect 17, which defects_config.json does not name"),
        (255, "{}", "expected a list of objects with defect_name"),
        (255, "", "defects_config.json is missing"),
    ],
    ids=["unknown value", "wrong table", "no table"],
)
def test_read_loco_with_a_wrong_table_says_what_was_expected(tmp_path, value, config, sentence):
    """A value that the table does not know, and a table that is none, are named before anything is fitted."""
    line = make_loco(tmp_path) / "pushpins"
    _put_mask(line / "ground_truth/logical_anomalies/000/001.png", value)
    if config is not None:
        (line / "defects_config.json").unlink()
    if config:
        _write(line / "defects_config.json", config)

    with pytest.raises(DatasetFault, match=sentence):
        check_dataset(read_dataset(line), FrameLimits(), SilentReporter())


def test_check_of_a_loco_file_with_two_values_says_that_one_marks_one_defect(tmp_path):
    """A file that mixes defects would count as one of them; it is refused."""
    line = make_loco(tmp_path) / "pushpins"
    mask = np.zeros((_HEIGHT, _WIDTH), np.uint8)
    mask[0], mask[1] = 255, 248
    _write(line / "ground_truth/logical_anomalies/000/001.png", encode_png(mask))

    with pytest.raises(DatasetFault, match=r"marks several defects, \[248, 255\]"):
        check_dataset(read_dataset(line), FrameLimits(), SilentReporter())


def test_read_mvtec_ad2_leaves_private_frames_without_label_and_groups_lights(tmp_path):
    """No label is guessed where the makers keep it, and frames of one object under several lights are one group."""
    dataset = read_dataset(make_mvtec_ad2(tmp_path) / "vial")

    private = [s for s in dataset.test if s.label == UNKNOWN]
    assert {(s.kind, s.mask_paths) for s in private} == {("test_private", ()), ("test_private_mixed", ())}
    assert {s.mask_path.name for s in dataset.test if s.label == ANOMALOUS} == {
        "000_regular_mask.png",
        "000_overexposed_mask.png",
    }
    assert len(dataset.train_good) == 2
    assert len({s.group for s in dataset.train_good}) == 1
    # Numbers begin anew in each folder, so the first object of one is none of the objects of another.
    assert len({s.group for s in dataset.samples}) == len({(s.split, s.kind) for s in dataset.samples}) == 6
    assert {(s.aupro_limit, s.seg_f1) for s in dataset.samples} == {(0.05, True)}
    assert dataset.has_masks


def test_read_mvtec_ad2_unpacked_twice_finds_the_inner_folder(tmp_path):
    """Archives that unpack to `vial/vial` are read by the outer folder."""
    inner = make_mvtec_ad2(tmp_path / "vial")

    dataset = read_dataset(inner)

    assert dataset.layout == "mvtec_ad2"
    assert len(dataset.test) == 6


def test_read_visa_keeps_to_its_table(tmp_path):
    """The table decides the split; frames keep their upper-case suffix and masks any value above zero."""
    root = make_visa(tmp_path)
    _put(root, "candle/Data/Images/Normal/9999.JPG")

    dataset = read_dataset(root / "candle")

    assert _told(dataset) == {
        ("Data/Images/Normal/0000.JPG", "train", NORMAL, "good", ()),
        ("Data/Images/Normal/0836.JPG", "test", NORMAL, "good", ()),
        ("Data/Images/Anomaly/000.JPG", "test", ANOMALOUS, "anomaly", ("000.png",)),
    }
    assert load_mask(dataset.test[0], _HEIGHT, _WIDTH).sum() == 2 * _WIDTH


def test_read_visa_in_the_reorganised_variant_is_read_as_mvtec(tmp_path):
    """Masks without the ending `_mask` are paired as well, and the set is still known as VisA."""
    for name in ("candle", "pcb1"):
        _put(tmp_path / name, "train/good/0.JPG", "test/good/1.JPG", "test/bad/000.JPG")
        _put_mask(tmp_path / name / "ground_truth/bad/000.png")

    lines = categories(tmp_path)

    assert identify(lines) == "visa"
    assert all(read_dataset(line.folder).has_masks for line in lines)


def test_read_real_iad_trusts_the_json_for_masks_and_groups_views(tmp_path):
    """Names of masks come from the JSON, with and without their ending; views of one piece are one group."""
    dataset = read_dataset(make_real_iad(tmp_path) / "realiad_256" / "toy_brick")

    anomalous = [s for s in dataset.test if s.label == ANOMALOUS]
    assert sorted(s.mask_path.name for s in anomalous) == [
        "toy_brick_0002_NG_QS_C1_20230101.png",
        "toy_brick_0002_NG_QS_C2_20230101_mask.png",
    ]
    assert {s.group for s in anomalous} == {"toy_brick_0002_NG_QS"}
    assert all(s.s_auroc for s in anomalous)
    assert {s.kind for s in anomalous} == {"QS"}


def test_read_real_iad_with_noisy_splits_takes_the_training_list_as_good(tmp_path):
    """Anomalies that nobody labelled are fitted on as good, as a plant that does not know of them would."""
    root = make_real_iad(tmp_path, "realiad_jsons_fuiad_0.1")
    path = root / "realiad_jsons_fuiad_0.1" / "toy_brick.json"
    table = json.loads(path.read_text())
    table["train"].append(table["test"].pop())
    path.write_text(json.dumps(table))

    dataset = read_dataset(root / "realiad_256" / "toy_brick")

    assert dataset.layout == "real_iad_fuiad_0.1"
    assert [s.label for s in dataset.train_good] == [NORMAL, NORMAL]


def test_read_real_iad_with_several_splits_prefers_the_plain_ones(tmp_path):
    """Beside the plain splits no other is guessed; without them, two others must be chosen by name."""
    root = make_real_iad(make_real_iad(make_real_iad(tmp_path), "realiad_jsons_sv"), "realiad_jsons_fuiad_0.0")
    line = root / "realiad_256" / "toy_brick"

    assert read_dataset(line).layout == "real_iad"
    assert read_dataset(line, "real_iad_sv").layout == "real_iad_sv"
    (root / "realiad_jsons" / "toy_brick.json").unlink()
    with pytest.raises(DatasetFault, match=r"real_iad_sv or as real_iad_fuiad_0\.0; say which with --layout"):
        read_dataset(line)


def test_categories_of_real_iad_in_two_sizes_asks_for_one(tmp_path):
    """Which size is meant can't be guessed; both are named."""
    root = make_real_iad(tmp_path)
    _put(root, "realiad_1024/toy_brick/OK/S0001/toy_brick_0001_OK_C1_20230101.jpg")

    with pytest.raises(DatasetFault, match=r"several sizes; give one of .*realiad_1024, .*realiad_256"):
        categories(root)


def test_read_magnetic_tile_draws_the_same_fifth_of_every_exposure(tmp_path):
    """One good tile in five of each exposure is tested, the same on every call, and empty masks count as none."""
    root = make_magnetic_tile(tmp_path)

    first, second = read_dataset(root), read_dataset(root)

    tested = [s for s in first.test if s.label == NORMAL]
    assert sorted(s.path.stem for s in tested) == ["exp1_num_3", "exp2_num_3"]  # the draw, not the first ones
    assert all(s.path.suffix == ".jpg" and not s.mask_paths for s in tested)
    assert first.samples == second.samples
    assert {s.kind for s in first.test if s.label == ANOMALOUS} == {"blowhole", "crack"}


def test_read_dagm_takes_labels_for_masks_and_never_for_frames(tmp_path):
    """A frame is defective where a label names it; defective training frames are left out."""
    dataset = read_dataset(make_dagm(tmp_path) / "Class1")

    assert _told(dataset) == {
        ("Train/0001.PNG", "train", NORMAL, "good", ()),
        ("Test/0001.PNG", "test", NORMAL, "good", ()),
        ("Test/0002.PNG", "test", ANOMALOUS, "defect", ("0002_label.PNG",)),
    }


def test_read_kolektor_sdd2_tells_defective_frames_by_their_masks(tmp_path):
    """Every frame has a mask; only one that marks a pixel makes a defect, and none of those is fitted on."""
    dataset = read_dataset(make_kolektor_sdd2(tmp_path))

    assert _told(dataset) == {
        ("train/10000.png", "train", NORMAL, "good", ()),
        ("test/20000.png", "test", NORMAL, "good", ()),
        ("test/20001.png", "test", ANOMALOUS, "defect", ("20001_GT.png",)),
    }


def test_read_elpv_leaves_the_doubtful_cells_out(tmp_path):
    """A third is neither good nor bad; two thirds and certainty are defects; a type can be read alone."""
    root = make_elpv(tmp_path)

    both, mono = read_dataset(root), read_dataset(root, "elpv_mono")

    assert [sum(s.label == label for s in both.samples) for label in (NORMAL, ANOMALOUS)] == [22, 4]
    assert sorted(s.path.stem for s in mono.samples if s.label == ANOMALOUS) == ["cell0012", "cell0013"]
    assert "cell0011" not in {s.path.stem for s in both.samples}


def test_read_elpv_with_doubtful_cells_tests_them_as_defects_of_their_own_kind(tmp_path):
    """Asked for by name, a third counts as anomalous, and whoever looks at kinds still sees it apart."""
    root = make_elpv(tmp_path)

    usual, both = read_dataset(root), read_dataset(root, "elpv_doubtful")
    lines = categories(root, "elpv_doubtful")
    poly = read_dataset(lines[1].folder, lines[1].layout)

    added = set(both.samples) - set(usual.samples)
    assert set(usual.samples) < set(both.samples)
    assert {(s.path.stem, s.split, s.label, s.kind) for s in added} == {
        ("cell0011", "test", ANOMALOUS, "doubtful"),
        ("cell0111", "test", ANOMALOUS, "doubtful"),
    }
    assert [line.name for line in lines] == ["mono", "poly"]
    assert poly.layout == "elpv_doubtful_poly"
    assert sorted(s.path.stem for s in poly.test if s.kind != "good") == ["cell0111", "cell0112", "cell0113"]
    assert identify(lines) is None


def _without(*names):
    def spoil(root):
        for name in names:
            (root / name).unlink()

    return spoil


def _with(name, data=None):
    def spoil(root):
        if data is None:
            _put(root, name)
        else:
            _write(root / name, data)

    return spoil


@pytest.mark.parametrize(
    ("make", "line", "spoil", "sentence"),
    [
        (make_loco, "pushpins", _with("pushpins/test/logical_anomalies/001.png"), "one PNG for each defect"),
        (
            make_loco,
            "pushpins",
            _with("pushpins/ground_truth/logical_anomalies/009/000.png"),
            "009 holds masks without an image",
        ),
        (
            make_mvtec_ad2,
            "vial",
            _without("vial/test_public/ground_truth/bad/000_regular_mask.png"),
            "000_regular.png is anomalous and has no mask",
        ),
        (make_mvtec_ad2, "vial", _with("vial/test_private/bad/1.png"), "expected all frames directly in"),
        (make_visa, "candle", _without("split_csv/1cls.csv"), "keeps the folder split_csv beside its categories"),
        (make_visa, "candle", _with("split_csv/1cls.csv", "image,label\n"), "expected object,split,label,image,mask"),
        (
            make_visa,
            "candle",
            _with("split_csv/1cls.csv", "object,split,label,image,mask\ncandle,train,good,a.JPG,\n"),
            "expected train or test, and normal or anomaly",
        ),
        (
            make_visa,
            "candle",
            _with("split_csv/1cls.csv", "object,split,label,image,mask\npcb1,train,normal,a.JPG,\n"),
            "no row of the object 'candle'",
        ),
        (
            make_visa,
            "candle",
            _with(
                "split_csv/1cls.csv", "object,split,label,image,mask\ncandle,test,normal,candle/a.JPG,candle/a.png\n"
            ),
            "calls candle/a.JPG normal and names a mask of it",
        ),
        (make_visa, "candle", _without("candle/Data/Images/Normal/0000.JPG"), "0000.JPG is named in .* but does not"),
        (
            make_real_iad,
            "realiad_256/toy_brick",
            _without("realiad_jsons/toy_brick.json"),
            "expected the folder realiad_jsons of Real-IAD beside realiad_256",
        ),
        (
            make_real_iad,
            "realiad_256/toy_brick",
            _with("realiad_jsons/toy_brick.json", '{"train": []}'),
            "expected meta with prefix and normal_class",
        ),
        (
            make_real_iad,
            "realiad_256/toy_brick",
            _without("realiad_256/toy_brick/NG/QS/S0002/toy_brick_0002_NG_QS_C1_20230101.png"),
            "C1_20230101.png is named in .* but does not exist",
        ),
        (make_btad, "01", _without("01/ground_truth/ko/0002.png"), "expected one for each image in .*ko, by its name"),
        (make_btad, "01", _with("01/ground_truth/ko/7.png"), "7.png is a mask without an image"),
        (make_btad, "01", _without("01/train/ok/0000.bmp"), "at least one image into .*train/ok"),
        (make_magnetic_tile, ".", _without("MT_Crack/Imgs/exp1_num_7.png"), "expected exp1_num_7.png beside it"),
        (make_magnetic_tile, ".", _with("MT_Fray/exp1_num_1.jpg"), "MT_Fray has no folder Imgs"),
        (make_dagm, "Class1", _without("Class1/Test/0002.PNG"), "0002_label.PNG is a label without an image"),
        (
            make_dagm,
            "Class1",
            _without("Class1/Test/0001.PNG", "Class1/Test/0002.PNG", "Class1/Test/Label/0002_label.PNG"),
            "Test holds no frame; expected NNNN.PNG",
        ),
        (make_kolektor_sdd2, ".", _without("test/20000_GT.png"), "Expected both .*20000.png and .*20000_GT.png"),
        (make_kolektor_sdd2, ".", _with("test/20000_GT.png", b"no image"), "20000_GT.png: .*Replace the file"),
        (
            make_elpv,
            ".",
            _with("src/elpv_dataset/data/labels.csv", "images/cell0000.png,0.0,mono\n"),
            "Line 1 of .* expected a path, a probability and mono or poly, between blanks",
        ),
        (
            make_elpv,
            ".",
            _with("src/elpv_dataset/data/labels.csv", "images/cell0000.png 0.0 thin\n"),
            "expected a probability from 0 to 1 and mono or poly",
        ),
        (make_elpv, ".", _without("src/elpv_dataset/data/images/cell0000.png"), "cell0000.png is named in labels.csv"),
    ],
)
def test_read_dataset_of_a_broken_published_set_says_what_was_expected(tmp_path, make, line, spoil, sentence):
    """A file that is missing, misplaced or wrong is named with what belongs there."""
    root = make(tmp_path / "root")
    spoil(root)

    with pytest.raises(DatasetFault, match=sentence):
        read_dataset(root / line)


def test_categories_with_a_named_layout_reads_every_line_by_it(tmp_path):
    """The name of a layout is passed on to every line, and a wrong one is refused."""
    root = make_mvtec(tmp_path)

    lines = categories(root, "plain")

    assert {line.layout for line in lines} == {"plain"}
    with pytest.raises(DatasetFault, match="There is no layout 'vista'"):
        categories(root, "vista")


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ([], "holds no line of a layout that we know. It is empty"),
        (["notes/readme.txt", "b.csv"], "It holds b.csv, notes/"),
        (["a/train/good/0.png", "a/test/good/0.png", "b/0.png"], r"several layouts: a \(mvtec\), b \(plain\)"),
    ],
    ids=["empty", "strange", "mixed"],
)
def test_categories_of_a_folder_without_a_data_set_tells_what_it_saw(tmp_path, files, sentence):
    """The message names what lies in the folder, so that a wrong path is recognised."""
    _put(tmp_path, *(name for name in files if name.endswith("png")))
    for name in files:
        if not name.endswith("png"):
            _write(tmp_path / name, "text")

    with pytest.raises(DatasetFault, match=sentence):
        categories(tmp_path)
