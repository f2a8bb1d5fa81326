"""Promises of policies while versions come and go: a line is judged by the one that was chosen, or by none."""

import pytest

from service.errors import (
    BundleRefused,
    LineNotCalibrated,
    LineNotReady,
    UnknownPolicy,
)
from tests.shelves import Shelf


def test_policy_when_a_file_appears_then_it_is_offered_and_may_be_made_the_default(shelf):
    """Policies come without a restart; which one judges is changed in one assignment."""
    registry = shelf.load()
    shelf.add_policy("strict", fail_threshold=0.15)

    found = registry.rescan()
    registry.activate_policy("demo_line", "strict")

    assert found.policies == (("demo_line", "strict"),)
    assert registry.find("demo_line", None, None).policy.policy.fail_threshold == 0.15
    assert 'policy="strict"' in shelf.metrics()
    with pytest.raises(UnknownPolicy):
        registry.activate_policy("demo_line", "absent")


def test_policy_when_a_new_version_becomes_live_then_its_own_judges(shelf):
    """Thresholds that somebody set for one network say nothing of another's scores."""
    registry = shelf.load()
    shelf.add_policy("lax", shelf.network(), fail_threshold=0.9)
    registry.activate_policy("demo_line", "lax")
    shelf.add("2")

    registry.rescan()
    new = registry.find("demo_line", None, None).policy.policy.version
    registry.roll_back("demo_line")

    assert new == "1"
    assert registry.find("demo_line", None, None).policy.policy.version == "lax"


def test_policy_when_the_line_is_not_calibrated_then_one_that_needs_it_is_no_default(tmp_path):
    """A policy that could not judge is not made the one that does."""
    shelf = Shelf(tmp_path)
    shelf.add("1", calibrated=False)
    registry = shelf.load()
    shelf.add_policy("strict")

    with pytest.raises(LineNotCalibrated):
        registry.activate_policy("demo_line", "strict")
    registry.close()


def offered(registry, version=None):
    """Return the policies that the line may be judged by."""
    return sorted(registry.serving("demo_line", version).policies)


def test_policy_when_it_was_written_for_another_network_then_it_judges_no_frame_of_this_one(shelf):
    """Thresholds of another network's scores could pass everything; they wait until that network serves."""
    shelf.add("2", reference=0.3, policy={"review_threshold": 0.7, "fail_threshold": 0.8})
    shelf.add_policy("night", shelf.network("2"), review_threshold=9.0, fail_threshold=9.0)
    registry = shelf.load()
    by_its_own = registry.find("demo_line", None, "night").policy.policy.fail_threshold

    registry.activate("demo_line", "1")
    registry.rescan()

    assert by_its_own == 9.0
    for version in (None, "1"):
        with pytest.raises(UnknownPolicy, match="another network"):
            registry.find("demo_line", version, "night")
    with pytest.raises(UnknownPolicy, match="another network"):
        registry.activate_policy("demo_line", "night")
    assert 'flawline_policies_refused_total{line="demo_line"} 0.0' in shelf.metrics()
    assert registry.find("demo_line", "2", "night").policy.policy.version == "night"


def test_policy_when_the_network_stays_then_it_judges_the_newer_version_too(shelf):
    """A calibration again changes no score, so that what was written for the scores goes on."""
    shelf.add_policy("lax", shelf.network(), fail_threshold=0.9)
    registry = shelf.load()
    shelf.add("2", policy={"fail_threshold": 0.3})

    registry.rescan()

    assert registry.find("demo_line", None, "lax").line.bundle.manifest.version == "2"


def test_policy_when_it_names_no_network_then_it_is_offered_only_as_strict_as_the_bundles_own(shelf):
    """What passes nothing that the bundle's own policy stops is safe; of the rest is said what to add."""
    shelf.add_policy("strict", fail_threshold=0.15)
    shelf.add_policy("lax", fail_threshold=0.9)
    registry = shelf.load()

    found = registry.rescan()

    assert offered(registry) == ["1", "strict"]
    assert found.refused_policies.keys() == {("demo_line", "lax")}
    with pytest.raises(UnknownPolicy, match=f'add "network": "{shelf.network()}"'):
        registry.find("demo_line", None, "lax")
    assert 'flawline_policies_refused_total{line="demo_line"} 1.0' in shelf.metrics()
    shelf.add_policy("lax", shelf.network(), fail_threshold=0.9)
    assert registry.rescan().policies == (("demo_line", "lax"),)


def test_policy_when_its_file_was_changed_then_that_is_refused_and_told_at_every_look(shelf):
    """A version means the same thresholds for good; who corrects one under its name must not believe that it counts."""
    shelf.add_policy("night", shelf.network(), fail_threshold=0.9)
    registry = shelf.load()
    shelf.add_policy("night", shelf.network(), fail_threshold=0.15)

    first, second = registry.rescan(), registry.rescan()

    assert first.refused_policies == second.refused_policies
    assert "save the file under a new version" in first.refused_policies["demo_line", "night"]
    assert 'flawline_policies_refused_total{line="demo_line"} 1.0' in shelf.metrics()
    assert registry.find("demo_line", None, "night").policy.policy.fail_threshold == 0.9
    with pytest.raises(BundleRefused, match="was changed"):
        registry.activate_policy("demo_line", "night")
    shelf.add("2")
    registry.rescan()  # the same thresholds in a version that never saw the file as it was
    assert registry.find("demo_line", "2", "night").policy.policy.fail_threshold == 0.9


def test_policy_when_its_file_is_half_written_then_it_goes_on_and_that_is_told(shelf):
    """An editor that is caught at work takes no line out."""
    file = shelf.add_policy("strict", fail_threshold=0.15)
    registry = shelf.load()
    registry.activate_policy("demo_line", "strict")
    whole = file.read_bytes()
    file.write_bytes(whole[:20])

    found = registry.rescan()
    file.write_bytes(whole)

    assert found.refused_policies.keys() == {("demo_line", "strict")}
    assert registry.find("demo_line", None, None).policy.policy.version == "strict"
    assert registry.rescan().refused_policies == {}


def test_policy_when_its_file_is_gone_then_it_is_withdrawn_from_every_version_in_memory(shelf):
    """Who removes a policy wants no frame judged by it, by whatever version it asks for."""
    shelf.add("2")
    file = shelf.add_policy("night", shelf.network(), fail_threshold=0.9)
    registry = shelf.load()
    registry.activate("demo_line", "1")
    registry.start_shadow("demo_line", "2")
    file.unlink()

    found = registry.rescan()
    shelf.add_policy("night", shelf.network(), fail_threshold=0.8)
    registry.rescan()

    assert found.withdrawn == (("demo_line", "night"),)
    for version in ("1", "2"):
        with pytest.raises(UnknownPolicy):
            registry.find("demo_line", version, "night")
    assert set(registry.shadow_of("demo_line", "1", "1")[1].policies) == {"1"}
    shelf.add_policy("night", shelf.network(), fail_threshold=0.9)
    assert registry.rescan().policies == (("demo_line", "night"),)
    file.write_text("half of it")
    assert registry.rescan().withdrawn == ()  # what came back goes on like any other


def test_policy_when_the_one_that_judges_is_gone_then_its_line_gives_no_verdict_by_another(shelf):
    """The bundle's own policy could pass what the withdrawn one stopped, so that the line waits for somebody."""
    file = shelf.add_policy("strict", fail_threshold=0.15)
    registry = shelf.load()
    registry.activate_policy("demo_line", "strict")
    text = file.read_text()
    file.unlink()

    found = registry.rescan()

    assert found.withdrawn == (("demo_line", "strict"),)
    assert not registry.is_ready
    with pytest.raises(LineNotReady, match="chose its policy strict"):
        registry.find("demo_line", None, None)
    file.write_text(text)
    registry.load_line("demo_line")
    assert registry.find("demo_line", None, None).policy.policy.version == "strict"
    file.unlink()
    registry.rescan()
    registry.activate_policy("demo_line", "1")
    assert registry.find("demo_line", None, None).policy.policy.version == "1"


def test_policy_when_the_one_that_was_chosen_for_a_kept_version_is_gone_then_that_one_judges_by_no_other(shelf):
    """Who asks for the version by its number gets no verdict by thresholds that nobody chose for it, either."""
    file = shelf.add_policy("strict", fail_threshold=0.15)
    registry = shelf.load()
    registry.activate_policy("demo_line", "strict")
    shelf.add("2")
    registry.rescan()
    file.unlink()
    registry.rescan()

    with pytest.raises(UnknownPolicy, match="is gone"):
        registry.find("demo_line", "1", None)
    assert registry.find("demo_line", "1", "1").policy.policy.version == "1"
    with pytest.raises(LineNotCalibrated):
        registry.start_shadow("demo_line", "1")


def test_policy_when_a_file_has_the_version_of_the_bundles_own_then_that_one_may_be_chosen_all_the_same(shelf):
    """The way back to the bundle's own policy is not barred by a file that was named like it."""
    shelf.add_policy("1", shelf.network(), fail_threshold=9.0)
    shelf.add_policy("strict", fail_threshold=0.15)
    registry = shelf.load()
    registry.activate_policy("demo_line", "strict")

    registry.activate_policy("demo_line", "1")

    assert registry.find("demo_line", None, None).policy.policy.fail_threshold == 0.2


def test_policy_when_nothing_lies_in_the_store_then_it_is_not_taken_for_removed(shelf):
    """A volume that is not mounted any more is no administrator's word."""
    shelf.add_policy("strict", fail_threshold=0.15)
    registry = shelf.load()
    registry.activate_policy("demo_line", "strict")
    shelf.path.rename(shelf.path.with_name("away"))
    shelf.path.mkdir()

    found = registry.rescan()

    assert found.withdrawn == ()
    assert registry.find("demo_line", None, None).policy.policy.version == "strict"
