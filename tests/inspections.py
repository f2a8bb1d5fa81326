"""Builds what goes into the pipeline and what comes out of it, without running one."""

import time
from typing import Any

import numpy as np

from service.contract.frames import Frame
from service.contract.policy import Judgement, Verdict
from service.inspection import Inspection, InspectionRequest
from tests.factories import encode, make_frame, make_policy

STAGES_S = {"receive": 0.001, "decode": 0.003, "queue": 0.0, "infer": 0.019, "postprocess": 0.0005}


def make_request(**overrides: Any) -> InspectionRequest:
    """Return a request that arrived just now, for a good part's frame as PNG, with some fields replaced."""
    fields: dict[str, Any] = {
        "line": "demo_line",
        "data": encode(make_frame()),
        "raw": None,
        "part_id": "part 7",
        "view": "top",
        "sequence": 3,
        "deadline_s": None,
        "policy_version": None,
        "heatmap": "none",
        "request_id": "request-1",
        "received_at": time.monotonic(),
        "receive_s": 0.001,
    }
    return InspectionRequest(**fields | overrides)


def make_inspection(**overrides: Any) -> Inspection:
    """Return an answered frame, with some fields replaced."""
    policy = make_policy()
    fields: dict[str, Any] = {
        "inspection_id": "0" * 32,
        "request": make_request(data=b"x" * 1000),
        "line": "demo_line",
        "bundle_version": "4",
        "bundle_digest": "d" * 64,
        "policy_version": "1",
        "policy_digest": "e" * 64,
        "frame_digest": "f" * 64,
        "detector": "distance_from_good",
        "device": "cpu",
        "precision": "fp32",
        "judgement": Judgement(Verdict.REVIEW, 0.1, [], 0, np.zeros((2, 2), np.float32)),
        "p_value": 0.1,
        "review_threshold": policy.review_threshold,
        "fail_threshold": policy.fail_threshold,
        "frame": Frame(np.zeros((4, 5, 3), np.uint8), 40, 50),
        "canvas": np.zeros((4, 5, 3), np.uint8),
        "anomaly_map": np.zeros((2, 2), np.float32),
        "window": (0.0, 0.0, 40.0, 50.0),
        "policy": policy,
        "batch_size": 2,
        "batch_number": 1,
        "timings_s": STAGES_S,
        "deadline_s": 2.0,
    }
    return Inspection(**fields | overrides)
