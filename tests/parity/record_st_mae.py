r"""Record what the kin of ST-MAE answers, narrow and with values that follow from names: `test_st_mae_official.py`.

    git clone https://github.com/TSTB-dev/ST-MAE SOURCES/TSTB-dev+ST-MAE    # at a8afa00; MIT; by others
    git clone https://github.com/hmyao22/PSA SOURCES/hmyao22+PSA            # at 7f607e7; the authors' next method
    .venv/bin/python -m tests.parity.record_st_mae SOURCES

The authors published no code of ST-MAE itself. Only numbers are written: `recorded/st_mae.npz`. The classes run as they
are, on the CPU in float64, so that no order of summation shows; what is narrow is asked for by the arguments of their
constructors, and the backbone is a narrow VGG11. Mended in what the first of the two answers, because
`models/st_mae.py` names it: tokens are put back to their places. For the training steps its positions and the bias of
its projection are frozen, and the loss is the other's, which is taken a token at a time.
"""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

from tests.parity.official_code import (
    RECORDED,
    checkout,
    checksum_of,
    declare_operators,
    fill_module,
    first_entries,
    key_shapes,
    numpy_of_then,
    timm_of_then,
)
from tests.parity.recordings import draw

SEED = 1
STEPS = 3
IMAGES = (3, 3, 64, 64)  # of the pseudo-key "input_64", as normalised images
PLAN = [8, "M", 16, "M", 32, 32, "M", 64, 64, "M"]  # VGG11, narrow, without its last stage
_TAPS = [1, 4, 9, 14]  # its last activation at each stride
CHANNELS = 120  # of all taps
TOKENS = 16
DEALS = ("deal_0", "deal_1")  # pseudo-keys
FEATURES = (2, CHANNELS, 32, 32)  # of "features", for PSA, whose maps have this grid only
LATENT, PREDICTION = (2, 256, 24), (2, 256, 4 * CHANNELS)  # of "latent" and "prediction"
PSA_SIZES = {"embed_dim": 24, "depth": 2, "num_heads": 4, "decoder_embed_dim": 32, "decoder_depth": 2}
PSA_DECODER_HEADS = 8
_REARRANGED: Mapping[str, Callable[..., Tensor]] = {
    "b e h w -> b (h w) e": lambda x, **_: x.flatten(2).transpose(1, 2),
    "b n (h d) -> b h n d": lambda x, h: x.unflatten(2, (h, -1)).transpose(1, 2),
    "b h n d -> b n (h d)": lambda x: x.transpose(1, 2).flatten(2),
    "b (h w) c -> b c h w": lambda x, h, w: x.transpose(1, 2).unflatten(2, (h, w)),
}  # what einops is asked for
UNUSED = ("stmae_dec.pos_embed.pos_embedding",)
FROZEN = ("pos_embed.pos_embedding", "out_proj.bias")
_SHOWN = ("to_qkv.weight", "to_out.bias", "net.2.weight", "layer_norm.weight", "embed.weight", "out_proj.weight")


def main() -> None:
    """Write the recording."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("sources", type=Path, help="folder of the checkouts")
    sources = parser.parse_args().sources
    declare_operators()
    numpy_of_then()
    answers = {**record_parts(sources / "hmyao22+PSA"), **record_whole(sources)}
    RECORDED.mkdir(exist_ok=True)
    rounded = {name: one.astype(np.float32) if one.dtype == np.float64 else one for name, one in answers.items()}
    np.savez_compressed(RECORDED / "st_mae.npz", **rounded)


def _drawn(key: str, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(draw(key, shape, SEED)).double()


def deal(key: str, images: int) -> np.ndarray:
    """Return which half of its tokens each image deals to A, ascending: `(images, TOKENS / 2)`."""
    return np.sort(draw(key, (images, TOKENS), SEED).argsort(axis=1)[:, : TOKENS // 2], axis=1)


def _build_psa(source: Path, **sizes: Any) -> tuple[Any, Any]:
    """Build PSA's transformer, and its detector around it, without a backbone."""
    stand_ins = {name: MagicMock() for name in ("torchsummary", "models.efficientnet")}
    timm_names = timm_of_then()
    with checkout(source, "models", stand_ins), patch.multiple("timm.models.vision_transformer", **timm_names):
        from models import STVT, DPTV_model

        transformer = DPTV_model.DPTV(**sizes).eval()
        detector = STVT.S_MAE(SimpleNamespace(backbone_name="none"))
    fill_module(transformer, SEED, "psa.")
    detector.Roncon_model = transformer.double()
    return transformer, detector


@torch.no_grad()
def record_parts(source: Path) -> dict[str, np.ndarray]:
    """Record of PSA what ST-MAE has alike: embedding, positions, blocks, decoder, loss and the way to maps."""
    sizes = {**PSA_SIZES, "decoder_num_heads": PSA_DECODER_HEADS}
    model, detector = _build_psa(source, img_size=32, patch_size=2, in_chans=CHANNELS, **sizes)
    features, latent, prediction = (
        _drawn("features", FEATURES),
        _drawn("latent", LATENT),
        _drawn("prediction", PREDICTION),
    )
    embedded = model.patch_embed(features)
    encoded = embedded
    for block in model.blocks:
        encoded = block(encoded)
    decoded = model.forward_decoder(latent)
    maps = [detector.a_map(one[None], two[None]) for one, two in zip(features, prediction, strict=True)]
    answers = {
        "psa_positions": model.pos_embed[0, 1:, ::2],
        "psa_decoder_positions": model.decoder_pos_embed[0, 1:, ::2],
        "psa_embedded": embedded[:, ::8, ::4],
        "psa_encoded": model.norm(encoded)[:, ::8, ::4],
        "psa_decoded": decoded[:, ::16, ::32],
        "psa_rebuilt": model.unpatchify(prediction)[:, ::16, ::4, ::4],
        "psa_loss": model.forward_loss(features, prediction),
    }
    arrays = {name: value.numpy().copy() for name, value in answers.items()}
    distances, directions = (np.array(kind) for kind in zip(*maps, strict=True))
    return {
        **arrays,
        "psa_distance": distances[:, ::16, ::16],
        "psa_direction": directions[:, ::16, ::16],
        "psa_smooth_distance": np.array([gaussian_filter(one, sigma=4) for one in distances])[:, ::16, ::16],
    }


def record_whole(sources: Path) -> dict[str, np.ndarray]:
    """Record of the re-implementation all that happens between an image and its residuals, and training steps."""
    source = sources / "TSTB-dev+ST-MAE" / "src"
    einops = {"rearrange": lambda x, pattern, **sizes: _REARRANGED[pattern](x, **sizes)}
    absent = {name: MagicMock() for name in ("datasets", "mask", "util")}
    with checkout(source, "models", {"einops": einops}):
        from torchvision.models.vgg import VGG, make_layers

        from models import st_mae

        backbone = VGG(make_layers(PLAN))
        backbone.classifier = nn.Identity()
        with patch.object(st_mae, "get_backbone_model", lambda _: backbone):
            model = st_mae.SiameseTransitionMAE(IMAGES[-1], 16, 4, _TAPS, CHANNELS, stmae_model="stmae_nano").eval()
        with checkout(source, "evaluate", absent):
            from evaluate import compute_err_map
    fill_module(model, SEED)
    model.double()
    psa, _ = _build_psa(sources / "hmyao22+PSA", img_size=16, patch_size=4, in_chans=CHANNELS, embed_dim=24)
    images = _drawn("input_64", IMAGES)
    return {
        **_published_size(source),
        "tensors": checksum_of(key_shapes(model, UNUSED)),
        **_inference(model, images, compute_err_map),
        **_training(model, images, psa),
    }


def _published_size(source: Path) -> dict[str, np.ndarray]:
    """Record how large the re-implementation is when nothing is said, without making its values."""
    from torchvision.models.vgg import vgg19

    with checkout(source, "models", {"einops": {"rearrange": None}}):
        from models import st_mae

        with torch.device("meta"), patch.object(st_mae, "get_backbone_model", lambda _: vgg19()):
            model = st_mae.SiameseTransitionMAE()
    stacks = [
        (one.emb_size, one.num_layers, one.num_heads, one.mlp_ratio) for one in (model.stmae_enc, model.stmae_dec)
    ]
    return {
        "published_stacks": np.array(stacks),
        "published_features": np.array([model.input_res, model.feature_res, model.patch_size, model.feature_dim]),
        "published_taps": np.array(model.extract_indices),
    }


def _rebuild(model: Any, images: Tensor, chosen: np.ndarray) -> tuple[Tensor, dict[str, Any]]:
    """Return rebuilt features with their tokens at their places, and all that the model answers."""
    answer = model(images, torch.from_numpy(chosen))
    others = np.array([np.setdiff1d(np.arange(TOKENS), one) for one in chosen])
    places = torch.from_numpy(np.concatenate((others, chosen), axis=1))  # of the decoder's tokens, as they come
    rebuilt = answer["recon_features"].unflatten(2, (4, 4)).unflatten(4, (4, 4))  # (B, C, rows, k, columns, k)
    tokens = rebuilt.transpose(3, 4).flatten(2, 3)  # (B, C, N, k, k)
    placed = torch.stack([one[:, order.argsort()] for one, order in zip(tokens, places, strict=True)])
    return placed.unflatten(2, (4, 4)).transpose(3, 4).flatten(4, 5).flatten(2, 3), answer


@torch.no_grad()
def _inference(model: Any, images: Tensor, compare: Callable[[Tensor, Tensor], Tensor]) -> dict[str, np.ndarray]:
    seen: dict[str, Tensor] = {}
    parts = {"normed": model.layer_norm, "encoded": model.stmae_enc, "decoded": model.stmae_dec}
    for name, part in parts.items():
        part.register_forward_hook(lambda _module, _inputs, output, name=name: seen.update({name: output}))
    pairs = [_rebuild(model, images, deal(key, len(images))) for key in DEALS]
    features = pairs[0][1]["org_features"]
    answers = {
        "features": features[:, ::8, ::3, ::3],
        "features_l2": features.norm(dim=1),
        "normed": seen["normed"][..., ::4],
        "encoded": seen["encoded"][0][..., ::4],  # the last deal's: all halves A, then all halves B
        "decoded": seen["decoded"][0][..., ::4],
        "rebuilt": pairs[-1][0][:, ::8, ::3, ::3],
        "residuals": torch.stack([compare(features, rebuilt) for rebuilt, _ in pairs]).mean(dim=0),
    }
    return {name: value.numpy().copy() for name, value in answers.items()}


def _training(model: Any, images: Tensor, psa: Any) -> dict[str, np.ndarray]:
    """Record both terms, first gradients and what steps of AdamW lead to; each step deals anew."""
    for name in FROZEN:
        model.get_parameter(name).requires_grad_(requires_grad=False)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05)
    rows = []
    for step in range(STEPS):
        rebuilt, answer = _rebuild(model, images, deal(f"step_{step}", len(images)))
        features, prediction = answer["org_features"], psa.patchify(rebuilt)
        total = psa.forward_loss(features, prediction)
        distance = ((rebuilt - features) ** 2).mean()
        optimiser.zero_grad()
        total.backward()
        if step == 0:
            gradients = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        rows.append([total.item(), distance.item(), norm.item()])
    state = dict(model.named_parameters())
    shown = sorted(filter(is_shown, gradients))
    return {
        "trace_total_distance_norm": np.array(rows),
        "gradient_norms": np.array([gradients[name].norm() for name in sorted(gradients)]),
        "gradients": np.concatenate([first_entries(gradients[name]) for name in shown]),
        "after_training": np.concatenate([first_entries(state[name]) for name in shown]),
    }


def is_shown(name: str) -> bool:
    """Tell whether entries of a tensor are recorded; of all others, the norm of the gradient alone."""
    return name.endswith(_SHOWN)


if __name__ == "__main__":
    main()
