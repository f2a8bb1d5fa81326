"""Promises of a policy that is brought to a bundle: one that could not judge is refused before any frame."""

import json
import re
from pathlib import Path

import pytest

from service.contract.bundle import MODEL_FILE, Manifest, OutputSpec
from service.contract.policy import Policy, PolicyFile, ScoreRule
from service.errors import BundleRefused
from service.lines.policies import LinePolicies, fit_policy
from service.observability.telemetry import Telemetry
from tests.factories import make_bundle, make_manifest, make_policy, write_policy
from tests.rights import rights_of_an_ordinary_user

CORNER = (((0.0, 0.0), (0.3, 0.0), (0.3, 0.3), (0.0, 0.3)),)

_README = (Path(__file__).resolve().parents[4] / "k8s/README.md").read_text(encoding="utf-8")


def test_fit_policy_when_its_region_is_too_small_for_the_score_then_is_refused():
    """A defect that fills the region of interest would leave the map even, and pass."""
    manifest = make_manifest()
    uneven = manifest.output.model_copy(update={"score_rule": ScoreRule(kind="deviation")})
    policy = make_policy(region_of_interest=CORNER)

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


def test_offered_when_a_file_does_not_fit_the_bundle_then_it_is_refused_with_the_reason_and_counted_once(tmp_path):
    """Whoever saved it learns from log, metric and administration that it judges nothing, and why."""
    uneven = OutputSpec(map_height=16, map_width=24, score_rule=ScoreRule(kind="deviation"))
    manifest, telemetry = make_manifest(output=uneven, files={MODEL_FILE: "0" * 64}), Telemetry()
    write_policy(tmp_path, make_policy(version="corner", region_of_interest=CORNER), manifest.network)
    look = LinePolicies(tmp_path, telemetry)

    for _ in range(2):
        policies, refusals = look.offered("demo_line", manifest, fit_policy(make_policy(), manifest))

        assert (set(policies), set(refusals)) == ({"1"}, {"corner"})
        assert refusals["corner"].is_fault
        assert "how uneven its map is" in refusals["corner"].reason
    assert b'flawline_policies_refused_total{line="demo_line"} 1.0' in telemetry.exposition()[0]


def test_offered_when_the_folder_can_not_be_read_then_those_before_go_on(tmp_path):
    """A fault of the volume takes no policy from a line; files of editors and mounts are none."""
    manifest = make_manifest(files={MODEL_FILE: "0" * 64})
    folder = write_policy(tmp_path, make_policy(version="night"), manifest.network).parent
    (folder / ".night.json").write_text("half of it")
    gone = write_policy(tmp_path, make_policy(version="gone"), manifest.network)
    look, own = LinePolicies(tmp_path, Telemetry()), fit_policy(make_policy(), manifest)
    look.offered("demo_line", manifest, own)
    gone.unlink()
    before = look.offered("demo_line", manifest, own)
    folder.chmod(0)

    with rights_of_an_ordinary_user():
        during = look.offered("demo_line", manifest, own)
    folder.chmod(0o700)

    assert set(before.policies) == set(during.policies) == {"1", "night"}
    assert before.refusals == during.refusals == {}


def test_policy_of_the_manual_when_saved_then_is_a_policy_file_whose_every_member_is_explained():
    """The example is taken as it stands there, and its table has each member of the file and no other."""
    [example] = re.findall(r"^```json\n(\{\n  \"version\".*?)^```", _README, re.DOTALL | re.MULTILINE)
    table = _README.partition(example)[2].partition("A member that is not in this table")[0]
    told = re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (.*?) \|", table, re.MULTILINE)))

    assert PolicyFile.model_validate_json(example).version == "strict"
    assert set(json.loads(example)) == set(told) == set(PolicyFile.model_fields)
