"""Promises of a reproduction: ours beside published, resumable, and no mean that is not the data set's."""

import json
import re
import shutil
import signal
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import yaml
from pydantic import ValidationError
from safetensors.torch import save_file
from typer.testing import CliRunner

from models import DETECTORS
from models.backbones import untrained_weights
from service.contract.bundle import MetricRecord
from service.errors import ParameterInvalid
from tests.shared_material import require_shared
from tests.tiny_line import DEFECTS, TEST_GOOD, TINY_RUN, make_config, write_line, write_mvtec_ad2_line
from training.__main__ import commands
from training.commands.reproduce_jobs import ReproductionWishes, reproduce_paper, split_seeds
from training.config import RunConfig
from training.data.benchmarks import BENCHMARKS
from training.data.detect import Category
from training.data.samples import DatasetFault
from training.fitting.fit import FitStopped
from training.progress import SilentReporter
from training.reproduction.measure import Equipment
from training.reproduction.pages import (
    COMPARISON_COLUMNS,
    Comparison,
    Figure,
    comparison_rows,
    differences_of_configuration,
    summarise,
    to_html,
    to_markdown,
)
from training.reproduction.published import PublishedDetector, read_published
from training.reproduction.reproduce import (
    Cell,
    CellFailed,
    Plan,
    _digest,
    cell_path,
    plan_lines,
    read_cell,
    reproduce,
)

_GOOD = 8
_UNTRAINED = Equipment(weights="untrained", device="cpu")
_METRICS = ("i_auroc", "p_auroc")


def _brief(steps=2):
    """Return the tiny run with even fewer steps."""
    hyperparameters = TINY_RUN["hyperparameters"]
    recipe = hyperparameters["recipe"] | {"iterations": steps, "warmup_iterations": 0}
    return make_config(hyperparameters=hyperparameters | {"recipe": recipe})


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Two categories under names of MVTec AD; the second has no masks."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("sets") / "mvtec_like"
    write_line(root / "bottle", good=_GOOD)
    write_line(root / "grid", good=_GOOD, masks=False)
    return root


def _plan(root, setting="single-class", seeds=(1,), wanted=(), config=None):
    lines, data, is_whole = plan_lines(root, None, wanted)
    return Plan(lines, data, is_whole, setting, config or _brief(), seeds)


class _Watcher(SilentReporter):
    """Remembers sentences, and after some steps of the second category's descent does what Ctrl-C would."""

    def __init__(self, stop_after=None):
        self.notes = []
        self.figures = []
        self._left = stop_after

    @contextmanager
    def bar(self, name, total, done=0):  # noqa: ARG002 - the shape of a reporter
        self.notes.append(f"{name}: {total}")
        yield self

    def advance(self, steps=1, figures=None):  # noqa: ARG002 - the shape of a bar
        self.figures += [name for name in figures or {} if "%" in name]
        if self._left is not None and len(figures or {}) > 1 and any("grid" in name for name in figures):
            self._left -= 1
            if self._left == 0:
                signal.raise_signal(signal.SIGINT)

    def note(self, text):
        self.notes.append(text)


@pytest.fixture(scope="module")
def finished(dataset, tmp_path_factory):
    """Both categories, measured once; tests that change something work on a copy."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, reproduce(_plan(dataset), _UNTRAINED, folder, SilentReporter())


def test_reproduce_of_two_categories_fits_on_every_good_frame(finished):
    """Nothing is held out, every category is one model, and pixel figures without masks say why."""
    _, cells = finished

    bottle, grid = cells
    assert bottle.frames == {"bottle": (_GOOD, TEST_GOOD, DEFECTS)}
    assert bottle.figures["bottle"]["p_auroc"].value is not None
    assert grid.figures["grid"]["i_auroc"].value is not None
    assert "no masks" in grid.figures["grid"]["p_auroc"].reason


def test_reproduce_again_reads_what_is_kept(dataset, finished, tmp_path):
    """A finished category is not measured twice, and is the same to the last bit."""
    folder, cells = finished
    copy = shutil.copytree(folder, tmp_path / "copy")
    watcher = _Watcher()

    again = reproduce(_plan(dataset), _UNTRAINED, copy, watcher)

    assert again == cells
    assert [note for note in watcher.notes if "already measured" in note] == [
        "bottle, seed 1: is already measured",
        "grid, seed 1: is already measured",
    ]


def test_reproduce_with_another_configuration_measures_anew(dataset, finished, tmp_path):
    """A kept figure of another configuration is never shown as this one's."""
    folder, cells = finished
    copy = shutil.copytree(folder, tmp_path / "copy")

    again = reproduce(_plan(dataset, wanted=["bottle"], config=_brief(steps=3)), _UNTRAINED, copy, SilentReporter())

    assert again[0].digest != cells[0].digest


def test_digest_of_a_model_is_another_where_anything_is_that_it_depends_on(dataset, tmp_path, monkeypatch):
    """No figure is shown of other files, weights, sources, seeds or settings than those that it was measured with."""
    root = shutil.copytree(dataset, tmp_path / "set")
    plan = _plan(root, wanted=["bottle"])
    files = [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    for seed, file in enumerate(files):
        save_file(untrained_weights(plan.config.backbone, seed), file)

    def digest(setting="single-class", config=plan.config, weights=files[0]):
        return _digest(plan.lines, setting, config, Equipment(weights))

    digests = [
        digest(),
        digest(setting="multi-class"),
        digest(config=plan.config.model_copy(update={"seed": 9})),
        digest(config=plan.config.model_copy(update={"evaluation_resolution": "model"})),
        digest(weights=files[1]),
    ]
    (root / "bottle/test/good/000.png").unlink()
    digests.append(digest())
    with next((root / "bottle/ground_truth/square").glob("*4_mask.png")).open("ab") as mask:
        mask.write(b"more")
    digests.append(digest())
    monkeypatch.setattr("training.reproduction.reproduce.sources_digest", lambda _: "of tomorrow")
    digests.append(digest())

    assert len(set(digests)) == len(digests)


def test_reproduce_when_stopped_keeps_what_is_finished_and_goes_on_where_it_stood(dataset, finished, tmp_path):
    """Ctrl-C in the second category's fitting leaves the first one's cell and a checkpoint; the result is the same."""
    watcher = _Watcher(stop_after=2)
    with pytest.raises(FitStopped):
        reproduce(_plan(dataset), _UNTRAINED, tmp_path, watcher)

    kept = [path.name for path in sorted(tmp_path.rglob("*.json")) if path.parent.name == "seed-1"]
    stood = list((tmp_path / "unfinished").iterdir())
    again = _Watcher()
    resumed = reproduce(_plan(dataset), _UNTRAINED, tmp_path, again)

    assert any("grid, seed 1, reconstruction" in name for name in watcher.figures)
    assert not any("grid, seed 1, reconstruction" in name for name in again.figures)  # both steps had been kept
    assert kept == ["bottle.json"]
    assert len(stood) == 1
    assert [cell.figures for cell in resumed] == [cell.figures for cell in finished[1]]
    assert not list((tmp_path / "unfinished").iterdir())


def test_reproduce_of_a_broken_category_goes_on_with_the_others(dataset, tmp_path):
    """One category's fault is told with its sentence and costs no other category."""
    root = shutil.copytree(dataset, tmp_path / "set")
    next((root / "bottle/train/good").iterdir()).write_bytes(b"no image")

    failed, fine = reproduce(_plan(root), _UNTRAINED, tmp_path / "out", SilentReporter())

    assert isinstance(failed, CellFailed)
    assert "Replace the file" in failed.sentence
    assert isinstance(fine, Cell)


def test_reproduce_tells_every_damaged_file_before_the_first_fit(dataset, tmp_path):
    """Who starts a work of hours hears in its first minute what its last category lacks, and can mend it till then."""
    root = shutil.copytree(dataset, tmp_path / "set")
    next((root / "grid/train/good").iterdir()).write_bytes(b"no image")
    watcher = _Watcher()

    fine, failed = reproduce(_plan(root), _UNTRAINED, tmp_path / "out", watcher)

    assert isinstance(fine, Cell)
    assert isinstance(failed, CellFailed)
    told = next(index for index, note in enumerate(watcher.notes) if note.startswith("grid can't be measured as it is"))
    assert told < watcher.notes.index("categories: 2")
    assert "Replace the file" in watcher.notes[told]


def test_reproduce_of_a_category_mended_while_another_is_fitted_measures_it(dataset, tmp_path):
    """What the first look refused is looked at again at its turn."""
    root = shutil.copytree(dataset, tmp_path / "set")
    damaged = next((root / "grid/train/good").iterdir())
    whole = damaged.read_bytes()
    damaged.write_bytes(b"no image")

    class Mender(_Watcher):
        def note(self, text):
            if text.startswith("grid can't be measured"):
                damaged.write_bytes(whole)

    assert all(isinstance(cell, Cell) for cell in reproduce(_plan(root), _UNTRAINED, tmp_path / "out", Mender()))


def test_reproduce_in_the_multi_class_setting_fits_one_model_for_all(dataset, tmp_path):
    """One cell holds the figures of every category, each measured on its own frames."""
    plan = _plan(dataset, "multi-class")
    watcher = _Watcher()

    (cell,) = reproduce(plan, _UNTRAINED, tmp_path, watcher)

    assert cell.frames == dict.fromkeys(("bottle", "grid"), (_GOOD, TEST_GOOD, DEFECTS))
    assert read_cell(cell_path(tmp_path, plan, plan.lines, 1)) == cell
    assert "categories: 2" in watcher.notes
    assert any(name.startswith("all, seed 1, test frames of grid") for name in watcher.figures)


def test_reproduce_on_mvtec_ad2_measures_seg_f1_at_a_threshold_of_its_validation_frames(tmp_path):
    """The threshold's frames are neither fitted on nor tested; both pages tell the figure and the rule behind it."""
    root = tmp_path / "ad2"
    write_mvtec_ad2_line(root / "vial", good=_GOOD, validation=3)
    plan, watcher = _plan(root), _Watcher()

    (cell,) = reproduce(plan, _UNTRAINED, tmp_path / "out", watcher)
    found = summarise(plan, [cell], "ad2", [])

    assert cell.frames == {"vial": (_GOOD, TEST_GOOD, DEFECTS)}
    assert 0 < cell.figures["vial"]["seg_f1"].value < cell.figures["vial"]["p_f1max"].value
    assert any(name.startswith("vial, seed 1, validation frames of vial") for name in watcher.figures)
    assert (found.data, found.means[0].ours.reason) == ("MVTec AD 2", "only 1 of 8 categories were run")
    for page in to_markdown(found), to_html(found):
        assert "SegF1" in page
        assert "mean + 3 standard deviations of the category" in page


def test_reproduce_on_mvtec_ad2_with_a_cell_from_before_seg_f1_measures_anew(tmp_path, monkeypatch):
    """A kept cell that lacks the figure is not taken for a whole one."""
    plan, watcher = _plan(write_mvtec_ad2_line(tmp_path / "vial", good=_GOOD, validation=3)), _Watcher()
    with monkeypatch.context() as earlier:
        earlier.setattr("training.reproduction.reproduce.needs_held_out", lambda _: False)
        reproduce(plan, _UNTRAINED, tmp_path / "out", SilentReporter())

    reproduce(plan, _UNTRAINED, tmp_path / "out", watcher)

    assert "vial, seed 1: is already measured" not in watcher.notes


def test_reproduce_on_mvtec_ad2_without_validation_frames_says_why_there_is_no_seg_f1(tmp_path):
    """No threshold is made of frames that were fitted on, and the other figures stand."""
    line = write_mvtec_ad2_line(tmp_path / "vial", good=_GOOD)
    shutil.rmtree(line / "validation")

    (cell,) = reproduce(_plan(line), _UNTRAINED, tmp_path / "out", SilentReporter())

    assert cell.figures["vial"]["seg_f1"].reason == "there is no held-out good frame to choose the threshold on"
    assert cell.figures["vial"]["aupro_at_0.05"].value is not None


@pytest.mark.parametrize(("detector", "models"), [("inp_former", 1), ("inp_former_pp", 1), ("dadf", 2)])
def test_plan_of_few_shots_has_as_many_models_as_the_paper(dataset, detector, models):
    """The few-shot setting of INP-Former and INP-Former++ fits one model for all categories; others one for each."""
    config = _brief().model_copy(update={"detector": detector})

    plan = _plan(dataset, "2-shot", config=config)

    assert plan.is_one_model == (models == 1)
    assert (plan.config_of(7).shots, plan.config_of(7).shot_seed, plan.config_of(7).seed) == (2, 7, 7)


def test_reproduce_in_a_few_shot_setting_fits_on_named_frames(dataset, tmp_path):
    """The cell names the frames; each is fitted on in its further views where the configuration asks for them."""
    config = _brief().model_copy(update={"shot_views": "inp_former"})

    (cell,) = reproduce(_plan(dataset, "1-shot", config=config), _UNTRAINED, tmp_path, SilentReporter())

    assert cell.frames == dict.fromkeys(("bottle", "grid"), (1, TEST_GOOD, DEFECTS))
    assert [len(names) for names in cell.shots.values()] == [1, 1]
    assert all(name.startswith("train/good/") for names in cell.shots.values() for name in names)


def test_plan_lines_with_a_wrong_category_names_those_there_are(dataset):
    """A misspelt category ends the command before anything is fitted."""
    with pytest.raises(DatasetFault, match="has no category botle; it has bottle, grid"):
        plan_lines(dataset, None, ["botle"])


def _cell(name, seed, **values):
    figures = {metric: MetricRecord(value=value) for metric, value in values.items()}
    return Cell(
        digest="d",
        setting="single-class",
        seed=seed,
        figures={name: figures},
        frames={name: (1, 1, 1)},
        shots={},
        backbone=None,
        device="cpu",
        fit_s=1.0,
        warnings=("a <b> | warning",),
        created_at="2026-11-22T00:00:00+00:00",
    )


def _whole_plan(tmp_path, detector="dadf", data="mvtec_ad", seeds=(1,), names=None):
    names = BENCHMARKS[data].categories if names is None else names
    lines = tuple(Category(name, tmp_path, BENCHMARKS[data].layouts[0]) for name in names)
    config = RunConfig.model_validate(TINY_RUN | {"detector": detector})
    return Plan(lines, data, True, "single-class", config, seeds)


def test_summarise_of_a_complete_set_puts_the_mean_beside_the_published_one(tmp_path):
    """The mean of every seed goes into the mean over seeds, with its spread, its source and the difference."""
    plan = _whole_plan(tmp_path, seeds=(1, 2))
    names = BENCHMARKS["mvtec_ad"].categories
    middle = len(names) // 2  # categories differ, so that no other mean is the same
    cells = [
        _cell(name, seed, i_auroc=0.9 + seed / 100 + (place - middle) / 1000)
        for seed in (1, 2)
        for place, name in enumerate(names)
    ]

    found = summarise(plan, cells, "mvtec", [])

    mean = next(row for row in found.means if row.metric == "i_auroc")
    assert mean.of == "mean over all 15 categories"
    assert mean.ours.value == pytest.approx(91.5)
    assert mean.ours.spread == pytest.approx(0.5**0.5)
    assert (mean.published, mean.source) == (98.3, "arXiv:2303.17882, abstract")
    assert any("best on the test frames" in text for text in mean.differs)
    row = ("mean over all 15 categories", "I-AUROC", "91.50 ± 0.71", "98.3", "-6.80", mean.source)
    assert comparison_rows([mean]) == [row]
    assert dict(zip(COMPARISON_COLUMNS, row, strict=True))["ours minus published"] == "-6.80"


@pytest.mark.parametrize("setting", ["single-class", "multi-class", "2-shot"])
@pytest.mark.parametrize("detector", sorted(DETECTORS))
def test_summarise_when_a_paper_has_several_settings_then_compares_with_that_of_the_run(tmp_path, detector, setting):
    """One model for each category is easier than one for all, so figures of another setting say nothing of ours."""
    plan = replace(_whole_plan(tmp_path, detector=detector), setting=setting)
    of_setting = [row for row in read_published()[detector].figures if (row.data, row.setting) == (plan.data, setting)]

    found = summarise(plan, [], "mvtec", [])

    shown = {(row.metric, row.published) for row in (*found.means, *found.by_category) if row.published is not None}
    assert shown == {value for row in of_setting for value in row.values.items()}
    of_all = {row.metric: row.published for row in found.means if row.of == "mean over all 15 categories"}
    published = {
        metric: value for row in of_setting[::-1] if not row.categories for metric, value in row.values.items()
    }
    assert {metric: value for metric, value in of_all.items() if value is not None} == published


@pytest.mark.parametrize(
    ("names", "cells", "reason"),
    [
        (["bottle"], ["bottle"], "only 1 of 15 categories were run"),
        (None, BENCHMARKS["mvtec_ad"].categories[:-1], "zipper: was not run"),
    ],
    ids=["restricted", "one failed"],
)
def test_summarise_of_a_part_has_no_mean(tmp_path, names, cells, reason):
    """A mean over some categories is nobody's figure; it is not defined, and says why."""
    plan = _whole_plan(tmp_path, names=names)

    found = summarise(plan, [_cell(name, 1, i_auroc=0.9) for name in cells], "mvtec", [])

    assert [row.ours.value for row in found.means] == [None] * len(found.means)
    assert found.means[0].ours.reason == reason
    assert str(found.means[0].ours) == f"not defined: {reason}"
    assert next(row for row in found.by_category if row.metric == "i_auroc").ours.value == 90


def test_summarise_of_a_published_part_compares_that_part(tmp_path):
    """Where a paper's mean is over five textures, ours is over the same five, whatever else was run."""
    textures = ("carpet", "grid", "leather", "tile", "wood")
    plan = _whole_plan(tmp_path, names=textures, detector="inp_former")
    plan = Plan(
        plan.lines, plan.data, False, plan.setting, plan.config.model_copy(update={"detector": "rb_ae"}), plan.seeds
    )

    found = summarise(plan, [_cell(name, 1, i_auroc=0.9, p_auroc=0.8) for name in textures], "mvtec", [])

    part = [row for row in found.means if row.of == "mean over carpet, grid, leather, tile, wood"]
    assert {(row.metric, round(row.ours.value), row.published) for row in part} == {
        ("i_auroc", 90, 98.81),
        ("p_auroc", 80, 98.54),
    }


def test_summarise_of_a_plants_own_set_compares_with_nothing(dataset, finished):
    """Without a published data set, the mean is over the folder and no published figure appears."""
    plan = _plan(dataset)
    plan = Plan(plan.lines, None, True, plan.setting, plan.config, plan.seeds)

    found = summarise(plan, finished[1], "ours", [])

    assert found.data == "ours"
    assert all(row.published is None for row in (*found.means, *found.by_category))
    assert found.means[0].ours.value is not None
    assert found.means[0].of == "mean over all 2 categories"


def test_pages_tell_ours_published_differences_and_failures(tmp_path):
    """Both pages hold the same cells; markup in a sentence stays text."""
    plan = _whole_plan(tmp_path, names=["carpet", "grid"])
    failed = CellFailed(categories=("grid",), seed=1, sentence="grid is <broken>.")
    found = summarise(plan, [_cell("carpet", 1, i_auroc=0.912), failed], "m", ["The configuration is small."])

    pages = to_markdown(found), to_html(found)

    assert [row.ours.reason for row in found.by_category if row.of == "grid"] == ["grid is <broken>."] * len(
        found.means
    )
    for page in pages:
        assert all(text in page for text in ("DADF on MVTec AD, single-class", "91.20", "98.3", "The configuration is"))
        assert "grid is &lt;broken" in page
        assert "was not measured here" in page
    assert "a &lt;b> \\| warning" in pages[0]
    assert "<script" not in pages[1]


def test_pages_tell_what_a_spread_is_and_name_the_figures_of_kinds(tmp_path):
    """No reader has to guess what stands behind the sign, nor what an identifier means."""
    kinds = {f"{figure}_{kind}_anomalies": 0.5 for figure in ("spro", "i_auroc") for kind in ("logical", "structural")}
    plan = _whole_plan(tmp_path, data="mvtec_loco", seeds=(1, 2), names=["pushpins"])
    cells = [_cell("pushpins", seed, spro=0.5, i_auroc=seed / 4, **kinds) for seed in (1, 2)]

    several = summarise(plan, cells, "loco", [])
    one = summarise(replace(plan, seeds=(1,)), cells[:1], "loco", [])

    for page in to_markdown(several), to_html(several):
        assert "“±” the standard deviation between them" in page
        for title in ("I-AUROC, logical anomalies", "I-AUROC, structural anomalies", "sPRO@0.05, logical anomalies"):
            assert title in page
        assert "_anomalies" not in page
    assert "±" not in to_markdown(one)


def test_summarise_of_mvtec_ad2_with_an_older_cell_leaves_out_the_figure_of_lights(tmp_path):
    """The frames of a piece are lights there, and nobody publishes a figure of them together."""
    lights, views = (
        summarise(_whole_plan(tmp_path, data=data, names=[name]), [_cell(name, 1, i_auroc=0.9, s_auroc=0.8)], data, [])
        for data, name in (("mvtec_ad2", "vial"), ("real_iad", "toy"))
    )

    assert [row.metric for row in views.by_category] == ["i_auroc", "s_auroc"]
    assert "s_auroc" not in {row.metric for row in (*lights.means, *lights.by_category)}


def test_differences_of_configuration_tell_every_option_that_leaves_the_paper():
    """The paper's own configuration differs in nothing; everything else is said."""
    assert differences_of_configuration("paper", [], {}) == []
    assert differences_of_configuration("small", ["seed=3"], {"Weights": "random"}) == [
        "The configuration is small, not the paper's.",
        "Changed by hand: seed=3.",
        "Weights: random.",
    ]


@pytest.mark.parametrize(
    ("detector", "words"),
    [
        ("glcf", ["local branch alone", "along a cosine", "commented out"]),
        ("jigsaw_svdd", ["cable, takes 1", "stride of 8", "coreset", "5 neighbours", "120,000 of 130,400"]),
        ("inp_former_pp", ["two transposed convolutions", "averaged over channels", "DTD", "trained first"]),
    ],
)
def test_summarise_tells_where_the_method_is_not_its_authors(tmp_path, detector, words):
    """Who reads ours beside published learns what was chosen or changed, on every page."""
    plan = _whole_plan(tmp_path, detector=detector)

    found = summarise(plan, [_cell("carpet", 1, i_auroc=0.9)], "mvtec", [])

    for page in (to_markdown(found), to_html(found)):
        assert [word for word in words if word not in page] == []


def test_summarise_when_no_difference_of_the_method_is_known_then_says_so(tmp_path, monkeypatch):
    """An empty list is told, so that it can't be taken for a method that nobody compared."""
    same = read_published()["dadf"].model_copy(update={"differs": ()})
    monkeypatch.setattr("training.reproduction.pages.read_published", lambda: {"dadf": same})

    found = summarise(_whole_plan(tmp_path), [_cell("carpet", 1, i_auroc=0.9)], "mvtec", [])

    assert "No difference between the method here and its authors' is known." in found.differences


def test_published_detectors_must_name_their_differences():
    """A detector of whose method nothing is said is refused; each sentence ends as one and stands once."""
    silent = read_published()["glcf"].model_dump(exclude={"differs"})
    with pytest.raises(ValidationError, match="differs"):
        PublishedDetector.model_validate(silent)

    for detector in read_published().values():
        rows = {text for row in detector.figures for text in row.differs}
        assert all(text.endswith(".") for text in {*detector.differs, *rows})
        assert len(set(detector.differs) | rows) == len(detector.differs) + len(rows)


def test_published_figures_name_known_sets_categories_and_metrics():
    """Every row can be compared: its data set, categories and figures exist here, and no row stands twice."""
    known = {"i_auroc", "i_ap", "i_f1max", "p_auroc", "p_ap", "p_f1max", "aupro", "spro", "i_auroc_of_kinds"}

    published = read_published()

    assert set(DETECTORS) <= set(published)
    for detector in published.values():
        rows = [(row.data, row.setting, row.categories) for row in detector.figures]
        assert len(set(rows)) == len(rows)
        for row in detector.figures:
            assert set(row.values) <= known
            assert set(row.categories) <= set(BENCHMARKS[row.data].categories)
        assert detector.figures or detector.remark


@pytest.mark.parametrize("detector", sorted(read_published()))
def test_published_figures_stand_in_the_methods_specification(detector):
    """No figure is from memory: each stands in the specification of its method, as percent or as a share."""
    text = (require_shared("methods") / f"{detector}.md").read_text()
    stated = {float(number) for number in re.findall(r"\d+(?:\.\d+)?", text)}

    values = [value for row in read_published()[detector].figures for value in row.values.values()]

    assert [v for v in values if v not in stated and round(v / 100, 4) not in stated] == []


@pytest.mark.parametrize("text", ["", "1,1", "one", "-1", "1;2"])
def test_split_seeds_of_nonsense_says_what_is_wanted(text):
    """Seeds are different whole numbers."""
    with pytest.raises(ParameterInvalid, match="different whole numbers"):
        split_seeds(text)


@pytest.mark.parametrize(
    ("setting", "settings", "batch"),
    [
        ("single-class", (), 8),
        ("multi-class", (), 16),
        ("2-shot", (), 1),
        ("2-shot", ("hyperparameters.recipe.batch_size=4",), 4),
    ],
    ids=["single-class", "multi-class", "2-shot", "changed by hand"],
)
def test_reproduce_paper_takes_the_batch_of_the_papers_setting(
    dataset, tmp_path, monkeypatch, setting, settings, batch
):
    """AMI-Net's batch is another one in each setting, and what somebody sets by hand comes last."""
    asked = []
    monkeypatch.setattr("training.commands.reproduce_jobs.reproduce", lambda plan, *_: asked.append(plan) or [])
    wishes = ReproductionWishes((), "paper", setting, (1,), tmp_path, None, None, "cpu", settings)

    reproduce_paper("ami_net", dataset, wishes, None)

    assert asked[0].config_of(1).hyperparameters["recipe"]["batch_size"] == batch


def _invoke(*arguments):
    return CliRunner().invoke(commands, ["reproduce", *map(str, arguments)])


def test_reproduce_command_writes_tables_and_goes_on(dataset, finished, tmp_path):
    """The command reads kept cells, writes JSON, Markdown and HTML, and prints ours beside published."""
    output = shutil.copytree(finished[0], tmp_path / "out")
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(_brief().model_dump(mode="json")))

    answer = _invoke(
        "inp_former",
        dataset,
        "--config",
        config,
        "--setting",
        "single-class",
        "--weights",
        "untrained",
        "--device",
        "cpu",
        "--output",
        output,
    )

    assert answer.exit_code == 0, answer.output
    assert answer.output.count("is already measured") == 2
    assert "only 2 of 15 categories were run" in answer.output
    assert "Backbone weights: random, not pretrained." in answer.output
    written = json.loads((output / "reproduction.json").read_text())
    assert written["data"] == "MVTec AD"
    assert {row["published"] for row in written["means"] if row["metric"] == "i_auroc"} == {99.7}
    assert "| bottle |" in (output / "reproduction.md").read_text()
    assert (output / "reproduction.html").read_text().startswith("<!doctype html>")


def test_reproduce_command_when_zero_shot_is_asked_for_then_tells_the_published_figure_and_the_way(dataset):
    """One data set can't give a zero-shot figure; the sentence says what was published and which commands do it."""
    answer = _invoke("inp_former", dataset, "--setting", "zero-shot")

    said = " ".join(answer.output.split())
    assert answer.exit_code == 2
    assert "flawline export RUN --zero-shot" in said
    assert "Published on mvtec_ad: i_auroc 80.8" in said


def test_reproduce_command_with_a_failed_category_ends_with_one(dataset, tmp_path):
    """A script learns that something is missing, and the tables are written all the same."""
    root = shutil.copytree(dataset, tmp_path / "set")
    next((root / "bottle/train/good").iterdir()).write_bytes(b"no image")
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(_brief().model_dump(mode="json")))

    answer = _invoke(
        "inp_former",
        root,
        "--config",
        config,
        "--categories",
        "bottle",
        "--setting",
        "single-class",
        "--weights",
        "untrained",
        "--output",
        tmp_path / "out",
    )

    assert answer.exit_code == 1
    assert "Replace the file" in (tmp_path / "out/reproduction.md").read_text()


def test_comparison_when_a_published_figure_ends_in_zero_then_is_told_with_its_decimal():
    """71.0 of a paper is known to a tenth; 71 would look as if it were not."""
    rows = comparison_rows([Comparison(of="a", metric="p_ap", ours=Figure(value=None, reason="why"), published=71.0)])

    assert rows[0][3] == "71.0"
