"""The published interface: pinned, complete, and with an example for every fault."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from service.app import create_admin_app, create_app
from service.errors import known_codes, meanings
from service.protocol import MAX_HEAD_BYTES
from service.routes.problems import PROBLEMS
from service.schemas import InspectionAnswer, ProblemDocument
from service.settings import Settings
from tests.callers import write_keys

SNAPSHOT = Path(__file__).parent / "openapi_snapshot.json"
ANSWERED_WITHOUT_A_FRAME = {"bundle_refused", "calibration_refused", "caller_error", "unavailable"}
ANSWERED_TO_ADMINISTRATORS = {"store_unreachable", "unknown_bundle", "version_refused"}


@pytest.fixture(scope="module")
def document(tmp_path_factory) -> dict[str, Any]:
    """The OpenAPI document as callers get it."""
    published = create_app(Settings(store_directory=tmp_path_factory.mktemp("store"))).openapi()
    return dict(json.loads(json.dumps(published)))


def surface(document: dict[str, Any]) -> dict[str, Any]:
    """Return what callers depend on: operations, parameters, bodies, statuses with codes, members of answers."""
    operations = {}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            operations[f"{method.upper()} {path}"] = {
                "parameters": sorted(f"{entry['in']} {entry['name']}" for entry in operation.get("parameters", [])),
                "bodies": sorted(operation.get("requestBody", {}).get("content", {})),
                "answers": {status: _codes(answer) for status, answer in sorted(operation["responses"].items())},
            }
    components = {
        name: sorted(schema.get("properties", schema.get("enum", [])))
        for name, schema in sorted(document["components"]["schemas"].items())
    }
    errors = {code: _status_of(answer) for code, answer in document["components"]["responses"].items()}
    return {"operations": operations, "components": components, "errors": errors}


def _status_of(answer: dict[str, Any]) -> int:
    [content] = answer["content"].values()
    [example] = content["examples"].values()
    return int(example["value"]["status"])


def _codes(answer: dict[str, Any]) -> list[str]:
    content = answer.get("content", {})
    examples = content.get("application/problem+json", {}).get("examples", {})
    return sorted(examples) or sorted(content)


def test_interface_when_it_changes_then_the_snapshot_must_change_in_the_same_commit(document):
    """Nobody changes the interface by accident; on purpose, run this file as a script."""
    assert surface(document) == json.loads(SNAPSHOT.read_text())


def test_document_when_it_refers_to_a_component_then_the_component_is_there(document):
    """Generators of clients follow every reference."""
    referred = set(re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(document)))

    assert referred <= set(document["components"]["schemas"])
    assert "HTTPValidationError" not in document["components"]["schemas"]


def test_faults_when_documented_then_each_has_an_example_that_fits_its_shape(document):
    """Every code of the table is shown where it may come, with a sentence, NO_VERDICT and its status."""
    shown = {}
    for methods in document["paths"].values():
        for operation in methods.values():
            for status, answer in operation["responses"].items():
                examples = answer.get("content", {}).get("application/problem+json", {}).get("examples", {})
                for code, example in examples.items():
                    shown[code] = ProblemDocument.model_validate(example["value"])
                    assert shown[code].status == int(status)

    unaddressed = {"not_found", "method_not_allowed"}  # of no operation
    assert set(PROBLEMS) - set(shown) == ANSWERED_WITHOUT_A_FRAME | ANSWERED_TO_ADMINISTRATORS | unaddressed


def test_errors_when_documented_then_every_code_is_there_with_its_status_and_meaning(document):
    """The table of all errors has those of every class and of every row, and says of each what its class says."""
    answers = document["components"]["responses"]

    assert set(answers) == set(PROBLEMS) == known_codes() | {"method_not_allowed"}
    assert {code: _status_of(answer) for code, answer in answers.items()} == {
        code: problem.status for code, problem in PROBLEMS.items()
    }
    for code, meaning in meanings().items():
        assert answers[code]["description"].startswith(meaning)
        assert meaning.endswith(".")


def test_errors_when_any_request_may_get_them_then_the_document_says_so_once(document):
    """A wrong method, a wrong address and what is no HTTP belong to no operation."""
    words = document["info"]["description"]

    assert re.findall(r"(\d{3}) `(\w+)`", words) == [
        ("400", "caller_error"),
        ("404", "not_found"),
        ("405", "method_not_allowed"),
        ("422", "parameter_invalid"),
        ("500", "internal"),
    ]
    assert f"{MAX_HEAD_BYTES // 2**10} KiB" in words


@pytest.mark.parametrize("port", ["frames", "administration"])
def test_names_when_documented_then_each_says_what_it_means(tmp_path, port):
    """No parameter, header and member is left to guessing, and none has words that are for authors."""
    app = create_app(Settings(store_directory=tmp_path, keys_file=write_keys(tmp_path)))
    document = (app if port == "frames" else create_admin_app(app)).openapi()
    said = {
        f"{name}.{member}": schema.get("description")
        for name, component in document["components"]["schemas"].items()
        for member, schema in component.get("properties", {}).items()
    }
    for path, methods in document["paths"].items():
        for operation in methods.values():
            said |= {f"{path} {entry['name']}": entry.get("description") for entry in operation.get("parameters", [])}
            for answer in operation["responses"].values():
                listed = {name: header for name, header in answer["headers"].items() if "$ref" not in header}
                said |= {f"{path} {name}": header.get("description") for name, header in listed.items()}

    assert {name for name, words in said.items() if not words} == set()
    assert len(said) > 40
    assert "Attributes:" not in json.dumps(document)


def test_limits_when_documented_then_they_are_those_of_the_running_server(tmp_path):
    """Whoever plans by the document is not refused at the line: deadlines, formats and numbers are this server's."""
    settings = Settings(
        store_directory=tmp_path,
        max_deadline_s=0.75,
        default_deadline_s=0.5,
        formats=frozenset({"PNG", "WEBP"}),
        max_frames_per_request=3,
        max_body_bytes=123456,
    )
    paths = create_app(settings).openapi()["paths"]

    for path in ("/v1/lines/{line}/inspect", "/v1/lines/{line}/inspect-batch"):
        schemas = {entry["name"]: entry["schema"] for entry in paths[path]["post"]["parameters"]}
        for name in ("deadline_ms", "X-Deadline-Ms"):
            assert (schemas[name]["maximum"], schemas[name]["default"]) == (750, 500)
        assert "123456 bytes" in paths[path]["post"]["requestBody"]["description"]
    frame = paths["/v1/lines/{line}/inspect"]["post"]["requestBody"]["content"]
    batch = paths["/v1/lines/{line}/inspect-batch"]["post"]["requestBody"]["content"]
    assert [kind for kind in frame if kind.startswith("image/")] == ["image/png", "image/webp"]
    assert batch["multipart/form-data"]["schema"]["properties"]["frames"]["maxItems"] == 3


def test_answer_when_documented_then_its_example_fits_its_shape(document):
    """The example of an inspection is one that the service could have given."""
    content = document["paths"]["/v1/lines/{line}/inspect"]["post"]["responses"]["200"]["content"]

    for example in content["application/json"]["examples"].values():
        InspectionAnswer.model_validate(example["value"])


def write_snapshot(folder: Path) -> None:
    """Write the snapshot anew, after a change that was meant."""
    published = create_app(Settings(store_directory=folder)).openapi()
    SNAPSHOT.write_text(json.dumps(surface(json.loads(json.dumps(published))), indent=2) + "\n")


if __name__ == "__main__":
    write_snapshot(Path())
