"""What must be written down, and the names under which nothing may hide."""

import ast
import re
from collections import Counter
from functools import cache
from pathlib import Path

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


def of_files(files, faults):
    """Return the faults of each file that has any; a test a file would take pytest longer than the look takes."""
    found = {file: faults(file) for file in files}
    return {file: wrong for file, wrong in found.items() if wrong}


def test_test_when_written_says_its_promise_in_one_sentence():
    """Every test opens with the promise that it keeps, one sentence on one paragraph."""

    def silent(file):
        return [
            test.name
            for test in promises_in(file)
            if not re.fullmatch(r"[^\n]+(\n[^\n]+)*[.!?]", (ast.get_docstring(test) or "").strip())
        ]

    assert of_files(TEST_FILES, silent) == {}


def test_test_when_named_twice_in_a_file_would_be_lost():
    """A second test of the same name silently replaces the first, so there is none."""

    def repeated(file):
        times = Counter(test.name for test in promises_in(file))
        return [name for name, count in times.items() if count > 1]

    assert of_files(TEST_FILES, repeated) == {}


def test_tests_when_collected_are_many():
    """The checks in this file look at something."""
    assert sum(len(promises_in(file)) for file in TEST_FILES) > 100


def test_file_when_named_says_what_it_holds():
    """Nothing hides behind a name that fits everything."""
    files = [*source_files(), *TEST_SUPPORT]

    assert of_files(files, lambda file: BANNED_NAMES & set(Path(file).with_suffix("").parts)) == {}


def test_packages_when_imported_pull_in_nothing_else():
    """Package files are empty, but for the one that names the detectors."""
    filled = [
        file for file in source_files() if file.endswith("/__init__.py") and (ROOT / file).read_text().strip() != ""
    ]

    assert filled in ([], ["models/__init__.py"])


def test_source_when_checked_waives_rules_only_with_a_reason():
    """Each `noqa` and `type: ignore` names its rule and says why, on the same line."""

    def bare_waivers(file):
        lines = (ROOT / file).read_text().splitlines()
        waivers = [line for line in lines if "# noqa" in line or "# type: ignore" in line]
        return [line for line in waivers if not REASONED_WAIVER.search(line)]

    assert of_files(source_files(), bare_waivers) == {}


def test_source_when_read_holds_no_note_to_self():
    """Open work is an issue, not a comment."""
    note = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")

    assert of_files(source_files(), lambda file: note.findall((ROOT / file).read_text())) == {}
