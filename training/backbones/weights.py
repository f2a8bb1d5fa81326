"""Backbone weights: from a file, a folder of known files, the package, timm's download, or none at all on purpose.

Comes before the detector is fitted; `models` never opens files. Only safetensors is read, and the digest is taken of
the very bytes that are parsed. The digest goes into checkpoint and manifest, so that a detector's own few tensors are
never joined with another backbone.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from models.backbones import BackboneUnavailable, untrained_weights
from training.backbones.download import fetch_where_reachable
from training.backbones.weight_lock import SHIPPED_FOLDER, how_to_get, known_files, name_of_file, refuse_changed_file

UNTRAINED: Literal["untrained"] = "untrained"


class WeightsUnavailable(Exception):
    """No weights could be had; the sentence says what to do."""


@dataclass(frozen=True)
class ResolvedWeights:
    """Weights of a backbone and where they come from.

    Attributes:
        state_dict: tensors in timm's naming.
        digest: SHA-256, in hexadecimal, of the safetensors file that they are or would be.
        source: file name, "timm" or "untrained"; for the manifest, so without folders.
    """

    state_dict: dict[str, Tensor]
    digest: str
    source: str


def resolve_weights(
    backbone: str,
    weights: Path | Literal["untrained"] | None = None,
    search: Sequence[Path] = (),
    *,
    seed: int = 0,
    fetch: Callable[[str], Mapping[str, Tensor]] = fetch_where_reachable,
) -> ResolvedWeights:
    """Find the weights of a backbone.

    Args:
        backbone: timm's name.
        weights: a safetensors file, which is then the only place looked at; or "untrained" for seeded random weights,
            the control that pretraining has to beat.
        search: folders that may hold `<backbone>.safetensors` or the file that the lock names, in order; looked at
            before the package's own. A folder's lock holds for its files.
        seed: of untrained weights.
        fetch: asked last for weights by name; timm's download unless given.

    Raises:
        WeightsUnavailable: if the file can't be read, or no place has weights.
        training.backbones.weight_lock.WeightsRefused: if a file differs from the lock of its folder.
    """
    if weights == UNTRAINED:
        return _from_memory(untrained_weights(backbone, seed), UNTRAINED)
    if isinstance(weights, Path):
        return _from_file(weights)
    for folder in (*search, SHIPPED_FOLDER):
        for name in _file_names(backbone):
            if (folder / name).is_file():
                refuse_changed_file(folder / name)
                return _from_file(folder / name)
    try:
        return _from_memory(fetch(backbone), "timm")
    except BackboneUnavailable as error:
        raise WeightsUnavailable(
            f"There are no weights for the backbone {backbone}: {error}; {how_to_get(backbone)}, or say {UNTRAINED!r} "
            "for random ones."
        ) from error


def read_weights_option(given: str | None) -> tuple[Path | Literal["untrained"] | None, tuple[Path, ...]]:
    """Read what a person says of weights: a safetensors file, a folder of such, "untrained", or nothing.

    Returns:
        `weights` and `search` of `resolve_weights`; the folder `weights` of the working directory is always searched.
    """
    usual = (Path("weights").resolve(),)
    if given is None:
        return None, usual
    if given == UNTRAINED:
        return UNTRAINED, usual
    path = Path(given).resolve()
    return (None, (path, *usual)) if path.is_dir() else (path, usual)


def tell_idle_folder(given: str | None, backbone: str | None, *, of_environment: bool = False) -> str | None:
    """Refuse a folder that a person names for a run but that holds no weights of its backbone, or say so.

    Others would be found elsewhere, and nobody would see that the folder was for nothing.

    Args:
        given: what the person says of weights.
        backbone: of the run's configuration.
        of_environment: whether a variable says so, for all runs of a machine and not for this one.

    Returns:
        What to say where the variable's folder is idle; else None.

    Raises:
        WeightsUnavailable: naming what the folder of a command holds, and how to choose it.
    """
    if given is None or backbone is None or not (folder := Path(given)).is_dir():
        return None
    if any((folder / name).is_file() for name in _file_names(backbone)):
        return None
    if of_environment:
        return f"FLAWLINE_WEIGHTS names {folder}, which holds no weights of {backbone}; others are taken."
    held = ", ".join(sorted({name_of_file(file.name) for file in folder.glob("*.safetensors")}))
    raise WeightsUnavailable(
        f"{folder} holds no weights of {backbone}, the backbone that this configuration has"
        + (f"; it holds {held}. Choose with --backbone NAME or --config paper," if held else ";")
        + " or leave --weights out."
    )


def _file_names(backbone: str) -> list[str]:
    return [f"{backbone}.safetensors", *known_files(backbone)]


def _from_file(path: Path) -> ResolvedWeights:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise WeightsUnavailable(f"The weights {path} can't be read ({error.strerror}); check the path.") from error
    try:
        state = safetensors.torch.load(content)
    except SafetensorError as error:
        raise WeightsUnavailable(
            f"{path.name} is no safetensors file; convert it, other formats can run code when they are opened."
        ) from error
    return ResolvedWeights(state, hashlib.sha256(content).hexdigest(), path.name)


def _from_memory(state: Mapping[str, Tensor], source: str) -> ResolvedWeights:
    # Independent copies: networks may share a tensor under two names, which the format refuses.
    copies = {key: value.detach().cpu().clone().contiguous() for key, value in sorted(state.items())}
    digest = hashlib.sha256(safetensors.torch.save(copies)).hexdigest()
    return ResolvedWeights(copies, digest, source)
