"""Every fault that a run is expected to have, by who can mend it; each is told as its one sentence."""

from models.backbones import BackboneUnavailable
from service.errors import EngineFailed, FlawlineError
from training.checkpoint import CheckpointRefused
from training.config import ConfigFault
from training.data.samples import DatasetFault
from training.export import ExportFailed
from training.fit import FitFailed
from training.golden import GoldenFailed
from training.peers import PeerLost
from training.ranking import ScoreNotFinite
from training.run import RunNotFitted
from training.run_directory import RunDirectoryFault
from training.store import StoreFailed, StoreRefused
from training.weight_lock import WeightsRefused
from training.weights import WeightsUnavailable

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
    RunDirectoryFault,
    RunNotFitted,
    StoreRefused,
    WeightsRefused,
    WeightsUnavailable,
)
