r"""Record what the official DADF answers, narrow and with values that follow from names, for `test_dadf_official.py`.

    git clone https://github.com/hmyao22/DADF SOURCES/hmyao22+DADF            # at ebef0b6; MIT
    .venv/bin/pip install --no-deps FrEIA==0.2                                # its invertible blocks; MIT
    .venv/bin/python -m tests.parity.record_dadf SOURCES

Only numbers are written: `recorded/dadf.npz`. Both official training scripts and the official evaluation run as they
are, on the CPU and in float64, where other orders of summation leave twelve digits alike. The repository does not hold
all that it imports: `dataset.py` itself lacks imports, so batches are drawn, and metrics, plots and progress are
stand-ins. The reconstructor's sizes are small instead of the ones that its callers write. The backbone is the official
ResNet-18. No weights are read from files, all are filled. The script of the first stage never clears its gradients: it
runs once as it is, for its losses, and once with gradients cleared before each loss, for all the rest.
"""

import argparse
import importlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from tests.parity.official_code import RECORDED, checkout, declare_operators, fill
from tests.parity.recordings import draw

SEED = 1
STEPS = 4  # of each training
IMAGES = (2, 3, 64, 64)  # of the pseudo-key "input_64", as normalised images
SIZES = {"embed_dim": 16, "depth": 2, "num_heads": 4, "mlp_ratio": 2}
FLOW_STEPS = 8
ENTRIES = 8  # of each gradient and trained tensor
MEMORY = "reconstructor.sem_token"
_LARGE = 2000  # entries from which on a tensor's initial values tell how they were drawn
_ABSENT = (
    *("dataset", "reconstruction_dataset", "get_spro", "ignite", "ignite.contrib", "skimage", "pandas", "torch._six"),
    *("matplotlib", "matplotlib.pyplot"),
)
_BACKBONE = "feature_extractor."


def main() -> None:
    """Write the recording."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("sources", type=Path, help="folder of the checkout")
    source = parser.parse_args().sources / "hmyao22+DADF"
    declare_operators()
    importlib.import_module("timm")  # while what it looks for is not yet a stand-in
    RECORDED.mkdir(exist_ok=True)
    np.savez_compressed(RECORDED / "dadf.npz", **record(source))


def fill_dadf(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return what the official tensor of that name and shape is filled with."""
    match key.rsplit(".", maxsplit=1)[-1], len(shape):
        case "sem_token", _:
            return np.float32(0.5) * draw(key, shape, SEED)
        case "global_scale", _:  # round the value from which gains are 1
            return np.float32(2 * np.log(np.expm1(5))) + draw(key, shape, SEED)
        case "global_offset", _:
            return np.float32(0.1) * draw(key, shape, SEED)
        case "weight", 3:  # of a norm over a whole map
            return np.float32(1) + np.float32(0.1) * draw(key, shape, SEED)
        case "w_perm", _:
            order = permutation_of(key, shape[0])
            return np.eye(shape[0], dtype=np.float32)[order].reshape(shape)
        case _:
            return fill(key, shape, SEED)


def permutation_of(key: str, channels: int) -> np.ndarray:
    """Return which channel comes to each place, in the step whose official permutation has that name."""
    return np.argsort(draw(key, (channels,), SEED))


def is_recorded(key: str) -> bool:
    """Tell the tensors that decide something: no table, no counter, no inverse of another one."""
    return key.rsplit(".", maxsplit=1)[-1] not in ("pos_embed", "num_batches_tracked", "w_perm_inv")


def record(source: Path) -> dict[str, np.ndarray]:
    """Return everything that is recorded, by name; `__` stands for a slash."""
    with checkout(source, "Models", {name: MagicMock() for name in _ABSENT}), _as_of_then():
        images = torch.from_numpy(draw("input_64", IMAGES, SEED)).double()
        model = _build()
        return {
            "names": np.array(sorted(key for key in model.state_dict() if is_recorded(key))),
            **_initial_values(),
            **_inference(model, images),
            **_training(model, images),  # last, because it changes the model
        }


@contextmanager
def _as_of_then() -> Iterator[None]:
    """Let the official constructors and scripts run without weights, GPU and names that libraries dropped since."""
    with ExitStack() as stack:
        stack.enter_context(patch("scipy.interp", create=True))
        stack.enter_context(patch("torch._six", SimpleNamespace(inf=np.inf), create=True))
        stack.enter_context(patch("torch.load"))
        stack.enter_context(patch("torch.save"))
        stack.enter_context(patch("os.makedirs"))
        stack.enter_context(patch.object(nn.Module, "cuda", lambda self: self))
        yield


def _build() -> Any:
    """Build the official model of the second stage from a small reconstructor, and fill it."""
    import fastflow
    from Models import backbone_networks
    from torchvision.models import resnet18

    def small(img_size: list[int], patch_size: list[int], in_chans: list[int]) -> nn.Module:
        assert img_size == [64, 32, 16]
        return _small_reconstructor(patch_size, in_chans)

    with (
        patch.object(backbone_networks, "resnet18", lambda pretrained: resnet18()),  # noqa: ARG005  (a download)
        patch.object(fastflow, "VIT", small),
        patch.object(nn.Module, "load_state_dict"),
    ):
        model = fastflow.FastFlow_v2("Resnet18", "", FLOW_STEPS, IMAGES[-1])
    model.double()
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if is_recorded(key):
                tensor.copy_(torch.from_numpy(fill_dadf(key, tuple(tensor.shape))))
                if key.endswith("w_perm"):
                    model.state_dict()[f"{key}_inv"].copy_(tensor.transpose(0, 1))
    return model


def _small_reconstructor(patch_size: list[int], in_chans: list[int]) -> Any:
    from Models.ViT import VIT

    sides = [IMAGES[-1] // stride for stride in (4, 8, 16)]
    return VIT(img_size=sides, patch_size=patch_size, in_chans=in_chans, **SIZES)


def _initial_values() -> dict[str, np.ndarray]:
    """Record how widely the official constructors spread memory and large tensors: deviation and reach."""
    import fastflow

    torch.manual_seed(SEED)
    fresh = nn.ModuleDict(
        {
            "reconstructor": _small_reconstructor([4, 2, 1], [64, 128, 256]),
            "nf_flows": nn.ModuleList([fastflow.nf_fast_flow([192, 16, 16], False, 1, 2)]),  # of stride 4
        }
    )
    spread = {
        key: (float(tensor.std()), float(tensor.abs().max()))
        for key, tensor in sorted(fresh.state_dict().items())
        if key == MEMORY or (tensor.numel() >= _LARGE and is_recorded(key) and not key.endswith("w_perm"))
    }
    return {"initial_names": np.array(list(spread)), "initial_spread": np.array(list(spread.values()))}


@torch.no_grad()
def _inference(model: Any, images: Tensor) -> dict[str, np.ndarray]:
    """Record pyramid, both rebuilt ones, flows and their volumes, both losses, the map and the evaluation's scores."""
    seen: list[tuple[Tensor, Tensor]] = []
    hooks = [
        flow.register_forward_hook(lambda _module, _inputs, output: seen.append(output)) for flow in model.nf_flows
    ]
    model.eval()
    features = model.feature_extractor(images)
    rebuilt, remembered = model.reconstructor.forward_(features)
    answer = model(images)
    for hook in hooks:
        hook.remove()
    arrays = {
        "reconstruction_loss": model.reconstructor.loss(features),
        "flow_loss": answer["loss"],
        "map": answer["anomaly_map"][:, 0, ::3, ::3],
        "score": _official_scores(model, images),
    }
    streams = {"features": features, "rebuilt": rebuilt, "remembered": remembered, "z": [z for z, _ in seen]}
    for name, maps in streams.items():
        arrays |= {f"{name}{scale}": subset(one) for scale, one in enumerate(maps)}
    arrays |= {f"volume{scale}": volume for scale, (_, volume) in enumerate(seen)}
    return {name: np.array(value) for name, value in arrays.items()}


def subset(maps: Tensor) -> Tensor:
    """Return every 24th channel of maps `(B, C, h, w)`, and three rows and columns or so."""
    step = maps.shape[2] // 2 - 1
    return maps[:, ::24, ::step, ::step]


class _Batches(list[Any]):
    """Batches that a script goes through, and what it asked its loader for."""

    batch_size = IMAGES[0]


def _official_scores(model: Any, images: Tensor) -> np.ndarray:
    """Return the image scores that the official evaluation hands to its metric."""
    import fuse_main

    given: list[Tensor] = []
    metric = MagicMock(**{"compute.return_value": 0.0})
    metric.update.side_effect = lambda pair: given.append(pair[0])
    batches = _Batches([(images, torch.zeros(len(images), 1, *images.shape[2:]))])
    with (
        patch.object(fuse_main, "metrics", SimpleNamespace(ROC_AUC=lambda: metric)),
        patch.object(fuse_main, "Config", SimpleNamespace(device="cpu"), create=True),
    ):
        fuse_main.eval_once(batches, model)
    return given[1].numpy()  # the first are the pixels


def _training(model: Any, images: Tensor) -> dict[str, np.ndarray]:
    """Record the optimisers that both scripts build, losses, first gradients and what some steps lead to."""
    import fuse_main
    from constants import DefaultConfig

    settings = DefaultConfig()
    settings.parse({"backbone_name": "Resnet18", "device": "cpu", "use_gpu": False, "rec_epoch": 1})
    first, second = _Descent(model), _Descent(model)
    untrained = deepcopy(model.reconstructor.state_dict())
    summed_losses = _train_reconstructor(model, settings, [images] * STEPS, clear=False)
    model.reconstructor.load_state_dict(untrained)
    with first.watched():
        first.losses += _train_reconstructor(model, settings, [images] * STEPS, clear=True)
    _freeze_for_flows(model)
    kept = model.register_forward_hook(lambda _module, _inputs, output: second.losses.append(output["loss"].item()))
    with second.watched(), patch.object(fuse_main, "Config", settings, create=True):
        optimiser = fuse_main.build_optimizer(model, settings)
        fuse_main.train_one_epoch([images] * STEPS, model, optimiser, 0)
    kept.remove()
    model.eval()
    with torch.no_grad():
        trained_map = model(images)["anomaly_map"][:, 0, ::6, ::6].numpy()
    return {
        "trained_map": trained_map,
        "summed_losses": np.array(summed_losses),
        **first.arrays("reconstruction", DefaultConfig.train_batch_size, DefaultConfig.rec_epoch),
        **second.arrays("flow", DefaultConfig.FLOW_batch, DefaultConfig.flow_epoch),
    }


def _train_reconstructor(model: Any, settings: Any, batches: list[Tensor], *, clear: bool) -> list[float]:
    """Run the official script of the first stage on the model's own parts, and return its losses.

    That script never clears gradients, so that each step follows the sum of all since the first; `clear` clears them.
    """
    import reconstruction_train
    from Models import ViT

    model.reconstructor.requires_grad_(requires_grad=True)  # the second stage's model has frozen it
    model.reconstructor.pos_embed.requires_grad_(requires_grad=False)
    model.reconstructor.zero_grad()
    with (
        patch.object(ViT, "VIT", lambda **_: model.reconstructor),
        patch.object(ViT, "Resnet18", lambda: model.feature_extractor),
    ):
        whole = ViT.CC_Model(settings)
    loss, losses = whole.loss, []

    def keep_loss(images: Tensor) -> Tensor:
        if clear:
            model.reconstructor.zero_grad()
        answer: Tensor = loss(images)
        losses.append(answer.item())
        return answer

    whole.loss = keep_loss
    with (
        patch.object(ViT, "CC_Model", lambda _: whole),
        patch.object(reconstruction_train, "TrainData", lambda opt: batches),  # noqa: ARG005  (the script's name)
        patch.object(reconstruction_train, "DataLoader", lambda *_, **__: batches),
    ):
        reconstruction_train.Rec_train(settings, show_feature_map=False)
    return losses


def _freeze_for_flows(model: Any) -> None:
    """Freeze what the second stage's constructor freezes, as after its reading of the first stage's file."""
    model.reconstructor.requires_grad_(requires_grad=False)
    for parameter in model.parameters():
        parameter.grad = None


class _Descent:
    """What a script's optimiser was built with, the gradients before its first step, and what it leads to."""

    def __init__(self, model: nn.Module) -> None:
        self.losses: list[float] = []
        self._model = model
        self._defaults: dict[str, Any] = {}
        self._gradients: dict[str, Tensor] = {}

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Watch every optimiser that steps."""
        hook = register_optimizer_step_pre_hook(self._look)
        try:
            yield
        finally:
            hook.remove()

    def _look(self, optimiser: torch.optim.Optimizer, _arguments: Any, _named: Any) -> None:
        if not self._gradients:
            self._defaults = optimiser.defaults
            grown = ((name, one.grad) for name, one in self._model.named_parameters() if one.grad is not None)
            self._gradients = {name: gradient.clone() for name, gradient in grown if not name.startswith(_BACKBONE)}

    def arrays(self, stage: str, batch: int, epochs: int) -> dict[str, np.ndarray]:
        """Return all that was seen, after the last step; rows are in the order of the names."""
        names, state = sorted(self._gradients), self._model.state_dict()
        rates = [self._defaults["lr"], *self._defaults["betas"], self._defaults["weight_decay"], self._defaults["eps"]]
        arrays = {
            "recipe": np.array([*rates, batch, epochs]),
            "losses": np.array(self.losses),
            "names": np.array(names),
            "gradient_norms": np.array([self._gradients[name].norm() for name in names]),
            "gradients": np.array([first_entries(self._gradients[name]) for name in names]),
            "after": np.array([first_entries(state[name]) for name in names]),
        }
        return {f"{stage}__{name}": value for name, value in arrays.items()}


def first_entries(tensor: Tensor) -> np.ndarray:
    """Return the first entries of a tensor in C order."""
    return tensor.detach().flatten()[:ENTRIES].numpy().copy()


if __name__ == "__main__":
    main()
