"""ST-MAE gives the numbers of the two codes that it was read from, once the deviations that it names are undone.

`recorded/st_mae.npz` was made by `record_st_mae.py`: with hmyao22/PSA at 7f607e7, the authors' next method, which
embeds, codes positions, decodes, weighs the loss and resizes maps alike; and with TSTB-dev/ST-MAE at a8afa00, which is
by others and has the transition. Every tensor is filled by a rule that starts from its official name. Undone for the
latter: its positions come before a norm or a layer, its blocks share one norm and none comes last, and attention has no
bias. Its own order of the rebuilt tokens was mended in the recording. Both sides compute in float64.
"""

from collections.abc import Iterator
from functools import partial
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models.backbones import CnnBackbone
from models.blocks.patches import patchify, unpatchify
from models.blocks.smoothing import SmoothUpsampling
from models.detector import GradientStage
from models.st_mae import StMae, StMaeConfig, _reconstruction_errors
from tests.parity.official_code import RECORDED, checksum_of, fill, first_entries
from tests.parity.record_st_mae import (
    CHANNELS,
    DEALS,
    FEATURES,
    FROZEN,
    IMAGES,
    LATENT,
    PLAN,
    PREDICTION,
    PSA_DECODER_HEADS,
    PSA_SIZES,
    SEED,
    STEPS,
    TOKENS,
    deal,
    is_shown,
)
from tests.parity.recordings import draw, read_arrays
from training.fitting.optimisers import build_optimiser

# The recording was rounded to float32, and so are the matrices that resize and blur.
_EXACT = {"rtol": 1e-6, "atol": 1e-7}
_WHOLE = StMaeConfig(
    image_size=IMAGES[2:],
    feature_grid=(16, 16),
    encoder_channels=120,
    encoder_blocks=6,
    decoder_channels=128,
    decoder_blocks=4,
)
_PARTS = StMaeConfig(
    feature_grid=FEATURES[2:],
    patch_size=2,
    encoder_channels=PSA_SIZES["embed_dim"],
    encoder_heads=PSA_SIZES["num_heads"],
    encoder_blocks=PSA_SIZES["depth"],
    decoder_channels=PSA_SIZES["decoder_embed_dim"],
    decoder_heads=PSA_DECODER_HEADS,
    decoder_blocks=PSA_SIZES["decoder_depth"],
)


def _build(config: StMaeConfig) -> StMae:
    """Build a detector on a backbone as narrow as the recorded one,."""
    from timm.models.vgg import VGG  # it needs what `models.backbones` has declared

    with patch("timm.models.vgg.ConvMlp", nn.Identity):  # thirty million values that are cut off again
        network = VGG(PLAN, num_classes=0)
    network.pretrained_cfg = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    with patch("models.st_mae.CnnBackbone", partial(CnnBackbone, network=network)):
        detector = StMae(config)
    detector.backbone.is_loaded = True
    return detector


def _drawn(key: str, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(draw(key, shape, SEED)).double()


@pytest.fixture(scope="module")
def expected():
    """Return the recorded arrays."""
    return read_arrays(RECORDED / "st_mae.npz")


_PSA_NAMES = {
    "patch_embedding": "patch_embed.proj",
    "encoder": "blocks",
    "decoder_embedding": "decoder_embed",
    "decoder": "decoder_blocks",
    "prediction": "decoder_pred",
}


def _as_psa(name: str) -> str:
    """Return PSA's name of a tensor of ours."""
    head, _, rest = name.partition(".")
    last = {"encoder": PSA_SIZES["depth"], "decoder": PSA_SIZES["decoder_depth"]}.get(head)
    if last is not None and rest.startswith(f"{last}."):
        return f"psa.{'norm' if head == 'encoder' else 'decoder_norm'}.{rest.partition('.')[2]}"
    return f"psa.{_PSA_NAMES[head]}.{rest}"


@pytest.fixture(scope="module")
def parts():
    """Return a detector with the values that PSA had."""
    detector = _build(_PARTS)
    for name, parameter in detector.named_parameters():
        if name.startswith(tuple(f"{head}." for head in _PSA_NAMES)):
            parameter.data = _kernel_as_matrix(_as_psa(name), parameter.shape, CHANNELS, detector.config.patch_size)
    return detector.double().eval()


def _kernel_as_matrix(key: str, shape: torch.Size, channels: int, patch_size: int) -> Tensor:
    """Draw a tensor of that official name; a kernel that cuts patches becomes the layer that takes them cut."""
    if not key.endswith("proj.weight") or "attn" in key:
        return torch.from_numpy(fill(key, shape, SEED))
    kernel = torch.from_numpy(fill(key, (shape[0], channels, patch_size, patch_size), SEED))
    return kernel.permute(0, 2, 3, 1).flatten(1)  # channels run fastest


@torch.no_grad()
def test_parts_equal_the_code_of_the_next_method(expected, parts):
    """Embedding, positions, encoder, decoder and the way back from patches are PSA's."""
    features, latent, prediction = (
        _drawn("features", FEATURES),
        _drawn("latent", LATENT),
        _drawn("prediction", PREDICTION),
    )
    embedded = parts.patch_embedding(patchify(features, 2))
    decoded = parts.prediction(parts.decoder(parts.decoder_embedding(latent) + parts.decoder_positions))

    answers = {
        "psa_positions": parts.positions[:, ::2],
        "psa_decoder_positions": parts.decoder_positions[:, ::2],
        "psa_embedded": embedded[:, ::8, ::4],
        "psa_encoded": parts.encoder(embedded)[:, ::8, ::4],
        "psa_decoded": decoded[:, ::16, ::32],
        "psa_rebuilt": unpatchify(prediction, (16, 16), 2)[:, ::16, ::4, ::4],
    }

    for name, ours in answers.items():
        np.testing.assert_allclose(ours.numpy(), expected[name], **_EXACT, err_msg=name)


def test_loss_equals_the_code_of_the_next_method(expected):
    """Squared distance plus five times the cosine distance of each token is PSA's loss."""
    distance, direction = _reconstruction_errors(
        patchify(_drawn("features", FEATURES), 2), _drawn("prediction", PREDICTION)
    )

    np.testing.assert_allclose(distance + StMaeConfig().direction_weight * direction, expected["psa_loss"], rtol=1e-6)


def test_residuals_and_their_resize_equal_the_code_of_the_next_method(expected, parts):
    """Both distances at a place, the resize to the image and the blur are PSA's; ours multiplies before the resize."""
    patches, rebuilt = patchify(_drawn("features", FEATURES), 2), _drawn("prediction", PREDICTION)
    features = unpatchify(patches, (16, 16), 2)
    distance = (features - unpatchify(rebuilt, (16, 16), 2)).square().mean(dim=1)
    direction = parts._compare(patches, rebuilt) / distance
    resize = SmoothUpsampling(FEATURES[2:], parts.image_size, 0.0).double()

    ours = {
        "psa_distance": resize(distance),
        "psa_direction": resize(direction),
        "psa_smooth_distance": parts.upsampling(distance),
    }

    for name, value in ours.items():
        np.testing.assert_allclose(value[:, ::16, ::16].numpy(), expected[name], **_EXACT, err_msg=name)


class _PositionFirst(nn.Module):
    """A layer or norm that adds positions to what it gets, as the re-implementation does."""

    def __init__(self, inner: nn.Module, positions: Tensor) -> None:
        super().__init__()
        self.inner, self.positions = inner, positions
        self.order = torch.arange(TOKENS)  # the place of each token that comes

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x + self.positions[self.order])


@torch.no_grad()
def _whole() -> tuple[StMae, dict[str, Tensor]]:
    """Return a detector that is like the re-implementation where it differs by name, and its tensors by those names."""
    detector = _build(_WHOLE)
    named = {f"backbone.{name}": one for name, one in detector.backbone.network.state_dict().items()}
    for part, stack in (("stmae_enc", detector.encoder), ("stmae_dec", detector.decoder)):
        shared = stack[0].norm1
        named |= {f"{part}.layer_norm.{name}": one for name, one in shared.named_parameters()}
        for index, block in enumerate(stack[:-1]):
            block.norm1 = block.norm2 = shared
            nn.init.zeros_(block.attn.qkv.bias).requires_grad_(requires_grad=False)
            under = f"{part}.layers.{index}"
            named |= {
                f"{under}.0.to_qkv.weight": block.attn.qkv.weight,
                **{f"{under}.0.to_out.{name}": one for name, one in block.attn.proj.named_parameters()},
                **{f"{under}.1.net.0.{name}": one for name, one in block.mlp.fc1.named_parameters()},
                **{f"{under}.1.net.2.{name}": one for name, one in block.mlp.fc2.named_parameters()},
            }
        stack[-1] = nn.Identity()
    named |= {f"layer_norm.{name}": one for name, one in detector.patch_norm.named_parameters()}
    named |= {f"stmae_dec.embed.{name}": one for name, one in detector.decoder_embedding.named_parameters()}
    named["patch_embed.projection.0.bias"] = detector.patch_embedding.bias
    for key, tensor in named.items():
        tensor.data.copy_(torch.from_numpy(fill(key, tensor.shape, SEED)))
    named |= _set_kernels(detector)
    detector.prediction.bias.requires_grad_(requires_grad=False)
    detector.double()
    positions = torch.from_numpy(fill(_POSITIONS, (TOKENS, 120), SEED)).double()
    detector.patch_norm = _PositionFirst(detector.patch_norm, positions)
    detector.positions.zero_()
    detector.decoder_positions.copy_(positions @ detector.decoder_embedding.weight.T)
    return detector.eval(), named


_KERNELS = {"patch_embed.projection.0.weight": (120, CHANNELS, 4, 4), "out_proj.weight": (128, CHANNELS, 4, 4)}
_POSITIONS, _PROJECTION_BIAS = FROZEN


def _set_kernels(detector: StMae) -> dict[str, Tensor]:
    """Draw the two kernels and the bias of the latter, which is one for all places of a patch."""
    embedding, prediction = (torch.from_numpy(fill(key, shape, SEED)) for key, shape in _KERNELS.items())
    bias = torch.from_numpy(fill(_PROJECTION_BIAS, (CHANNELS,), SEED))
    detector.patch_embedding.weight.data.copy_(embedding.permute(0, 2, 3, 1).flatten(1))
    detector.prediction.weight.data.copy_(prediction.permute(2, 3, 1, 0).flatten(0, 2))
    detector.prediction.bias.data.copy_(bias.repeat(16))
    return dict(zip(_KERNELS, (detector.patch_embedding.weight, detector.prediction.weight), strict=True))


def _as_kernel(name: str, tensor: Tensor) -> Tensor:
    """Bring a matrix of ours back to the official kernel."""
    match name:
        case "patch_embed.projection.0.weight":
            return tensor.unflatten(1, (4, 4, CHANNELS)).permute(0, 3, 1, 2)
        case "out_proj.weight":
            return tensor.unflatten(0, (4, 4, CHANNELS)).permute(3, 2, 0, 1)
        case _:
            return tensor


def test_tensors_have_the_names_and_shapes_of_the_reimplementation(expected):
    """Every tensor of the re-implementation has one of ours, but for its positions and the bias that is repeated."""
    _, named = _whole()

    shapes = {name: tuple(_as_kernel(name, tensor).shape) for name, tensor in named.items()}

    shapes |= {_POSITIONS: (TOKENS, 120), _PROJECTION_BIAS: (CHANNELS,)}
    np.testing.assert_array_equal(checksum_of(shapes), expected["tensors"])


def test_model_when_nothing_is_said_has_the_size_of_the_reimplementation(expected):
    """Our defaults are its widths, depths, heads and grid, and we tap VGG19 where it does."""
    with torch.device("meta"):
        backbone = CnnBackbone(StMaeConfig().backbone, StMaeConfig().layers)
    config = StMaeConfig()
    stacks = [
        (config.encoder_channels, config.encoder_blocks, config.encoder_heads, config.mlp_ratio),
        (config.decoder_channels, config.decoder_blocks, config.decoder_heads, config.mlp_ratio),
    ]
    features = [config.image_size[0], config.feature_grid[0], config.patch_size, sum(backbone.channels)]
    taps = [int(stage["module"].removeprefix("features.")) for stage in backbone.network.feature_info[:4]]

    np.testing.assert_array_equal(stacks, expected["published_stacks"])
    np.testing.assert_array_equal(features, expected["published_features"])
    np.testing.assert_array_equal(taps, expected["published_taps"])


def _order(key: str) -> Tensor:
    """Return a recorded deal: A, then B, both ascending."""
    halves = deal(key, IMAGES[0])
    others = np.array([np.setdiff1d(np.arange(TOKENS), one) for one in halves])
    return torch.from_numpy(np.concatenate((halves, others), axis=1))


def _images(detector: StMae) -> Tensor:
    return _drawn("input_64", IMAGES) * detector.backbone.std + detector.backbone.mean


@torch.no_grad()
def test_inference_equals_the_reimplementation(expected):
    """Features, norm, siamese encoder, transition, decoder, rebuilt features and residuals are those of that code."""
    detector, _ = _whole()
    features = detector.encode(_images(detector))
    patches = patchify(features, 4)
    seen: dict[str, Tensor] = {}
    for name in ("patch_norm", "encoder", "decoder"):
        part = getattr(detector, name)
        part.register_forward_hook(lambda _module, _inputs, output, name=name: seen.update({name: output}))
    residuals = []
    for key in DEALS:
        order = _order(key)
        rebuilt = detector._rebuild(patches, order, order.argsort(dim=1))
        residuals.append(detector._compare(patches, rebuilt))
    halves = seen["encoder"].unflatten(0, (-1, 2))
    decoded = torch.cat(seen["decoder"].chunk(2, dim=1)[::-1], dim=1)  # theirs come as codes of A, at B's places, first

    ours = {
        "features": features[:, ::8, ::3, ::3],
        "features_l2": features.norm(dim=1),
        "normed": seen["patch_norm"][..., ::4],
        "encoded": torch.cat((halves[:, 0], halves[:, 1]))[..., ::4],
        "decoded": decoded[..., ::4],
        "rebuilt": unpatchify(rebuilt, (4, 4), 4)[:, ::8, ::3, ::3],
        "residuals": torch.stack(residuals).mean(dim=0),
    }

    for name, value in ours.items():
        np.testing.assert_allclose(value.numpy(), expected[name], **_EXACT, err_msg=name)


def _deals(detector: StMae) -> Iterator[Tensor]:
    """Deal as was recorded, step by step, and tell the decoder's positions."""
    for step in range(STEPS):
        order = detector.decoder_embedding.order = _order(f"step_{step}")
        yield order


@pytest.fixture(scope="module")
def trained():
    """Run the recorded training steps with our loss and our recipe."""
    detector, named = _whole()
    # There the layer sees positions, and learns from them.
    detector.decoder_embedding = _PositionFirst(detector.decoder_embedding, detector.patch_norm.positions)
    detector.decoder_positions.zero_()
    (stage,) = detector.stages()
    assert isinstance(stage, GradientStage)
    clip = stage.recipe.clip_gradient_norm
    optimiser = build_optimiser(stage.recipe, stage.parameters)
    features = stage.encode(_images(detector))
    rows, gradients = [], {}
    dealt = _deals(detector)
    with patch("models.st_mae.deal_tokens", lambda *_: next(dealt)):
        for step in range(STEPS):
            terms = stage.loss(features, step)
            total = sum(terms.values())
            optimiser.zero_grad()
            total.backward()
            if step == 0:
                gradients = {
                    name: _as_kernel(name, one.grad.clone()) for name, one in named.items() if one.grad is not None
                }
            norm = nn.utils.clip_grad_norm_(stage.parameters, clip)
            optimiser.step()
            rows.append([total.item(), terms["distance"].item(), norm.item()])
    return np.array(rows), gradients, {name: _as_kernel(name, one.detach()) for name, one in named.items()}


def test_losses_equal_the_reimplementation(expected, trained):
    """The loss, its squared distance and the norm of the gradient are those of the other code in each step."""
    np.testing.assert_allclose(trained[0], expected["trace_total_distance_norm"], **_EXACT)


def test_first_gradients_equal_the_reimplementation(expected, trained):
    """Every parameter but the backbone's gets the gradient that it gets there."""
    _, gradients, _ = trained

    norms = np.array([gradients[name].norm() for name in sorted(gradients)])
    shown = np.concatenate([first_entries(gradients[name]) for name in sorted(filter(is_shown, gradients))])

    np.testing.assert_allclose(norms, expected["gradient_norms"], **_EXACT)
    np.testing.assert_allclose(shown, expected["gradients"], **_EXACT)


def test_parameters_after_the_last_step_equal_the_reimplementation(expected, trained):
    """Clipping and AdamW with its decay move the parameters alike."""
    _, gradients, state = trained

    shown = np.concatenate([first_entries(state[name]) for name in sorted(filter(is_shown, gradients))])

    np.testing.assert_allclose(shown, expected["after_training"], **_EXACT)
