"""Promises of settings: values that no detector can mean are refused by name, and all that ship are accepted."""

import dataclasses

import pytest

from models import DETECTORS
from training.comparison.compare import CellPlan, control_of
from training.config import ConfigFault, load_config
from training.ranges import find_idle_recipe, find_misfit


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("iterations=-5", "iterations: must not be negative; it is -5."),
        ("iterations=0", "iterations: must be at least 1, or nothing is learnt; it is 0."),
        ("batch_size=0", "batch_size: must be at least 1; it is 0."),
        ("batch_size=-3", "batch_size: must be at least 1; it is -3."),
        ("warmup_iterations=-9", "warmup_iterations: must not be negative; it is -9."),
        ("clip_gradient_norm=0", "clip_gradient_norm: must be finite and above 0"),
        ("clip_gradient_norm=-1", "clip_gradient_norm: must be finite and above 0"),
        ("learning_rate=0", "learning_rate: must be above 0"),
        ("learning_rate=-1", "learning_rate: must be finite and not negative; it is -1.0."),
        ("final_learning_rate=.nan", "final_learning_rate: must be finite"),
        ("weight_decay=.inf", "weight_decay: must be finite"),
        ("eps=-1", "eps: must be finite and not negative"),
        ("betas=[0.9, 1.0]", "betas: must lie from 0 to below 1; they are [0.9, 1.0]."),
    ],
)
@pytest.mark.parametrize(("detector", "recipe"), [("st_mae", "recipe"), ("rb_ae", "defect_recipe")])
def test_load_config_when_a_descent_leads_nowhere_then_names_the_key(detector, recipe, setting, words):
    """Such a run would end well and publish a network that learnt nothing, or fail after hours."""
    with pytest.raises(ConfigFault) as caught:
        load_config("small", detector, [f"hyperparameters.{recipe}.{setting}"])

    assert f"hyperparameters.{recipe}.{words}" in str(caught.value)


@pytest.mark.parametrize(
    ("detector", "setting", "words"),
    [
        ("dadf", "heads=0", "heads: must be at least 1; it is 0."),
        ("dadf", "layers=[-2, -1]", "layers: must not be negative; it is [-2, -1]."),
        ("st_mae", "patch_size=0", "patch_size: must be at least 1"),
        ("st_mae", "blur_sigma=-1", "blur_sigma: must not be negative"),
        ("glcf", "level_weights=[-1, -3]", "level_weights: must not be negative"),
        ("glcf", "level_weights=[0, 0]", "level_weights: must not all be 0"),
        ("glcf", "level_depths=[0, 1]", "level_depths: must be at least 1"),
        ("jigsaw_svdd", "brightness_noise=.nan", "brightness_noise: must be finite; it is nan."),
        ("jigsaw_svdd", "hidden_channels=0", "hidden_channels: must be at least 1"),
        ("rb_ae", "margin=.inf", "margin: must be finite"),
        ("inp_former", "top_fraction=0", "top_fraction: must be above 0 and at most 1"),
        ("inp_former", "mining_exponent=2.5", "mining_exponent: must be whole"),
        ("inp_former_pp", "top_fraction=1.5", "top_fraction: must be above 0 and at most 1"),
    ],
)
def test_load_config_when_a_size_or_weight_is_impossible_then_names_the_key(detector, setting, words):
    """What would end in a traceback, or turn a map over, once all frames were read."""
    with pytest.raises(ConfigFault) as caught:
        load_config("small", detector, [f"hyperparameters.{setting}"])

    assert f"hyperparameters.{words}" in str(caught.value)


@pytest.mark.parametrize("setting", ["rb_ae margin=-0.2", "jigsaw_svdd margin=0", "glcf blur_sigma=0"])
def test_load_config_when_a_value_may_be_low_then_takes_it(setting):
    """A cosine has a sign, and no border and no blur are choices."""
    detector, value = setting.split()

    load_config("small", detector, [f"hyperparameters.{value}"])


@pytest.mark.parametrize("detector", DETECTORS)
def test_defaults_of_every_detector_are_accepted(detector):
    """Whatever ships can be trained."""
    own = DETECTORS[detector].config()

    assert find_misfit(detector, own) is None
    assert find_idle_recipe(own) is None


def test_control_when_it_learns_nothing_then_is_a_configuration_all_the_same(tmp_path):
    """A comparison asks on purpose for descents of no step."""
    control = control_of(CellPlan("cloth", tmp_path, load_config("small", "st_mae"), "detector"))

    assert control.config.detector_config().recipe.iterations == 0
    assert dataclasses.asdict(control)["kind"] == "control"


@pytest.mark.parametrize(
    ("setting", "words"), [("ridge=0", "ridge: must be above 0"), ("regularisation=-1", "must not be negative")]
)
def test_load_config_when_grnr_would_solve_nothing_then_names_the_key(setting, words):
    """A texture's equal neighbours have no solution without a ridge, and a pull pulls."""
    with pytest.raises(ConfigFault, match=words):
        load_config("small", "grnr", ["product=texture", f"hyperparameters.{setting}"])
