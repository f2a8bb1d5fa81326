"""The published interface: pinned, complete, and with an example for every fault."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from service.app import create_app
from service.routes.problems import PROBLEMS
from service.schemas import InspectionAnswer, ProblemDocument
from service.settings import Settings

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
    return {"operations": operations, "components": components}


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
