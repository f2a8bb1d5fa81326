"""Figures that others published, from `published.yaml`: what a reproduction is compared with, and never called ours.

Every figure there has its source, and what is known to differ between its setting and ours; every detector, what is
known to differ between the method here and its authors'. A detector without figures has a remark that says why.
"""

from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

Setting = Literal["single-class", "multi-class", "1-shot", "2-shot", "4-shot"]
KindOfSetting = Literal["single-class", "multi-class", "few-shot"]
SHOTS: Mapping[Setting, int] = {"1-shot": 1, "2-shot": 2, "4-shot": 4}


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PublishedFigures(_Record):
    """One row of somebody's table.

    Attributes:
        data: key of `training.data.benchmarks.BENCHMARKS`.
        setting: one model for each category, one for all, or so many good frames of each category. Zero-shot, a model
            that was fitted on another data set, is told only: `flawline reproduce` has one data set.
        categories: that the values are the mean over; empty for all of the data set's. With one name, its own values.
        values: percent, by the names of our figures.
        source: where it stands: paper with arXiv id and table, or the page that tells it.
        differs: what is known to differ from how we measure, one sentence each; empty where nothing is known but what
            the detector's own tell.
    """

    data: str
    setting: Setting | Literal["zero-shot"]
    categories: tuple[str, ...] = ()
    values: dict[str, Annotated[float, Field(ge=0, le=100)]] = Field(min_length=1)
    source: str = Field(min_length=1)
    differs: tuple[str, ...] = ()


class PublishedDetector(_Record):
    """What was published of one detector.

    Attributes:
        title: as its authors call it.
        setting: that its paper is about first of all.
        shots_share_a_model: whether its few-shot setting fits one model for all categories.
        changes: what a kind of setting sets otherwise than the detector's paper configuration, `key=value`.
        paper: arXiv id.
        differs: what is known to differ between its authors' method and ours in the paper configuration, one sentence
            each; it must be given, and an empty one says that nothing is known.
        remark: what a reader must know of the figures, or why there are none.
        figures: rows.
    """

    title: str
    setting: Setting
    shots_share_a_model: bool = False
    changes: dict[KindOfSetting, tuple[str, ...]] = Field(default_factory=dict)
    paper: str
    differs: tuple[str, ...]
    remark: str = ""
    figures: tuple[PublishedFigures, ...] = ()

    def changes_in(self, setting: Setting) -> tuple[str, ...]:
        """Return what a setting sets otherwise than the paper configuration, `key=value`."""
        match setting:
            case "single-class" | "multi-class":
                return self.changes.get(setting, ())
            case "1-shot" | "2-shot" | "4-shot":
                return self.changes.get("few-shot", ())


@cache
def read_published() -> Mapping[str, PublishedDetector]:
    """Return what was published, by detector."""
    text = (files("training.reproduction") / "published.yaml").read_text("utf-8")
    return TypeAdapter(dict[str, PublishedDetector]).validate_python(yaml.safe_load(text))
