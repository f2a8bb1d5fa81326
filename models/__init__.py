"""Detectors by name: an explicit table, so that what exists can be read here and importing has no side effect."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from models.ami_net import AmiNet, AmiNetConfig
from models.dadf import Dadf, DadfConfig
from models.detector import Detector
from models.glcf import Glcf, GlcfConfig
from models.grnr import Grnr, GrnrConfig
from models.inp_former import InpFormer, InpFormerConfig
from models.inp_former_pp import InpFormerPp, InpFormerPpConfig
from models.jigsaw_svdd import JigsawSvdd, JigsawSvddConfig
from models.pnpt import Pnpt, PnptConfig
from models.rb_ae import RbAe, RbAeConfig
from models.st_mae import StMae, StMaeConfig


class DetectorEntry(NamedTuple):
    """What is known of a detector by its name.

    Attributes:
        config: its frozen configuration class.
        detector: the class that is built from it.
        several_lines: whether one network serves several lines: `made` for it or indifferent to it, `unproven` where
            the method is published for one line, `refused` where the network holds a picture of one product.
    """

    config: type[Any]
    detector: type[Any]
    several_lines: Literal["made", "unproven", "refused"] = "made"


DETECTORS: Mapping[str, DetectorEntry] = MappingProxyType(
    {
        "ami_net": DetectorEntry(AmiNetConfig, AmiNet),
        "dadf": DetectorEntry(DadfConfig, Dadf, "unproven"),
        "glcf": DetectorEntry(GlcfConfig, Glcf, "unproven"),
        "grnr": DetectorEntry(GrnrConfig, Grnr),
        "inp_former": DetectorEntry(InpFormerConfig, InpFormer),
        "inp_former_pp": DetectorEntry(InpFormerPpConfig, InpFormerPp),
        "jigsaw_svdd": DetectorEntry(JigsawSvddConfig, JigsawSvdd, "refused"),
        "pnpt": DetectorEntry(PnptConfig, Pnpt),
        "rb_ae": DetectorEntry(RbAeConfig, RbAe, "refused"),
        "st_mae": DetectorEntry(StMaeConfig, StMae, "unproven"),
    }
)


def build_detector(name: str, config: Any) -> Detector:
    """Build a detector from its own configuration, with random weights.

    Raises:
        ValueError: if no detector has that name, the configuration is another's, or it contradicts itself.
    """
    if name not in DETECTORS:
        raise ValueError(f"there is no detector {name!r}; known are {', '.join(sorted(DETECTORS))}")
    entry = DETECTORS[name]
    if not isinstance(config, entry.config):
        raise ValueError(f"{name} is built from {entry.config.__name__}, not {type(config).__name__}")  # noqa: TRY004  (a value of the run is wrong)
    detector: Detector = entry.detector(config)
    return detector
