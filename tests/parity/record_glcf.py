r"""Record what the official GLCF answers, narrow and with values that follow from names, for `test_glcf_official.py`.

    git clone https://github.com/hmyao22/GLCF SOURCES/hmyao22+GLCF    # at a9eaaec; MIT
    # Its calibration was deleted in a58e7e3:
    (cd SOURCES/hmyao22+GLCF && git show a58e7e3^:fuse_weight.py > fuse_weight.py)
    .venv/bin/python -m tests.parity.record_glcf SOURCES

Only numbers are written: `recorded/glcf.npz`. The official classes run as they are, on the CPU in float64, so that no
order of summation shows. What is narrow is asked for by the arguments of their constructors, and for the two
convolutional networks, whose widths are written in their code, by dividing them where a layer is built; the backbone
has basic blocks instead of bottlenecks. The calibration and the evaluation are the official scripts, with a data set of
drawn images. Changed for the training steps alone: the backbone is frozen, as in the first upload, where the last one
trains it. Of the model at its published size, names, shapes and heads are recorded.
"""

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
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
IMAGES = (2, 3, 224, 224)  # of the pseudo-key "input_224", as normalised images; official maps have this side only
TRAINING_IMAGES = (3, 3, 64, 64)  # of "input_64"
CALIBRATION_IMAGES = (3, 3, 224, 224)  # of "calibration_224"
DEPTHS = (1, 2, 2)  # of the mirrored network, the coarsest level first
CHANNELS = (8, 16, 32, 64)  # of the backbone's four stages, of one block each
_BOTTLENECK: dict[str, Any] = {
    "patch_size": [4, 2, 1],
    "in_chans": list(CHANNELS[1:]),
    "embed_dim": 24,
    "output_dim": 64,
    "depth": 2,
    "num_heads": 4,
    "decoder_embed_dim": 24,
    "decoder_depth": 2,
    "decoder_num_heads": 6,
}
_ABSENT = ("einops", "skimage", "pandas", "prefetch_generator", "get_spro", "models.swim_transformer_decoder")
UNUSED = ("bottle.cls_token", "teacher_encoder.fc.weight", "teacher_encoder.fc.bias")
_SHOWN = (
    *("auxiliary_token", "proj.weight", "fc2.weight", "norm2.weight", "decoder_pred.weight", "decoder_pred.bias"),
    *("0.bn2.running_mean", "0.bn2.running_var", "0.conv2.weight", "0.upsample.0.weight", "1.bn3.weight"),
)


def main() -> None:
    """Write the recording."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("sources", type=Path, help="folder of the checkout")
    source = parser.parse_args().sources / "hmyao22+GLCF"
    declare_operators()
    numpy_of_then()
    RECORDED.mkdir(exist_ok=True)
    np.savez_compressed(RECORDED / "glcf.npz", **record(source))


def record(source: Path) -> dict[str, np.ndarray]:
    """Return everything that is recorded, by name; `__` stands for a slash."""
    stand_ins = {name: MagicMock() for name in (*_ABSENT, "models.swim_transformer_encoder", "datasets", "config")}
    timm_names = timm_of_then()
    with checkout(source, "models", stand_ins), patch.multiple("timm.models.vision_transformer", **timm_names):
        model = build_small(IMAGES[-1])
        images = drawn_images("input_224", IMAGES)
        answers = {
            "tensors": checksum_of(key_shapes(model, UNUSED)),
            **_published_size(),
            **_inference(model, images),
            **_evaluation(source, model, images),
            **_training(build_small(TRAINING_IMAGES[-1]), drawn_images("input_64", TRAINING_IMAGES)),
        }
    return {name: one.astype(np.float32) if one.dtype == np.float64 else one for name, one in answers.items()}


def drawn_images(key: str, shape: tuple[int, ...]) -> Tensor:
    """Return images `(B, 3, side, side)`, as if already normalised."""
    return torch.from_numpy(draw(key, shape, SEED)).double()


def build_small(side: int) -> nn.Module:
    """Build the official model from narrow parts for images of a side, and fill it."""
    from models import Model, bottleneck, cnn_decoder, cnn_encoder

    class Narrow(cnn_encoder.ResNet):
        def _make_layer(self, block: Any, planes: int, blocks: int, **named: Any) -> nn.Sequential:
            return super()._make_layer(block, planes * CHANNELS[0] // 64, blocks, **named)

    class NarrowMirror(cnn_decoder.ResNet):
        def _make_layer(self, block: Any, planes: int, blocks: int, **named: Any) -> nn.Sequential:
            if planes == 256:  # the first layer, whose input the constructor has set
                self.inplanes = _BOTTLENECK["output_dim"]
            return super()._make_layer(block, planes * CHANNELS[0] // 256, blocks, **named)

    backbone = Narrow(cnn_encoder.BasicBlock, [1, 1, 1, 1])
    with (
        patch.object(cnn_encoder, "wide_resnet50_2", lambda pretrained: (backbone, None)),  # noqa: ARG005  (a download)
        patch.object(
            cnn_decoder,
            "de_wide_resnet50_2",
            lambda pretrained: NarrowMirror(cnn_decoder.Bottleneck, [*DEPTHS, 0], width_per_group=128),  # noqa: ARG005
        ),
        patch.object(
            bottleneck, "DPTV", partial(bottleneck.DPTV, img_size=[side // 8, side // 16, side // 32], **_BOTTLENECK)
        ),
    ):
        model = Model.SDCC_Model().eval()
    fill_module(model, SEED)
    return model.double()


def _published_size() -> dict[str, np.ndarray]:
    """Record what the official model is made of when nothing is said, without making its values."""
    from models import Model, cnn_encoder

    backbone = partial(cnn_encoder.wide_resnet50_2, pretrained=False)
    with torch.device("meta"), patch.object(cnn_encoder, "wide_resnet50_2", lambda pretrained: backbone()):  # noqa: ARG005
        model = Model.SDCC_Model()
    stacks = (model.bottle.blocks, model.bottle.global_decoder_blocks, model.bottle.local_decoder_blocks)
    return {
        "published_tensors": checksum_of(key_shapes(model, UNUSED)),
        "published_heads": np.array([stack[-1].attn.num_heads for stack in stacks]),
    }


@torch.no_grad()
def _inference(model: Any, images: Tensor) -> dict[str, np.ndarray]:
    """Record levels, tokens, coarse maps, decoded maps and distances in eval mode."""
    normed: list[Tensor] = []
    kept = model.bottle.norm.register_forward_hook(lambda _module, _inputs, output: normed.append(output))
    levels = model.teacher_encoder(images)
    coarse_local, coarse_global = model.bottle(levels[1:])
    kept.remove()
    targets, local, semantic, estimates = model(images)
    assert torch.equal(targets[0], levels[0])
    answers = {
        "positions": model.bottle.pos_embed[0, 1:, ::4],
        "tokens": normed[0][:, :, ::4],
        "coarse_local": coarse_local[:, ::4],
        "coarse_global": coarse_global[:, ::4],
    }
    named = {"level": levels, "local_estimate": local, "global_feature": semantic, "global_estimate": estimates}
    for name, maps in named.items():
        for scale, one in enumerate(maps):
            answers[f"{name}{scale}_s"] = one[:, ::4, ::7, ::7]
            answers[f"{name}{scale}_l2"] = one.norm(dim=1)[:, ::7, ::7]
    # The official maps are of one image: (images, branches, scales, rows, columns).
    official = np.array([model.a_map(image[None]) for image in images])
    return {**{name: value.numpy().copy() for name, value in answers.items()}, "maps": official[..., ::16, ::16]}


class _DrawnImages(torch.utils.data.Dataset[Any]):
    """Drawn images, for the scripts as files or as samples of a test."""

    def __init__(self, images: Tensor, *, samples: bool) -> None:
        self.images, self.samples = images, samples

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        if not self.samples:
            return self.images[index]
        return {
            "image": self.images[index],
            "has_anomaly": np.array([index % 2], dtype=np.float32),
            "mask": np.full((1, 224, 224), index % 2, dtype=np.float32),
        }


def _evaluation(source: Path, model: nn.Module, images: Tensor) -> dict[str, np.ndarray]:
    """Record the twelve numbers of calibration, and maps and scores of the evaluation, blurred and as published."""
    from models import Model

    weights = _calibrate(source, model, drawn_images("calibration_224", CALIBRATION_IMAGES))
    # A row a scale: deviation and mean of the local branch, then of the global one.
    answers = {"calibration": np.array([weights[f"scale{scale}"] for scale in (1, 2, 3)])}

    class Blurred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def a_map(self, imgs: Tensor) -> Any:
            return [[gaussian_filter(one, sigma=4) for one in maps] for maps in self.inner.a_map(imgs)]

    for name, judge in (("blurred", Blurred()), ("published", model)):
        for preset, line in (("texture", "carpet"), ("logical", "screw")):
            with patch.object(Model, "SDCC_Model", lambda judge=judge: judge):
                scores, maps = _evaluate(source, line, weights, images)
            answers[f"score__{name}__{preset}"] = scores
            answers[f"fused__{name}__{preset}"] = maps[:, ::16, ::16]
    return answers


def _calibrate(source: Path, model: nn.Module, images: Tensor) -> Any:
    """Run the deleted calibration script and return what it saves."""
    from models import Model

    kept: list[Any] = []
    options = MagicMock(device="cpu", use_gpu=True, load_model_path="", class_name="")
    stand_ins = {
        "datasets": MagicMock(TrainData=lambda **_: _DrawnImages(images, samples=False)),
        "config": MagicMock(DefaultConfig=lambda: options),
        "measure": MagicMock(),
        "models.misc": MagicMock(),
    }
    model.load_state_dict = lambda _: None  # type: ignore[method-assign,assignment]
    with (
        checkout(source, "fuse_weight", stand_ins),
        patch.object(Model, "SDCC_Model", lambda: model),
        patch("torch.save", lambda value, _: kept.append(value)),
        patch("torch.load"),
    ):
        import fuse_weight  # noqa: F401  (it calibrates when it is imported)
    return kept[0]


def _evaluate(source: Path, line: str, weights: Any, images: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Run the official evaluation of a line and return its scores and maps."""
    given: list[np.ndarray] = []
    with checkout(source, "measure", {}):
        import measure

        options = MagicMock(device="cpu", use_gpu=True, load_model_path="")
        with (
            patch.object(measure, "MVTecTestDataset", MagicMock()),
            patch.object(measure, "MVTecLOCOTestDataset", lambda *_, **__: _DrawnImages(images, samples=True)),
            patch.object(measure, "DataLoader", _one_by_one),
            patch.object(measure, "roc_auc_score", lambda _, scores: given.append(scores) or 0.0),
            patch.object(measure, "average_precision_score", lambda *_: 0.0),
            patch("torch.load", lambda *_, **__: weights),
            patch.object(nn.Module, "load_state_dict", lambda *_: None),
        ):
            measure.test(options, [line], "", "")
    return given[0], given[1].reshape(-1, 224, 224)


def _one_by_one(dataset: _DrawnImages, **_: Any) -> Iterator[Any]:
    return iter(torch.utils.data.DataLoader(dataset, batch_size=1))


def _training(model: Any, images: Tensor) -> dict[str, np.ndarray]:
    """Record terms, first gradients and what three steps of AdamW lead to, with a frozen backbone."""
    model.train()
    model.teacher_encoder.eval().requires_grad_(requires_grad=False)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95))
    rows = []
    for step in range(STEPS):
        terms: list[Tensor] = []
        with patch.object(model, "loss_fucntion", partial(_keep_term, model.loss_fucntion, terms)):
            total = model.loss(images)
        optimiser.zero_grad()
        total.backward()
        if step == 0:
            gradients = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
        optimiser.step()
        rows.append([total.item(), *(term.item() for term in terms)])
    state = model.state_dict()
    shown, changed = (sorted(filter(is_shown, names)) for names in (gradients, state))
    return {
        "trace_total_local_global_correspondence": np.array(rows),
        "gradient_norms": np.array([gradients[name].norm() for name in sorted(gradients)]),
        "gradients": np.concatenate([first_entries(gradients[name]) for name in shown]),
        "after_training": np.concatenate([first_entries(state[name]) for name in changed]),
    }


def _keep_term(of_pair: Callable[[Any, Any], Tensor], terms: list[Tensor], a: Any, b: Any) -> Tensor:
    terms.append(of_pair(a, b))
    return terms[-1]


def is_shown(name: str) -> bool:
    """Tell whether entries of an official tensor are recorded; of all others, the norm of the gradient alone."""
    return not name.startswith("teacher") and name not in UNUSED and name.endswith(_SHOWN)


if __name__ == "__main__":
    main()
