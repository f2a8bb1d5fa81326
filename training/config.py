"""The one description of a run: frozen, complete, and kept in the bundle's manifest.

A run's YAML comes first, `--set` changes single values of it, and the result is checked against the detector's own
configuration before anything else happens. Rules:

- A key that nobody knows is refused and named; nothing is passed on in silence.
- What several places need is said once here (`backbone`, `input`, `seed`) and derived for the detector.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Collection, Iterable, Mapping
from importlib.resources import files
from math import gcd
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, JsonValue, TypeAdapter, ValidationError, field_validator

from models import DETECTORS
from service.contract.bundle import GoldenRule
from service.contract.geometry import InputSpec, NetworkInput, Tiling
from service.contract.policy import ScoreRule
from training.backbones.weight_lock import backbone_name
from training.data.split import HoldOut
from training.ranges import find_idle_recipe, find_misfit

# Fields of a detector's configuration that the run says once for everybody.
_DERIVED = {"backbone": "backbone", "image_size": "input", "lines": "the lines of the run", "seed": "seed"}
_USUAL_DETECTOR = "inp_former"
_CONFIG_OF_SIZE = {"paper": "{detector}.yaml", "small": "{detector}_small.yaml"}


Product = Literal["texture", "object"]
Precision = Literal["fp32", "fp16", "int8"]


class ConfigFault(Exception):
    """The run's description does not hold; the sentence names the key and says what to do."""


class Tiles(BaseModel):
    """Into how many overlapping parts a frame is cut, each of which the network looks at by itself.

    Attributes:
        rows: of tiles.
        columns: of tiles.
        overlap: share of a tile's height and width that it has in common with the next, to whole cells of the map.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rows: int = Field(ge=1)
    columns: int = Field(ge=1)
    overlap: float = Field(default=0.25, ge=0, le=0.5)


class RunConfig(BaseModel):
    """Everything that decides what a run makes of a folder of frames.

    Attributes:
        detector: a name of `models.DETECTORS`.
        backbone: timm's name of the feature extractor, `embedded`, or an alias of the weights' lock; None for
            detectors without one.
        hyperparameters: values of the detector's own configuration; what is missing keeps its default.
        product: what the frames show, a `texture` that fills them or an `object`; some detectors judge one kind only,
            and then it must be said. Frames can't tell: a board that is seen at another place each time has no
            outline either.
        input: sizes that frames are resized and cropped to, where they are not cut into tiles; and how many bits
            their values have.
        tiles: cuts each frame into overlapping parts of the network's input, so that small defects of large frames are
            seen; None for frames that are looked at whole. `frame_input` says what that makes of the sizes.
        seed: of initial values, order of frames, bootstrap and planted defects.
        hold_out: which good frames fitting never sees; has a seed of its own, so that runs with several seeds are
            calibrated on the same frames.
        shots: number of good frames of each line to fit on, or None for all that are not held out; then every other
            good frame may calibrate, and `hold_out` is not used.
        shot_seed: chooses these frames.
        shot_views: what else is made of them: "none", or the 22 views of INP-Former's few-shot setting.
        review_rate: wanted share of good parts that are at least `REVIEW`.
        fail_rate: wanted share of good parts that are `FAIL`.
        golden: how closely a device must reproduce the golden set.
        golden_frames: how many frames of each line the golden set has at most.
        evaluation_resolution: whether pixel figures are measured at the frames' own size or at the model's.
        batch_size: frames a forward pass in evaluation and calibration; it changes speed, never an answer.
        precision: of the exported graph.
        keep_float: patterns of names of operators that stay in float32 at any precision, as in `node_conv2d_1*`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    detector: str
    backbone: str | None = None
    product: Product | None = None
    hyperparameters: dict[str, JsonValue] = Field(default_factory=dict)
    input: NetworkInput
    tiles: Tiles | None = None
    seed: int = Field(default=1, ge=0, lt=2**31)
    hold_out: HoldOut = HoldOut()
    shots: int | None = Field(default=None, ge=1)
    shot_seed: int = Field(default=1, ge=0, lt=2**31)
    shot_views: Literal["none", "inp_former"] = "none"
    review_rate: float = Field(default=0.10, gt=0, lt=1)
    fail_rate: float = Field(default=0.05, gt=0, lt=1)
    golden: GoldenRule = GoldenRule(map_tolerance=0.01, score_tolerance=0.01)
    golden_frames: int = Field(default=8, ge=2, le=64)
    evaluation_resolution: Literal["original", "model"] = "original"
    batch_size: int = Field(default=8, ge=1, le=512)
    precision: Precision = "fp32"
    keep_float: tuple[str, ...] = ()

    @field_validator("backbone")
    @classmethod
    def _resolve_alias(cls, name: str | None) -> str | None:
        return None if name is None else backbone_name(name)

    @property
    def frame_input(self) -> InputSpec:
        """What becomes of a frame; with tiles it is resized to what all of them cover, cropped in the same proportion.

        Raises:
            ConfigFault: if that is too large or too many.
        """
        whole = InputSpec(**self.input.model_dump())
        if self.tiles is None or self.tiles.rows * self.tiles.columns == 1:
            return whole
        map_height, map_width = map_size_of(self.detector_config())
        tiling = {
            "rows": self.tiles.rows,
            "columns": self.tiles.columns,
            "overlap_height": _whole_cells(self.tiles.overlap, self.input.height, map_height),
            "overlap_width": _whole_cells(self.tiles.overlap, self.input.width, map_width),
        }
        try:
            tiled = whole.model_copy(update={"tiles": Tiling.model_validate(tiling)})
            sizes = {
                "resize_height": round(tiled.canvas_height * self.input.resize_height / self.input.height),
                "resize_width": round(tiled.canvas_width * self.input.resize_width / self.input.width),
            }
            return InputSpec.model_validate(tiled.model_dump() | sizes)
        except ValidationError as error:
            raise ConfigFault(_first_fault(error, "tiles")) from error

    @property
    def makes_views(self) -> bool:
        """Whether fitting sees further views of its few frames."""
        return self.shots is not None and self.shot_views != "none"

    def detector_config(self, lines: int = 1) -> Any:
        """Return the detector's own frozen configuration, filled from this run.

        Args:
            lines: how many lines the detector is fitted on; only line-conditioned ones ask.

        Raises:
            ConfigFault: if the detector or a hyperparameter is not known, a value does not fit, or the detector does
                not judge such products.
        """
        if self.detector not in DETECTORS:
            raise ConfigFault(f"There is no detector {self.detector!r}; known are {', '.join(sorted(DETECTORS))}.")
        schema = DETECTORS[self.detector][0]
        names = {field.name for field in dataclasses.fields(schema)}
        for key in sorted(self.hyperparameters.keys() & _DERIVED.keys()):
            raise ConfigFault(f"hyperparameters.{key} follows from {_DERIVED[key]}; set that instead.")
        _refuse_unknown(schema, self.hyperparameters, "hyperparameters")
        if "backbone" not in names and self.backbone is not None:
            raise ConfigFault(f"The detector {self.detector} has no backbone; leave it out.")
        derived = {
            "backbone": self.backbone,
            "image_size": (self.input.height, self.input.width),
            "lines": lines,
            "seed": self.seed,
        }
        values = self.hyperparameters | {
            key: value for key, value in derived.items() if key in names and value is not None
        }
        try:
            own = TypeAdapter(schema).validate_python(values)
        except ValidationError as error:
            raise ConfigFault(_first_fault(error, "hyperparameters")) from error
        if (misfit := find_misfit(self.detector, own)) is not None:
            raise ConfigFault(f"hyperparameters.{misfit}.")
        _refuse_other_products(self.detector, self.product, getattr(schema, "products", None))
        return own

    def to_yaml(self) -> str:
        """Return the run's description with every value, as it can be read again."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def load_config(source: str, detector: str | None = None, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a configuration, change single values and check all of it.

    Args:
        source: `small` or `paper` for those that come with the detector, else a path.
        detector: whose configuration `small` and `paper` mean, and which a file must be of; None for `inp_former` of
            those, and for whichever the file names.
        overrides: `key=value`, the key with dots between its levels, the value as in YAML.

    Raises:
        ConfigFault: if the file can't be read or is of another detector, or a key or value does not fit.
    """
    values = _read_yaml(source, detector or _USUAL_DETECTOR)
    named = values.get("detector", detector)
    if detector is not None and named != detector:
        raise ConfigFault(
            f"The configuration {source} is of the detector {named}, and {detector} is asked for; name one of them in "
            "both places."
        )
    for override in overrides:
        _apply(values, override)
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigFault(_first_fault(error)) from error
    # A control of a comparison learns nothing on purpose; a run of somebody's own does so by a slip.
    if (idle := find_idle_recipe(config.detector_config())) is not None:
        raise ConfigFault(f"hyperparameters.{idle}.")
    _ = config.frame_input  # tiles that can't be cut are refused now
    return config


def score_rule_of(own: Any) -> ScoreRule:
    """Return how a detector with this configuration of its own reduces scores from maps.

    It says so by `score_reduction` or `top_fraction`, as a setting or once for all.
    """
    reduction = getattr(own, "score_reduction", None)
    if reduction is None:
        return ScoreRule(kind="top_fraction_mean", fraction=own.top_fraction)
    return ScoreRule(kind=reduction)


def map_size_of(own: Any) -> tuple[int, int]:
    """Return `(height, width)` of the map of a detector with this configuration of its own: the image's by default."""
    height, width = getattr(own, "map_size", None) or own.image_size
    return height, width


def parse_config(text: str) -> RunConfig:
    """Read what `RunConfig.to_yaml` wrote.

    Raises:
        ConfigFault: if a key or value does not fit.
    """
    try:
        return RunConfig.model_validate(yaml.safe_load(text))
    except (ValidationError, yaml.YAMLError) as error:
        raise ConfigFault("The run's config.yaml can't be read; start a new run.") from error


def _whole_cells(overlap: float, side: int, map_side: int) -> int:
    """Return an overlap in pixels, the nearest to a share of a side that is whole cells of the map; half at most."""
    step = side // gcd(side, map_side)
    return min(round(overlap * side / step), side // 2 // step) * step


def _read_yaml(source: str, detector: str) -> dict[str, Any]:
    try:
        if source in _CONFIG_OF_SIZE:
            text = (files("training") / "configs" / _CONFIG_OF_SIZE[source].format(detector=detector)).read_text(
                "utf-8"
            )
        else:
            text = Path(source).read_text("utf-8")
        values = yaml.safe_load(text)
    except FileNotFoundError as error:
        known = ", ".join(sorted(DETECTORS))
        raise ConfigFault(
            f"There is no configuration {source!r} for the detector {detector!r}; give small, paper or a YAML file, "
            f"and one of the detectors {known}."
        ) from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigFault(
            f"The configuration {source} can't be read as YAML; compare it with training/configs."
        ) from error
    if not isinstance(values, dict):
        raise ConfigFault(f"The configuration {source} holds no keys; compare it with training/configs.")
    return values


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigFault(f"{override!r} is no setting; write key=value, for example fail_rate=0.02.")
    *levels, last = key.strip().split(".")
    place = values
    for level in levels:
        deeper = place.setdefault(level, {})
        if not isinstance(deeper, dict):
            raise ConfigFault(f"{key} can't be set: {level} holds a single value.")
        place = deeper
    try:
        place[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigFault(f"The value of {key} is no YAML; put quotes round it.") from error


def _refuse_other_products(detector: str, product: Product | None, judged: Collection[str] | None) -> None:
    """Refuse a detector of one kind of product unless the line is said to be of that kind; None judges all kinds."""
    if judged is None or product in judged:
        return
    kinds = " and ".join(f"{kind}s" for kind in sorted(judged))
    begin = f"The detector {detector} judges {kinds} only, surfaces that look the same all over and fill the frame"
    if product is None:
        raise ConfigFault(
            f"{begin}; if this line shows one, say so with --product {min(judged)}, else take another detector, for "
            "example inp_former."
        )
    raise ConfigFault(
        f"{begin}, and this line is said to show an {product}, whose outline would count as a defect; take another "
        "detector, for example inp_former."
    )


def _refuse_unknown(schema: Any, values: Mapping[str, Any], place: str) -> None:
    """Refuse keys that a dataclass, or one nested in it, does not have; pydantic would drop them in silence."""
    hints = typing.get_type_hints(schema)
    known = [field.name for field in dataclasses.fields(schema) if field.name not in _DERIVED]
    for key, value in values.items():
        if key not in known:
            raise ConfigFault(f"{place}.{key} is not known{_did_you_mean(key, known)}; known are {', '.join(known)}.")
        for option in _options(hints[key]):
            if dataclasses.is_dataclass(option) and isinstance(value, Mapping):
                _refuse_unknown(option, value, f"{place}.{key}")


def _options(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def _first_fault(error: ValidationError, prefix: str = "") -> str:
    first = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in (*([prefix] if prefix else []), *first["loc"])) or "The configuration"
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        level = " at the top level" if len(first["loc"]) == 1 else ""
        known = RunConfig.model_fields if level else [field.name for field in dataclasses.fields(HoldOut)]
        return (
            f"{place} is not known{level}{_did_you_mean(str(first['loc'][-1]), known)}; known are {', '.join(known)}."
        )
    what = first["msg"].removeprefix("Value error, ")
    given = "" if isinstance(first["input"], dict) else f"; it is {first['input']!r}"
    return f"{place}: {what[0].lower()}{what[1:]}{given}."


def _did_you_mean(key: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(key, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""
