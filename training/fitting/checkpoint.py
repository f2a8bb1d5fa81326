"""Training state on disk, so that a stopped run goes on as if nothing had happened. Safetensors and JSON, no pickle.

    <directory>/checkpoint.json                 where the run stands, and the name and digest of its tensors
    <directory>/checkpoint-<digest>.safetensors

The tensors are written first and the JSON is renamed into place last, so at any moment the JSON names a complete file.
Backbone weights are not kept: they never change, and the identity says which ones they were.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from training.whole_files import write_whole

_SCHEMA_VERSION = 1
_STATE_FILE = "checkpoint.json"
_BACKBONE = "backbone."

Scalar = int | float | bool | None


class CheckpointRefused(Exception):
    """The checkpoint is damaged or belongs to another run; the sentence says which and what to do."""


@dataclass(frozen=True)
class LossPoint:
    """The loss of one iteration.

    Attributes:
        stage: name of the stage.
        step: iteration within the stage, from 0.
        terms: named terms; the loss is their sum.
    """

    stage: str
    step: int
    terms: dict[str, float]


@dataclass(frozen=True)
class TrainingState:
    """Where a run stands between two iterations.

    Attributes:
        stage: index of the stage that comes next or is under way; the number of stages when all are done.
        step: iterations done in that stage.
        detector: tensors of the detector, all but the backbone's.
        optimiser: tensors of the optimiser, by "<parameter>.<name>"; empty between stages.
        optimiser_scalars: its other values, by the same keys.
        losses: all iterations so far.
    """

    stage: int
    step: int
    detector: Mapping[str, Tensor]
    optimiser: Mapping[str, Tensor] = field(default_factory=dict)
    optimiser_scalars: Mapping[str, Scalar] = field(default_factory=dict)
    losses: tuple[LossPoint, ...] = ()


def save_checkpoint(directory: Path, state: TrainingState, identity: Mapping[str, str]) -> None:
    """Write a checkpoint; the previous one stays valid until the new one is complete.

    Args:
        directory: made where it is missing.
        state: what to keep.
        identity: what must be equal for the state to make sense: digests of configuration, data and backbone weights.

    Raises:
        OSError: naming the file, if one can't be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {f"detector/{name}": value for name, value in state.detector.items()}
    tensors |= {f"optimiser/{name}": value for name, value in state.optimiser.items()}
    # Cloned, because safetensors refuses tensors that share memory, as tied weights do.
    data = safetensors.torch.save({name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()})
    digest = hashlib.sha256(data).hexdigest()
    tensor_file = f"checkpoint-{digest[:16]}.safetensors"
    record = {
        "schema_version": _SCHEMA_VERSION,
        "identity": dict(identity),
        "stage": state.stage,
        "step": state.step,
        "tensors": tensor_file,
        "tensors_sha256": digest,
        "optimiser_scalars": dict(state.optimiser_scalars),
        "losses": [[point.stage, point.step, point.terms] for point in state.losses],
    }
    write_whole(directory / tensor_file, data)
    write_whole(directory / _STATE_FILE, json.dumps(record).encode())
    for path in _tensor_files(directory):
        if path.name != tensor_file:
            path.unlink()


def has_checkpoint(directory: Path) -> bool:
    """Tell whether a run was kept here."""
    return (directory / _STATE_FILE).is_file()


def load_checkpoint(directory: Path, identity: Mapping[str, str], *, only_named: bool = False) -> TrainingState:
    """Read a checkpoint of the same run.

    Args:
        directory: of the run.
        identity: as it was saved with.
        only_named: compare what `identity` names and nothing else; for who uses a fitted detector elsewhere.

    Raises:
        CheckpointRefused: if there is none, its identity is another one, or its files are damaged.
    """
    record = _read_record(directory)
    found = record["identity"]
    _refuse_stranger(directory, {name: found.get(name) for name in identity} if only_named else found, identity)
    try:
        data = (directory / record["tensors"]).read_bytes()
    except FileNotFoundError as error:
        raise _damaged(directory) from error
    if hashlib.sha256(data).hexdigest() != record["tensors_sha256"]:
        raise _damaged(directory)
    tensors = safetensors.torch.load(data)
    return TrainingState(
        stage=record["stage"],
        step=record["step"],
        detector=_under("detector/", tensors),
        optimiser=_under("optimiser/", tensors),
        optimiser_scalars=record["optimiser_scalars"],
        losses=tuple(LossPoint(*point) for point in record["losses"]),
    )


def kept_identity(directory: Path) -> Mapping[str, str]:
    """Return the identity that a checkpoint was saved with.

    Raises:
        CheckpointRefused: if there is none, or its file is damaged.
    """
    identity: Mapping[str, str] = _read_record(directory)["identity"]
    return identity


def remove_checkpoint(directory: Path) -> None:
    """Delete a checkpoint, once the bundle is in the store; other files of the directory stay."""
    (directory / _STATE_FILE).unlink(missing_ok=True)
    for path in _tensor_files(directory):
        path.unlink()


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 in hex over names, types, shapes and bytes of tensors, sorted by name."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        value = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def is_backbone(name: str) -> bool:
    """Tell whether a part of a detector, or one of its tensors, belongs to its frozen backbone."""
    return f"{name}.".startswith(_BACKBONE)


def detector_tensors(detector: nn.Module) -> dict[str, Tensor]:
    """Return the state of a detector without its backbone."""
    return {name: value for name, value in detector.state_dict().items() if not is_backbone(name)}


def restore_detector(detector: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `detector_tensors` gave.

    Raises:
        CheckpointRefused: if names or shapes do not fit this detector.
    """
    try:
        missing, unexpected = detector.load_state_dict(dict(tensors), strict=False)
    except RuntimeError as error:
        raise CheckpointRefused(f"The checkpoint does not fit the detector: {error}") from error
    strange = [name for name in missing if not is_backbone(name)] + unexpected
    if strange:
        raise CheckpointRefused(f"The checkpoint does not fit the detector: {', '.join(strange[:5])}.")


def optimiser_state(optimiser: Optimizer) -> tuple[dict[str, Tensor], dict[str, Scalar]]:
    """Return the tensors and the other values of an optimiser, by "<parameter>.<name>"."""
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Scalar] = {}
    for index, values in optimiser.state_dict()["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value
            else:
                scalars[f"{index}.{name}"] = value
    return tensors, scalars


def restore_optimiser(optimiser: Optimizer, state: TrainingState) -> None:
    """Put back what `optimiser_state` gave, into an optimiser that was built alike."""
    values: dict[int, dict[str, Any]] = {}
    for key, value in (*state.optimiser.items(), *state.optimiser_scalars.items()):
        index, name = key.split(".", 1)
        values.setdefault(int(index), {})[name] = value
    optimiser.load_state_dict({"state": values, "param_groups": optimiser.state_dict()["param_groups"]})


def _read_record(directory: Path) -> dict[str, Any]:
    try:
        record = json.loads((directory / _STATE_FILE).read_bytes())
    except FileNotFoundError as error:
        raise CheckpointRefused(f"{directory} holds no checkpoint; begin another run.") from error
    except ValueError as error:
        raise _damaged(directory) from error
    if not isinstance(record, dict) or record.get("schema_version") != _SCHEMA_VERSION:
        raise CheckpointRefused(f"{directory} was written by another version; begin another run.")
    return record


def _refuse_stranger(directory: Path, found: Mapping[str, str | None], wanted: Mapping[str, str]) -> None:
    differing = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
    if differing:
        raise CheckpointRefused(
            f"{directory} belongs to a run with another {', '.join(differing)}; put back what was changed, or begin "
            "another run."
        )


def _damaged(directory: Path) -> CheckpointRefused:
    return CheckpointRefused(f"The checkpoint in {directory} is damaged; begin another run.")


def _tensor_files(directory: Path) -> list[Path]:
    """Return the tensors of all states, those included at which a process was killed while it wrote them."""
    return [*directory.glob("checkpoint-*.safetensors"), *directory.glob(".checkpoint-*.safetensors.writing")]


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
