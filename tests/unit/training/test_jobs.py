"""Promises of training commands: figures stand with what weakens them, and a folder that holds no bundle is told so."""

import re
from pathlib import Path

import pytest

from service.contract.bundle import MetricRecord
from service.errors import ParameterInvalid
from training.jobs import _figure_rows, evaluate_bundle


def test_figures_when_told_then_intervals_and_reasons_both_are():
    """An interval round a figure does not hide that marked defects were not measured."""
    figures = {
        "sure": MetricRecord(value=0.9, low=0.8, high=0.95),
        "weak": MetricRecord(value=0.9, low=0.8, high=0.95, reason="a defect is lost"),
        "alone": MetricRecord(value=1.0, reason="no interval: too few"),
        "none": MetricRecord(value=None, reason="no masks"),
    }

    rows = _figure_rows(figures)

    assert rows == [
        ("sure", "90.0 %", "80.0 to 95.0 %"),
        ("weak", "90.0 %", "80.0 to 95.0 %; a defect is lost"),
        ("alone", "100.0 %", "no interval: too few"),
        ("none", "not defined: no masks", ""),
    ]


@pytest.mark.parametrize(("given", "named"), [("bottle", "bottle/10"), ("bottel/1", "store/bottle/1")])
def test_bundle_when_the_folder_holds_none_then_says_which_folder_is_wanted(tmp_path, given, named):
    """Who names the line without a version, or misspells it, hears what to give instead of what a manifest is."""
    for version in ("9", "10", "9.new"):
        (tmp_path / "bottle" / version).mkdir(parents=True)

    with pytest.raises(ParameterInvalid, match=rf"There is no bundle in .*; .* for example .*{re.escape(named)}\."):
        evaluate_bundle(tmp_path / given, None, Path("line"), None, None, 1)
