"""Promises of the cache of plans: what is loaded was built here, for this model and machine, and is whole."""

import hashlib
from dataclasses import replace

import pytest

from service.engines.plans import (
    PlanKey,
    PlanRecord,
    private_directory,
    read_plan,
    read_timing_cache,
    write_plan,
    write_timing_cache,
)
from service.errors import EngineFailed

KEY = PlanKey("a" * 64, "sm_90", "10.16.1.11", "fp16")
PLAN = b"native code of one GPU"


def record_of(key):
    """Return what a build says of its plan."""
    return PlanRecord(
        model_digest=key.model_digest,
        architecture=key.architecture,
        tensorrt=key.tensorrt,
        precision=key.precision,
        min_batch=1,
        opt_batch=8,
        max_batch=16,
        plan_digest="0" * 64,
    )


@pytest.fixture
def cache(tmp_path):
    """Return a cache with one plan."""
    write_plan(tmp_path / "cache", record_of(KEY), PLAN)
    return tmp_path / "cache"


def test_read_plan_when_it_was_written_here_then_returns_it(cache):
    """The plan comes back with its digest, and no other file is left."""
    plan = read_plan(cache, KEY)

    assert plan.data == PLAN
    assert plan.record.plan_digest == hashlib.sha256(PLAN).hexdigest()
    names = sorted(path.name for path in cache.rglob("*") if path.is_file())
    assert names == ["sm_90-10.16.1.11-fp16.json", "sm_90-10.16.1.11-fp16.plan"]


@pytest.mark.parametrize(
    "other",
    [
        replace(KEY, model_digest="b" * 64),
        replace(KEY, architecture="sm_80"),
        replace(KEY, tensorrt="11.4.0.106"),
        replace(KEY, precision="fp32"),
    ],
    ids=["model", "architecture", "release", "precision"],
)
def test_read_plan_when_anything_of_its_key_differs_then_there_is_none(cache, other):
    """A plan serves one model, GPU, release and precision."""
    with pytest.raises(EngineFailed, match="flawline build-engine"):
        read_plan(cache, other)


def _damage(cache):
    path = next(cache.rglob("*.plan"))
    path.write_bytes(PLAN[:-1])


def _rename(cache):
    for path in list(cache.rglob("sm_90*")):
        path.rename(path.with_name(path.name.replace("sm_90", "sm_80")))


def _spoil_sidecar(cache):
    next(cache.rglob("*.json")).write_bytes(b"{}")


@pytest.mark.parametrize(
    ("change", "key", "words"),
    [
        (_damage, KEY, "not the one that was built"),
        (_rename, replace(KEY, architecture="sm_80"), "not the one that was built"),
        (_spoil_sidecar, KEY, "can't be read"),
    ],
    ids=["half a plan", "renamed", "sidecar"],
)
def test_read_plan_when_a_file_was_changed_then_refuses(cache, change, key, words):
    """Damaged plans, and plans that pretend to be of another machine, are never loaded."""
    change(cache)

    with pytest.raises(EngineFailed, match=words):
        read_plan(cache, key)


@pytest.mark.parametrize("which", ["cache", "folder", "plan", "sidecar"])
def test_read_plan_when_others_may_write_it_then_refuses(cache, which):
    """Whoever could write a plan could run code as the service."""
    plan = next(cache.rglob("*.plan"))
    places = {"cache": cache, "folder": plan.parent, "plan": plan, "sidecar": plan.with_suffix(".json")}
    places[which].chmod(0o777)

    with pytest.raises(EngineFailed, match="chmod"):
        read_plan(cache, KEY)


def test_read_plan_when_it_is_a_link_then_refuses(cache, tmp_path):
    """A link leads to where nothing was checked."""
    plan = next(cache.rglob("*.plan"))
    plan.rename(tmp_path / "elsewhere")
    plan.symlink_to(tmp_path / "elsewhere")

    with pytest.raises(EngineFailed, match="somebody else"):
        read_plan(cache, KEY)


def test_private_directory_when_it_is_a_file_then_says_what_to_set(tmp_path):
    """A place that can't be a folder is named with its setting."""
    (tmp_path / "cache").write_bytes(b"")

    with pytest.raises(EngineFailed, match="FLAWLINE_ENGINE_CACHE_DIRECTORY"):
        private_directory(tmp_path / "cache")


def test_timing_cache_when_written_then_serves_the_next_build(tmp_path):
    """What was measured once is not measured again."""
    assert read_timing_cache(tmp_path / "cache") == b""

    write_timing_cache(tmp_path / "cache", b"measured")

    assert read_timing_cache(tmp_path / "cache") == b"measured"
