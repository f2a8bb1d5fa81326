"""Detectors from the checkpoints that the methods' authors released.

A released checkpoint is a flat dictionary of tensors in the authors' names. Its sizes are read off the shapes, its
names are translated, and everything that does not fit is named rather than skipped.
"""

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from models.ami_net import AmiNet, AmiNetConfig
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
_AMI_NET_PREFIXES = {
    "Roncon_model.cls_token": "centre_queries",
    "Roncon_model.mask_token": "mask_token",
    "Roncon_model.patch_embed.proj.": "patch_embedding.",
    "Roncon_model.auxi_embed.proj.": "centre_embedding.",
    "Roncon_model.auxiliary.": "centre_blocks.",
    "Roncon_model.norm_auxi.": "centre_norm.",
    "Roncon_model.blocks.": "blocks.",
    "Roncon_model.norm.": "norm.",
    "Roncon_model.inpainting_pred.": "prediction.",
}
_AMI_NET_BACKBONE = "Feature_extractor."
_AMI_NET_BACKBONE_PREFIXES = {
    "block1.0.": "conv1.",
    "block1.1.": "bn1.",
    "block2.": "layer1.",
    "block3.": "layer2.",
    "block4.": "layer3.",
}
_AMI_NET_POSITIONS = "Roncon_model.pos_embed"


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
    head = {
        _translate(key, _INP_FORMER_PREFIXES): value for key, value in state.items() if not key.startswith("encoder.")
    }

    detector = InpFormer(_read_config(head, image_size))
    _load(detector, head, _INP_FORMER_PREFIXES)
    if encoder:
        detector.load_backbone_weights(dinov2_to_timm(encoder))
    return detector


def import_ami_net(checkpoint: Mapping[str, Tensor] | Path, image_size: tuple[int, int] = (256, 256)) -> AmiNet:
    """Build AMI-Net from a checkpoint with the official names (luow23/AMI-Net, `AMAE.pth`).

    Args:
        checkpoint: the state dictionary, or a file with it (`.safetensors`, or `.pth` read without unpickling objects;
            there the dictionary may lie under "state_dict", as in the released files).
        image_size: `(height, width)` to run at; the released models were trained at 256.

    Returns:
        The detector. If the checkpoint holds no `Feature_extractor.*`, it still needs `load_backbone_weights`.

    Raises:
        OSError: if the file can't be opened.
        ValueError: if the file holds something else than tensors, a key is missing, unknown or of an unexpected shape,
            or the positions are those of another image size; the sentence names it.
    """
    state = dict(_read(checkpoint, "state_dict") if isinstance(checkpoint, Path) else checkpoint)
    positions = state.pop(_AMI_NET_POSITIONS, None)
    backbone = {
        _translate(key.removeprefix(_AMI_NET_BACKBONE), _AMI_NET_BACKBONE_PREFIXES): value
        for key, value in state.items()
        if key.startswith(_AMI_NET_BACKBONE)
    }
    head = {
        _translate(key, _AMI_NET_PREFIXES): value
        for key, value in state.items()
        if not key.startswith(_AMI_NET_BACKBONE)
    }

    detector = AmiNet(_read_ami_net_config(head, image_size))
    _load(detector, head, _AMI_NET_PREFIXES)
    # The table follows from the grid; a checkpoint that holds another one was trained on another grid.
    own = detector.positions[None]
    if positions is not None and (positions.shape != own.shape or not torch.allclose(positions, own, atol=1e-5)):
        raise ValueError(f"{_AMI_NET_POSITIONS} does not belong to images of {image_size[0]} x {image_size[1]}")
    if backbone:
        detector.load_backbone_weights(backbone)
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


def _read(path: Path, inside: str | None = None) -> Mapping[str, Tensor]:
    """Read a flat dictionary of tensors; objects of any other class are refused by the loaders.

    Args:
        path: of the file.
        inside: key under which some files hold the dictionary.
    """
    try:
        if path.suffix == ".safetensors":
            state: object = safetensors.torch.load(path.read_bytes())
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # the two loaders raise many kinds, and all of them mean the file
        raise ValueError(f"{path.name} can't be read as plain tensors") from error
    if isinstance(state, Mapping) and inside in state:
        state = state[inside]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path.name} holds no flat dictionary of tensors")
    return state


def _read_config(head: Mapping[str, Tensor], image_size: tuple[int, int]) -> InpFormerConfig:
    """Read the sizes off the shapes; the number of decoder blocks is the released one."""
    _require_dimensions(head, {"prototype_tokens": 2, "decoder.0.attn.learn_scale": 3}, _INP_FORMER_PREFIXES)
    prototypes, channels = head["prototype_tokens"].shape
    heads = head["decoder.0.attn.learn_scale"].shape[0]
    if channels not in _VIT_BY_CHANNELS:
        raise ValueError(f"prototype_token has {channels} channels; known are {sorted(_VIT_BY_CHANNELS)}")
    if heads != channels // _CHANNELS_PER_HEAD:
        expected = channels // _CHANNELS_PER_HEAD
        raise ValueError(f"decoder.0.attn.learn_scale has {heads} heads; {expected} go with {channels} channels")
    return InpFormerConfig(backbone=_VIT_BY_CHANNELS[channels], prototypes=prototypes, image_size=image_size)


def _read_ami_net_config(head: Mapping[str, Tensor], image_size: tuple[int, int]) -> AmiNetConfig:
    """Read the sizes off the shapes and names; the backbone is the released one."""
    _require_dimensions(head, {"centre_queries": 3, "patch_embedding.weight": 4}, _AMI_NET_PREFIXES)
    channels, _, patch, _ = head["patch_embedding.weight"].shape
    return AmiNetConfig(
        image_size=image_size,
        patch_size=patch,
        token_channels=channels,
        heads=max(1, channels // _CHANNELS_PER_HEAD),
        blocks=_depth(head, "blocks."),
        centre_blocks=_depth(head, "centre_blocks."),
        centres=head["centre_queries"].shape[1],
    )


def _require_dimensions(head: Mapping[str, Tensor], wanted: Mapping[str, int], prefixes: Mapping[str, str]) -> None:
    """Refuse a checkpoint without the tensors that sizes are read off."""
    for key, dimensions in wanted.items():
        if key not in head:
            raise ValueError(f"the checkpoint lacks {_untranslate(key, prefixes)}")
        if head[key].ndim != dimensions:
            shape = tuple(head[key].shape)
            raise ValueError(f"{_untranslate(key, prefixes)} has shape {shape}, not {dimensions} dimensions")


def _depth(head: Mapping[str, Tensor], prefix: str) -> int:
    """Count the numbered blocks under a prefix."""
    return len({key.removeprefix(prefix).partition(".")[0] for key in head if key.startswith(prefix)})


def _load(detector: nn.Module, head: Mapping[str, Tensor], prefixes: Mapping[str, str]) -> None:
    """Put all tensors but the backbone's into a detector, and name those that don't fit as the file does."""
    own = {key: value for key, value in detector.state_dict().items() if not key.startswith("backbone.")}
    for key in sorted(own.keys() - head.keys()):
        raise ValueError(f"the checkpoint lacks {_untranslate(key, prefixes)}")
    for key in sorted(head.keys() - own.keys()):
        raise ValueError(f"the checkpoint has an unknown key {_untranslate(key, prefixes)}")
    for key, value in own.items():
        if head[key].shape != value.shape:
            expected = f"{tuple(head[key].shape)}, expected {tuple(value.shape)}"
            raise ValueError(f"{_untranslate(key, prefixes)} has shape {expected}")
    detector.load_state_dict(dict(head), strict=False)


def _translate(key: str, prefixes: Mapping[str, str]) -> str:
    for official, ours in prefixes.items():
        if key.startswith(official):
            return ours + key.removeprefix(official)
    raise ValueError(f"the checkpoint has an unknown key {key}")


def _untranslate(key: str, prefixes: Mapping[str, str]) -> str:
    official, ours = next((official, ours) for official, ours in prefixes.items() if key.startswith(ours))
    return official + key.removeprefix(ours)
