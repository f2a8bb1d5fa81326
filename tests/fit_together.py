"""What two processes of `tests/e2e/test_fit_together.py` do, each started by torchrun: `fit_together.py FOLDER`.

The test fits the same detectors by itself and compares. Everything happens in one start, because torch's takes seconds.
"""

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import typer
from torch import nn

from models.detector import Recipe
from tests.tiny_detectors import make_detector
from training.data.loader import MemoryFrames
from training.fitting.checkpoint import detector_tensors
from training.fitting.fit import CheckpointPlan, FitSettings, FitStopped, fit
from training.fitting.peers import Alone, PeerLost, Peers, meet_peers
from training.progress import SilentReporter

IDENTITY = {"processes": "2"}
# Frames a batch that two can't halve; a rule that does not magnify the last bits, as dividing by small moments does.
RECIPE = Recipe("sgd", 1e-2, 1e-3, 0.0, batch_size=5, betas=(0.9, 0.0), iterations=6, clip_gradient_norm=1.0)
_STOPPED_AT = 3


def make_mean_detector() -> nn.Module:
    """Return a detector whose losses are means over frames and draw nothing: shares change nothing but rounding."""
    return make_detector("dadf", recipe=RECIPE, flow_recipe=RECIPE)


def make_drawing_detector() -> nn.Module:
    """Return a detector that flips frames, plants defects, and has batch norms, with passes before its descents."""
    return make_detector("rb_ae", recipe=RECIPE, defect_recipe=replace(RECIPE, iterations=2))


def fit_detector(
    detector: nn.Module, shares: int, peers: Peers | None = None, plan: CheckpointPlan | None = None
) -> nn.Module:
    """Fit a detector on a few frames of noise."""
    frames = MemoryFrames(np.random.default_rng(1).integers(0, 256, (12, 64, 64, 3), dtype=np.uint8))
    fit(detector, frames, FitSettings(seed=5, shares=shares), SilentReporter(), plan, peers=peers)
    return detector


def _keep(folder: Path, name: str, detector: nn.Module, peers: Peers) -> None:
    tensors = {key: value.clone() for key, value in detector_tensors(detector).items()}
    safetensors.torch.save_file(tensors, folder / f"{name}-{peers.number}.safetensors")


def _stop_one(detector: nn.Module, peers: Peers) -> nn.Module:
    """Have the second process told to stop, as it computes its part of a step."""
    original = detector.reconstruction_loss

    def told_to_stop(inputs: torch.Tensor, step: int) -> dict[str, torch.Tensor]:
        if step == _STOPPED_AT and peers.number == 1:
            signal.raise_signal(signal.SIGTERM)
        return original(inputs, step)

    detector.reconstruction_loss = told_to_stop
    return detector


def main() -> None:
    """Fit alike, stop, go on; then be a run of the command line until somebody stops it, and lose each other."""
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    peers = meet_peers("cpu")
    assert not isinstance(peers, Alone)
    _keep(folder, "mean", fit_detector(make_mean_detector(), 2, peers), peers)
    _keep(folder, "drawing", fit_detector(make_drawing_detector(), 2, peers), peers)

    plan = CheckpointPlan(folder / "stopped", IDENTITY)
    try:
        fit_detector(_stop_one(make_mean_detector(), peers), 2, peers, plan)
    except FitStopped:
        (folder / f"stopped-{peers.number}").touch()
    resumed = make_mean_detector()
    fit_detector(resumed, 2, peers, replace(plan, resume=True))
    _keep(folder, "resumed", resumed, peers)

    from training import jobs, progress
    from training.__main__ import commands

    progress._PLAIN_LINE_EVERY_S = 0.2  # the test waits for the first steps
    jobs.meet_peers = lambda _: peers  # they can't meet twice in one life
    arguments = ["train", folder / "bottle", "--config", folder / "config.yaml", "--weights", "untrained"]
    arguments += ["--store", folder / "store", "--runs", folder / "runs", "--device", "cpu"]
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun may say it again when the run has ended already
    code = typer.main.get_command(commands)([str(argument) for argument in arguments], standalone_mode=False)
    (folder / f"left-{peers.number}").write_text(str(code))
    if peers.number == 1:
        os._exit(1)
    try:
        peers.add_up(torch.zeros(1))
    except PeerLost:
        (folder / "lost").touch()


if __name__ == "__main__":
    main()
