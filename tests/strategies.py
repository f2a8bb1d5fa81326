"""What Hypothesis draws: images, score sets, maps, policies and manifests, all small."""

from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from service.contract.bundle import Manifest, MetricRecord
from service.contract.policy import Policy
from tests.factories import make_input, make_line_record, make_manifest, make_policy

_LETTERS = "abcXYZ0189"
_NAMES = st.tuples(st.sampled_from(_LETTERS), st.text(_LETTERS + "_.-", max_size=63)).map("".join)


def finite_float32(low: float = -1e6, high: float = 1e6) -> st.SearchStrategy[float]:
    """Draw numbers that float32 holds exactly, as scores and map values are."""
    return st.floats(np.float32(low).item(), np.float32(high).item(), width=32, allow_subnormal=False)


def images(channels: int | None = 3, largest: int = 24) -> st.SearchStrategy[Any]:
    """Draw `(h, w, channels)` uint8, or `(h, w)` where `channels` is None."""
    sides = st.tuples(st.integers(1, largest), st.integers(1, largest))
    shapes = sides if channels is None else sides.map(lambda side: (*side, channels))
    return shapes.flatmap(lambda shape: arrays.arrays(np.uint8, shape))


def score_sets(smallest: int = 1, largest: int = 80) -> st.SearchStrategy[Any]:
    """Draw `(n,)` float32 scores of good parts, with ties more often than not."""
    few = st.lists(finite_float32(), min_size=1, max_size=6).flatmap(st.sampled_from)
    values = st.one_of(few, finite_float32())
    return st.lists(values, min_size=smallest, max_size=largest).map(lambda scores: np.array(scores, np.float32))


def false_reject_rates() -> st.SearchStrategy[float]:
    """Draw rates in (0, 1), among them the awkward ones that are a fraction of whole numbers, or just beside one."""
    fractions = st.integers(2, 200).flatmap(lambda n: st.integers(1, n - 1).map(lambda k: k / n))
    beside = fractions.flatmap(
        lambda rate: st.sampled_from([float(np.nextafter(rate, 0)), float(np.nextafter(rate, 1))])
    )
    inside = st.floats(1e-4, 0.9999)
    return st.one_of(fractions, beside, inside).filter(lambda rate: 0 < rate < 1)


def anomaly_maps(largest: int = 20) -> st.SearchStrategy[Any]:
    """Draw `(h, w)` float32 in [0, 1] of few values, so that regions form."""
    shapes = st.tuples(st.integers(1, largest), st.integers(1, largest))
    values = st.sampled_from([np.float32(v) for v in (0, 0.1, 0.25, 0.5, 0.75, 1)])
    return shapes.flatmap(lambda shape: arrays.arrays(np.float32, shape, elements=values))


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    """Draw a valid policy without a region of interest."""
    review, fail = sorted([draw(finite_float32()), draw(finite_float32())])
    floor, region = draw(st.lists(finite_float32(), min_size=2, max_size=2, unique=True).map(sorted))
    return make_policy(
        version=draw(_NAMES),
        review_threshold=review,
        fail_threshold=fail,
        region_threshold=region,
        map_floor=floor,
        min_region_area_px=draw(st.floats(0, 1e4)),
        max_regions=draw(st.integers(0, 1000)),
    )


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    """Draw a valid manifest, with text and numbers from all over."""
    scalars = st.one_of(st.none(), st.booleans(), st.integers(-(2**40), 2**40), st.floats(-1e9, 1e9), st.text())
    values = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=5)
    figures = st.builds(MetricRecord, value=st.none() | st.floats(0, 1), reason=st.none() | st.text())
    lines = tuple(draw(st.lists(_NAMES, min_size=1, max_size=3, unique=True)))
    return make_manifest(
        name=draw(_NAMES),
        lines=lines,
        version=str(draw(st.integers(1, 999_999_999))),
        hyperparameters=draw(st.dictionaries(st.text(), values, max_size=4)),
        input=make_input(draw(st.integers(1, 512)), draw(st.integers(1, 512)), draw(st.integers(0, 64))),
        by_line={
            line: make_line_record(metrics=draw(st.dictionaries(st.text(), figures, max_size=3))) for line in lines
        },
        seed=draw(st.integers(0, 2**31)),
        git_revision=draw(st.none() | st.text()),
    )
