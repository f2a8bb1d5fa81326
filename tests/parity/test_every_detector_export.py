"""The graph that leaves PyTorch gives PyTorch's answers, at batch sizes that it was not traced with."""

import warnings
from functools import cache
from io import BytesIO

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from models.detector import PassStage
from tests.tiny_detectors import TINY, make_detector


@cache
def _finished(variant: str) -> nn.Module:
    """Build a detector whose passes have run; the values of its weights do not matter here."""
    detector = make_detector(variant)
    frames = torch.rand(4, 3, *detector.image_size, generator=torch.Generator().manual_seed(0))
    for stage in detector.stages():
        if isinstance(stage, PassStage):
            stage.show(frames, torch.zeros(4, dtype=torch.int64))
            stage.finish()
    return detector.eval()


@cache
def _session(variant: str) -> onnxruntime.InferenceSession:
    detector = _finished(variant)
    example = torch.rand(2, 3, *detector.image_size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations are not this project's
        program = torch.onnx.export(
            detector,
            (example,),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},),
            output_names=["anomaly_map", "score"],
            verbose=False,
        )
    content = BytesIO()
    program.save(content)
    return onnxruntime.InferenceSession(content.getvalue(), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("batch", [1, 3, 5])
@pytest.mark.parametrize("variant", sorted(TINY))
def test_exported_graph_gives_the_answers_of_pytorch(variant, batch):
    """Maps and scores differ by less than 1e-4 of the map's range: float32 with other orders of summation."""
    detector, session = _finished(variant), _session(variant)
    frames = torch.rand(batch, 3, *detector.image_size, generator=torch.Generator().manual_seed(batch))

    with torch.no_grad():
        expected = detector(frames)
    anomaly_map, score = session.run(None, {session.get_inputs()[0].name: frames.numpy()})

    span = float(expected.anomaly_map.max() - expected.anomaly_map.min())
    np.testing.assert_allclose(anomaly_map, expected.anomaly_map.numpy(), rtol=0, atol=1e-4 * span)
    np.testing.assert_allclose(score, expected.score.numpy(), rtol=0, atol=1e-4 * span)
