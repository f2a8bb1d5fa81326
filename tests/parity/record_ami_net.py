r"""Record what the official AMI-Net answers, in the form that `test_ami_net_official.py` compares.

    git clone https://github.com/luow23/AMI-Net SOURCES/luow23+AMI-Net    # at 3350be0; MIT
    .venv/bin/python -m tests.parity.record_ami_net SOURCES OUTPUT/parity/ami_net --seed 2 --patch 8 --centres 4
    FLAWLINE_SHARED=OUTPUT .venv/bin/python -m pytest tests/parity/test_ami_net_official.py

Nothing of that code is copied: it runs from its checkout, and numbers alone are written. Changed at run time are: the
download of weights (none), NumPy's removed name `float`, the jitter and the random mask of training (hard-wired to
CUDA; off, and one given mask), and fused attention (off). Maps are made of one image after the other, as in the
official loop over test frames.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn
from torch.nn import functional

from tests.parity.official_code import checkout, declare_operators, fill_module, numpy_of_then
from tests.parity.recordings import draw

_STAND_INS = {"models.efficientnet": MagicMock()}
_POSITION_ROWS = (0, 1, 2, 15, 16, 17, 128, 255)
_ENTRIES = 64
_IN_FULL = (
    *("cls_token", "mask_token", "patch_embed.proj.weight", "auxi_embed.proj.weight", "auxiliary.0.attn.qkv.weight"),
    *("blocks.0.attn.qkv.weight", "blocks.{last}.mlp.fc2.weight", "inpainting_pred.weight"),
)


def main() -> None:
    """Write one folder of recordings."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("sources", type=Path, help="folder of the checkout luow23+AMI-Net")
    parser.add_argument("output", type=Path, help="folder to write the recordings into")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--backbone", default="WideResnet50", help="a name of the official options")
    parser.add_argument("--side", type=int, default=256, help="of the images; the official grid is 64 for all of them")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--patch", type=int, default=4, help="k")
    parser.add_argument("--centres", type=int, default=8)
    parser.add_argument("--sigma", type=float, default=0.5)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--centre-blocks", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3, help="training steps; 0 for no training")
    options = parser.parse_args()

    declare_operators()
    with checkout(options.sources.resolve() / "luow23+AMI-Net", "models", _STAND_INS):
        _record(options)


def _record(options: argparse.Namespace) -> None:
    model = _build(options)
    fill_module(model, options.seed)
    options.output.mkdir(parents=True, exist_ok=True)
    keys = [
        {"key": key, "shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
        for key, value in model.state_dict().items()
    ]
    (options.output / "state_dict_keys.json").write_text(json.dumps(keys), encoding="utf-8")
    (options.output / "README.md").write_text(
        f"# Recorded: AMI-Net (SEED = {options.seed})\n\n"
        f"luow23/AMI-Net at 3350be0, {options.backbone}, k={options.patch}, {options.blocks} blocks, "
        f"{options.centres} centres, sigma {options.sigma:g}, {options.centre_blocks} auxiliary blocks, "
        f"torch {torch.__version__}; by record_ami_net.py {' '.join(sys.argv[3:])}.\n",
        encoding="utf-8",
    )
    images = draw(f"input_{options.side}", (options.batch, 3, options.side, options.side), options.seed)
    arrays = record_inference(model, torch.from_numpy(images))
    flat = images.astype(np.float64).ravel()
    arrays["input_checksum"] = np.array([flat.sum(), np.abs(flat).sum(), *flat[:8]])
    arrays |= record_mask_case(model.Roncon_model, arrays["token_score"].shape, options)
    np.savez_compressed(options.output / f"expected_{options.side}.npz", **arrays)
    if options.steps:
        trained = record_training(model, torch.from_numpy(images), options.seed, options.steps)
        np.savez_compressed(options.output / "expected_train.npz", **trained)


def _build(options: argparse.Namespace) -> Any:
    """Build the network by the official constructor, without pretrained weights."""
    numpy_of_then()
    from models import AMI_Net_model, networks

    for name in ("wide_resnet50_2", "resnet34", "resnet50", "resnet101", "wide_resnet101_2", "vgg19", "mobilenet_v2"):
        constructor = getattr(networks, name)
        setattr(networks, name, lambda _pretrained, constructor=constructor: constructor(weights=None))
    settings = SimpleNamespace(
        backbone_name=options.backbone,
        k=options.patch,
        in_lay_num=options.blocks,
        center_num=options.centres,
        sigma=options.sigma,
        clu_lay_num=options.centre_blocks,
    )
    model = AMI_Net_model.AMAE(settings).eval()
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return model


@torch.no_grad()
def record_inference(model: Any, images: Tensor) -> dict[str, np.ndarray]:
    """Run the network and the official evaluation of its maps, and keep what they make on the way."""
    network = model.Roncon_model
    seen: dict[str, Tensor] = {}
    taps = {"patch_embed": network.patch_embed, "auxi_embed": network.auxi_embed, "norm_auxi": network.norm_auxi}
    taps |= {"auxiliary": network.auxiliary[-1], "block0": network.blocks[0], "norm": network.norm}
    hooks = [module.register_forward_hook(partial(_keep, seen, name)) for name, module in taps.items()]
    features, _, rebuilt, _, scores, mask = model(images, "test")
    for hook in hooks:
        hook.remove()
    centres = network.auxiliary_feature
    points = seen["auxi_embed"] + network.pos_embed
    distances = torch.norm(points.unsqueeze(2) - centres.unsqueeze(1), p=2, dim=-1) * (
        1.0 - functional.cosine_similarity(points.unsqueeze(2), centres.unsqueeze(1), dim=-1)
    )
    nearest = distances.argmin(dim=2)
    two = distances.topk(2, dim=2, largest=False).values
    arrays = {
        "cluster_margin": ((two[..., 1] - two[..., 0]) / two[..., 0]).min(),
        "threshold_margin": torch.tensor(_threshold_margin(scores, nearest, network.sigma)),
        "patch_embed_s": seen["patch_embed"][..., ::16],
        "auxi_embed_s": seen["auxi_embed"][..., ::16],
        "aux_block_centres": seen["auxiliary"][:, : network.center_num],
        "centres": centres,
        "token_score": scores,
        "cluster_index": nearest,
        "mask": mask,
        "block0_s": seen["block0"][..., ::16],
        "final_norm_s": seen["norm"][..., ::16],
        "dis64": ((features - rebuilt) ** 2).mean(dim=1),
        "dir64": 1 - functional.cosine_similarity(features, rebuilt, dim=1),
        "pos_embed_rows": network.pos_embed[0][[row for row in _POSITION_ROWS if row < network.pos_embed.shape[1]]],
    }
    for name, value in (("feat", features), ("rec", rebuilt)):
        arrays |= {f"{name}_s": value[:, ::32, ::2, ::2], f"{name}_l2": value.norm(dim=1)}
    recorded = {name: value.numpy() for name, value in arrays.items()}
    maps: dict[str, list[Any]] = {name: [] for name in ("dis_map_s", "dir_map_s", "dis_smooth_s", "dir_smooth_s")}
    maps |= {"amap": [], "image_score": []}
    for image in range(len(images)):
        coarse = model.a_map(features[image : image + 1], rebuilt[image : image + 1])
        smooth = [gaussian_filter(one, sigma=4) for one in coarse]
        for name, plain, smoothed in zip(("dis", "dir"), coarse, smooth, strict=True):
            maps[f"{name}_map_s"].append(plain[::2, ::2])
            maps[f"{name}_smooth_s"].append(smoothed[::2, ::2])
        amap = smooth[1] * smooth[0]
        maps["amap"].append(amap)
        maps["image_score"].append(np.std(amap))
    return recorded | {name: np.stack(values) for name, values in maps.items()}


def _keep(into: dict[str, Tensor], name: str, _module: nn.Module, _inputs: object, output: Tensor) -> None:
    into[name] = output


def _threshold_margin(scores: Tensor, nearest: Tensor, sigma: float) -> float:
    """Return the smallest relative gap between a score and the threshold of its cluster."""
    gaps = []
    for own_scores, own_nearest in zip(scores, nearest, strict=True):
        for cluster in own_nearest.unique():
            members = own_scores[own_nearest == cluster]
            if len(members) > 1:
                threshold = members.mean() + sigma * members.std()
                gaps.append(((members - threshold).abs() / threshold).min().item())
    return min(gaps)


def record_mask_case(network: Any, shape: tuple[int, ...], options: argparse.Namespace) -> dict[str, np.ndarray]:
    """Ask the official generator for a mask where all clusters are in use, the last one with a single token."""
    scores = np.abs(draw("mask_case_score", shape, options.seed)) + np.float32(1)
    clusters = np.abs(draw("mask_case_cluster", shape, options.seed) * 1000).astype(np.int64)
    clusters %= max(options.centres - 1, 1)
    clusters[:, 0] = options.centres - 1
    mask = network.generate_mask(torch.from_numpy(scores), torch.from_numpy(clusters), options.sigma)
    return {"mask_case_score": scores, "mask_case_cluster": clusters, "mask_case_mask": mask.numpy()}


def record_training(model: Any, images: Tensor, seed: int, steps: int) -> dict[str, np.ndarray]:
    """Run the official loss and optimiser over the same images, without jitter and with one given mask."""
    network = model.Roncon_model
    network.train()
    shape = (len(images), network.patch_embed.num_patches)
    visible = torch.from_numpy((draw("train_mask", shape, seed) > 0).astype(np.float32))
    network.add_jitter = lambda tokens, _scale, _probability: tokens
    network.rand_mask = lambda _scores: setattr(network, "binary_anomaly", visible) or visible
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-4, betas=(0.9, 0.95))
    trained = {f"Roncon_model.{key}": value for key, value in network.named_parameters()}
    in_full = [f"Roncon_model.{key.format(last=len(network.blocks) - 1)}" for key in _IN_FULL]
    arrays: dict[str, Any] = {"train_mask": visible}
    rows = []
    for step in range(steps):
        features, _, rebuilt, loss, scores, _ = model(images, "train")
        predicted, target = network.patchify(rebuilt), network.patchify(features)
        dis = ((predicted - target) ** 2).mean()
        direction = (1 - functional.cosine_similarity(predicted, target, dim=-1)).mean()
        count = network.center_num
        diversity = (network.diff_cos.sum(dim=(1, 2)) / (count * count - count)).mean()
        optimiser.zero_grad()
        loss.backward()
        if step == 0:
            for key in in_full:
                arrays[f"gradnorm__{key}"] = trained[key].grad.norm()
                arrays[f"grad__{key}"] = trained[key].grad.flatten()[:_ENTRIES].clone()
        optimiser.step()
        rows.append([value.item() for value in (loss, dis, direction, scores.mean(), diversity)])
    arrays["trace__total_dis_dir_compact_diversity"] = np.array(rows)
    for key in in_full:
        arrays[f"after{steps}__{key}"] = trained[key].detach().flatten()[:_ENTRIES]
    return {name: np.asarray(value) for name, value in arrays.items()}


if __name__ == "__main__":
    main()
