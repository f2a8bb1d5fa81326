"""Promises of the bundle: what was written is what is read, and everything else is refused by name."""

import hashlib
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from service.contract.bundle import (
    Manifest,
    MetricRecord,
    line_file,
    load_bundle,
    load_policy,
    newest_bundles,
    promised_lines,
    seal,
    versions_of,
)
from service.contract.geometry import Tiling
from service.contract.golden import read_golden
from service.contract.legible import is_legible
from service.contract.policy import ScoreRule, Verdict
from service.errors import BundleNotLoaded, BundleRefused
from tests.factories import (
    bundle_files,
    make_bundle,
    make_input,
    make_line_record,
    make_manifest,
    make_policy,
    reseal,
    write_files,
)
from tests.rights import rights_of_an_ordinary_user
from tests.strategies import manifests

FILES = bundle_files()
NETWORK = make_manifest(files={"model.onnx": "0" * 64})
MANIFEST, SIDECAR = "manifest.json", "manifest.sha256"


@pytest.fixture
def bundle(tmp_path):
    """Return the folder of a valid bundle."""
    return write_files(tmp_path / "demo_line" / "1", FILES)


def rewrite_manifest(folder, change):
    """Let `change` edit the manifest's fields and repair its digest, as a careless or hostile writer would."""
    fields = json.loads((folder / MANIFEST).read_bytes())
    change(fields)
    text = json.dumps(fields).encode()
    (folder / MANIFEST).write_bytes(text)
    (folder / SIDECAR).write_bytes(hashlib.sha256(text).hexdigest().encode() + b"\n")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"margin": 4},
        {"height": 64, "width": 16},
        {"lines": ("left", "right"), "conditional": True},
        {"policy": {"region_of_interest": (((0.1, 0.1), (0.9, 0.1), (0.5, 0.9)),)}},
        {"extra_files": {"report/curve.png": b"\x89PNG"}},
    ],
    ids=["plain", "cropped", "tall", "two lines", "region of interest", "pictures"],
)
def test_bundle_when_sealed_and_loaded_holds_what_was_written(tmp_path, options):
    """Every part of a bundle comes back as it was written."""
    folder = make_bundle(tmp_path, "socket.a", "12", **options)

    bundle = load_bundle(folder)

    assert (bundle.manifest.name, bundle.manifest.version, bundle.path) == ("socket.a", "12", folder)
    lines = bundle.manifest.lines
    assert lines == options.get("lines", ("socket.a",))
    assert bundle.policies == {line: make_policy(**options.get("policy", {})) for line in lines}
    assert bundle.model == (folder / "model.onnx").read_bytes()
    assert bundle.digest == hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
    assert {line: calibration.scores.size for line, calibration in bundle.calibrations.items()} == {
        line: record.data.calibrated_on for line, record in bundle.manifest.by_line.items()
    }
    assert {*bundle.files, "model.onnx"} == set(bundle.manifest.files)


def test_factory_when_called_twice_writes_the_same_bytes():
    """A bundle made of the same things has the same digest."""
    assert bundle_files() == FILES


@given(manifests())
def test_manifest_when_sealed_and_read_is_the_same(manifest):
    """A manifest survives its file, with the digests of what it was sealed with."""
    sealed = seal(manifest, {"model.onnx": b"graph", "report.html": b"page"})

    read = Manifest.model_validate_json(sealed[MANIFEST])

    assert read.model_copy(update={"files": {}}) == manifest
    assert read.files == {
        "model.onnx": hashlib.sha256(b"graph").hexdigest(),
        "report.html": hashlib.sha256(b"page").hexdigest(),
    }


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_manifest_when_a_figure_is_no_number_is_sealed_as_plain_json(value):
    """An undefined figure becomes null, which every JSON reader knows; `NaN` is no JSON."""
    record = make_line_record(metrics={"aupro": MetricRecord(value=value)})
    manifest = make_manifest(by_line={"demo_line": record}, hyperparameters={"limit": value})

    sealed = seal(manifest, {})

    fields = json.loads(sealed[MANIFEST], parse_constant=pytest.fail)
    assert fields["by_line"]["demo_line"]["metrics"]["aupro"]["value"] is None
    assert fields["hyperparameters"]["limit"] is None


@pytest.mark.parametrize("name", sorted(FILES))
@pytest.mark.parametrize("place", [0.0, 0.37, 0.71, 1.0], ids=["first", "early", "late", "last"])
@pytest.mark.parametrize("bit", [0x01, 0x2A, 0x80])
def test_loading_when_a_byte_of_a_file_is_flipped_is_refused_by_name(bundle, name, place, bit):
    """Not one byte of any file can change unnoticed, and the refusal names the file."""
    data = bytearray(FILES[name])
    data[int(place * (len(data) - 1))] ^= bit
    (bundle / name).write_bytes(data)

    with pytest.raises(BundleRefused) as refused:
        load_bundle(bundle)

    assert name in str(refused.value)


@given(st.sampled_from(sorted(FILES)), st.floats(0, 1), st.integers(1, 255))
def test_loading_when_any_byte_of_any_file_is_flipped_is_refused(tmp_path_factory, name, place, bits):
    """Wherever the byte lies and however it changes, the bundle is refused."""
    folder = tmp_path_factory.getbasetemp() / "flipped"
    if not folder.exists():
        write_files(folder, FILES)
    data = bytearray(FILES[name])
    data[int(place * (len(data) - 1))] ^= bits
    (folder / name).write_bytes(data)

    with pytest.raises(BundleRefused, match=name.replace(".", r"\.")):
        load_bundle(folder)

    (folder / name).write_bytes(FILES[name])


@pytest.mark.parametrize("name", sorted(FILES))
@pytest.mark.parametrize("change", ["missing", "cut", "longer", "empty"])
def test_loading_when_a_file_has_another_length_is_refused_by_name(bundle, name, change):
    """Missing, shortened, lengthened and emptied files are refused."""
    file = bundle / name
    if change == "missing":
        file.unlink()
    else:
        file.write_bytes({"cut": FILES[name][:-1], "longer": FILES[name] + b"\n", "empty": b""}[change])

    with pytest.raises(BundleRefused) as refused:
        load_bundle(bundle)

    assert name in str(refused.value)


@pytest.mark.parametrize("name", ["stranger.txt", "golden/3.png", ".hidden", "model.onnx.data", "deep/er/file"])
def test_loading_when_there_is_a_file_that_the_manifest_does_not_name_is_refused(bundle, name):
    """What no digest covers has no place in a bundle."""
    write_files(bundle, {name: b"x"})

    with pytest.raises(BundleRefused, match="is not named by manifest"):
        load_bundle(bundle)


@pytest.mark.parametrize("is_named", [False, True], ids=["stranger", "named"])
def test_loading_when_a_file_is_named_as_a_terminal_would_obey_is_refused_and_shown_legibly(bundle, is_named):
    """Who verifies a bundle from elsewhere reads its names, and nothing of it writes on the terminal."""
    write_files(bundle, {"\x1b[2J": b"x"})
    if is_named:
        record = Manifest.model_validate_json((bundle / MANIFEST).read_bytes())
        write_files(bundle, seal(record, {name: (bundle / name).read_bytes() for name in (*record.files, "\x1b[2J")}))

    with pytest.raises(BundleRefused) as refused:
        load_bundle(bundle)

    assert r"\x1b[2J" in str(refused.value)
    assert is_legible(str(refused.value))


def test_loading_when_a_folder_can_not_be_looked_into_does_not_call_the_bundle_whole(bundle):
    """What lies in there is named by nobody; Python's own way to list files leaves such a folder out in silence."""
    write_files(bundle, {"deep/er/file": b"x"})
    (bundle / "deep/er").chmod(0)

    with rights_of_an_ordinary_user(), pytest.raises(BundleNotLoaded, match="'deep/er' can't be read"):
        load_bundle(bundle)


def test_loading_when_plans_were_built_on_the_target_accepts_them(bundle):
    """Engines belong to the device; they are checked against the verified graph, not by the manifest."""
    write_files(bundle, {"engines/sm90-10.8-fp16.plan": b"plan"})

    assert "engines/sm90-10.8-fp16.plan" not in load_bundle(bundle).files


@pytest.mark.parametrize("name", ["model.onnx", MANIFEST, "golden", "engines", "stranger"])
@pytest.mark.parametrize("target", ["inside", "outside", "nowhere", "itself"])
def test_loading_when_something_is_a_link_is_refused(bundle, tmp_path, name, target):
    """A bundle holds plain files, so that what was hashed is what lies there."""
    link = bundle / name
    aims = {"outside": tmp_path / "elsewhere", "nowhere": tmp_path / "nowhere", "itself": link}
    aim = aims.get(target, bundle / "moved")
    if link.exists() and target in ("inside", "outside"):
        link.rename(aim)
    else:
        write_files(tmp_path / "elsewhere", {"file": b"x"})
        if link.is_file():
            link.unlink()
        elif link.exists():
            link.rename(tmp_path / "away")
    link.symlink_to(aim)

    with pytest.raises(BundleRefused):
        load_bundle(bundle)


def test_loading_when_a_file_is_a_pipe_is_refused_at_once(bundle):
    """A pipe would be read for ever."""
    (bundle / "model.onnx").unlink()
    os.mkfifo(bundle / "model.onnx")

    with pytest.raises(BundleRefused, match=r"model\.onnx is no plain file"):
        load_bundle(bundle)


def test_loading_when_the_manifest_is_a_pipe_is_refused_at_once(bundle):
    """Not even the first file may block."""
    (bundle / MANIFEST).unlink()
    os.mkfifo(bundle / MANIFEST)

    with pytest.raises(BundleRefused, match=r"manifest\.json is no plain file"):
        load_bundle(bundle)


def test_loading_when_the_folder_itself_is_reached_by_a_link_is_allowed(bundle, tmp_path):
    """Stores are often mounted through links; only the inside of a bundle must be plain."""
    (tmp_path / "mounted").symlink_to(bundle.parent, target_is_directory=True)

    assert load_bundle(tmp_path / "mounted" / "1").digest == load_bundle(bundle).digest


def test_loading_when_the_folder_does_not_exist_is_refused(tmp_path):
    """A bundle that is not there is refused like a broken one, and whoever mistyped its folder learns of it."""
    with pytest.raises(BundleRefused, match=r"manifest\.json is missing from .* demo_line/9, because there is no such"):
        load_bundle(tmp_path / "demo_line" / "9")


def test_loading_when_the_folder_holds_versions_says_to_give_one(bundle):
    """The folder of a name is not yet a bundle; whoever stopped there reads what to append."""
    with pytest.raises(BundleRefused, match=rf"because it holds the versions of a bundle; .* {bundle}\.$"):
        load_bundle(bundle.parent)


def test_loading_when_a_file_is_missing_says_which(bundle):
    """The folder is there, so nobody is sent to look for it."""
    (bundle / "model.onnx").unlink()

    with pytest.raises(BundleRefused, match=r"model\.onnx is missing from the bundle demo_line/1\.$"):
        load_bundle(bundle)


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/hostname", "golden/../../secret", "nul\0byte", "golden", "x" * 300, ""]
)
def test_loading_when_the_manifest_names_a_file_elsewhere_is_refused(bundle, name):
    """A manifest can't make the service read outside of the bundle, nor fail in another way."""
    (bundle.parent / "secret").write_bytes(b"secret")
    digest = hashlib.sha256(b"secret").hexdigest()
    rewrite_manifest(bundle, lambda fields: fields["files"].update({name: digest}))

    with pytest.raises(BundleRefused):
        load_bundle(bundle)


@pytest.mark.parametrize(
    "name", ["model.onnx", "calibration.npz", "policy.json", "golden/expected.json", "golden/maps.npz", "report.html"]
)
def test_loading_when_the_manifest_leaves_out_a_required_file_is_refused_by_name(bundle, name):
    """A bundle without one of its parts is none, even with its digests in order."""
    (bundle / name).unlink()
    rewrite_manifest(bundle, lambda fields: fields["files"].pop(name))

    with pytest.raises(BundleRefused) as refused:
        load_bundle(bundle)

    assert f"names no {name}" in str(refused.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "../up"),
        ("name", ""),
        ("version", "0"),
        ("version", "1.0"),
        ("lines", []),
        ("lines", ["a/b"]),
        ("precision", "fp8"),
        ("opset", 11),
        ("detector", None),
        ("evaluation_resolution", "somewhere"),
        ("surprise", 1),
    ],
)
def test_loading_when_a_manifest_field_does_not_fit_is_refused_by_its_name(bundle, field, value):
    """A schema fault names the field."""
    rewrite_manifest(bundle, lambda fields: fields.update({field: value}))

    with pytest.raises(BundleRefused, match=rf"manifest\.json: {field}"):
        load_bundle(bundle)


def test_loading_when_the_bundle_is_of_another_schema_says_what_to_do(bundle):
    """A bundle of another time is named as such, and not by the first of many fields that differ."""
    rewrite_manifest(bundle, lambda fields: fields.update(schema_version=1, data=fields.pop("by_line")))

    with pytest.raises(BundleRefused, match=r"another schema version than 2, .*; train and export again"):
        load_bundle(bundle)


@pytest.mark.parametrize(
    ("lines", "words"),
    [(["left", "left"], "a line is named twice"), (["left"], "by_line"), (["left", "right", "third"], "by_line")],
)
def test_loading_when_lines_and_what_is_said_of_them_differ_is_refused(tmp_path, lines, words):
    """Every line is listed once and described once, since its place in the list is its index in the graph."""
    folder = make_bundle(tmp_path, lines=("left", "right"))
    rewrite_manifest(folder, lambda fields: fields.update(lines=lines))

    with pytest.raises(BundleRefused, match=words):
        load_bundle(folder)


@pytest.mark.parametrize("name", ["lines/right/policy.json", "lines/right/calibration.npz"])
def test_loading_when_one_of_several_lines_lacks_its_own_file_is_refused_by_name(tmp_path, name):
    """A line is never judged by another line's policy or calibration, nor by one at the bundle's root."""
    folder = make_bundle(tmp_path, lines=("left", "right"))
    (folder / name).rename(folder / name.rpartition("/")[2])
    rewrite_manifest(
        folder, lambda fields: fields["files"].update({name.rpartition("/")[2]: fields["files"].pop(name)})
    )

    with pytest.raises(BundleRefused, match=f"names no {name}"):
        load_bundle(folder)


def test_newest_bundles_when_names_have_versions_then_gives_the_newest_and_the_lines_it_promises(tmp_path):
    """Who asks what a store serves looks at the versions that the service would load."""
    make_bundle(tmp_path, "pair", "9", lines=("left",))
    make_bundle(tmp_path, "pair", "10", lines=("left", "right"))
    make_bundle(tmp_path, "single")
    (tmp_path / "left/policies").mkdir(parents=True)  # a line's own policies, and no bundle

    newest = newest_bundles(tmp_path)

    assert {name: promised_lines(path, name) for name, path in newest.items()} == {
        "pair": ("left", "right"),
        "single": ("single",),
    }
    assert newest["pair"].name == "10"
    assert newest_bundles(tmp_path / "nowhere") == {}


def test_promised_lines_when_the_manifest_can_not_be_read_then_is_the_name_alone(bundle):
    """A broken bundle still says under which name it is missed."""
    (bundle / MANIFEST).write_bytes(b"{")

    assert promised_lines(bundle, "demo_line") == ("demo_line",)


def test_line_file_when_there_is_one_line_lies_at_the_root_and_else_in_the_folder_of_its_line():
    """A bundle of one line stays as flat as it can be."""
    assert line_file("left", ["left"], "policy.json") == "policy.json"
    assert line_file("left", ["left", "right"], "policy.json") == "lines/left/policy.json"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("input", "height"), 0),
        (("input", "resize"), "nearest"),
        (("input", "scaled_jpeg_decode"), False),
        (("input", "channel_order"), "BGR"),
        (("output", "score_rule", "kind"), "median"),
        (("parity", "verdicts_differ"), 1),
        (("parity", "map_difference"), "NaN"),
        (("golden", "map_tolerance"), 0),
        (("by_line", "demo_line", "data", "calibrated_on"), -1),
        (("by_line", "demo_line", "data", "digest"), "short"),
        (("by_line", "demo_line", "fail_rate"), 0),
        (("files", "report.html"), "0" * 63),
    ],
    ids=lambda value: ".".join(value) if isinstance(value, tuple) else str(value),
)
def test_loading_when_a_nested_field_does_not_fit_is_refused_by_its_path(bundle, path, value):
    """A schema fault deep inside names the way to it."""

    def change(fields):
        for step in path[:-1]:
            fields = fields[step]
        fields[path[-1]] = value

    rewrite_manifest(bundle, change)

    with pytest.raises(BundleRefused) as refused:
        load_bundle(bundle)

    assert f"manifest.json: {'.'.join(path)}" in str(refused.value)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"\x80\x04pickle"])
@pytest.mark.parametrize("name", ["policy.json", MANIFEST])
def test_loading_when_a_json_file_is_none_is_refused_by_name(bundle, name, text):
    """A file that is no JSON is refused, also where its digest is right."""
    (bundle / name).write_bytes(text)
    if name == MANIFEST:
        (bundle / SIDECAR).write_bytes(hashlib.sha256(text).hexdigest().encode() + b"\n")
    else:
        reseal(bundle)

    with pytest.raises(BundleRefused) as refused:
        load_bundle(bundle)

    assert name in str(refused.value)


def test_loading_when_the_policy_makes_no_sense_is_refused(bundle):
    """A default policy that could not be read on its own is refused within the bundle as well."""
    fields = json.loads((bundle / "policy.json").read_bytes()) | {"review_threshold": 99}
    (bundle / "policy.json").write_text(json.dumps(fields))

    with pytest.raises(BundleRefused, match=r"policy\.json: .*review_threshold"):
        load_bundle(reseal(bundle))


def test_loading_when_the_calibration_is_pickled_is_refused(bundle):
    """Arrays of objects are refused with their digests in order."""
    np.savez(bundle / "calibration.npz", scores=np.array([{}], dtype=object))

    with pytest.raises(BundleRefused, match=r"calibration\.npz"):
        load_bundle(reseal(bundle))


def test_loading_a_policy_when_it_is_good_returns_it(tmp_path):
    """A line's own policy is read by the same schema."""
    (tmp_path / "7.json").write_text(make_policy(version="7").model_dump_json())

    assert load_policy(tmp_path / "7.json").rules == make_policy(version="7")


@pytest.mark.parametrize("text", [None, "{}", "no json"])
def test_loading_a_policy_when_it_is_missing_or_wrong_is_refused_by_name(tmp_path, text):
    """A policy file that can't be used is named."""
    if text is not None:
        (tmp_path / "7.json").write_text(text)

    with pytest.raises(BundleRefused, match=r"7\.json"):
        load_policy(tmp_path / "7.json")


def test_versions_when_nobody_may_look_at_them_then_that_is_said_whatever_a_python_takes_for_no_folder(
    tmp_path, monkeypatch
):
    """What can't be seen is not gone: Python 3.13 and later call it no folder, without a word."""
    monkeypatch.setattr(Path, "is_dir", os.path.isdir)
    store = tmp_path / "demo_line"
    (store / "1").mkdir(parents=True)
    store.chmod(0o444)

    with rights_of_an_ordinary_user(), pytest.raises(PermissionError):
        versions_of(store)
    store.chmod(0o700)


def test_versions_when_a_store_holds_more_than_bundles_are_whole_numbers_oldest_first(tmp_path):
    """Half-written bundles, notes and files are no versions, and ten comes after nine."""
    for name in ("10", "9", "1", "0", "01", ".2.partial", "latest", "٣"):
        (tmp_path / name).mkdir()
    (tmp_path / "11").write_text("a file")

    assert versions_of(tmp_path) == ["1", "9", "10"]
    assert versions_of(tmp_path / "nowhere") == []


def test_loading_when_a_line_is_not_calibrated_then_its_calibration_is_absent(tmp_path):
    """A bundle without good parts is whole: it has a policy, golden frames without verdicts and no calibration."""
    path = make_bundle(tmp_path, calibrated=False)

    bundle = load_bundle(path)

    assert dict(bundle.calibrations) == {}
    assert set(bundle.policies) == {"demo_line"}
    assert {answer.verdict for answer in read_golden(bundle).answers} == {Verdict.NO_VERDICT}


def test_loading_when_the_manifest_promises_a_calibration_that_is_missing_then_refused(tmp_path):
    """A calibration can't get lost on the way and leave an uncalibrated line behind."""
    path = make_bundle(tmp_path, calibrated=False)
    reseal(path, by_line={"demo_line": make_line_record()})

    with pytest.raises(BundleRefused, match=r"names no calibration\.npz"):
        load_bundle(path)


def test_manifest_when_rates_are_named_without_good_parts_then_refused():
    """A false-reject rate that nobody measured is not promised."""
    with pytest.raises(ValidationError, match="belong to a calibration"):
        make_line_record(data=make_line_record().data.model_copy(update={"calibrated_on": 0}))


@pytest.mark.parametrize(
    "changes",
    [
        {"files": {"model.onnx": "1" * 64}},
        {"input": make_input(height=24)},
        {"input": make_input(width=40)},
        {"input": make_input(margin=8)},
        {"input": make_input(tiles=Tiling(rows=2, columns=1, overlap_height=0, overlap_width=0))},
        {"input": make_input().model_copy(update={"bit_depth": 12})},
        {"output": NETWORK.output.model_copy(update={"score_rule": ScoreRule(kind="maximum")})},
        {"output": NETWORK.output.model_copy(update={"map_height": 8})},
    ],
    ids=["graph", "height", "width", "crop", "tiles", "bit depth", "score rule", "map"],
)
def test_network_when_frames_would_get_other_scores_then_is_another(changes):
    """Thresholds that were chosen for one network's scores must not be taken for another's."""
    assert make_manifest(**{"files": NETWORK.files, **changes}).network != NETWORK.network


@pytest.mark.parametrize(
    "changes",
    [
        {"version": "2"},
        {"name": "another", "lines": ("left", "right")},
        {"by_line": {"demo_line": make_line_record(metrics={}, fail_rate=0.02)}},
        {"created_at": "2027-01-01T00:00:00+00:00", "git_revision": "0" * 40, "libraries": {}},
        {"files": NETWORK.files | {"policy.json": "1" * 64, "calibration.npz": "2" * 64}},
    ],
    ids=["version", "lines", "calibration", "time", "other files"],
)
def test_network_when_frames_get_the_same_scores_then_is_the_same(changes):
    """A line's policy files outlive new versions that only calibrate, describe or rename."""
    assert make_manifest(**{"files": NETWORK.files, **changes}).network == NETWORK.network


def test_network_when_a_later_release_reads_what_is_there_then_is_what_policy_files_name():
    """Policy files lie in stores for years, and a field with a default must not take them away."""
    output = NETWORK.output.model_copy(update={"score_rule": ScoreRule(kind="maximum")})

    assert make_manifest(files=NETWORK.files, output=output).network == (
        "48eb584b1612df3da371b96c5922839cf190cd96006d2f2c35ece2b2117c357a"
    )
