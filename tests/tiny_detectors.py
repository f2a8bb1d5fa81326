"""One tiny configuration or more for each detector: real architectures, random weights, milliseconds to run.

A detector that is added to `models.DETECTORS` is added to `TINY` too; `tests/unit/models/test_every_detector.py`
insists on it and then tests it like all others.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

import tests.early_mismatch
import tests.one_registry  # noqa: F401 - for its effect
from models import build_detector
from models.ami_net import AmiNetConfig
from models.backbones import untrained_weights
from models.dadf import DadfConfig
from models.detector import Recipe
from models.glcf import GlcfConfig
from models.grnr import GrnrConfig
from models.inp_former import InpFormerConfig
from models.inp_former_pp import InpFormerPpConfig
from models.jigsaw_svdd import JigsawSvddConfig
from models.pnpt import PnptConfig
from models.rb_ae import RbAeConfig
from models.st_mae import StMaeConfig

_BRIEF = Recipe(
    optimiser="stable_adamw",
    learning_rate=1e-3,
    final_learning_rate=1e-4,
    weight_decay=1e-4,
    batch_size=8,
    eps=1e-10,
    amsgrad=True,
    iterations=40,
    warmup_iterations=4,
    clip_gradient_norm=0.1,
)

_BRIEF_ADAMW = Recipe(
    optimiser="adamw",
    learning_rate=2e-3,
    final_learning_rate=2e-4,
    weight_decay=0.01,
    batch_size=8,
    betas=(0.9, 0.95),
    iterations=60,
    warmup_iterations=5,
)

# A variant's name is the detector's, and after a dash what is special about it.
TINY: Mapping[str, Any] = {
    "ami_net": AmiNetConfig(
        backbone="test_resnet",
        layers=(1, 2, 3),
        image_size=(64, 64),
        patch_size=2,
        token_channels=64,
        heads=2,
        mlp_ratio=2,
        blocks=2,
        centres=4,
        jitter=6.0,
        mask_softness=0.05,
        map_size=(64, 64),
        recipe=_BRIEF_ADAMW,
    ),
    "dadf": DadfConfig(
        backbone="test_resnet",
        image_size=(64, 64),
        scale_channels=16,
        blocks=2,
        heads=2,
        mlp_ratio=2,
        flow_steps=4,
        recipe=_BRIEF_ADAMW,
        flow_recipe=_BRIEF_ADAMW,
    ),
    "glcf": GlcfConfig(
        backbone="test_resnet",
        layers=(1, 2, 3),
        targets=2,
        inputs=2,
        image_size=(64, 64),
        token_channels=48,
        encoder_blocks=2,
        encoder_heads=2,
        decoder_blocks=2,
        decoder_heads=4,
        mlp_ratio=2,
        level_depths=(2, 1),
        level_weights=(1.0, 3.0),
        recipe=_BRIEF_ADAMW,
    ),
    "grnr": GrnrConfig(
        backbone="test_resnet",
        layers=(1, 2),
        image_size=(64, 64),
        margin=16,
        context=32,
        support=10,
    ),
    "inp_former-vit": InpFormerConfig(
        backbone="test_vit2",
        layers=(1, 2, 3, 4),
        image_size=(64, 64),
        decoder_blocks=4,
        mlp_ratio=2,
        map_size=(64, 64),
        recipe=_BRIEF,
    ),
    "inp_former-cnn": InpFormerConfig(
        backbone="test_resnet",
        layers=(2, 3),
        image_size=(64, 64),
        groups=1,
        decoder_blocks=2,
        heads=2,
        mlp_ratio=2,
        projected_channels=32,
        average_features=True,
        extractor_tokens=32,
        decoder_tokens=16,
        map_size=(64, 64),
        recipe=_BRIEF,
    ),
    "inp_former_pp-vit": InpFormerPpConfig(
        backbone="test_vit2",
        layers=(1, 2, 3, 4),
        image_size=(64, 64),
        decoder_blocks=4,
        mlp_ratio=2,
        head_channels=(16, 8),
        schedule="joint",
        recipe=_BRIEF,
    ),
    "inp_former_pp-cnn": InpFormerPpConfig(
        backbone="test_resnet",
        layers=(2, 3),
        image_size=(64, 64),
        groups=1,
        decoder_blocks=2,
        heads=2,
        mlp_ratio=2,
        projected_channels=32,
        extractor_tokens=32,
        decoder_tokens=16,
        head_channels=(16, 8),
        scale_distance=True,
        map_size=(32, 32),
        blur_sigma=1.0,
        recipe=_BRIEF,
        head_recipe=_BRIEF,
    ),
    "jigsaw_svdd": JigsawSvddConfig(
        image_size=(192, 192),
        encoder_channels=(8, 8, 8, 8, 8, 8),
        embedding_channels=8,
        hidden_channels=16,
        small_stride=16,
        large_stride=32,
        margin=32,
        neighbours=3,
        bank_rows=100,
        recipe=replace(_BRIEF_ADAMW, iterations=20),
    ),
    "pnpt": PnptConfig(
        backbone="test_resnet",
        image_size=(64, 64),
        token_channels=32,
        encoder_blocks=1,
        decoder_blocks=1,
        heads=2,
        mlp_ratio=2,
        recipe=replace(_BRIEF_ADAMW, learning_rate=5e-3, final_learning_rate=5e-4),
    ),
    "rb_ae": RbAeConfig(
        image_size=(64, 64),
        channels=(8, 16, 16, 16),
        recipe=replace(_BRIEF_ADAMW, learning_rate=5e-3, final_learning_rate=5e-4, iterations=20),
        defect_recipe=replace(_BRIEF_ADAMW, learning_rate=5e-3, final_learning_rate=5e-4, iterations=20),
    ),
    "st_mae": StMaeConfig(
        backbone="test_resnet",
        layers=(1, 2, 3),
        image_size=(64, 64),
        feature_grid=(16, 16),
        patch_size=2,
        encoder_channels=64,
        encoder_heads=2,
        encoder_blocks=2,
        decoder_channels=48,
        decoder_heads=2,
        decoder_blocks=2,
        mlp_ratio=2,
        recipe=replace(_BRIEF_ADAMW, learning_rate=5e-3, final_learning_rate=5e-4),
    ),
}


def make_detector(variant: str, **changes: Any) -> nn.Module:
    """Build a tiny detector with random backbone weights; its stages have not run yet.

    Args:
        variant: a key of `TINY`.
        changes: fields of its configuration with other values.
    """
    detector = build_detector(variant.partition("-")[0], replace(TINY[variant], **changes))
    assert isinstance(detector, nn.Module)
    if hasattr(detector, "load_backbone_weights"):
        detector.load_backbone_weights(untrained_weights(TINY[variant].backbone))
    return detector
