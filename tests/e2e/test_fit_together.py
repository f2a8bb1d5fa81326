"""Two real processes under a real torchrun fit what one process fits, over gloo; NCCL and GPUs were not at hand."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml

from tests.fit_together import IDENTITY, fit_detector, make_drawing_detector, make_mean_detector
from tests.servers import PATIENCE_S, wait_until
from tests.tiny_line import TINY_RUN, write_line
from training.fitting.checkpoint import detector_tensors
from training.fitting.fit import CheckpointPlan

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """Start both, stop torchrun when the run of the command line has kept its second stage, return what is left."""
    folder = tmp_path_factory.mktemp("together")
    write_line(folder / "bottle", tested=False)
    endless = {"iterations": 10**6, "batch_size": 4}
    recipe = TINY_RUN["hyperparameters"]["recipe"] | endless
    config = TINY_RUN | {"hyperparameters": TINY_RUN["hyperparameters"] | {"recipe": recipe}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, ROOT / "tests" / "fit_together.py", folder], env=environment, stdout=log, stderr=log
        )
        try:
            wait_until(lambda: process.poll() is not None or _is_descending(folder), "the run's descent", 180)
            process.send_signal(signal.SIGTERM)
            process.wait(PATIENCE_S)
        finally:
            process.kill()
            process.wait()
    return folder


def _is_descending(folder):
    found = list(folder.glob("runs/bottle/*/checkpoint.json"))
    if not found or json.loads(found[0].read_bytes())["stage"] != 2:
        return False
    # And has made a step: before its first message, one of them may stop a step ahead of the other, whose message would
    # then meet what this test says last.
    return re.search(r"reconstruction: [1-9]\d*/", (folder / "log").read_text()) is not None


def _difference(folder, name, detector):
    """Return the largest difference of any tensor between what both processes have and another detector."""
    tensors = detector_tensors(detector)
    kept = [safetensors.torch.load_file(folder / f"{name}-{number}.safetensors") for number in (0, 1)]
    assert kept[0].keys() == kept[1].keys() == tensors.keys()
    assert all(torch.equal(kept[0][key], kept[1][key]) for key in tensors), "the processes differ"
    return max(float((kept[0][key].double() - value.double()).abs().max()) for key, value in tensors.items())


def test_fit_when_two_processes_share_batches_then_gives_what_one_process_gives(together):
    """Half a batch each, averaged, is the whole batch, where losses are means over frames."""
    alone, untouched = fit_detector(make_mean_detector(), 1), make_mean_detector()

    # float32 sums in another order, over six steps of two descents
    assert _difference(together, "mean", alone) < 1e-5
    assert _difference(together, "mean", untouched) > 1e-3


def test_fit_when_losses_draw_and_norms_learn_then_depends_on_shares_and_not_on_who_computes_them(together):
    """One process that computes both shares gives the same."""
    alone = fit_detector(make_drawing_detector(), 2)

    assert _difference(together, "drawing", alone) < 1e-4


def test_fit_when_one_of_two_is_told_to_stop_then_both_stop_after_the_same_step_and_go_on_to_the_same_bits(together):
    """Nobody waits for one that has left, and what was kept is resumed by two processes or by one."""
    assert all((together / f"stopped-{number}").exists() for number in (0, 1))
    for number in (0, 1):
        through, resumed = (
            safetensors.torch.load_file(together / f"{name}-{number}.safetensors") for name in ("mean", "resumed")
        )
        assert all(torch.equal(through[key], resumed[key]) for key in through)
    copy = together / "copy"
    shutil.copytree(together / "stopped", copy)
    alone = fit_detector(make_mean_detector(), 2, plan=CheckpointPlan(copy, IDENTITY, resume=True))
    assert _difference(together, "resumed", alone) == 0


def test_train_when_torchrun_is_stopped_then_one_run_is_kept_and_the_first_process_speaks_for_all(together):
    """Both leave with the code of a stopped run; there is one directory, one checkpoint and one sentence."""
    [directory] = (together / "runs" / "bottle").iterdir()
    record, request = (json.loads((directory / name).read_bytes()) for name in ("checkpoint.json", "run.json"))
    log = (together / "log").read_text()

    assert [(together / f"left-{number}").read_text() for number in (0, 1)] == ["130", "130"]
    assert (record["identity"]["processes"], request["processes"]) == ("2", 2)
    assert record["stage"] == 2
    assert len(list(directory.glob("checkpoint-*.safetensors"))) == 1
    assert log.count("projection: 24/24") == 1
    assert log.count("Stopped. To go on where it stood: flawline train --resume") == 1


def test_peers_when_another_has_ended_then_say_so_instead_of_waiting(together):
    """Who lives longer is not kept waiting."""
    assert (together / "lost").exists()
