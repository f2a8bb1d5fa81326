"""Promises of checkpoints: complete or absent, of this run or refused."""

import errno
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from training.fitting.checkpoint import (
    CheckpointRefused,
    LossPoint,
    TrainingState,
    detector_tensors,
    has_checkpoint,
    load_checkpoint,
    optimiser_state,
    remove_checkpoint,
    restore_detector,
    restore_optimiser,
    save_checkpoint,
    weights_digest,
)

_IDENTITY = {"config": "c", "backbone": "b"}


class _Tied(nn.Module):
    """A backbone, a head, and a second name for the head's weight."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Linear(2, 2)
        self.head = nn.Linear(2, 2)
        self.tied = nn.Linear(2, 2)
        self.tied.weight = self.head.weight


def _state(step=3):
    return TrainingState(
        stage=1,
        step=step,
        detector={"weight": torch.arange(6.0).reshape(2, 3).T, "count": torch.tensor(step)},
        optimiser={"0.mean": torch.ones(2)},
        optimiser_scalars={"0.step": step, "0.momentum_buffer": None},
        losses=(LossPoint("student", 0, {"distance": 0.1}),),
    )


def test_checkpoint_saved_and_loaded_is_the_same(tmp_path):
    """Tensors, numbers and losses come back as they were."""
    save_checkpoint(tmp_path / "new", _state(), _IDENTITY)

    loaded = load_checkpoint(tmp_path / "new", _IDENTITY)

    assert (loaded.stage, loaded.step, loaded.losses) == (1, 3, _state().losses)
    assert torch.equal(loaded.detector["weight"], _state().detector["weight"])
    assert torch.equal(loaded.optimiser["0.mean"], torch.ones(2))
    assert loaded.optimiser_scalars == {"0.step": 3, "0.momentum_buffer": None}


def test_checkpoint_saved_again_replaces_the_old_one(tmp_path):
    """Only the newest state stays, as two files."""
    save_checkpoint(tmp_path, _state(3), _IDENTITY)
    save_checkpoint(tmp_path, _state(4), _IDENTITY)

    assert load_checkpoint(tmp_path, _IDENTITY).step == 4
    assert len(list(tmp_path.iterdir())) == 2


def test_checkpoint_whose_writing_was_cut_short_leaves_the_old_one(tmp_path):
    """Tensors of a newer state without its JSON change nothing, and the next state takes their place."""
    save_checkpoint(tmp_path, _state(3), _IDENTITY)
    (tmp_path / "checkpoint-0123.safetensors").write_bytes(b"half")
    (tmp_path / ".checkpoint.json.writing").write_bytes(b"{")

    (tmp_path / ".checkpoint-0123.safetensors.writing").write_bytes(b"half")

    assert load_checkpoint(tmp_path, _IDENTITY).step == 3
    save_checkpoint(tmp_path, _state(4), _IDENTITY)
    assert len(list(tmp_path.iterdir())) == 2


def test_checkpoint_when_the_disk_is_full_then_names_its_file_and_leaves_the_old_one_alone(tmp_path, monkeypatch):
    """A write knows no name of its own, and what it left half done would keep the disk full."""
    save_checkpoint(tmp_path, _state(3), _IDENTITY)
    before = sorted(tmp_path.iterdir())

    def sync(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("training.whole_files.os.fsync", sync)
    with pytest.raises(OSError, match="No space left") as refused:
        save_checkpoint(tmp_path, _state(4), _IDENTITY)

    assert Path(refused.value.filename).parent == tmp_path
    assert Path(refused.value.filename).match("checkpoint-*.safetensors")
    assert sorted(tmp_path.iterdir()) == before
    assert load_checkpoint(tmp_path, _IDENTITY).step == 3


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"config": "x", "backbone": "b"}, "another config"),
        ({"config": "c", "backbone": "x"}, "another backbone"),
        ({"config": "c"}, "another backbone"),
    ],
    ids=["configuration", "weights", "something missing"],
)
def test_checkpoint_of_another_run_is_refused_by_name(tmp_path, other, named):
    """The sentence says what differs."""
    save_checkpoint(tmp_path, _state(), _IDENTITY)

    with pytest.raises(CheckpointRefused, match=named):
        load_checkpoint(tmp_path, other)


def _flip_tensor_byte(directory):
    (path,) = directory.glob("*.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _change_version(directory):
    record = json.loads((directory / "checkpoint.json").read_text())
    (directory / "checkpoint.json").write_text(json.dumps(record | {"schema_version": 99}))


@pytest.mark.parametrize(
    ("harm", "sentence"),
    [
        (_flip_tensor_byte, "damaged"),
        (lambda d: [path.unlink() for path in d.glob("*.safetensors")], "damaged"),
        (lambda d: (d / "checkpoint.json").write_text("{"), "damaged"),
        (_change_version, "another version"),
        (lambda d: (d / "checkpoint.json").unlink(), "no checkpoint"),
    ],
    ids=["flipped byte", "no tensors", "half a JSON", "another version", "nothing"],
)
def test_checkpoint_that_does_not_hold_is_refused(tmp_path, harm, sentence):
    """Damage ends with a sentence, never with half a state."""
    save_checkpoint(tmp_path, _state(), _IDENTITY)
    harm(tmp_path)

    with pytest.raises(CheckpointRefused, match=sentence):
        load_checkpoint(tmp_path, _IDENTITY)


def test_remove_checkpoint_leaves_other_files(tmp_path):
    """Only our own files are deleted, and twice is no fault."""
    save_checkpoint(tmp_path, _state(), _IDENTITY)
    (tmp_path / "report.html").write_text("x")
    kept = has_checkpoint(tmp_path)

    remove_checkpoint(tmp_path)
    remove_checkpoint(tmp_path)

    assert kept
    assert not has_checkpoint(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_detector_tensors_leave_the_backbone_out_and_come_back_with_tied_weights(tmp_path):
    """The backbone is not kept; weights with two names are."""
    first, second = _Tied(), _Tied()
    save_checkpoint(tmp_path, TrainingState(0, 0, detector_tensors(first)), _IDENTITY)

    restore_detector(second, load_checkpoint(tmp_path, _IDENTITY).detector)

    assert not any(name.startswith("backbone.") for name in detector_tensors(first))
    assert torch.equal(second.tied.weight, first.head.weight)
    assert not torch.equal(second.backbone.weight, first.backbone.weight)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop("head.bias"),
        lambda tensors: tensors.update(strange=torch.ones(1)),
        lambda tensors: tensors.update({"head.bias": torch.ones(7)}),
    ],
    ids=["missing", "unexpected", "another shape"],
)
def test_restore_detector_from_another_detector_is_refused(change):
    """Names and shapes must fit."""
    tensors = detector_tensors(_Tied())
    change(tensors)

    with pytest.raises(CheckpointRefused, match="does not fit the detector"):
        restore_detector(_Tied(), tensors)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_restore_optimiser_puts_back_what_was_kept(momentum):
    """Moments and counters come back, absent ones too."""
    parameters = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))]
    first = torch.optim.SGD(parameters, lr=0.1, momentum=momentum)
    parameters[0].grad, parameters[1].grad = torch.ones(3), torch.ones(2)
    first.step()
    second = torch.optim.SGD(parameters, lr=0.1, momentum=momentum)

    tensors, scalars = optimiser_state(first)
    restore_optimiser(second, TrainingState(0, 1, {}, tensors, scalars))

    assert str(second.state_dict()) == str(first.state_dict())


def test_weights_digest_depends_on_names_types_shapes_and_values_only():
    """Order and memory layout do not matter; anything else does."""
    weights = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(1)}
    same = {"b": torch.tensor(1), "a": torch.arange(6.0).reshape(2, 3).T.contiguous().T}
    others = [
        {"a": weights["a"], "c": weights["b"]},
        {"a": weights["a"].reshape(3, 2), "b": weights["b"]},
        {"a": weights["a"].to(torch.bfloat16), "b": weights["b"]},
        {"a": weights["a"] + 1, "b": weights["b"]},
    ]

    digests = {weights_digest(w) for w in (weights, *others)}

    assert weights_digest(same) == weights_digest(weights)
    assert len(digests) == 5
