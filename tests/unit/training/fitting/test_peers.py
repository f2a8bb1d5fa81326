"""Promises of meeting other processes, as far as one process without a GPU can tell; the rest is in `tests/e2e`."""

import pytest
import torch
from torch import distributed

from tests.tiny_line import make_request
from training import jobs
from training.config import ConfigFault
from training.fitting.peers import Alone, meet_peers, process_number, refuse_company
from training.run_directory import keep_request


@pytest.fixture
def second_of_two(monkeypatch):
    """Be what torchrun calls its second process; return what is asked of torch's devices and groups."""
    for name, value in {"TORCHELASTIC_RUN_ID": "none", "LOCAL_RANK": "1", "RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    asked = {}
    monkeypatch.setattr(distributed, "init_process_group", lambda backend, **_: asked.update(backend=backend))
    monkeypatch.setattr(distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: asked.update(device=device))
    return asked


def _have_gpus(monkeypatch, count):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def test_peers_when_torchrun_did_not_start_this_process_then_it_is_alone():
    """Sums are its own, and so is what the first one says."""
    peers, values = meet_peers("auto"), torch.ones(2)

    peers.add_up(values)

    assert isinstance(peers, Alone)
    assert (peers.number, peers.count, process_number()) == (0, 1, 0)
    assert values.tolist() == [1, 1]
    assert peers.hear_first(b"said") == b"said"
    refuse_company()


@pytest.mark.parametrize(
    ("gpus", "wanted", "backend", "device"),
    [(2, "auto", "nccl", 1), (2, "cpu", "gloo", None), (0, "auto", "gloo", None)],
)
def test_process_when_it_meets_others_then_takes_the_gpu_of_its_number(
    second_of_two, monkeypatch, gpus, wanted, backend, device
):
    """Over NCCL on GPUs, each its own; over gloo where there are none, or none is wanted."""
    _have_gpus(monkeypatch, gpus)

    peers = meet_peers(wanted)

    assert (peers.number, peers.count) == (1, 2)
    assert second_of_two.get("backend") == backend
    assert second_of_two.get("device") == device


def test_process_when_there_is_no_gpu_left_for_it_then_says_how_many_may_start(second_of_two, monkeypatch):
    """Two on one GPU would halve its memory and wait for each other."""
    _have_gpus(monkeypatch, 1)

    with pytest.raises(ConfigFault, match="--nproc-per-node=1, or fit with --device cpu"):
        meet_peers("auto")


def test_command_when_torchrun_starts_several_of_it_then_refuses(second_of_two):
    """What is no fitting would be done several times, into the same files."""
    with pytest.raises(ConfigFault, match="torchrun is for flawline train"):
        refuse_company()


@pytest.mark.parametrize("begun_by", [1, 3])
def test_run_when_resumed_by_a_number_that_does_not_divide_its_shares_then_is_refused(
    second_of_two, tmp_path, begun_by
):
    """Two processes can't have equally many of one share, or of three; nothing is written."""
    keep_request(tmp_path / "run", make_request(tmp_path / "line", tmp_path / "store", processes=begun_by))

    with pytest.raises(ConfigFault, match=f"--nproc-per-node={begun_by}, or go on without torchrun"):
        jobs.resume_run(tmp_path / "run", None)
