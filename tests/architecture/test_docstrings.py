"""What must be written down, and the names under which nothing may hide."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from tests.architecture.sources import ROOT, source_files

TEST_FILES = sorted(
    path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("test_*.py") if "__pycache__" not in path.parts
)
BANNED_NAMES = frozenset({"utils", "util", "helpers", "helper", "common", "misc", "tools", "stuff"})
REASONED_WAIVER = re.compile(r"# (noqa: [A-Z]+\d+(, ?[A-Z]+\d+)*|type: ignore\[[a-z, -]+\])\W+[A-Za-z].*")
TEST_SUPPORT = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").glob("*.py"))


@cache
def promises_in(file):
    """Return the test functions of a file, those of classes included."""
    return [
        node
        for node in ast.walk(ast.parse((ROOT / file).read_text(), file))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
    ]


@pytest.mark.parametrize("file", TEST_FILES)
def test_test_when_written_says_its_promise_in_one_sentence(file):
    """Every test opens with the promise that it keeps, one sentence on one paragraph."""
    silent = [
        test.name
        for test in promises_in(file)
        if not re.fullmatch(r"[^\n]+(\n[^\n]+)*[.!?]", (ast.get_docstring(test) or "").strip())
    ]

    assert silent == []


@pytest.mark.parametrize("file", TEST_FILES)
def test_test_when_named_twice_in_a_file_would_be_lost(file):
    """A second test of the same name silently replaces the first, so there is none."""
    names = [test.name for test in promises_in(file)]

    assert sorted(names) == sorted(set(names))


def test_tests_when_collected_are_many():
    """The checks in this file look at something."""
    assert sum(len(promises_in(file)) for file in TEST_FILES) > 100


@pytest.mark.parametrize("file", [*source_files(), *TEST_SUPPORT])
def test_file_when_named_says_what_it_holds(file):
    """Nothing hides behind a name that fits everything."""
    assert not BANNED_NAMES & set(Path(file).with_suffix("").parts)


def test_packages_when_imported_pull_in_nothing_else():
    """Package files are empty, but for the one that names the detectors."""
    filled = [
        file for file in source_files() if file.endswith("/__init__.py") and (ROOT / file).read_text().strip() != ""
    ]

    assert filled in ([], ["models/__init__.py"])


@pytest.mark.parametrize("file", source_files())
def test_source_when_checked_waives_rules_only_with_a_reason(file):
    """Each `noqa` and `type: ignore` names its rule and says why, on the same line."""
    waivers = [line for line in (ROOT / file).read_text().splitlines() if "# noqa" in line or "# type: ignore" in line]

    assert [line for line in waivers if not REASONED_WAIVER.search(line)] == []


@pytest.mark.parametrize("file", source_files())
def test_source_when_read_holds_no_note_to_self(file):
    """Open work is an issue, not a comment."""
    assert re.search(r"\b(TODO|FIXME|XXX|HACK)\b", (ROOT / file).read_text()) is None
