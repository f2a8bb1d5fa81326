"""Promises of the statistics: they count frames and runs, in the protocol's words, and only grow."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.observability.tallies import Tally

SECONDS = {"receive": 1.0, "decode": 0.002, "queue": 0.001, "infer": 0.02, "postprocess": 0.003, "encode": 0.001}
NOTHING = {"count": 0, "ns": 0}


def test_tally_when_nothing_happened_then_every_count_is_zero():
    """A model that was just loaded has complete statistics."""
    told = Tally().describe()

    assert (told["last_inference"], told["inference_count"], told["execution_count"]) == (0, 0, 0)
    assert set(map(str, told["inference_stats"].values())) == {str(NOTHING)}
    assert told["batch_stats"] == []


def test_tally_when_frames_are_answered_then_times_are_summed_in_nanoseconds_by_the_protocols_stages():
    """Three frames alone and four in one run: seven inferences, four runs, and each run's time once."""
    tally = Tally()
    for batch_size in (1, 1, 1, 4, 4, 4, 4):
        tally.answered(batch_size, {**SECONDS, "total": 0.03}, at_ms=7)
    tally.failed(0.5, at_ms=8)

    told = tally.describe()

    assert (told["last_inference"], told["inference_count"], told["execution_count"]) == (8, 7, 4)
    assert told["inference_stats"] == {
        "success": {"count": 7, "ns": 210_000_000},
        "fail": {"count": 1, "ns": 500_000_000},
        "queue": {"count": 7, "ns": 7_000_000},
        "compute_input": {"count": 7, "ns": 14_000_000},
        "compute_infer": {"count": 7, "ns": 140_000_000},
        "compute_output": {"count": 7, "ns": 28_000_000},
    }
    stages = ("compute_input", "compute_infer", "compute_output")
    assert told["batch_stats"] == [
        {"batch_size": size, **{stage: {"count": runs, "ns": ns} for stage, ns in zip(stages, times, strict=True)}}
        for size, runs, times in [
            (1, 3, (6_000_000, 60_000_000, 12_000_000)),
            (4, 1, (8_000_000, 20_000_000, 16_000_000)),
        ]
    ]


@given(st.lists(st.sampled_from([1, 2, 4]), min_size=1, max_size=30))
def test_tally_when_counted_on_then_no_number_falls_and_batches_are_no_larger_than_they_were(batch_sizes):
    """Monitoring takes differences; frames by runs lies between one and the largest batch."""
    tally, before = Tally(), 0
    for batch_size in batch_sizes:
        tally.answered(batch_size, {**SECONDS, "total": 0.03}, at_ms=1)
        assert tally.describe()["execution_count"] >= before
        before = tally.describe()["execution_count"]

    mean = tally.describe()["inference_count"] / before

    assert mean <= max(batch_sizes)
    assert mean > 0
    assert sum(batch["compute_infer"]["count"] for batch in tally.describe()["batch_stats"]) == before
    assert tally.describe()["inference_stats"]["queue"]["ns"] == pytest.approx(len(batch_sizes) * 1e6)
