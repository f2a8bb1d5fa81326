"""Which part a frame shows, as its caller names it: also where nothing else of the request is of use.

Whoever looks into why a part was stopped knows its name and no request id; so what can be read of the name comes back
with a problem, and stands in its line of the log.
"""

from contextlib import suppress

from fastapi import Request
from pydantic import ValidationError

from service.routes.headers import OPTION_HEADERS
from service.routes.problems import PartNames
from service.schemas import InspectionOptions

_NAMES = {name: OPTION_HEADERS[name].lower().encode() for name in ("part_id", "view", "sequence")}


def names_in(options: InspectionOptions, index: int = 0) -> PartNames:
    """Return how a request names the part of one of its frames, by index: part id, view, sequence, where it does."""
    names = {name: getattr(options, name) for name in _NAMES}
    if options.sequence is not None:
        names["sequence"] = options.sequence + index
    return {name: value for name, value in names.items() if value is not None}


def names_of(request: Request) -> PartNames:
    """Return the same of the first frame of a request that may be faulty, as far as each is given once and fits."""
    names: dict[str, str | int] = {}
    for name, header in _NAMES.items():
        shown = [value.decode("latin-1") for given, value in request.scope["headers"] if given == header]
        asked = request.query_params.getlist(name)
        if len(shown) > 1 or len(asked) > 1:  # which one was meant is not guessed
            continue
        for value in asked or shown:
            with suppress(ValidationError):  # of what is no name
                names.update(names_in(InspectionOptions.model_validate_strings({name: value})))
    return names
