"""Promises of the table from error code to status and of the documents that it makes."""

import json
from collections.abc import Iterator

import pytest

from service import errors
from service.errors import FlawlineError
from service.routes.problems import PROBLEMS, problem_document, responses, retry_after, status_of


def _family(root: type[FlawlineError]) -> Iterator[type[FlawlineError]]:
    yield root
    for child in root.__subclasses__():
        if child.__module__.startswith("service."):  # training has faults of its own, which never travel over HTTP
            yield from _family(child)


@pytest.mark.parametrize("kind", sorted(set(_family(FlawlineError)), key=lambda kind: kind.__name__))
def test_error_class_when_looked_up_then_it_has_a_row_whose_status_lays_the_same_blame(kind):
    """Every class of the error tree has its own row, with a status of its own branch."""
    status = PROBLEMS[kind.code].status

    if issubclass(kind, errors.CallerError):
        assert 400 <= status < 500
    elif issubclass(kind, errors.MomentError):
        assert status in (503, 504)
    else:
        assert status == 500


@pytest.mark.parametrize("code", sorted(PROBLEMS))
def test_problem_when_made_then_it_never_carries_another_verdict_than_none(code):
    """Every document has all members, says NO_VERDICT, and can be written as JSON."""
    document = json.loads(json.dumps(problem_document(code, "What to do.", "r-1", "cap")))

    assert document == {
        "type": f"urn:flawline:problem:{code}",
        "title": PROBLEMS[code].title,
        "status": PROBLEMS[code].status,
        "code": code,
        "detail": "What to do.",
        "verdict": "NO_VERDICT",
        "request_id": "r-1",
        "line": "cap",
    }


def test_problem_when_the_line_is_no_name_then_it_is_not_repeated():
    """Bytes of the caller that are no line's name do not come back."""
    document = problem_document("unknown_line", "What to do.", "r-1", "<script>")

    assert "line" not in document


def test_status_when_the_code_is_unknown_then_the_fault_is_ours():
    """A code without a row is a fault of the service, never a success."""
    assert status_of("never_heard_of") == 500


@pytest.mark.parametrize(
    ("code", "known_s", "expected"),
    [
        ("overloaded", 0.2, "1"),
        ("overloaded", 2.1, "3"),
        ("line_not_ready", None, "1"),
        ("quota_exceeded", 59.5, "60"),
        ("unreadable_frame", None, None),
        ("deadline_passed", None, None),
    ],
)
def test_retry_after_when_the_fault_passes_by_itself_then_whole_seconds_are_told(code, known_s, expected):
    """`Retry-After` is a whole number of seconds, at least one, wherever waiting helps."""
    assert retry_after(code, known_s).get("Retry-After") == expected


def test_documentation_when_two_codes_share_a_status_then_both_examples_stand_there():
    """OpenAPI gets one response a status and one example a code."""
    documented = responses("overloaded", "line_not_ready", "unknown_line")

    examples = documented[503]["content"]["application/problem+json"]["examples"]
    assert set(examples) == {"overloaded", "line_not_ready"}
    assert set(documented) == {503, 404}
