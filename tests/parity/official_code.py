"""Run official code from a checkout: stand-ins for what it imports and isn't here, and values for its tensors.

Used by the recorders beside this file. Nothing here is imported from a checkout until a recorder asks for it.
"""

import sys
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import torch
from torch import nn

from tests.parity.recordings import draw

RECORDED = Path(__file__).parent / "recorded"
_TOKENS = ("cls_token", "mask_token")
_FIXED = ("pos_embed", "decoder_pos_embed", "num_batches_tracked")
_ENTRIES = 32
_operators: list[torch.library.Library] = []


def fill(key: str, shape: Sequence[int], seed: int) -> np.ndarray:
    """Return what the official tensor of that name and shape is filled with, as `parity/ami_net/README.md` says."""
    x = draw(key, tuple(shape), seed)
    match key.rsplit(".", maxsplit=1)[-1], len(shape):
        case "running_mean", _:
            return np.float32(0.1) * x
        case "running_var", _:
            return np.float32(1) + np.float32(0.1) * np.abs(x)
        case name, _ if name in _TOKENS:
            return np.float32(0.5) * x
        case "bias", _:
            return np.float32(0.05) * x
        case "weight", 1:
            return np.float32(1) + np.float32(0.1) * x
        case _:
            return x * np.float32(np.sqrt(1 / np.prod(shape[1:])))


def is_filled(key: str) -> bool:
    """Tell whether a tensor is filled: tables of positions and counters of steps keep what they are built with."""
    return key.rsplit(".", maxsplit=1)[-1] not in _FIXED


@torch.no_grad()
def fill_module(module: nn.Module, seed: int, under: str = "") -> None:
    """Fill an official module in place; `under` is what its names lack."""
    for key, tensor in module.state_dict().items():
        if is_filled(key):
            tensor.copy_(torch.from_numpy(fill(under + key, tensor.shape, seed)))


def key_shapes(module: nn.Module, unused: Collection[str], under: str = "") -> dict[str, tuple[int, ...]]:
    """Return the shapes of an official module's filled tensors by name, but for unused ones."""
    shapes = {under + key: tuple(tensor.shape) for key, tensor in module.state_dict().items() if is_filled(key)}
    return {key: shape for key, shape in shapes.items() if key not in unused}


def checksum_of(shapes: Mapping[str, tuple[int, ...]]) -> np.ndarray:
    """Return how many tensors there are and a checksum of their names and shapes."""
    lines = [f"{key} {'x'.join(map(str, shapes[key]))}" for key in sorted(shapes)]
    return np.array([len(lines), zlib.crc32("\n".join(lines).encode("utf-8"))])


@contextmanager
def checkout(folder: Path, package: str, stand_ins: Mapping[str, Any]) -> Iterator[None]:
    """Let a package or file of a checkout be imported in place of ours of that name; absent imports have stand-ins.

    A stand-in is a module, a mock, or the names that a module has.
    """
    before = dict(sys.modules)
    for name in [name for name in before if name.partition(".")[0] == package]:
        del sys.modules[name]
    if (folder / package).is_dir():  # without an `__init__.py` of its own it would come after ours
        sys.modules[package] = _as_module(package, {"__path__": [str(folder / package)]})
    sys.modules.update({name: _as_module(name, value) for name, value in stand_ins.items()})
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in [name for name in sys.modules if name in stand_ins or name.partition(".")[0] == package]:
            del sys.modules[name]
        sys.modules.update({name: module for name, module in before.items() if name not in sys.modules})


def _as_module(name: str, value: Any) -> Any:
    if isinstance(value, ModuleType | MagicMock):
        return value
    module = ModuleType(name)
    vars(module).update(value)
    return module


def declare_operators() -> None:
    """Let torchvision be imported where its compiled operators do not load; nothing here calls them.

    `models.backbones` declares the same for our detectors, and is out of reach: checkouts bring a `models` of their
    own.
    """
    try:
        import torchvision  # noqa: F401  (only whether it can be imported)
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _operators.append(library)


def timm_of_then() -> dict[str, Any]:
    """Return timm 0.3.2's two names as today's timm has them: same arithmetic, without an argument that was None."""
    from timm.models.vision_transformer import Block, PatchEmbed

    def block(*arguments: Any, qk_scale: None = None, **named: Any) -> nn.Module:
        assert qk_scale is None
        return Block(*arguments, **named)

    return {"Block": block, "PatchEmbed": PatchEmbed}


def numpy_of_then() -> None:
    """Give numpy back the alias that official code still uses."""
    vars(np)["float"] = float


def first_entries(tensor: torch.Tensor) -> np.ndarray:
    """Return the first entries of a tensor in C order."""
    return tensor.detach().flatten()[:_ENTRIES].numpy().copy()
