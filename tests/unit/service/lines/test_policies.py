"""Promises of a policy that is brought to a bundle: one that could not judge is refused before any frame."""

import json
import re
from pathlib import Path

import pytest

from service.contract.bundle import Manifest
from service.contract.policy import Policy, PolicyFile, ScoreRule
from service.errors import BundleRefused
from service.lines.policies import LinePolicies, fit_policy
from service.observability.telemetry import Telemetry
from tests.factories import make_bundle, make_manifest, make_policy

_README = (Path(__file__).resolve().parents[4] / "k8s/README.md").read_text(encoding="utf-8")


def test_fit_policy_when_its_region_is_too_small_for_the_score_then_is_refused():
    """A defect that fills the region of interest would leave the map even, and pass."""
    manifest = make_manifest()
    uneven = manifest.output.model_copy(update={"score_rule": ScoreRule(kind="deviation")})
    policy = make_policy(region_of_interest=(((0.0, 0.0), (0.3, 0.0), (0.3, 0.3), (0.0, 0.3)),))

    assert fit_policy(policy, manifest).inspected is not None
    with pytest.raises(BundleRefused, match="how uneven its map is"):
        fit_policy(policy, manifest.model_copy(update={"output": uneven}))


def test_copy_of_the_bundles_policy_when_its_version_is_another_then_is_offered(tmp_path):
    """Whoever writes a first policy of a line starts from the bundle's own, and need change nothing but the name."""
    bundle = make_bundle(tmp_path)
    manifest = Manifest.model_validate_json((bundle / "manifest.json").read_bytes())
    own = (bundle / "policy.json").read_text()
    folder = tmp_path / "demo_line/policies"
    folder.mkdir()
    (folder / "strict.json").write_text(json.dumps(json.loads(own) | {"version": "strict"}))

    policies, refusals = LinePolicies(tmp_path, Telemetry()).offered(
        "demo_line", manifest, fit_policy(Policy.model_validate_json(own), manifest)
    )

    assert set(policies) == {"1", "strict"}
    assert refusals == {}


def test_policy_of_the_manual_when_saved_then_is_a_policy_file_whose_every_member_is_explained():
    """The example is taken as it stands there, and its table has each member of the file and no other."""
    [example] = re.findall(r"^```json\n(\{\n  \"version\".*?)^```", _README, re.DOTALL | re.MULTILINE)
    table = _README.partition(example)[2].partition("A member that is not in this table")[0]
    told = re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (.*?) \|", table, re.MULTILINE)))

    assert PolicyFile.model_validate_json(example).version == "strict"
    assert set(json.loads(example)) == set(told) == set(PolicyFile.model_fields)
