"""From a run's description to a detector ready to be fitted: built, given its backbone's weights, on its device.

Comes before the data check, which takes longer, and before fitting. The one place where a fault of the configuration
that only the detector can see becomes a sentence for the person who wrote it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from models import DETECTORS, build_detector
from models.detector import Detector, GradientStage
from service.contract.bundle import BackboneRecord
from service.contract.policy import ScoreRule
from training.backbones.weights import ResolvedWeights, resolve_weights
from training.config import ConfigFault, RunConfig, score_rule_of
from training.data.labelled_defects import LabelledDefects
from training.fitting.batches import planned_iterations


class _WithBackbone(Protocol):
    def load_backbone_weights(self, state_dict: dict[str, Tensor]) -> None: ...


@dataclass(frozen=True, eq=False)
class PreparedDetector:
    """A detector before fitting, and what the manifest says of it.

    Attributes:
        module: on its device.
        backbone: which weights it stands on, or None.
        score_rule: how it reduces scores from maps; parity proves it.
        device: where it lies.
    """

    module: nn.Module
    backbone: BackboneRecord | None
    score_rule: ScoreRule
    device: torch.device

    @property
    def detector(self) -> Detector:
        """The same module, as what training asks of it."""
        if not isinstance(self.module, Detector):
            raise TypeError(f"{type(self.module).__name__} is no detector: it has no stages")
        return self.module


def prepare_detector(
    config: RunConfig,
    weights: Path | Literal["untrained"] | None,
    search: tuple[Path, ...],
    device: torch.device,
    lines: int = 1,
) -> PreparedDetector:
    """Build a detector and load its backbone.

    Args:
        config: of the run.
        weights: a safetensors file, "untrained", or None to search by the backbone's name.
        search: folders that may hold the file.
        device: where the detector shall lie.
        lines: how many lines it is fitted on.

    Raises:
        ConfigFault: if the configuration contradicts itself or the backbone, or the weights belong to another one.
        WeightsUnavailable: if no weights could be had.
    """
    own = config.detector_config(lines)
    built: Any = _build(config, own)
    backbone = None
    name = getattr(own, "backbone", None)
    if name is not None:
        resolved = resolve_weights(name, weights, search, seed=config.seed)
        _load(built, name, resolved)
        backbone = BackboneRecord(name=name, digest=resolved.digest, source=resolved.source)
    module: nn.Module = built
    return PreparedDetector(module.to(device), backbone, score_rule_of(own), device)


def refuse_labelled_defects(config: RunConfig) -> None:
    """Refuse marked defects that the detector would not learn from, before anything is read.

    Raises:
        ConfigFault: if the detector takes none, or no share of a batch gets them.
    """
    if not hasattr(DETECTORS[config.detector].detector, "keep_labelled_defects"):
        takers = [name for name, entry in DETECTORS.items() if hasattr(entry.detector, "keep_labelled_defects")]
        raise ConfigFault(
            f"The detector {config.detector} learns from good frames alone; leave --labelled-defects out, or take "
            f"{' or '.join(takers)}."
        )
    share = config.detector_config().labelled_share
    if not 0 < share <= 1:
        raise ConfigFault(
            f"hyperparameters.labelled_share is {share:g}; it is the share of a batch that gets a real defect, above 0 "
            "and at most 1. Give one, for example 0.5, or leave --labelled-defects out."
        )


def refuse_unseen_defects(prepared: PreparedDetector, frames: int, processes: int) -> None:
    """Refuse marked defects where a process' share of a batch is so small that none of its frames would get one.

    Args:
        prepared: a detector that was given marked defects.
        frames: that it is fitted on.
        processes: that each batch is split over.

    Raises:
        ConfigFault: if they would all be left out, however long the fitting.
    """
    module: Any = prepared.module
    share = module.config.labelled_share
    # The last descent teaches the head, alone or together with everything else.
    stage = next(stage for stage in reversed(prepared.detector.stages()) if isinstance(stage, GradientStage))
    _, batch = planned_iterations(stage.recipe, frames)
    own = batch // processes
    if own and not round(share * own):
        where = f"a batch of {batch} frames" if processes == 1 else f"a process' {own} of {batch} frames"
        raise ConfigFault(
            f"No labelled defect would be learnt from: hyperparameters.labelled_share is {share:g}, and of {where} in "
            f"'{stage.name}' that is none. Raise the share or that descent's batch_size, or start fewer processes."
        )


def give_labelled_defects(prepared: PreparedDetector, defects: LabelledDefects) -> None:
    """Hand marked defects to a detector that takes them, before it is fitted.

    Raises:
        ConfigFault: if this configuration of it has nothing that learns from them.
    """
    module: Any = prepared.module
    images = torch.from_numpy(defects.frames).permute(0, 3, 1, 2).to(torch.float32).contiguous() / 255
    try:
        module.keep_labelled_defects(images, torch.from_numpy(defects.masks))
    except ValueError as error:
        raise ConfigFault(f"The labelled defects are of no use to this detector: {error}.") from error


def choose_device(wanted: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """Return the device that is wanted, or the best there is, set to full float32.

    Tensor cores would round products to ten bits, and the exported graph would then give other scores than those that
    thresholds were calibrated on.

    Raises:
        ConfigFault: if a GPU is wanted and there is none.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigFault("There is no CUDA device here; use --device cpu.")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def _build(config: RunConfig, own: Any) -> Any:
    try:
        return build_detector(config.detector, own)
    except ValueError as error:
        size = f"input.height {config.input.height} and input.width {config.input.width}"
        stands_on = "" if config.backbone is None else f", the backbone {config.backbone}"
        raise ConfigFault(
            f"The detector {config.detector} can't be built: {error}. The configuration has {size}{stands_on}; change "
            "what does not fit with --set, or take all of --config paper."
        ) from error
    except (ArithmeticError, LookupError, RuntimeError, TypeError) as error:
        # What a detector does not refuse in words of its own, such as a size that torch can't make a layer of.
        given = ", ".join(
            f"{key}={value}" for key, value in config.hyperparameters.items() if not isinstance(value, dict)
        )
        raise ConfigFault(
            f"The detector {config.detector} can't be built with these settings, {type(error).__name__}: {error}. They "
            f"are: {given or 'the defaults'}; compare them with those of --config small."
        ) from error


def _load(detector: _WithBackbone, name: str, resolved: ResolvedWeights) -> None:
    try:
        detector.load_backbone_weights(resolved.state_dict)
    except ValueError as error:
        raise ConfigFault(f"{resolved.source} does not belong to the backbone {name}: {error}.") from error
