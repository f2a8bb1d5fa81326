"""Promises of a run's description: complete, and nothing unknown is passed on in silence."""

import pytest

from models import DETECTORS
from models.inp_former import InpFormerConfig
from training.config import ConfigFault, load_config, map_size_of, parse_config, score_rule_of


def test_paper_configuration_gives_the_published_values():
    """The paper's YAML says exactly what the detector's defaults say."""
    config = load_config("paper")

    assert config.detector_config() == InpFormerConfig()
    assert config.frame_input.window(448, 448) == (28.0, 28.0, 392.0, 392.0)


def test_small_configuration_inspects_the_whole_frame_on_a_small_network():
    """The CPU's YAML has no crop and takes the backbone that comes with the package."""
    config = load_config("small")

    assert config.detector_config().backbone == "embedded"
    assert config.frame_input.window(300, 300) == (0.0, 0.0, 300.0, 300.0)


def test_load_config_when_values_are_set_then_each_level_takes_them():
    """Overrides reach the top level, nested models and the detector's recipe, typed as in YAML."""
    config = load_config(
        "small",
        overrides=["seed=0", "hold_out.fraction=0.4", "hyperparameters.recipe.iterations=7", "backbone=resnet18"],
    )

    own = config.detector_config()
    assert (config.seed, config.hold_out.fraction) == (0, 0.4)
    assert (own.seed, own.recipe.iterations, own.backbone) == (0, 7, "resnet18")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("fail_rat=0.1", "fail_rat is not known at the top level (did you mean fail_rate?)"),
        ("hold_out.fractoin=0.1", "did you mean fraction?"),
        ("hyperparameters.prototype=3", "did you mean prototypes?"),
        (
            "hyperparameters.recipe.iteration=3",
            "hyperparameters.recipe.iteration is not known (did you mean iterations?)",
        ),
        ("hyperparameters.seed=3", "follows from seed"),
        ("hyperparameters.image_size=[1, 1]", "follows from input"),
        ("hyperparameters.prototypes=many", "hyperparameters.prototypes"),
        ("hyperparameters.recipe.epochs=3", "set exactly one of epochs and iterations"),
        ("detector=patchcore", "known are"),
        ("fail_rate=2", "fail_rate"),
        ("hold_out.fraction=2", "must lie between 0 and 1"),
        ("input.height=999", "crop must not be larger"),
        ("seed", "write key=value"),
        ("seed.more=1", "holds a single value"),
        ("seed=[", "is no YAML"),
    ],
)
def test_load_config_when_a_setting_does_not_fit_then_the_sentence_names_it(override, words):
    """A wrong key or value is refused by name, with the nearest known one where there is one."""
    with pytest.raises(ConfigFault) as caught:
        load_config("small", overrides=[override])

    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", [None, "- a\n- b\n", "{", b"\xff\xfe\x00"], ids=["missing", "list", "broken", "binary"]
)
def test_load_config_when_the_file_is_no_configuration_then_says_so(tmp_path, text):
    """A missing or malformed file ends in one sentence."""
    path = tmp_path / "run.yaml"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())

    with pytest.raises(ConfigFault):
        load_config(str(path))


def test_to_yaml_when_read_again_then_is_the_same_run():
    """What a run directory keeps describes the same run."""
    config = load_config("paper", overrides=["hold_out.rule=groups", "hold_out.group_by=(\\d+)"])

    assert parse_config(config.to_yaml()) == config


@pytest.mark.parametrize(
    ("product", "words"),
    [("null", "say so with --product texture"), ("object", "take another detector, for example inp_former")],
)
def test_load_config_when_a_texture_detector_is_offered_another_product_then_says_what_to_do(product, words):
    """A detector that judges textures only is refused before any work, unless the line is said to show one."""
    with pytest.raises(ConfigFault, match="judges textures only") as caught:
        load_config("small", "grnr", [f"product={product}"])

    assert words in str(caught.value)


@pytest.mark.parametrize("source", ["small", "paper"])
def test_load_config_when_the_line_is_said_to_be_a_texture_then_the_texture_detector_is_built(source):
    """The word is all that is needed, and the configuration keeps it."""
    config = load_config(source, "grnr", ["product=texture"])

    assert (config.product, config.detector_config().support) == ("texture", 40)


def test_frame_input_when_frames_are_cut_then_covers_all_tiles_and_keeps_the_crops_proportion():
    """INP-Former sees 392 of 448 pixels; of three rows that overlap by a quarter it sees 980 of 1120."""
    config = load_config("paper", overrides=["tiles.rows=3", "tiles.columns=2"])

    spec = config.frame_input

    assert config.detector_config().image_size == (392, 392) == (spec.height, spec.width)
    assert (spec.canvas_height, spec.canvas_width) == (980, 686)
    assert (spec.resize_height, spec.resize_width) == (1120, 784)
    assert spec.stitched_size(256, 256) == (640, 448)


@pytest.mark.parametrize("overlap", [0, 0.33, 0.5])
@pytest.mark.parametrize("detector", ["inp_former", "inp_former_pp"])
def test_frame_input_when_any_overlap_is_wanted_then_it_is_whole_cells_of_the_map(detector, overlap):
    """The overlap is the nearest that maps can be stitched by, never above a half."""
    settings = ["tiles.rows=2", "tiles.columns=3", f"tiles.overlap={overlap}"]
    config = load_config("paper", detector, settings)

    spec = config.frame_input

    spec.stitched_size(*map_size_of(config.detector_config()))
    assert abs(spec.tiles.overlap_height / spec.height - overlap) <= 1 / 16


@pytest.mark.parametrize("settings", [[], ["tiles.rows=1", "tiles.columns=1"]], ids=["none", "one"])
def test_frame_input_when_there_is_one_tile_then_frames_are_looked_at_whole(settings):
    """One tile is no tiling."""
    config = load_config("small", overrides=settings)

    assert config.frame_input.tiles is None
    assert config.frame_input.resize_target == (256, 256)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["tiles.rows=3"], "tiles.columns"),
        (["tiles.rows=0", "tiles.columns=2"], "tiles.rows"),
        (["tiles.rows=2", "tiles.columns=2", "tiles.overlap=0.6"], "tiles.overlap"),
        (["tiles.rows=9", "tiles.columns=9"], "at most 64 tiles"),
        (["tiles.rows=60", "tiles.columns=1"], "resize_height"),
    ],
)
def test_load_config_when_tiles_make_no_sense_then_the_sentence_names_them(settings, words):
    """Tiles that can't be cut are refused with the configuration, before a frame is read."""
    with pytest.raises(ConfigFault, match=words):
        load_config("small", overrides=settings)


@pytest.mark.parametrize("source", ["small", "paper"])
@pytest.mark.parametrize("detector", sorted(DETECTORS))
def test_score_rule_when_a_detector_is_configured_then_says_how_its_score_follows_from_its_map(detector, source):
    """Every detector can look at a region of interest or at tiles, where scores are reduced again from maps."""
    product = ["product=texture"] if detector == "grnr" else []
    rules = {"ami_net": "deviation", "inp_former": "top_fraction_mean", "inp_former_pp": "top_fraction_mean"}
    rules |= {"glcf": "maximum" if source == "small" else "deviation", "st_mae": "deviation"}

    rule = score_rule_of(load_config(source, detector, product).detector_config())

    assert rule.kind == rules.get(detector, "maximum")


def test_load_config_when_a_file_is_of_another_detector_then_names_both(tmp_path):
    """What was asked for is never ignored in silence, and who asks for nothing gets the file's."""
    path = tmp_path / "my.yaml"
    path.write_text(load_config("small").to_yaml())

    with pytest.raises(ConfigFault, match="of the detector inp_former, and glcf is asked for"):
        load_config(str(path), "glcf")
    assert load_config(str(path)).detector == load_config(str(path), "inp_former").detector == "inp_former"
