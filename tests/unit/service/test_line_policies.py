"""Promises of a policy that is brought to a bundle: one that could not judge is refused before any frame."""

import pytest

from service.contract.policy import ScoreRule
from service.errors import BundleRefused
from service.line_policies import fit_policy
from tests.factories import make_manifest, make_policy


def test_fit_policy_when_its_region_is_too_small_for_the_score_then_is_refused():
    """A defect that fills the region of interest would leave the map even, and pass."""
    manifest = make_manifest()
    uneven = manifest.output.model_copy(update={"score_rule": ScoreRule(kind="deviation")})
    policy = make_policy(region_of_interest=(((0.0, 0.0), (0.3, 0.0), (0.3, 0.3), (0.0, 0.3)),))

    assert fit_policy(policy, manifest).inspected is not None
    with pytest.raises(BundleRefused, match="how uneven its map is"):
        fit_policy(policy, manifest.model_copy(update={"output": uneven}))
