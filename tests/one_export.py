"""Lets all runs of the tests export equal networks once: the exporter takes seconds, and would give equal bytes again.

A network is equal where all that it is made of is equal to the byte: modules, settings, tensors; the processes of a run
of the tests share what they have exported. Who wants a run's own export says so first.
"""

import copy
import fcntl
import hashlib
import io
import pickle
from collections import OrderedDict
from dataclasses import is_dataclass
from typing import Any

import torch

import training.run
import training.zero_shot
from tests import run_folder
from training.bundling.export import export_graph

_kept: dict[str, bytes] = {}
_wanted_anew: set[str] = set()
_LARGEST_BYTES = 2**24  # larger ones are exported by one test each


def export_once(detector: Any) -> bytes:
    """Return what `export_graph` gives, from an earlier call with an equal network where there was one."""
    alike, everything = copy.deepcopy(detector), io.BytesIO()
    for module in alike.modules():
        # torch numbers hooks through the whole process.
        module._load_state_dict_post_hooks = OrderedDict(enumerate(module._load_state_dict_post_hooks.values()))
        vars(module).update({name: _by_value(value) for name, value in vars(module).items()})
    torch.save(alike, everything)
    if everything.tell() > _LARGEST_BYTES:
        return export_graph(detector)
    name = hashlib.sha256(everything.getbuffer()).hexdigest()
    if name in _wanted_anew:
        _wanted_anew.remove(name)
        _kept[name] = export_graph(detector)
    elif name not in _kept:
        _kept[name] = _export_for_all(detector, name)
    return _kept[name]


def _by_value(setting: Any) -> Any:
    """Return what tells a setting from others: neither the order of a set, nor which settings are one object."""
    if isinstance(setting, set):
        return pickle.dumps(sorted(setting))
    return pickle.dumps(setting) if is_dataclass(setting) or isinstance(setting, str | tuple) else setting


def _export_for_all(detector: Any, name: str) -> bytes:
    """Export, or take what another process has exported; wait where it is about to."""
    if run_folder.folder is None:
        return export_graph(detector)
    graph = run_folder.folder / f"{name}.onnx"
    with graph.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not graph.exists():
            graph.write_bytes(export_graph(detector))
    return graph.read_bytes()


def forget_exports() -> None:
    """Have the next runs export for themselves what this process knows."""
    _wanted_anew.update(_kept)
    _kept.clear()


training.run.export_graph = export_once
training.zero_shot.export_graph = export_once
