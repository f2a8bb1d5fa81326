"""Every fault that a run is expected to have, by who can mend it; each is told as its one sentence."""

from models.backbones import BackboneUnavailable
from service.errors import EngineFailed, FlawlineError
from training.backbones.weight_lock import WeightsRefused
from training.backbones.weights import WeightsUnavailable
from training.bundling.export import ExportFailed
from training.bundling.store import StoreFailed, StoreRefused
from training.config import ConfigFault
from training.data.samples import DatasetFault
from training.fitting.checkpoint import CheckpointRefused
from training.fitting.fit import FitFailed, FramesRefused
from training.fitting.peers import PeerLost
from training.golden import GoldenFailed
from training.measuring.ranking import ScoreNotFinite
from training.run import RunNotFitted
from training.run_directory import RunDirectoryFault

OURS: tuple[type[Exception], ...] = (
    EngineFailed,
    ExportFailed,
    FitFailed,
    GoldenFailed,
    PeerLost,
    ScoreNotFinite,
    StoreFailed,
)
CALLERS: tuple[type[Exception], ...] = (
    BackboneUnavailable,
    CheckpointRefused,
    ConfigFault,
    DatasetFault,
    FlawlineError,
    FramesRefused,
    RunDirectoryFault,
    RunNotFitted,
    StoreRefused,
    WeightsRefused,
    WeightsUnavailable,
)
