"""DADF gives the numbers of its authors' code: both networks, likelihood, map and score, and both trainings.

The recorded numbers are of hmyao22/DADF at ebef0b6, whose scripts ran on small networks filled by a rule that starts
from official names (`record_dadf.py`). Both sides computed in float64, so that they agree to nine digits or not at all.
What is not the same: the map is 1 + A / e; gradients are cleared before each step of the first stage, which the script
forgets; and the biases of the patch embeddings begin at 0, where the script leaves them as PyTorch draws them.
"""

import math
import re
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from models.blocks.packing import unpack
from models.dadf import Dadf, DadfConfig
from models.detector import AnomalyOutput, GradientStage
from tests.parity.official_code import RECORDED
from tests.parity.record_dadf import (
    FLOW_STEPS,
    IMAGES,
    MEMORY,
    SEED,
    SIZES,
    fill_dadf,
    first_entries,
    permutation_of,
    subset,
)
from tests.parity.recordings import Arrays, draw, read_arrays
from training.fitting.optimisers import build_optimiser

_CLOSE = {"rtol": 1e-9, "atol": 1e-9}
_STAGES = ("reconstruction", "flow")
_BACKBONE = "backbone.network."
_OFFICIAL_NAMES = {
    r"backbone\.network\.conv1\.": "feature_extractor.block1.0.",
    r"backbone\.network\.bn1\.": "feature_extractor.block1.1.",
    r"backbone\.network\.layer(\d)\.": lambda found: f"feature_extractor.block{int(found[1]) + 1}.",
    r"transformer\.memory": "reconstructor.sem_token",
    r"transformer\.embeddings\.(\d)": lambda found: f"reconstructor.patch_embed{int(found[1]) + 1}.proj",
    r"transformer\.predictions\.(\d)": lambda found: f"reconstructor.decoder_pred{int(found[1]) + 1}",
    r"transformer\.": "reconstructor.",
    r"flows\.(\d)\.norm\.": r"norms.\1.",
    r"flows\.(\d)\.steps\.(\d)\.": r"nf_flows.\1.module_list.\2.",
}


@cache
def _recorded() -> Arrays:
    return read_arrays(RECORDED / "dadf.npz")


def _official(name: str) -> str:
    """Translate the name of a tensor of ours."""
    for pattern, official in _OFFICIAL_NAMES.items():
        translated, found = re.subn(f"^{pattern}", official, name)
        if found:
            break
    last = {"gain_logits": "global_scale", "offset": "global_offset", "permutation": "w_perm"}
    head, _, tail = translated.rpartition(".")
    return f"{head}.{last.get(tail, tail)}"


def _fill(name: str, own: Tensor) -> Tensor:
    """Give a tensor of ours the values of the official one."""
    if name.endswith("permutation"):
        return torch.from_numpy(permutation_of(_official(name), len(own)))
    return torch.from_numpy(fill_dadf(_official(name), tuple(own.shape)))


def _build(flow_steps: int = FLOW_STEPS) -> Dadf:
    return Dadf(
        DadfConfig(
            backbone="resnet18",
            image_size=IMAGES[2:],
            scale_channels=SIZES["embed_dim"],
            blocks=SIZES["depth"],
            heads=SIZES["num_heads"],
            mlp_ratio=SIZES["mlp_ratio"],
            flow_steps=flow_steps,
        )
    )


def _filled() -> tuple[Dadf, Tensor]:
    """Build the detector with the official values, and the images that the official code saw normalised."""
    detector = _build()
    counters = {name: one for name, one in detector.state_dict().items() if name.endswith("num_batches_tracked")}
    others = {name: _fill(name, one) for name, one in detector.state_dict().items() if name not in counters}
    detector.load_backbone_weights(
        {name.removeprefix(_BACKBONE): one for name, one in others.items() if name.startswith(_BACKBONE)}
    )
    detector.load_state_dict(others | counters)
    detector.double().eval()
    images = torch.from_numpy(draw(f"input_{IMAGES[-1]}", IMAGES, SEED)).double()
    return detector, images * detector.backbone.std + detector.backbone.mean


@cache
@torch.no_grad()
def _answers() -> dict[str, np.ndarray]:
    """Run the detector once and name everything that the official code was asked for."""
    detector, images = _filled()
    encoded, joined = detector.encode_features(images), detector.encode_joint(images)
    features = unpack(encoded, detector.shapes)
    streams = dict(zip(("rebuilt", "remembered"), detector.transformer(features), strict=True)) | {"features": features}
    flows = [flow(one) for flow, one in zip(detector.flows, unpack(joined, detector.joint_shapes), strict=True)]
    answers = {
        "reconstruction_loss": sum(detector.reconstruction_loss(encoded, 0).values()),
        "flow_loss": sum(detector.flow_loss(joined, 0).values()),
        **_as_published(detector(images), step=3),
    }
    for name, maps in (streams | {"z": [z for z, _ in flows]}).items():
        answers |= {f"{name}{scale}": subset(one) for scale, one in enumerate(maps)}
    answers |= {f"volume{scale}": volume for scale, (_, volume) in enumerate(flows)}
    return {name: value.numpy() for name, value in answers.items()}


def _as_published(output: AnomalyOutput, step: int) -> dict[str, Tensor]:
    """Return map and score as the paper has them, in [-e, 0)."""
    return {
        "map": math.e * (output.anomaly_map[:, ::step, ::step] - 1),
        "score": math.e * (output.score - 1),
    }


def test_tensors_are_those_of_the_official_code():
    """Nothing of the official networks is missing here, and nothing is added."""
    names = {_official(name) for name in _build().state_dict() if not name.endswith("num_batches_tracked")}

    assert names == set(_recorded()["names"])


@pytest.mark.parametrize(
    "name",
    [
        *(f"{kind}{scale}" for kind in ("features", "rebuilt", "remembered", "z", "volume") for scale in range(3)),
        *("reconstruction_loss", "flow_loss", "map", "score"),
    ],
)
def test_inference_equals_the_official_code(name):
    """Each stage's values, both losses, the map and the score are those of the official scripts."""
    np.testing.assert_allclose(_answers()[name], _recorded()[name], **_CLOSE)


@cache
def _trained() -> tuple[dict[str, dict[str, np.ndarray]], np.ndarray]:
    """Run both descents on the recorded images, and judge these."""
    detector, images = _filled()
    seen = {}
    for stage in detector.stages():
        assert isinstance(stage, GradientStage)
        encoded, optimiser = stage.encode(images), build_optimiser(stage.recipe, stage.parameters)
        own = {id(one) for one in stage.parameters}
        named = {_official(name): one for name, one in detector.named_parameters() if id(one) in own}
        trained = [named[name] for name in sorted(named)]
        losses, gradients = [], []
        for step in range(len(_recorded()[f"{stage.name}__losses"])):
            optimiser.zero_grad()
            loss = sum(stage.loss(encoded, step).values())
            loss.backward()
            gradients = gradients or [one.grad.clone() for one in trained]
            optimiser.step()
            losses.append(loss.item())
        seen[stage.name] = {
            "names": np.array(sorted(named)),
            "losses": np.array(losses),
            "gradient_norms": np.array([one.norm() for one in gradients]),
            "gradients": np.array([first_entries(one) for one in gradients]),
            "after": np.array([first_entries(one) for one in trained]),
        }
    with torch.no_grad():
        return seen, _as_published(detector(images), step=6)["map"].numpy()


def test_reconstruction_when_gradients_are_never_cleared_then_losses_are_those_of_the_script_as_it_is():
    """The official loop adds up all gradients since its first step, and ours does not: nothing else differs."""
    detector, images = _filled()
    stage = detector.stages()[0]
    assert isinstance(stage, GradientStage)
    encoded, optimiser = stage.encode(images), build_optimiser(stage.recipe, stage.parameters)
    losses = []
    for step in range(len(_recorded()["summed_losses"])):
        loss = sum(stage.loss(encoded, step).values())
        loss.backward()
        optimiser.step()
        losses.append(loss.item())

    np.testing.assert_allclose(losses, _recorded()["summed_losses"], rtol=1e-9)


@pytest.mark.parametrize("stage", _STAGES)
def test_trained_tensors_are_those_of_the_official_script(stage):
    """Each script's optimiser moves the same tensors, and no others."""
    seen, _ = _trained()

    np.testing.assert_array_equal(seen[stage]["names"], _recorded()[f"{stage}__names"])


@pytest.mark.parametrize("name", ["losses", "gradient_norms", "gradients", "after"])
@pytest.mark.parametrize("stage", _STAGES)
def test_training_equals_the_official_script(stage, name):
    """Losses of each step, the first gradients and the tensors after the last step are the official ones."""
    seen, _ = _trained()
    official = _recorded()[f"{stage}__{name}"]

    np.testing.assert_allclose(seen[stage][name], official, rtol=1e-7, atol=1e-9 * np.abs(official).max())


def test_map_after_both_trainings_equals_the_official_code():
    """The flows were trained on what the trained transformer rebuilds."""
    _, trained_map = _trained()

    np.testing.assert_allclose(trained_map, _recorded()["trained_map"], **_CLOSE)


@pytest.mark.parametrize("stage", _STAGES)
def test_recipe_is_that_of_the_official_script(stage):
    """Rate, betas, decay, guard, batch and epochs are what the script builds its optimiser and loader with."""
    recipe = {"reconstruction": DadfConfig().recipe, "flow": DadfConfig().flow_recipe}[stage]

    ours = (recipe.learning_rate, *recipe.betas, recipe.weight_decay, recipe.eps, recipe.batch_size, recipe.epochs)

    np.testing.assert_allclose(ours, _recorded()[f"{stage}__recipe"])
    assert recipe.final_learning_rate == recipe.learning_rate


def test_initial_values_spread_as_those_of_the_official_constructors():
    """Large tensors have the official deviation and reach to 5 per cent, and the memory its deviation to 15."""
    own = {_official(name): one for name, one in _build(flow_steps=2).state_dict().items()}
    names, official = list(_recorded()["initial_names"]), _recorded()["initial_spread"]
    memory = names.index(MEMORY)

    spread = np.array([(float(own[name].std()), float(own[name].abs().max())) for name in names])

    np.testing.assert_allclose(np.delete(spread, memory, axis=0), np.delete(official, memory, axis=0), rtol=0.05)
    np.testing.assert_allclose(spread[memory, 0], official[memory, 0], rtol=0.15)
