"""The service in an environment of its own, installed as on a line's computer: without torch, and without training."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.factories import encode, make_bundle, make_frame
from tests.servers import ServerProcess


@pytest.fixture(scope="module")
def interpreter() -> Path:
    """Return the Python of an environment that holds `.[service]` only, or skip."""
    named = os.environ.get("FLAWLINE_SERVICE_PYTHON")
    if named is None:
        pytest.skip("needs FLAWLINE_SERVICE_PYTHON: the Python of an environment with '.[service]' and nothing else")
    return Path(named)


@pytest.mark.parametrize("package", ["torch", "timm", "matplotlib"])
def test_service_environment_when_installed_holds_nothing_of_training(interpreter: Path, package: str) -> None:
    """What only training needs is not pulled in."""
    done = subprocess.run([interpreter, "-c", f"import {package}"], capture_output=True, text=True, check=False)

    assert "ModuleNotFoundError" in done.stderr


def test_service_environment_when_serving_gives_verdicts(interpreter: Path, tmp_path: Path) -> None:
    """Without torch the service loads a bundle, becomes ready and tells a defect from a good part."""
    make_bundle(tmp_path)
    good, defective = (encode(make_frame(96, 128, seed=3, defect=defect)) for defect in (False, True))

    with ServerProcess(tmp_path, interpreter=interpreter) as server:
        server.ready()
        verdicts = [
            server.http.post(
                "/v1/lines/demo_line/inspect", content=frame, headers={"Content-Type": "image/png"}
            ).json()["verdict"]
            for frame in (good, defective)
        ]

    assert verdicts == ["PASS", "FAIL"]


def test_service_environment_when_asked_to_train_says_what_to_install(interpreter: Path, tmp_path: Path) -> None:
    """A command whose packages are not there answers with the one sentence that helps."""
    done = subprocess.run([interpreter, "-m", "service", "train", "line"], capture_output=True, text=True, check=False)

    assert "pip install 'flawline[training]'" in done.stdout + done.stderr
    assert done.returncode != 0
