"""Promises of what makes a run repeatable."""

import random
import shutil
import subprocess
from datetime import UTC, datetime, timedelta, timezone

import numpy as np
import pytest
import torch

from training.reproducibility import describe_run, make_deterministic

_NOON = datetime(2026, 7, 1, 12, 0, 0, 123, tzinfo=timezone(timedelta(hours=2)))


@pytest.fixture
def _restored(monkeypatch):
    """Leave torch's switches and the environment as they were."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "before")
    benchmark = torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(mode=False)
    torch.backends.cudnn.benchmark = benchmark


@pytest.mark.usefixtures("_restored")
def test_make_deterministic_twice_gives_the_same_draws():
    """All three generators start again from the seed."""
    draws = []
    for seed in (3, 3, 4):
        make_deterministic(seed)
        draws.append((random.random(), float(np.random.rand()), float(torch.rand(()))))  # noqa: NPY002, S311 -- seeded here

    assert draws[0] == draws[1]
    assert all(a != b for a, b in zip(draws[0], draws[2], strict=True))


@pytest.mark.usefixtures("_restored")
def test_make_deterministic_chooses_repeatable_kernels():
    """Torch is told to prefer repeatable kernels."""
    make_deterministic(0)

    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.benchmark


def test_describe_run_tells_versions_seed_and_time_in_utc(tmp_path):
    """The manifest can say what computed, and when."""
    found = describe_run(7, _NOON, tmp_path)

    assert found.seed == 7
    assert found.created_at == "2026-07-01T10:00:00+00:00"
    assert found.libraries["torch"] == torch.__version__.split("+")[0] or found.libraries["torch"] == torch.__version__
    assert {"python", "numpy", "timm"} <= set(found.libraries)


def test_describe_run_outside_of_a_checkout_has_no_revision(tmp_path):
    """An installed package belongs to no commit."""
    found = describe_run(7, datetime(2026, 7, 1, tzinfo=UTC), tmp_path)

    assert found.git_revision is None


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_describe_run_in_a_checkout_names_the_commit_and_tells_changes(tmp_path):
    """A revision with changes is not passed off as the commit itself."""

    def git(*arguments):
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    git("init", "-q")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-q", "-m", "x")

    clean = describe_run(7, _NOON, tmp_path).git_revision
    (tmp_path / "a").write_text("2")
    changed = describe_run(7, _NOON, tmp_path).git_revision

    assert len(clean) == 40
    assert changed == f"{clean}+changes"
