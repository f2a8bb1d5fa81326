r"""Record what the official INP-Former answers, in the form that `test_inp_former_official.py` compares.

    git clone https://github.com/luow23/INP-Former SOURCES/luow23+INP-Former    # at 17d2653; MIT
    .venv/bin/python -m tests.parity.record_inp_former SOURCES OUTPUT/parity/inp_former --seed 2 --sides 280:2 448:1
    FLAWLINE_SHARED=OUTPUT .venv/bin/python -m pytest tests/parity/test_inp_former_official.py

Nothing of that code is copied: it runs from its checkout, and numbers alone are written. What it takes from elsewhere
and does not need here is an empty stand-in, and no pretrained weights are loaded. Intermediate values are taken by
forward hooks. The first side is recorded with all arrays, and trained on; the others with a part of them.
"""

import argparse
import contextlib
import json
import sys
import tempfile
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import torch
from torch import Tensor, nn

from tests.parity.official_code import checkout, declare_operators
from tests.parity.recordings import draw
from tests.parity.test_inp_former_official import _fill

_STAND_INS = {
    name: MagicMock() for name in ("kornia", "adeval", "skimage", "pandas", "beit", "beit.vision_transformer")
}
_REDUCED = ("loss_coherence", "inp_tokens", "distance", "cluster_index", "en0_l2", "en1_l2", "de0_l2", "de1_l2")
_REDUCED += ("grid0", "grid1", "amap256", "smooth", "score", "zs_score", "input_checksum")
_CHANNELS = {"small": (384, 6), "base": (768, 12), "large": (1024, 16)}
_LARGE_LAYERS = [4, 6, 8, 10, 12, 14, 16, 18]
_ENTRIES = 64
_IN_FULL = (
    *("prototype_token", "bottleneck.0.fc1.weight", "aggregation.0.attn.kv.weight", "decoder.0.attn.q.weight"),
    *("decoder.{last}.mlp.fc2.weight", "decoder.3.attn.learn_scale"),
)


def main() -> None:
    """Write one folder of recordings."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("sources", type=Path, help="folder of the checkout luow23+INP-Former")
    parser.add_argument("output", type=Path, help="folder to write the recordings into")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--encoder", default="dinov2reg_vit_small_14")
    parser.add_argument("--sides", nargs="+", default=["224:2", "392:1"], help="SIDE:BATCH each")
    parser.add_argument("--prototypes", type=int, default=6)
    parser.add_argument("--reduced", action="store_true", help="record the first side with a part of the arrays too")
    parser.add_argument("--iterations", type=int, default=12, help="of the schedule")
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4, help="iterations that are run; 0 for no training")
    options = parser.parse_args()

    declare_operators()
    folder, options.output = options.sources.resolve() / "luow23+INP-Former", options.output.resolve()
    with (
        checkout(folder, "models", _STAND_INS),
        tempfile.TemporaryDirectory() as elsewhere,
        contextlib.chdir(elsewhere),  # a folder for weights is made where it runs
    ):
        _record(options)


def _record(options: argparse.Namespace) -> None:
    model = _build(options.encoder, options.prototypes)
    state = model.state_dict()
    for key, value in state.items():
        value.copy_(_fill(key, list(value.shape), options.seed))
    options.output.mkdir(parents=True, exist_ok=True)
    keys = [{"key": key, "shape": list(value.shape), "dtype": "float32"} for key, value in state.items()]
    (options.output / "state_dict_keys.json").write_text(json.dumps(keys), encoding="utf-8")
    (options.output / "README.md").write_text(
        f"# Recorded: INP-Former (SEED = {options.seed})\n\n"
        f"luow23/INP-Former at 17d2653, {options.encoder}, {options.prototypes} INPs, "
        f"torch {torch.__version__}; by record_inp_former.py {' '.join(sys.argv[3:])}.\n",
        encoding="utf-8",
    )
    for place, given in enumerate(options.sides):
        side, batch = (int(part) for part in given.split(":"))
        images = draw(f"input_{side}", (batch, 3, side, side), options.seed)
        arrays = record_inference(model, torch.from_numpy(images))
        flat = images.astype(np.float64).ravel()
        arrays["input_checksum"] = np.array([flat.sum(), np.abs(flat).sum(), *flat[:8]])
        if place or options.reduced:
            arrays = {name: arrays[name] for name in _REDUCED}
        np.savez_compressed(options.output / f"expected_{side}.npz", **arrays)
    if options.steps:
        side, batch = (int(part) for part in options.sides[0].split(":"))
        images = torch.from_numpy(draw(f"input_{side}", (batch, 3, side, side), options.seed))
        trained = record_training(model, images, options.iterations, options.warmup, options.steps)
        np.savez_compressed(options.output / "expected_train.npz", **trained)


def _build(encoder_name: str, prototypes: int) -> nn.Module:
    """Build the network as the scripts of the repository do, but for the weights of the encoder."""
    from models.uad import INP_Former

    from models import vision_transformer, vit_encoder

    encoder = _without_weights(vit_encoder, encoder_name)
    size = next(name for name in _CHANNELS if name in encoder_name)
    channels, heads = _CHANNELS[size]
    settings = {"qkv_bias": True, "norm_layer": partial(nn.LayerNorm, eps=1e-8), "mlp_ratio": 4.0}
    layers = {"target_layers": _LARGE_LAYERS} if size == "large" else {}
    groups = [[0, 1, 2, 3], [4, 5, 6, 7]]
    return INP_Former(
        encoder=encoder,
        bottleneck=nn.ModuleList([vision_transformer.Mlp(channels, channels * 4, channels, drop=0.0)]),
        aggregation=nn.ModuleList([vision_transformer.Aggregation_Block(dim=channels, num_heads=heads, **settings)]),
        decoder=nn.ModuleList(
            [vision_transformer.Prototype_Block(dim=channels, num_heads=heads, **settings) for _ in range(8)]
        ),
        remove_class_token=True,
        fuse_layer_encoder=groups,
        fuse_layer_decoder=groups,
        prototype_token=nn.ParameterList([nn.Parameter(torch.randn(prototypes, channels))]),
        **layers,
    ).eval()


def _without_weights(vit_encoder: ModuleType, name: str) -> nn.Module:
    """Let the official function build its encoder, and give it no weights where it would download some."""
    vit_encoder.download_cached_file = lambda *_, **__: None
    load, torch.load = torch.load, lambda *_, **__: {}
    try:
        return vit_encoder.load(name)
    finally:
        torch.load = load


@torch.no_grad()
def record_inference(model: Any, images: Tensor) -> dict[str, np.ndarray]:
    """Run the network and the official evaluation of its maps, and keep what they make on the way."""
    from torch.nn import functional
    from utils import cal_anomaly_maps, get_gaussian_kernel

    model.eval()
    seen: dict[str, Tensor] = {}
    taps = {"block0": model.encoder.blocks[0], "bottleneck": model.bottleneck[-1], "inps": model.aggregation[-1]}
    taps |= {"first": model.decoder[0], "last": model.decoder[-1]}
    hooks = [module.register_forward_hook(partial(_keep, seen, name)) for name, module in taps.items()]
    embedded = model.encoder.prepare_tokens(images)
    fuse, fused = model.fuse_feature, []
    model.fuse_feature = lambda features: fused.append(fuse(features)) or fused[-1]
    en, de, coherence = model(images)
    del model.fuse_feature
    for hook in hooks:
        hook.remove()

    side, blur = images.shape[-1], get_gaussian_kernel(kernel_size=5, sigma=4)
    amap, _ = cal_anomaly_maps(en, de, side)
    amap256 = functional.interpolate(amap, size=256, mode="bilinear", align_corners=False)
    smooth = blur(amap256)
    grid = en[0].shape[-1]
    zero_shot = model.distance.reshape(-1, 1, grid, grid)
    zero_shot = functional.interpolate(zero_shot, size=side, mode="bilinear", align_corners=True)
    zero_shot = blur(functional.interpolate(zero_shot, size=256, mode="bilinear", align_corners=False))
    extra = embedded.shape[1] - grid * grid
    arrays = {
        "loss_coherence": coherence,
        "inp_tokens": seen["inps"],
        "distance": model.distance,
        "cluster_index": model.cluster_index,
        "tokens_cls_reg": embedded[:, :extra],
        "tokens_patch_s": embedded[:, extra:, ::16],
        "block0_s": seen["block0"][..., ::16],
        "fused_s": fused[0][..., ::16],
        "bottleneck_s": seen["bottleneck"][..., ::16],
        "decoder0_s": seen["first"][..., ::16],
        f"decoder{len(model.decoder) - 1}_s": seen["last"][..., ::16],
        "amap": amap,
        "amap256": amap256,
        "smooth": smooth,
        "score": _top_mean(smooth),
        "zs_smooth": zero_shot,
        "zs_score": _top_mean(zero_shot),
    }
    for group, (seen_there, rebuilt) in enumerate(zip(en, de, strict=True)):
        for name, value in (("en", seen_there), ("de", rebuilt)):
            arrays |= {f"{name}{group}_s": value[:, ::8], f"{name}{group}_l2": value.norm(dim=1)}
        arrays[f"grid{group}"] = 1 - functional.cosine_similarity(seen_there, rebuilt)
    return {name: value.numpy() for name, value in arrays.items()}


def _keep(into: dict[str, Tensor], name: str, _module: nn.Module, _inputs: object, output: Tensor) -> None:
    into[name] = output


def _top_mean(maps: Tensor) -> Tensor:
    """Score maps as the official evaluation does at `max_ratio` 0.01."""
    flat = maps.flatten(1)
    return torch.sort(flat, dim=1, descending=True)[0][:, : int(flat.shape[1] * 0.01)].mean(dim=1)


def record_training(model: Any, images: Tensor, iterations: int, warmup: int, steps: int) -> dict[str, np.ndarray]:
    """Run the official loop's iterations over the same images."""
    from optimizers import StableAdamW
    from utils import WarmCosineScheduler, global_cosine_hm_adaptive

    model.train()
    trainable = {key: value for key, value in model.named_parameters() if not key.startswith("encoder.")}
    optimiser = StableAdamW(
        [{"params": trainable.values()}], lr=1e-3, betas=(0.9, 0.999), weight_decay=1e-4, amsgrad=True, eps=1e-10
    )
    scheduler = WarmCosineScheduler(
        optimiser, base_value=1e-3, final_value=1e-4, total_iters=iterations, warmup_iters=warmup
    )
    arrays: dict[str, Any] = {f"schedule{iterations}": scheduler.schedule}
    rows = []
    for step in range(steps):
        rate = optimiser.param_groups[0]["lr"]
        en, de, coherence = model(images)
        mined = global_cosine_hm_adaptive(en, de, y=3)
        loss = mined + 0.2 * coherence
        optimiser.zero_grad()
        loss.backward()
        if step == 0:
            for key, value in trainable.items():
                arrays[f"gradnorm__{key}"] = value.grad.norm()
            for key in _recorded_in_full(model):
                arrays[f"grad__{key}"] = trainable[key].grad.flatten()[:_ENTRIES].clone()
        norm = nn.utils.clip_grad_norm_(trainable.values(), max_norm=0.1)
        optimiser.step()
        scheduler.step()
        rows.append((mined.item(), coherence.item(), loss.item(), norm.item(), rate))
    for name, column in zip(("loss_sm", "loss_coh", "loss", "gnorm", "lr"), np.array(rows).T, strict=True):
        arrays[f"trace__{name}"] = column
    for key in _recorded_in_full(model):
        arrays[f"after{steps}__{key}"] = trainable[key].detach().flatten()[:_ENTRIES]
    return {name: np.asarray(value) for name, value in arrays.items()}


def _recorded_in_full(model: Any) -> list[str]:
    return [key.format(last=len(model.decoder) - 1) for key in _IN_FULL]


if __name__ == "__main__":
    main()
