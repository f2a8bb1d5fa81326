"""What is installed and what is shipped: pins, entries of the repository, files of the wheel."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest

from tests.architecture.sources import PACKAGES, ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# Not installed by any test: they need a GPU machine, where docker/ pins them.
NOT_PINNED_HERE = frozenset({"cuda-python", "onnxruntime-gpu", "tensorrt"})

# The one network of our own making; its model card lies beside it.
EMBEDDED_WEIGHTS = "models/weights/embedded.safetensors"

ALLOWED_ENTRIES = frozenset(
    {".ci", ".dockerignore", ".gitattributes", ".github", ".gitignore", ".pre-commit-config.yaml", "CHANGELOG.md"}
    | {"LICENSE", "Makefile", "README.md", "constraints.txt", "docker", "k8s", "models"}
    | {"pyproject.toml", "service", "tests", "training"}
)


def normalised(name):
    """Return a distribution's name as registries compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins():
    """Return the pinned versions by normalised name."""
    lines = (line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    return {normalised(name): version for name, _, version in (line.partition("==") for line in lines if line)}


def requirements():
    """Return the normalised names of all dependencies, extras included."""
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    return {normalised(re.match(r"[A-Za-z0-9._-]+", requirement).group()) for group in groups for requirement in group}


def tracked_files():
    """Return the files that git tracks, or skip where this is no checkout."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return listed.splitlines()


def test_dependencies_when_declared_are_pinned():
    """Tests and benchmarks name the versions that they ran with."""
    assert requirements() - set(pins()) - NOT_PINNED_HERE == set()


def test_pins_when_written_are_exact():
    """A pin is one version, not a range; an epoch may stand before it."""
    assert [name for name, version in pins().items() if not re.fullmatch(r"(\d+!)?[0-9][0-9A-Za-z.+]*", version)] == []


def test_torch_when_pinned_is_pinned_together_with_torchvision():
    """A newer torchvision would replace torch by a build of several gigabytes."""
    assert {"torch", "torchvision"} <= set(pins())


def test_service_when_installed_alone_needs_no_torch():
    """Neither the base nor the service extra asks for anything of training."""
    asked = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["service"]
    names = {normalised(re.match(r"[A-Za-z0-9._-]+", requirement).group()) for requirement in asked}

    assert names & {"torch", "torchvision", "timm", "onnxscript", "safetensors", "matplotlib", "scikit-learn"} == set()


def test_repository_when_listed_holds_known_entries_only():
    """Nothing drops into the top level unnoticed; a new entry is added here on purpose."""
    assert {file.partition("/")[0] for file in tracked_files()} - ALLOWED_ENTRIES == set()


def test_repository_when_listed_holds_only_our_own_weights_and_nothing_large():
    """Fetched weights, data sets and bundles are not tracked; the embedded backbone and stored pixels stay small."""
    present = [ROOT / file for file in tracked_files() if (ROOT / file).is_file() and file != EMBEDDED_WEIGHTS]
    banned = {".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".onnx", ".safetensors", ".plan", ".engine", ".joblib"}

    assert [path.name for path in present if path.suffix in banned] == []
    assert [path.name for path in present if path.stat().st_size > 2**20] == []
    assert (ROOT / EMBEDDED_WEIGHTS).stat().st_size <= 6_000_000


def test_packages_when_typed_say_so():
    """Who imports us gets our types."""
    assert all((ROOT / package / "py.typed").is_file() for package in PACKAGES)


def test_wheel_when_built_holds_every_file_of_the_packages(tmp_path):
    """What the sources read at run time, configurations and templates, is in the wheel; tests are not."""
    pytest.importorskip("hatchling", reason="the wheel is built offline only where its builder is installed")
    wanted = {file for file in tracked_files() if file.partition("/")[0] in PACKAGES and (ROOT / file).is_file()}

    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)

    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        shipped = set(archive.namelist())
    assert wanted - shipped == set()
    assert {name for name in shipped if name.partition("/")[0] == "tests"} == set()
