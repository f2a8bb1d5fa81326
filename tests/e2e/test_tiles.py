"""Frames that are cut into tiles, from the command line to the server: what was validated is what is answered."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from service.contract.bundle import load_bundle
from service.contract.golden import read_golden, replay
from service.settings import Settings
from tests.factories import encode, make_runner
from tests.servers import LONG_S, serve_in_thread, wait_until_ready
from tests.tiny_line import TINY_RUN, write_line
from training.__main__ import commands

LINE = "board"
SIZE = (150, 110)


def _invoke(*arguments):
    return CliRunner().invoke(commands, [*map(str, arguments), "--threads", "1"])


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A line of upright frames, a folder that two readers fit, a mask that leaves out its top, and a bundle of it."""
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("tiles")
    write_line(place / LINE, size=SIZE)
    (place / "run.yaml").write_text(json.dumps(TINY_RUN))
    mask = np.zeros(SIZE, np.uint8)
    mask[15:] = 255
    (place / "mask.png").write_bytes(encode(mask))
    result = _invoke(
        *("train", place / LINE, "--tiles", "2x2", "--tile-overlap", "0.5", "--roi", place / "mask.png"),
        *("--config", place / "run.yaml", "--weights", "untrained", "--layout", "mvtec"),
        *("--store", place / "store", "--runs", place / "runs"),
    )
    assert result.exit_code == 0, result.output
    return place


def test_train_when_frames_are_cut_then_the_manifest_says_how_and_the_golden_set_replays(place):
    """Whoever serves the bundle learns everything from it, and any runtime gives the validated answers."""
    bundle = load_bundle(place / "store" / LINE / "1")
    spec = bundle.manifest.input

    replay(bundle, read_golden(bundle), make_runner(bundle.model))

    assert (spec.height, spec.canvas_height, spec.resize_height, spec.tile_count) == (64, 96, 96, 4)
    assert (bundle.manifest.output.map_height, bundle.manifest.map_size) == (32, (48, 48))
    assert bundle.manifest.hyperparameters["tiles"] == {"rows": 2, "columns": 2, "overlap": 0.5}
    assert bundle.policies[LINE].region_of_interest is not None
    assert "cut into 2 rows and 2 columns of tiles of 64x64" in (bundle.path / "report.html").read_text("utf-8")


def test_commands_when_a_bundle_cuts_frames_then_measure_and_calibrate_it_likewise(place):
    """Figures are those of the run, and new thresholds rest on the same stitched maps."""
    bundle = place / "store" / LINE / "1"
    measured = _invoke("evaluate", bundle, place / LINE, "--layout", "mvtec", "--output", place / "figures.json")
    again = _invoke("calibrate", bundle, place / LINE / "train" / "good")

    assert (measured.exit_code, again.exit_code) == (0, 0), measured.output + again.output
    figures = json.loads((place / "figures.json").read_text())["figures"]
    for name, metric in load_bundle(bundle).manifest.by_line[LINE].metrics.items():
        assert figures[name]["value"] == pytest.approx(metric.value, abs=0.01)
    published = load_bundle(Path(re.search(r"bundle: (\S+)", again.output)[1]))
    assert published.manifest.input == load_bundle(bundle).manifest.input


def test_frames_when_they_are_cut_then_every_door_gives_the_validated_score(place):
    """A file, its pixels under /v2, and the golden set say one score; metadata tells the canvas's size."""
    bundle = load_bundle(place / "store" / LINE / "1")
    answer = read_golden(bundle).answers[-1]
    png = bundle.files[answer.file]
    store = place / "served"
    (store / LINE).mkdir(parents=True)
    (store / LINE / "1").symlink_to(bundle.path)
    patience = dict.fromkeys(("default_deadline_s", "max_deadline_s", "drain_timeout_s", "stuck_after_s"), LONG_S)
    with serve_in_thread(Settings(store_directory=store, **patience)) as http:
        wait_until_ready(http)
        told = http.get(f"/v1/lines/{LINE}").json()["live"]
        inspected = http.post(
            f"/v1/lines/{LINE}/inspect", content=png, headers={"Content-Type": "image/png", "X-Heatmap": "f16"}
        ).json()
        metadata = http.get(f"/v2/models/{LINE}").json()

    assert (told["input"], told["tiles"]) == ({"height": 96, "width": 96}, 4)
    assert told["anomaly_map"] == {"height": 48, "width": 48}
    assert inspected["verdict"] == answer.verdict
    shapes = {tensor["name"]: tensor["shape"] for tensor in (*metadata["inputs"], *metadata["outputs"])}
    assert shapes["frames"] == [-1, 96, 96, 3]
    assert shapes["anomaly_map"] == [-1, 48, 48]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--tiles", "3"], "write for example 3x2"),
        (["--tile-overlap", "0.3"], "tiles.rows"),
        (["--layout", "photo_album"], "known are"),
        (["--layout", "plain", "--layout", "mvtec"], "give --layout once"),
    ],
)
def test_train_when_tiles_or_layout_do_not_fit_then_says_so_in_one_sentence(place, tmp_path, options, words):
    """What can't be cut or read is refused in a sentence, before any frame is looked at."""
    result = _invoke("train", place / LINE, "--runs", tmp_path, "--store", tmp_path, *options)

    assert result.exit_code == 2
    assert words in " ".join(result.stderr.split())
    assert not any(path.is_file() for path in tmp_path.rglob("*"))
