"""Promises of a comparison: every cell is measured once, beside a control that learnt nothing; one page shows all."""

import dataclasses
import hashlib
import html
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file

from models import DETECTORS, build_detector
from models.backbones import untrained_weights
from models.detector import Recipe
from service.contract.bundle import MetricRecord, load_bundle
from service.errors import ParameterInvalid, UnreadableFrame
from tests.factories import encode, make_frame, make_graph
from tests.tiny_detectors import TINY
from tests.tiny_line import DEFECTS, TEST_GOOD, make_config, write_line
from training.backbones.weights import UNTRAINED, resolve_weights
from training.commands.compare_jobs import Wishes, compare_detectors
from training.comparison import compare
from training.comparison.compare import (
    Cell,
    CellFailed,
    CellPlan,
    Means,
    _digest,
    auroc_resamples,
    cell_directory,
    complete,
    control_of,
    count_parameters,
    data_digest,
    keep_cell,
    read_cells,
    sources_digest,
)
from training.comparison.page import (
    TABLE_COLUMNS,
    Result,
    Settings,
    _means,
    as_good_as_best,
    pair_controls,
    ranked,
    render_comparison,
    stands_above_control,
    table_rows,
)
from training.comparison.speed import GraphSpeed, measure_speed
from training.config import ConfigFault, RunConfig
from training.data.samples import DatasetFault
from training.measuring.metrics import auroc
from training.measuring.peaks import mask_without_rim
from training.progress import SilentReporter
from training.reporting.page_data import VerdictRow


def _tiny(variant):
    """Return the run of a tiny detector whose descents are cut to two steps, and its decoder to one block."""
    own = TINY[variant]
    brief = {
        field.name: dataclasses.replace(getattr(own, field.name), iterations=2, epochs=None, warmup_iterations=0)
        for field in dataclasses.fields(own)
        if isinstance(getattr(own, field.name), Recipe)
    }
    shallow = {"decoder_blocks": 1} if hasattr(own, "decoder_blocks") else {}
    values = json.loads(json.dumps(dataclasses.asdict(dataclasses.replace(own, **brief, **shallow))))
    side = values["image_size"][0]
    derived = {"backbone", "image_size", "lines", "seed"}
    return RunConfig.model_validate(
        {
            "detector": variant.partition("-")[0],
            "backbone": values.get("backbone"),
            "product": "texture",
            "input": {"height": side, "width": side, "resize_height": side, "resize_width": side},
            "hyperparameters": {key: value for key, value in values.items() if key not in derived},
            "hold_out": {"fraction": 0.5},
            "golden_frames": 4,
        }
    )


def _cell(good, defective, **fields):
    values = {
        "digest": "0",
        "detector": "inp_former",
        "line": "bottle",
        "kind": "fitted",
        "seed": 1,
        "backbone": None,
        "metrics": {
            "i_auroc": MetricRecord(value=auroc([*good, *defective], [0] * len(good) + [1] * len(defective)).value),
            "i_ap": MetricRecord(value=0.9),
            "p_auroc": MetricRecord(value=None, reason="the line has image labels only, no masks"),
            "aupro": MetricRecord(value=None, reason="the line has image labels only, no masks"),
        },
        "good_scores": tuple(good),
        "defect_scores": tuple(defective),
        "fit_s": 100.0,
        "total_s": 120.0,
        "trainable_parameters": 1_000_000,
        "parameters": 2_000_000,
        "speed": None,
        "model_bytes": 2**20,
        "bundle_bytes": 2**21,
        "bundle": None,
        "created_at": "2026-11-22T10:00:00+00:00",
    }
    return Cell.model_validate(values | fields)


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    """A line with masks."""
    return write_line(tmp_path_factory.mktemp("lines") / "bottle")


@pytest.fixture(scope="module")
def compared(line, tmp_path_factory):
    """One detector, its control, and one that can't be fitted because its wishes are beyond 24 good parts."""
    mask = tmp_path_factory.mktemp("masks") / "bottle.png"
    mask.write_bytes(encode(mask_without_rim((72, 80), (0.0, 0.0, 1.0, 1.0))))
    fitted = CellPlan("bottle", line, _tiny("inp_former-cnn"), region_of_interest=mask)
    greedy = CellPlan("bottle", line, _tiny("st_mae").model_copy(update={"fail_rate": 1e-4}))
    plans = [fitted, control_of(fitted), greedy]
    weights = tmp_path_factory.mktemp("weights") / "mine.safetensors"
    save_file(untrained_weights(fitted.config.backbone, seed=5), weights)
    means = Means(tmp_path_factory.mktemp("cells"), weights=weights, device="cpu", speed_s=0.0)
    return plans, means, list(complete(plans, means, SilentReporter()))


def test_complete_when_a_cell_is_measured_then_it_tells_accuracy_time_and_size(compared):
    """A cell holds every figure of the table, and a bundle that the service would accept."""
    plans, means, (cell, *_) = compared

    assert (cell.detector, cell.line, cell.kind) == ("inp_former", "bottle", "fitted")
    assert (len(cell.good_scores), len(cell.defect_scores)) == (TEST_GOOD, DEFECTS)
    assert all(cell.metrics[name].value is not None for name in ("i_auroc", "i_ap", "p_auroc", "aupro"))
    assert 0 < cell.trainable_parameters < cell.parameters
    assert 0 < cell.fit_s < cell.total_s
    assert cell.total_cpu_s is not None
    assert cell.total_cpu_s > 0
    assert cell.speed.cpu_ms > 0
    assert cell.bundle_bytes > cell.model_bytes > 0
    assert load_bundle(cell_directory(means.folder, plans[0]) / cell.bundle).manifest.detector == "inp_former"


def test_complete_when_a_region_of_interest_is_given_then_the_cell_is_of_that_region(compared):
    """Detectors are compared on what will be inspected, and a figure of all of the frame is another one."""
    plans, means, (cell, *_) = compared
    bundle = load_bundle(cell_directory(means.folder, plans[0]) / cell.bundle)

    assert bundle.policies["bottle"].region_of_interest is not None
    assert _digest(plans[0], means) == cell.digest
    assert _digest(dataclasses.replace(plans[0], region_of_interest=None), means) != cell.digest


def test_complete_when_a_cell_is_a_control_then_its_backbone_is_untrained_whatever_weights_are_given(compared):
    """A control with trained features would make every detector look as if it had learnt little."""
    plans, means, (cell, control, *_) = compared
    untrained = resolve_weights(plans[1].config.backbone, UNTRAINED, seed=plans[1].config.seed)

    assert cell.backbone_digest == hashlib.sha256(means.weights.read_bytes()).hexdigest()
    assert control.backbone_digest == untrained.digest


def test_digest_when_anything_that_a_cell_depends_on_is_another_then_so_is_the_cell(line, tmp_path, monkeypatch):
    """No figure is shown of other frames, weights, sources or seeds than those that it was measured with."""
    plan, means = CellPlan("bottle", line, _tiny("inp_former-cnn")), Means(tmp_path)
    files = []
    for seed in (1, 2):
        files.append(tmp_path / f"{seed}.safetensors")
        save_file(untrained_weights(plan.config.backbone, seed), files[-1])
    other = shutil.copytree(line, tmp_path / "bottle")
    (other / "test/good/000.png").write_bytes(encode(make_frame(72, 80, seed=900)))
    first = dataclasses.replace(means, weights=files[0])

    digests = [
        _digest(plan, first),
        _digest(dataclasses.replace(plan, folder=other), first),
        _digest(dataclasses.replace(plan, kind="control"), first),
        _digest(dataclasses.replace(plan, config=plan.config.model_copy(update={"seed": 3})), first),
        _digest(plan, dataclasses.replace(means, weights=files[1])),
    ]
    monkeypatch.setattr("training.comparison.compare.sources_digest", lambda _: "of tomorrow")
    digests.append(_digest(plan, first))

    assert len(set(digests)) == len(digests)
    assert _digest(control_of(plan), first) == _digest(control_of(plan), dataclasses.replace(means, weights=files[1]))


def test_complete_when_a_cell_is_a_control_then_its_bundle_is_not_kept(compared):
    """Nobody may serve a detector that learnt nothing."""
    plans, means, (_, control, *_) = compared

    assert control.bundle is None
    assert list(cell_directory(means.folder, plans[1]).iterdir()) == [
        cell_directory(means.folder, plans[1]) / "cell.json"
    ]


class _Notes(SilentReporter):
    """Keeps what was said."""

    def __init__(self):
        self.said = []

    def note(self, text):
        """Keep a sentence."""
        self.said.append(text)


def test_complete_when_the_rim_sets_the_thresholds_then_the_mask_that_is_named_lies_there_and_works(
    line, tmp_path, monkeypatch
):
    """What is proposed can be done: the run is gone by then, and measuring with the mask must not remove it."""
    monkeypatch.setattr(
        "training.measuring.peaks.Peaks.gather_at_rim", property(lambda peaks: peaks.everything_inspected)
    )
    plan, means, told = (
        CellPlan("bottle", line, _tiny("inp_former-cnn")),
        Means(tmp_path, weights="untrained"),
        _Notes(),
    )

    next(complete([plan], dataclasses.replace(means, device="cpu", speed_s=0.0), told))

    (sentence,) = [text for text in told.said if "the rim sets the thresholds" in text]
    assert "flawline export" not in sentence
    name, mask = re.search(r"flawline compare with --roi (\w+)=(\S+)$", sentence).groups()
    again = dataclasses.replace(plan, region_of_interest=Path(mask))
    (cell,) = complete([again], dataclasses.replace(means, device="cpu", speed_s=0.0), told)
    bundle = load_bundle(cell_directory(means.folder, again) / cell.bundle)
    assert bundle.policies[name].region_of_interest is not None
    assert Path(mask).exists()


def test_cell_directory_when_configurations_of_one_detector_differ_then_each_has_a_place_and_a_title():
    """Two configurations of one detector on one line do not overwrite each other."""
    plain = CellPlan("bottle", Path(), make_config())
    other = dataclasses.replace(plain, variant="other backbone")
    kept = _cell([0.0], [1.0]).model_copy(update={"variant": other.variant})

    assert cell_directory(Path(), plain) == Path("bottle/inp_former/fitted-1")
    assert cell_directory(Path(), other) == Path("bottle/inp_former+other_backbone/fitted-1")
    assert kept.title == "inp_former, other backbone"


def test_complete_when_one_cell_fails_then_the_others_are_measured_and_the_fault_is_told(compared):
    """A comparison of ten detectors does not end with the first fault."""
    _, _, outcomes = compared

    assert [isinstance(outcome, CellFailed) for outcome in outcomes] == [False, False, True]
    assert "good" in outcomes[2].sentence


def test_complete_when_asked_again_then_a_cell_is_read_until_something_that_it_depends_on_changes(compared, tmp_path):
    """Equal plans cost nothing; another configuration is measured anew, and here that fails."""
    plans, shared, before = compared
    # A folder of its own: what is measured anew takes the old cell's place, and other tests look at the old ones.
    means = dataclasses.replace(shared, folder=shutil.copytree(shared.folder, tmp_path / "cells"))
    changed = dataclasses.replace(plans[0], config=plans[0].config.model_copy(update={"fail_rate": 1e-4}))

    *kept, again = complete([*plans[:2], changed], means, SilentReporter())

    assert kept == before[:2]
    assert isinstance(again, CellFailed)


@pytest.mark.parametrize("variant", sorted(TINY))
def test_control_when_made_then_descents_have_no_step_and_all_else_is_equal(line, variant):
    """A control differs from its detector in what was learnt, and in nothing else."""
    plan = CellPlan("bottle", line, _tiny(variant))

    control = control_of(plan)

    own, fitted = control.config.detector_config(), plan.config.detector_config()
    for field in dataclasses.fields(own):
        value, expected = getattr(own, field.name), getattr(fitted, field.name)
        if isinstance(value, Recipe):
            expected = dataclasses.replace(expected, iterations=0, epochs=None)
        assert value == expected
    assert control.kind == "control"


def test_count_parameters_when_a_backbone_is_frozen_then_only_all_parameters_hold_it():
    """What a descent changes is told apart from what the network consists of."""
    config = _tiny("inp_former-cnn")
    parts = build_detector(config.detector, config.detector_config()).named_parameters()
    numbers = [(name.startswith("backbone."), parameter.numel()) for name, parameter in parts]

    trainable, every = count_parameters(config)

    assert trainable == sum(count for is_frozen, count in numbers if not is_frozen)
    assert every == sum(count for _, count in numbers)


def test_sources_digest_when_detectors_differ_then_it_differs():
    """A cell depends on its own detector's code."""
    digests = {name: sources_digest(name) for name in DETECTORS}

    assert len(set(digests.values())) == len(DETECTORS)
    assert digests == {name: sources_digest(name) for name in DETECTORS}


def test_sources_digest_when_code_that_a_detector_imports_changes_then_so_does_it(monkeypatch):
    """A block is as much of a detector as its own file; what is said about it is not."""
    read = compare._source
    sources = {}

    def source(module):
        sources.setdefault(module, read(module))
        return sources[module]

    monkeypatch.setattr(compare, "_source", source)
    before = sources_digest("inp_former")
    block = next(module for module in sources if module.startswith("models.blocks."))

    sources[block] += b"\n# a comment\n"
    assert sources_digest("inp_former") == before
    sources[block] += b"\nANOTHER = 1\n"
    assert sources_digest("inp_former") != before


def test_resamples_when_drawn_then_they_lie_round_the_figure():
    """The draws' mean is the AUROC, and equal seeds draw equal frames."""
    rng = np.random.default_rng(0)  # rounded, so that there are ties
    cell, other = (
        _cell(rng.normal(0, 1, 60).round().tolist(), rng.normal(1, 1, 50).round().tolist()) for _ in range(2)
    )

    draws = auroc_resamples([cell])

    assert abs(draws.mean() - cell.metrics["i_auroc"].value) < 0.01
    np.testing.assert_array_equal(draws, auroc_resamples([cell]))
    of_both = (draws + auroc_resamples([other])) / 2
    np.testing.assert_allclose(auroc_resamples([cell, other]), of_both)


@pytest.mark.parametrize(("gain", "expected"), [(2.0, True), (0.0, False)], ids=["clearly better", "no better"])
def test_stands_above_control_when_test_frames_decide_then_tells_noise_from_gain(gain, expected):
    """A detector within the noise of its untrained self is said to be so."""
    good = np.linspace(0, 1, 40).tolist()
    control = _cell(good, good, kind="control")
    fitted = _cell(good, [score + gain for score in good])

    result = Result(CellPlan("bottle", Path(), make_config()), fitted, control)

    assert stands_above_control(result) is expected


def _result(detector, cell):
    plan = CellPlan("bottle", Path(), make_config().model_copy(update={"detector": detector}))
    return Result(plan, None if cell is None else cell.model_copy(update={"detector": detector}))


def test_as_good_as_best_when_bands_overlap_then_the_frames_that_both_saw_decide():
    """A detector that is behind on the very same frames is told apart, though its own interval meets the best one's."""
    rng = np.random.default_rng(3)
    good, hard = rng.normal(0, 1, 20), rng.normal(1.5, 1.2, 20)
    best = _cell(good.tolist(), hard.tolist())
    behind = _cell((good + rng.normal(0, 0.1, 20)).tolist(), (hard - 0.6).tolist())
    twin = _cell((good + rng.normal(0, 0.05, 20)).tolist(), hard.tolist())
    results = [_result("dadf", best), _result("glcf", twin), _result("grnr", behind), _result("st_mae", None)]

    assert ranked(behind).bounds[1] > ranked(best).bounds[0]
    assert as_good_as_best(results) == ["glcf"]


def test_table_and_best_when_test_frames_are_few_then_nothing_is_certain():
    """Three defects in order prove little, and neither the runner-up nor the untrained one is told apart by them."""
    best = _cell([0.0, 1.0, 2.0], [3.0, 4.0, 5.0])
    behind = _cell([0.0, 1.0, 2.0], [-1.0, 0.5, -2.0])
    results = [_result("dadf", best), _result("glcf", behind)]

    assert [row[1:3] for row in table_rows(results)] == [("100.0\u00a0%", "29.2 to 100.0"), ("11.1\u00a0%", "-")]
    assert as_good_as_best(results) == ["glcf"]
    assert stands_above_control(dataclasses.replace(results[0], control=behind)) is False


def test_page_when_rendered_then_shows_every_detector_beside_each_other_and_needs_nothing_else(compared):
    """Figures, faults and the same frames by every detector stand on one page that loads nothing."""
    plans, means, outcomes = compared
    twin = dataclasses.replace(plans[0], config=_tiny("glcf"))
    shutil.copytree(cell_directory(means.folder, plans[0]), cell_directory(means.folder, twin))
    results = pair_controls(outcomes, plans)
    results.append(Result(twin, outcomes[0].model_copy(update={"detector": "glcf"})))

    settings = Settings("small", ("hyperparameters.recipe.iterations=3", "review_rate=0.2"), "random")
    page = render_comparison(results, means.folder, settings)

    sources = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)""", page)
    shown = 3 + 2  # of the one kind of defect the middle, hardest and clearest; of good frames the worst and the middle
    assert len(sources) == shown * 3
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert not re.search(r"<script|<link|@import|@font-face|https?://", page)
    assert outcomes[2].sentence.split(";")[0] in page
    # Who reads the page months later can tell how its figures came about, and make them again.
    assert all(f"<code>{change}</code>" in page for change in settings.changes)
    assert f"<code>{data_digest(plans[0].folder, None)}</code>" in page
    assert f"<code>{hashlib.sha256(plans[0].region_of_interest.read_bytes()).hexdigest()}</code>" in page
    assert f"<code>{outcomes[0].git_revision or 'not known'}</code>" in page
    assert html.escape(plans[0].config.to_yaml(), quote=False) in html.unescape(page)
    assert {"glcf", "inp_former"} <= set(re.findall(r'<div class="head">(\w+)</div>', page))


def test_table_when_a_detector_failed_then_it_is_told_after_the_others(compared):
    """The best detector comes first, and a fault is a row too."""
    plans, _, outcomes = compared

    rows = table_rows(pair_controls(outcomes, plans))

    assert [row[0] for row in rows] == ["inp_former", "st_mae"]
    assert rows[1][1].startswith("failed: ")


def test_table_when_shown_then_every_figure_stands_under_its_name():
    """Nobody takes the share of stopped good parts for that of found defects."""
    figures = {name: MetricRecord(value=value) for name, value in (("i_ap", 0.81), ("p_auroc", 0.82), ("aupro", 0.83))}
    cell = _cell([0.0, 1.0, 2.0, 3.0], [4.0, 2.5, 5.0, 6.0])
    rows = [
        ("good, held out", True, 0, 0, 9),
        ("good", True, 6, 3, 1),
        ("dent", False, 1, 1, 1),
        ("cut", False, 0, 0, 1),
    ]
    verdicts = tuple(
        VerdictRow(kind=kind, is_good=is_good, passed=passed, review=review, failed=failed)
        for kind, is_good, passed, review, failed in rows
    )
    speed = GraphSpeed(cpu_ms=12.5, wall_ms=99.0, repeats=15, cpu="a", operators=())
    update = {"metrics": cell.metrics | figures, "verdicts": verdicts, "speed": speed}
    control = _cell([0.0, 1.0, 2.0, 3.0], [0.5, 1.5, 2.5, 3.5], kind="control")

    (row,) = table_rows([dataclasses.replace(_result("dadf", cell.model_copy(update=update)), control=control)])

    told = {name: text.replace("\u00a0", " ") for name, text in zip(TABLE_COLUMNS, row, strict=True)}
    assert told.pop("95 %") == "-"
    assert told == {
        "detector": "dadf",
        "I-AUROC": "93.8 %",
        "control": "62.5 %",
        "I-AP": "81.0 %",
        "P-AUROC": "82.0 %",
        "AUPRO": "83.0 %",
        "defects stopped": "75.0 %",
        "good stopped": "40.0 %",
        "fit": "2 min",
        "trained / all": "1.00 M / 2.00 M",
        "graph": "1.0 MiB",
        "ms a frame": "12.5",
    }


def test_means_when_a_detector_lacks_a_line_then_it_has_none():
    """A mean over fewer lines is another figure, and the easiest line alone would win."""
    good = [0.0, 1.0, 2.0, 3.0]
    found = {("dadf", "bottle"): [2.5, 4.0], ("dadf", "cap"): [1.5, 4.0], ("grnr", "bottle"): [4.0, 5.0]}
    found |= {("glcf", "bottle"): [2.5, 4.0], ("glcf", "cap"): [4.0, 5.0]}
    results = []
    for (detector, line), defective in found.items():
        of_line = _result(detector, _cell(good, defective, line=line))
        results.append(dataclasses.replace(of_line, plan=dataclasses.replace(of_line.plan, line=line)))

    means = [(name, of, pytest.approx(mean)) for name, of, mean in _means(results)]

    assert means == [
        ("glcf", {"bottle": 0.875, "cap": 1.0}, 0.9375),
        ("dadf", {"bottle": 0.875, "cap": 0.75}, 0.8125),
    ]


def test_pair_controls_when_there_are_several_lines_and_detectors_then_each_has_its_own():
    """A detector is held against the control on the very line, of the very method."""
    plans, cells = [], []
    for line in ("bottle", "cap"):
        for detector in ("inp_former", "dadf"):
            for kind in ("fitted", "control"):
                config = make_config().model_copy(update={"detector": detector})
                plans.append(CellPlan(line, Path(), config, kind=kind))
                cells.append(_cell([0.0], [1.0], line=line, detector=detector, kind=kind))

    results = pair_controls(cells[::-1], plans[::-1])

    assert len(results) == 4
    for result in results:
        of = (result.plan.line, result.plan.config.detector)
        assert (result.cell.line, result.cell.detector, result.cell.kind) == (*of, "fitted")
        assert (result.control.line, result.control.detector, result.control.kind) == (*of, "control")


def test_read_cells_when_a_file_is_of_another_kind_then_it_is_passed_over(tmp_path):
    """A damaged or foreign file costs one cell, not the comparison."""
    keep_cell(tmp_path / "a", _cell((0.0, 1.0), (2.0,)))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "cell.json").write_text('{"digest": 1}')

    cells = read_cells(tmp_path)

    assert [cell.detector for cell in cells] == ["inp_former"]


def test_speed_when_measured_then_operators_share_all_of_the_time():
    """A frame has a price, and the operators' shares of it add up."""
    speed = measure_speed(make_graph(), make_frame(32, 48)[None], least_s=0.0)

    assert speed.cpu_ms > 0
    assert speed.repeats == 15
    assert abs(sum(operator.share for operator in speed.operators) - 1) < 1e-6


@pytest.mark.parametrize(
    ("lines", "fault"),
    [(["a=lines/bottle", "a=lines/cap"], ParameterInvalid), (["no name=lines/x"], ParameterInvalid)],
    ids=["one name twice", "a name that is none"],
)
def test_compare_when_lines_are_misnamed_then_says_so_before_any_work(tmp_path, lines, fault):
    """A mistake in the options costs seconds."""
    with pytest.raises(fault):
        compare_detectors(Wishes(lines, None, "small", tmp_path, None, False, "cpu", ()), 1)


@pytest.mark.parametrize(
    ("layout", "fault", "sentence"),
    [("cap=visa", ParameterInvalid, "there is no --line cap"), ("bottle=none", DatasetFault, "There is no layout")],
    ids=["another line", "no layout"],
)
def test_compare_when_a_layout_is_given_then_the_line_is_read_by_it(tmp_path, layout, fault, sentence):
    """A folder that could be read in several ways is read in the one that is said."""
    folder = write_line(tmp_path / "bottle")
    wishes = Wishes([str(folder)], "inp_former", "small", tmp_path, None, False, "cpu", (), layouts=(layout,))

    with pytest.raises(fault, match=sentence):
        compare_detectors(wishes, 1)


def test_compare_when_a_setting_fits_one_detector_and_not_another_then_names_the_other(tmp_path):
    """Of several detectors nobody can guess which one does not know a key."""
    folder = write_line(tmp_path / "bottle")
    setting = ["hyperparameters.recipe.iterations=5"]

    with pytest.raises(ConfigFault, match=r"^grnr: .*hyperparameters\.recipe"):
        compare_detectors(Wishes([str(folder)], "inp_former,grnr", "small", tmp_path, None, False, "cpu", setting), 1)


def test_compare_when_a_mask_cannot_be_read_then_says_so_before_any_work(tmp_path):
    """A region of interest is looked at before the first of many runs."""
    folder = write_line(tmp_path / "bottle")
    wishes = Wishes([str(folder)], "grnr", "small", tmp_path, None, False, "cpu", (), regions_of_interest=("none.png",))

    with pytest.raises(UnreadableFrame, match=r"none\.png"):
        compare_detectors(wishes, 1)


def test_compare_when_a_line_has_no_defects_to_find_then_refuses(tmp_path):
    """Detectors that can't be told apart are not fitted for hours."""
    folder = write_line(tmp_path / "bottle", tested=False)

    with pytest.raises(DatasetFault, match="compared"):
        compare_detectors(Wishes([str(folder)], "inp_former", "small", tmp_path, None, False, "cpu", ()), 1)


def test_compare_when_a_frame_is_damaged_then_says_so_before_any_work(tmp_path):
    """A bad file of the last line is told before hours go into the first; a folder may hold an equals sign."""
    line = write_line(tmp_path / "data=1/tex", masks=False)
    (line / "train/good/000.png").write_bytes(b"no image")
    given = [str(line), f"b={line}"]

    for one in given:
        with pytest.raises(DatasetFault, match=r"tex/train/good/000\.png"):
            compare_detectors(
                Wishes(
                    [one], "glcf", "small", tmp_path / "cells", "untrained", control=False, device="cpu", settings=[]
                ),
                None,
            )
    assert not (tmp_path / "cells").exists()
