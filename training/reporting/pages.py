"""From a template and values to one HTML file that needs nothing else; the one door to jinja2.

Templates lie beside this file. Whatever is not known to a template is an error, and every value is escaped.
"""

from collections.abc import Callable, Mapping
from datetime import datetime
from functools import cache

import jinja2


def render_page(template: str, values: Mapping[str, object]) -> str:
    """Return a page.

    Args:
        template: name of a file in `training/reporting/templates`.
        values: everything that the template names.
    """
    return _environment().get_template(template).render(values)


@cache
def _environment() -> jinja2.Environment:
    """Return the one that keeps its templates: a run fills its page twice, and compiling takes longer than filling."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("training.reporting"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(_FILTERS)
    return environment


def percent(share: float, digits: int = 1) -> str:
    """Return a share of 0 to 1 as people read it."""
    return f"{100 * share:.{digits}f}\N{NO-BREAK SPACE}%"


def figure(value: float) -> str:
    """Return a number without unit, four digits long."""
    return f"{value:.4g}"


def day(created_at: str) -> str:
    """Return a moment, ISO 8601 in UTC, as people read it."""
    return datetime.fromisoformat(created_at).strftime("%d %B %Y, %H:%M UTC")


def duration(seconds: float) -> str:
    """Return how long something took, in the unit that suits."""
    if seconds < 90:
        return f"{seconds:.0f}\N{NO-BREAK SPACE}s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f}\N{NO-BREAK SPACE}min"
    return f"{seconds / 3600:.1f}\N{NO-BREAK SPACE}h"


def millions(count: int) -> str:
    """Return a number of parameters in millions."""
    return f"{count / 1e6:.2f}\N{NO-BREAK SPACE}M"


def mebibytes(size: int) -> str:
    """Return a size of a file in MiB."""
    return f"{size / 2**20:.1f}\N{NO-BREAK SPACE}MiB"


_FILTERS: Mapping[str, Callable[..., str]] = {
    "percent": percent,
    "figure": figure,
    "day": day,
    "duration": duration,
    "millions": millions,
    "mebibytes": mebibytes,
}
