"""Detectors from the checkpoints that the methods' authors released.

A released checkpoint is a flat dictionary of tensors in the authors' names. Its sizes are read off the shapes, its
names are translated, and everything that does not fit is named rather than skipped.
"""

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from models.inp_former import InpFormer, InpFormerConfig

_VIT_BY_CHANNELS = {
    384: "vit_small_patch14_reg4_dinov2",
    768: "vit_base_patch14_reg4_dinov2",
    1024: "vit_large_patch14_reg4_dinov2",
}
_CHANNELS_PER_HEAD = 64

# Prefix in the official file and the name here; the rest of each key is the same.
_INP_FORMER_PREFIXES = {
    "prototype_token": "prototype_tokens",
    "aggregation.0.": "extractor.",
    "bottleneck.0.": "bottleneck.",
    "decoder.": "decoder.",
}


def import_inp_former(checkpoint: Mapping[str, Tensor] | Path, image_size: tuple[int, int] = (392, 392)) -> InpFormer:
    """Build INP-Former from a checkpoint with the official names (luow23/INP-Former, `model.pth`).

    Args:
        checkpoint: the state dictionary, or a file with it (`.safetensors`, or `.pth` read without unpickling objects).
        image_size: `(height, width)` to run at; the released models were trained at 392.

    Returns:
        The detector. If the checkpoint holds no `encoder.*`, it still needs `load_backbone_weights`.

    Raises:
        OSError: if the file can't be opened.
        ValueError: if the file holds something else than tensors, or a key is missing, unknown or of an unexpected
            shape; the sentence names it.
    """
    state = _read(checkpoint) if isinstance(checkpoint, Path) else checkpoint
    encoder = {key.removeprefix("encoder."): value for key, value in state.items() if key.startswith("encoder.")}
    head = {_translate(key): value for key, value in state.items() if not key.startswith("encoder.")}

    detector = InpFormer(_read_config(head, image_size))
    own = {key: value for key, value in detector.state_dict().items() if not key.startswith("backbone.")}
    for key in sorted(own.keys() - head.keys()):
        raise ValueError(f"the checkpoint lacks {_untranslate(key)}")
    for key in sorted(head.keys() - own.keys()):
        raise ValueError(f"the checkpoint has an unknown key {_untranslate(key)}")
    for key, value in own.items():
        if head[key].shape != value.shape:
            expected = f"{tuple(head[key].shape)}, expected {tuple(value.shape)}"
            raise ValueError(f"{_untranslate(key)} has shape {expected}")
    detector.load_state_dict(head, strict=False)
    if encoder:
        detector.load_backbone_weights(dinov2_to_timm(encoder))
    return detector


def dinov2_to_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of a DINOv2 release with registers to timm's names.

    timm keeps no position for the class token: it is added to the token itself. The mask token of pretraining is left.

    Raises:
        ValueError: if a token or the positions are missing; the sentence names it.
    """
    special = ("cls_token", "register_tokens", "pos_embed")
    for key in special:
        if key not in state:
            raise ValueError(f"the weights lack {key}")
    renamed = {key: value for key, value in state.items() if key not in (*special, "mask_token")}
    positions = state["pos_embed"]
    renamed["cls_token"] = state["cls_token"] + positions[:, :1]
    renamed["reg_token"] = state["register_tokens"]
    renamed["pos_embed"] = positions[:, 1:]
    return renamed


def _read(path: Path) -> Mapping[str, Tensor]:
    """Read a flat dictionary of tensors; objects of any other class are refused by the loaders."""
    try:
        if path.suffix == ".safetensors":
            state: object = safetensors.torch.load(path.read_bytes())
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # the two loaders raise many kinds, and all of them mean the file
        raise ValueError(f"{path.name} can't be read as plain tensors") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path.name} holds no flat dictionary of tensors")
    return state


def _read_config(head: Mapping[str, Tensor], image_size: tuple[int, int]) -> InpFormerConfig:
    """Read the sizes off the shapes; the number of decoder blocks is the released one."""
    for key, dimensions in (("prototype_tokens", 2), ("decoder.0.attn.learn_scale", 3)):
        if key not in head:
            raise ValueError(f"the checkpoint lacks {_untranslate(key)}")
        if head[key].ndim != dimensions:
            raise ValueError(f"{_untranslate(key)} has shape {tuple(head[key].shape)}, not {dimensions} dimensions")
    prototypes, channels = head["prototype_tokens"].shape
    heads = head["decoder.0.attn.learn_scale"].shape[0]
    if channels not in _VIT_BY_CHANNELS:
        raise ValueError(f"prototype_token has {channels} channels; known are {sorted(_VIT_BY_CHANNELS)}")
    if heads != channels // _CHANNELS_PER_HEAD:
        expected = channels // _CHANNELS_PER_HEAD
        raise ValueError(f"decoder.0.attn.learn_scale has {heads} heads; {expected} go with {channels} channels")
    return InpFormerConfig(backbone=_VIT_BY_CHANNELS[channels], prototypes=prototypes, image_size=image_size)


def _translate(key: str) -> str:
    for official, ours in _INP_FORMER_PREFIXES.items():
        if key.startswith(official):
            return ours + key.removeprefix(official)
    raise ValueError(f"the checkpoint has an unknown key {key}")


def _untranslate(key: str) -> str:
    prefixes = {ours: official for official, ours in _INP_FORMER_PREFIXES.items()}
    ours = next(ours for ours in prefixes if key.startswith(ours))
    return prefixes[ours] + key.removeprefix(ours)
