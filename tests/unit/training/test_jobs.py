"""Promises of what training commands print: a figure never stands without what weakens it."""

from service.contract.bundle import MetricRecord
from training.jobs import _figure_rows


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
