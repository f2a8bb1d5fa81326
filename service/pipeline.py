"""One frame's way, told in order: find the line, take a place, decode, batch and run, judge, answer.

Before: the HTTP side received the body. After: it answers, and only then records. Everything that goes wrong on the way
is raised as one of `service.errors`; whatever is raised is `NO_VERDICT`.
"""

from service.inspection import HeatmapKind, Inspection, InspectionRequest, RawLayout

__all__ = ["HeatmapKind", "Inspection", "InspectionRequest", "RawLayout"]
