"""A static checker of others looks at every rendered manifest and Dockerfile: it finds nothing that is not explained.

An exception stands on what it is about: `checkov.io/skipN` in a manifest, `checkov:skip=` in a Dockerfile, with its
reason. checkov pins many libraries, so it lives in an environment of its own; `FLAWLINE_CHECKOV` names the program.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]
CHECKOV = os.environ.get("FLAWLINE_CHECKOV") or shutil.which("checkov")
KUBECTL = shutil.which("kubectl")
SPOILT = "spoilt.yaml"

pytestmark = [
    pytest.mark.skipif(CHECKOV is None, reason="checkov is not installed"),
    pytest.mark.skipif(KUBECTL is None, reason="kubectl is not installed"),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Return what is found, by kind of file; one more Deployment, whose root may be written to, is among them."""
    folder = tmp_path_factory.mktemp("looked_at")
    for overlay in sorted((ROOT / "k8s" / "overlays").iterdir()):
        told = subprocess.run([KUBECTL, "kustomize", overlay], capture_output=True, text=True, check=True)
        (folder / f"{overlay.name}.yaml").write_text(told.stdout)
    for dockerfile in (ROOT / "docker").glob("*Dockerfile"):
        shutil.copy(dockerfile, folder)
    [deployment] = [
        resource
        for resource in yaml.safe_load_all((folder / "cpu.yaml").read_text())
        if resource["kind"] == "Deployment"
    ]
    deployment["spec"]["template"]["spec"]["containers"][0]["securityContext"]["readOnlyRootFilesystem"] = False
    (folder / SPOILT).write_text(yaml.safe_dump(deployment))
    command = [CHECKOV, "--directory", folder, "--framework", "kubernetes", "dockerfile", "--skip-download"]
    told = subprocess.run([*command, "--quiet", "--output", "json"], capture_output=True, text=True, check=False)
    return {one["check_type"]: one for one in json.loads(told.stdout)}


def _failed(results, kind):
    return {(check["check_id"], Path(check["file_path"]).name) for check in results[kind]["results"]["failed_checks"]}


def test_manifests_when_checked_then_every_finding_is_explained(results):
    """Nothing is found but what this test has spoilt, so the checker does look."""
    assert _failed(results, "kubernetes") == {("CKV_K8S_22", SPOILT)}
    assert results["kubernetes"]["summary"]["parsing_errors"] == 0
    assert results["kubernetes"]["summary"]["resource_count"] > len(list((ROOT / "k8s" / "overlays").iterdir()))


def test_dockerfiles_when_checked_then_every_finding_is_explained(results):
    """All three are looked at."""
    assert _failed(results, "dockerfile") == set()
    assert results["dockerfile"]["summary"]["resource_count"] == len(list((ROOT / "docker").glob("*Dockerfile")))
