"""Detectors from the checkpoints that the methods' authors released.

A released checkpoint is a flat dictionary of tensors in the authors' names. Its sizes are read off the shapes, its
names are translated, and everything that does not fit is named rather than skipped. As a run sees it, a released
checkpoint is a fitting that is complete: `read_released` reads it, `keep_released` puts it into the run's directory,
and `adopt_released` turns it into the run's own checkpoint.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from models.ami_net import AmiNet, AmiNetConfig
from models.detector import Detector
from models.inp_former import InpFormer, InpFormerConfig
from training.config import RunConfig
from training.fitting.checkpoint import CheckpointRefused, TrainingState, detector_tensors, save_checkpoint

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
_AMI_NET_FEATURES = 256 + 512 + 1024  # channels of WideResNet-50-2's layers
_AMI_NET_POSITIONS = "Roncon_model.pos_embed"

# What was released, and at which side of the image it was trained.
RELEASED_SIDES: Mapping[str, int] = {"inp_former": 392, "ami_net": 256}
_RELEASED_FILE = "released.safetensors"
_BACKBONE_FILE = "backbone.safetensors"


class NotImportable(ValueError):
    """The file may well be the authors' own, but it can't be taken over like this; the message ends with what to do."""


@dataclass(frozen=True, eq=False)
class Released:
    """What an authors' checkpoint holds, in the names that are used here.

    Attributes:
        settings: what it decides of a run's configuration, `key=value`.
        tensors: of the detector without its backbone.
        backbone: weights in timm's names, or None where the file has none.
        told: file name and SHA-256.
    """

    settings: tuple[str, ...]
    tensors: Mapping[str, Tensor]
    backbone: Mapping[str, Tensor] | None
    told: str


def read_released(detector: str, path: Path, side: int | None = None) -> Released:
    """Read a released checkpoint of any published size.

    Args:
        detector: a name of `RELEASED_SIDES`.
        path: the authors' file.
        side: of the square image to run at; None for the one it was trained at.

    Raises:
        OSError: if the file can't be opened.
        CheckpointRefused: if the detector has no released checkpoints, or the file is none of its; the sentence names
            the key that does not fit.
    """
    if detector not in RELEASED_SIDES:
        raise CheckpointRefused(
            f"There are no released checkpoints of {detector!r} to import; known are {', '.join(RELEASED_SIDES)}."
        )
    side = RELEASED_SIDES[detector] if side is None else side
    told = f"{path.name}, SHA-256 {hashlib.sha256(path.read_bytes()).hexdigest()}"
    try:
        if detector == "inp_former":
            return _read_inp_former(_read(path), side, told)
        return _read_ami_net(_read(path, "state_dict"), side, told)
    except NotImportable as error:
        raise CheckpointRefused(f"{path.name} can't become a detector {detector}: {error}.") from error
    except ValueError as error:
        raise CheckpointRefused(
            f"{path.name} can't become a detector {detector}: {error}; give the authors' own file, as they released it."
        ) from error


def tell_softened(config: RunConfig) -> str | None:
    """Say where a configuration makes a released detector judge otherwise than its authors' code; else None."""
    own = config.detector_config()
    if not isinstance(own, AmiNetConfig) or own.mask_softness == 0:
        return None
    return (
        f"the mask is softened (hyperparameters.mask_softness={own.mask_softness:g}), so that every runtime masks "
        "alike; maps differ from the authors' by some hundredths of their range. Their own hard step, if the exported "
        "graph then still agrees: --set hyperparameters.mask_softness=0"
    )


def keep_released(released: Released, directory: Path) -> Path | None:
    """Put a released checkpoint into a run's directory; return the file of its backbone's weights, if it has any."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / _RELEASED_FILE).write_bytes(safetensors.torch.save(_copied(released.tensors)))
    if released.backbone is None:
        return None
    (directory / _BACKBONE_FILE).write_bytes(safetensors.torch.save(_copied(released.backbone)))
    return directory / _BACKBONE_FILE


def adopt_released(detector: Detector, directory: Path, identity: Mapping[str, str]) -> None:
    """Turn what `keep_released` wrote into the checkpoint of a run whose fitting is complete."""
    tensors = safetensors.torch.load((directory / _RELEASED_FILE).read_bytes())
    save_checkpoint(directory, TrainingState(len(detector.stages()), 0, tensors), identity)


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

    config = _read_config(head, image_size)
    if encoder and "register_tokens" not in encoder:
        raise NotImportable(
            "its encoder has no register_tokens; only INP-Formers over DINOv2 with registers are imported: give one of "
            "those, or fit another backbone anew with flawline train --detector inp_former"
        )
    try:
        detector = InpFormer(config)
    except ValueError as error:  # all but the size of the image is the authors'
        raise NotImportable(f"{error}; {_other_side('inp_former')}") from error
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
    backbone = _ami_net_backbone(state)
    head = {
        _translate(key, _AMI_NET_PREFIXES): value
        for key, value in state.items()
        if not key.startswith(_AMI_NET_BACKBONE)
    }

    config = _read_ami_net_config(head, image_size)
    try:
        detector = AmiNet(config)
    except ValueError as error:  # all but the size of the image is the authors'
        raise NotImportable(f"{error}; {_other_side('ami_net')}") from error
    _load(detector, head, _AMI_NET_PREFIXES)
    # The table follows from the grid; a checkpoint that holds another one was trained on another grid, and the authors'
    # code loads it there alone.
    own = detector.positions[None]
    where = f"{_AMI_NET_POSITIONS} does not belong to images of {image_size[0]} x {image_size[1]}"
    if positions is not None and positions.shape != own.shape:
        raise NotImportable(f"{where}; {_other_side('ami_net')}")
    if positions is not None and not torch.allclose(positions, own, atol=1e-5):
        raise ValueError(where)
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


def _read_inp_former(state: Mapping[str, Tensor], side: int, told: str) -> Released:
    imported = import_inp_former(state, (side, side))
    encoder = {key.removeprefix("encoder."): value for key, value in state.items() if key.startswith("encoder.")}
    # The authors cut 392 pixels out of 448; other sides keep that share.
    resized = round(side * 8 / 7)
    settings = (
        f"backbone={imported.config.backbone}",
        *(f"hyperparameters.{name}={getattr(imported.config, name)}" for name in ("prototypes", "decoder_blocks")),
        *_input_settings(side, resized),
    )
    return Released(settings, detector_tensors(imported), dinov2_to_timm(encoder) if encoder else None, told)


def _read_ami_net(state: Mapping[str, Tensor], side: int, told: str) -> Released:
    imported = import_ami_net(state, (side, side))
    sizes = ("patch_size", "token_channels", "heads", "blocks", "centre_blocks", "centres")
    settings = (
        f"backbone={imported.config.backbone}",
        *(f"hyperparameters.{name}={getattr(imported.config, name)}" for name in sizes),
        *_input_settings(side, side),
    )
    return Released(settings, detector_tensors(imported), _ami_net_backbone(state) or None, told)


def _input_settings(side: int, resized: int) -> tuple[str, ...]:
    return (
        *(f"input.{name}={side}" for name in ("height", "width")),
        *(f"input.resize_{name}={resized}" for name in ("height", "width")),
    )


def _ami_net_backbone(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        _translate(key.removeprefix(_AMI_NET_BACKBONE), _AMI_NET_BACKBONE_PREFIXES): value
        for key, value in state.items()
        if key.startswith(_AMI_NET_BACKBONE)
    }


def _other_side(detector: str) -> str:
    """Say which side of the image to take instead."""
    return f"leave --size out for the {RELEASED_SIDES[detector]} that the authors trained at, or give one that fits"


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors, because safetensors refuses those that share memory."""
    return {name: value.detach().clone().contiguous() for name, value in tensors.items()}


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
    """Read the sizes off the shapes and names; the number of groups is the released one."""
    _require_dimensions(head, {"prototype_tokens": 2, "decoder.0.attn.learn_scale": 3}, _INP_FORMER_PREFIXES)
    prototypes, channels = head["prototype_tokens"].shape
    heads = head["decoder.0.attn.learn_scale"].shape[0]
    if channels not in _VIT_BY_CHANNELS:
        raise ValueError(f"prototype_token has {channels} channels; known are {sorted(_VIT_BY_CHANNELS)}")
    if heads != channels // _CHANNELS_PER_HEAD:
        expected = channels // _CHANNELS_PER_HEAD
        raise ValueError(f"decoder.0.attn.learn_scale has {heads} heads; {expected} go with {channels} channels")
    blocks = _depth(head, "decoder.")
    if blocks % InpFormerConfig.groups:
        raise ValueError(f"decoder.* are {blocks} blocks, which {InpFormerConfig.groups} groups can't share evenly")
    return InpFormerConfig(
        backbone=_VIT_BY_CHANNELS[channels], prototypes=prototypes, decoder_blocks=blocks, image_size=image_size
    )


def _read_ami_net_config(head: Mapping[str, Tensor], image_size: tuple[int, int]) -> AmiNetConfig:
    """Read the sizes off the shapes and names; the backbone is the released one."""
    _require_dimensions(head, {"centre_queries": 3, "patch_embedding.weight": 4}, _AMI_NET_PREFIXES)
    channels, features, patch, _ = head["patch_embedding.weight"].shape
    if features != _AMI_NET_FEATURES:
        raise NotImportable(
            f"{_untranslate('patch_embedding.weight', _AMI_NET_PREFIXES)} takes features of {features} channels; only "
            f"AMI-Nets over WideResNet-50-2, which has {_AMI_NET_FEATURES}, are imported: give one of those, or fit "
            "another backbone anew with flawline train --detector ami_net"
        )
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
    found = {key.removeprefix(prefix).partition(".")[0] for key in head if key.startswith(prefix)}
    return sum(number.isdecimal() for number in found)


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
