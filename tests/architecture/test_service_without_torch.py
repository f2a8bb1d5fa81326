"""The service on a machine without torch: imports fail as if it were not installed, and everything still works."""

import subprocess
import sys

import pytest

from tests.architecture.sources import ROOT, module_of, source_files
from tests.factories import make_bundle

# Runs first in a fresh interpreter: refuses what the service's environment does not have.
WITHOUT = """
import importlib, importlib.abc, pathlib, sys

ABSENT = {"torch", "torchvision", "timm", "models", "training", "safetensors", "matplotlib"}

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
"""
VERIFY = """
from service.contract.bundle import load_bundle
from service.contract.golden import read_golden
bundle = load_bundle(pathlib.Path(sys.argv[1]))
print(bundle.manifest.name, len(read_golden(bundle).answers))
"""
IMPORT_ALL = """
for module in sys.argv[1:]:
    importlib.import_module(module)
print("imported", len(sys.argv) - 1)
"""


def run_without_torch(script, *arguments):
    """Run a script where torch and training do not exist, and return what it prints."""
    command = [sys.executable, "-c", WITHOUT + script, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_hook_when_torch_is_imported_hides_it():
    """The other tests here prove something: torch really is out of reach."""
    script = "\ntry:\n    import torch\nexcept ModuleNotFoundError:\n    print('absent')\n"

    assert run_without_torch(script) == "absent"


def test_service_when_torch_is_absent_verifies_a_bundle(tmp_path):
    """Manifest, digests, graph, calibration, policy and golden set are read without torch."""
    assert run_without_torch(VERIFY, make_bundle(tmp_path)) == "demo_line 3"


def test_service_when_torch_is_absent_imports_whole():
    """Every module of the service imports without torch, but for those whose runtime may be absent as well."""
    optional = ("/trt.py", "/cuda.py", "/openvino.py")
    modules = [
        module_of(file) for file in source_files() if file.startswith("service/") and not file.endswith(optional)
    ]

    assert run_without_torch(IMPORT_ALL, *modules) == f"imported {len(modules)}"


def test_training_when_torch_is_absent_fails_with_its_name():
    """Training says plainly that torch is missing; it is not imported by accident elsewhere."""
    with pytest.raises(AssertionError, match="No module named 'training'"):
        run_without_torch("\nimport training.run\n")
