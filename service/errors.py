"""Everything that can go wrong, split by blame; HTTP chooses the status (`service/routes/problems.py`), not this file.

    FlawlineError
    ├── CallerError                     the request's fault: sending it again does not help
    │   ├── UnreadableFrame             not an image we accept, truncated, animated, wrong byte count
    │   ├── FrameTooLarge               bytes or pixels over the limit, decided before decoding
    │   ├── FrameNotComparable          a flat frame, as with a covered lens or without light
    │   ├── MediaTypeNotAllowed
    │   ├── ParameterInvalid
    │   ├── NotAuthenticated            no key, or a key we do not know
    │   ├── NotAuthorised               a known key without this line or action
    │   ├── NotFound
    │   │   ├── UnknownLine
    │   │   ├── UnknownBundle
    │   │   ├── UnknownVersion
    │   │   ├── UnknownPolicy
    │   │   └── UnknownInspection
    │   ├── VersionRefused              an administrator wants a version live that does not hold
    │   └── QuotaExceeded               the caller's own quota
    ├── MomentError                     the moment's fault: the same request may succeed later
    │   ├── Overloaded                  queue full, or the deadline can't be met
    │   ├── LineNotReady                loading, unhealthy or draining
    │   │   ├── LineLoading             for the first time, or again after it made room for others
    │   │   └── LineNotCalibrated       loaded, but without good parts nobody knows what is anomalous
    │   ├── StoreUnreachable            where bundles come from can't be asked for what is new
    │   └── DeadlinePassed              accepted, but the answer would come too late
    └── OwnError                        our fault
        ├── EngineFailed                the runtime raised, or returned something unusable
        ├── BundleRefused               digest, schema, graph or golden set does not hold
        │   └── BundleNotLoaded         nothing is said against it: the store or the machine did not let it be loaded
        └── CalibrationRefused          too few good parts for the wanted rate

Each class has a stable `code`; each instance carries one sentence that says what to do. A sentence never repeats bytes
of the caller. Rule: whatever ends here ends as `NO_VERDICT`.
"""


class FlawlineError(Exception):
    """Base of all expected faults.

    Args:
        sentence: what happened and what to do, for the caller.
        retry_after_s: seconds after which the same request may succeed, where that is known.
    """

    code = "internal"

    def __init__(self, sentence: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(sentence)
        self.sentence = sentence
        self.retry_after_s = retry_after_s


class CallerError(FlawlineError):
    """The request can't be served as it is."""

    code = "caller_error"


class UnreadableFrame(CallerError):
    """The frame can't be decoded as exactly one image of an accepted kind."""

    code = "unreadable_frame"


class FrameTooLarge(CallerError):
    """The body or the image is over a limit."""

    code = "frame_too_large"


class FrameNotComparable(CallerError):
    """The frame shows no picture, or its map is flat where a policy measures the frame by itself."""

    code = "frame_not_comparable"


class MediaTypeNotAllowed(CallerError):
    """The content type is not among the accepted ones."""

    code = "media_type_not_allowed"


class ParameterInvalid(CallerError):
    """A header, query or path parameter does not fit."""

    code = "parameter_invalid"


class NotAuthenticated(CallerError):
    """No key, or a key that is not known."""

    code = "not_authenticated"


class NotAuthorised(CallerError):
    """The key does not cover this line or action."""

    code = "not_authorised"


class NotFound(CallerError):
    """The thing asked for does not exist here."""

    code = "not_found"


class UnknownLine(NotFound):
    """No such line."""

    code = "unknown_line"


class UnknownBundle(NotFound):
    """No such bundle."""

    code = "unknown_bundle"


class UnknownVersion(NotFound):
    """The line has no such bundle version."""

    code = "unknown_version"


class UnknownPolicy(NotFound):
    """The line has no such policy version."""

    code = "unknown_policy"


class UnknownInspection(NotFound):
    """The inspection never was, or is no longer kept."""

    code = "unknown_inspection"


class VersionRefused(CallerError):
    """The version that was to become live does not hold; what was live before still is."""

    code = "version_refused"


class QuotaExceeded(CallerError):
    """The caller used up its own quota."""

    code = "quota_exceeded"


class MomentError(FlawlineError):
    """It can't be served now."""

    code = "unavailable"


class Overloaded(MomentError):
    """No place left, or the deadline can't be met."""

    code = "overloaded"


class LineNotReady(MomentError):
    """The line is loading, unhealthy or draining."""

    code = "line_not_ready"


class LineLoading(LineNotReady):
    """The line's network is on its way into memory."""

    code = "line_loading"


class LineNotCalibrated(LineNotReady):
    """The line has no calibration, and its policy does not allow a verdict without one."""

    code = "line_not_calibrated"


class StoreUnreachable(MomentError):
    """The store can't be asked for what is new; what was there before is still served."""

    code = "store_unreachable"


class DeadlinePassed(MomentError):
    """The frame was accepted, but its answer would come after the deadline."""

    code = "deadline_passed"


class OwnError(FlawlineError):
    """Something went wrong inside the service."""

    code = "internal"


class EngineFailed(OwnError):
    """The runtime raised or returned something that can't be used."""

    code = "engine_failed"


class BundleRefused(OwnError):
    """The bundle does not hold what its manifest promises."""

    code = "bundle_refused"


class BundleNotLoaded(BundleRefused):
    """Store or machine did not let the bundle be loaded now: nothing is said against it, and it may be later."""


class CalibrationRefused(OwnError):
    """The good parts at hand can't support the wanted false-reject rate."""

    code = "calibration_refused"


def known_codes(of: type[FlawlineError] = FlawlineError) -> frozenset[str]:
    """Return every code that an error of this file has, or those of one side.

    Args:
        of: the kind whose code is wanted, and those of all that are below it.
    """
    waiting: list[type[FlawlineError]] = [of]
    codes = set()
    while waiting:
        kind = waiting.pop()
        if kind.__module__ == __name__:
            codes.add(kind.code)
            waiting.extend(kind.__subclasses__())
    return frozenset(codes)


def meanings() -> dict[str, str]:
    """Return what each code means, in a sentence: the first line of what its class says of itself."""
    said: dict[str, str] = {}
    waiting: list[type[FlawlineError]] = [FlawlineError]
    while waiting:
        kind = waiting.pop(0)  # from the root on, so that of two with the same code the more special one counts
        if kind.__module__ == __name__:
            if "code" in vars(kind):
                said[kind.code] = (kind.__doc__ or "").partition("\n")[0]
            waiting.extend(kind.__subclasses__())
    return said
