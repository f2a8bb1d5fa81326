"""What makes a run repeatable, and what it has to say of itself so that somebody can repeat it.

Rule: the clock is never read here; the time of creation is an argument.
"""

import os
import platform
import random
import shutil
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch

_LIBRARIES = (
    "flawline",
    "numpy",
    "onnx",
    "onnxruntime",
    "opencv-python-headless",
    "pillow",
    "safetensors",
    "simplejpeg",
    "timm",
    "torch",
)
_GIT_TIMEOUT_S = 10


@dataclass(frozen=True)
class Provenance:
    """Where a bundle comes from.

    Attributes:
        seed: of the run.
        libraries: versions of what computes, by distribution name, and of Python.
        git_revision: commit of the sources, with "+changes" where files differ from it; None outside a checkout.
        created_at: UTC, ISO 8601.
    """

    seed: int
    libraries: dict[str, str]
    git_revision: str | None
    created_at: str


def make_deterministic(seed: int) -> None:
    """Seed every generator and choose repeatable kernels, for this process.

    The same seed on the same machine, library versions and number of threads gives the same bits. Kernels without a
    repeatable variant (some gradients on a GPU) run with a warning.
    """
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 -- libraries below us may draw from the global generator
    torch.manual_seed(seed)
    # cuBLAS reads this when the device is first used; without it deterministic products are refused.
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(mode=True, warn_only=True)
    torch.backends.cudnn.benchmark = False


def describe_run(seed: int, created_at: datetime, sources: Path = Path(__file__).parent) -> Provenance:
    """Collect what the manifest says of a run.

    Args:
        seed: of the run.
        created_at: with its time zone.
        sources: a folder of the checkout whose revision is wanted.
    """
    return Provenance(
        seed=seed,
        libraries=_library_versions(),
        git_revision=_git_revision(sources),
        created_at=created_at.astimezone(UTC).isoformat(timespec="seconds"),
    )


def _library_versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _git_revision(folder: Path) -> str | None:
    git = shutil.which("git")
    if git is None:
        return None
    revision = _ask(git, folder, "rev-parse", "HEAD")
    changes = _ask(git, folder, "status", "--porcelain", "--untracked-files=no")
    return f"{revision}+changes" if revision and changes else revision


def _ask(git: str, folder: Path, *question: str) -> str | None:
    try:
        answer = subprocess.run(  # noqa: S603 -- fixed arguments and a path of our own
            [git, "-C", str(folder), *question],
            capture_output=True,
            text=True,
            check=True,
            timeout=_GIT_TIMEOUT_S,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()
