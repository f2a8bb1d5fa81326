r"""Record what the official SCL-VI (Jigsaw-SVDD) answers, for `test_jigsaw_svdd_official.py`.

    git clone https://github.com/wangpeng000/VisualInspection SOURCES/wangpeng000+VisualInspection    # at a593340
    .venv/bin/python -m tests.parity.record_jigsaw_svdd SOURCES

Its README shows an MIT badge, and there is no licence file. Nothing of that code is copied: it runs from its checkout,
and numbers alone are written. Tensors and images are filled from their names and the seed, so that none of them is
stored. Changed at run time is where it runs: `cuda()` stays on the CPU. Its encoder has one size, the published one.
"""

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import torch
from torch import Tensor

from tests.parity.official_code import RECORDED, checkout, declare_operators, fill_module
from tests.parity.recordings import draw

_SEED = 1
_STAND_INS = {"imageio": MagicMock(), "ngtpy": MagicMock()}
_SIDE = 256
_BATCH = 2
_STEPS = 2
_LAMBDA = 0.5  # large enough to be seen in the gradients
_GRID_SIDE = 80
_DRAWS = 20_000
_ENTRIES = 16


def main() -> None:
    """Write the one file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("sources", type=Path, help="folder of the checkout wangpeng000+VisualInspection")
    folder = parser.parse_args().sources.resolve() / "wangpeng000+VisualInspection"
    declare_operators()
    torch.Tensor.cuda = lambda self, *_, **__: self
    with checkout(folder, "codes", _STAND_INS):
        os.chdir(folder)  # the table of relations is read from there
        encoder, classifiers = _build()
        arrays = {
            **record_grids(encoder),
            **record_training(encoder, classifiers),
            **record_merging(),
            **record_spreading(),
            **record_chain(),
            **record_draws(),
            "table": np.load("data.npy"),
        }
    np.savez_compressed(RECORDED / "jigsaw_svdd.npz", **arrays)


def _build() -> tuple[Any, Mapping[int, Any]]:
    from codes import networks

    encoder = networks.MyJigsawPositionHierEncoder(64, 64)
    classifiers = {side: networks.MyJigsawPositionClassifier(side, 64) for side in (64, 32)}
    for prefix, module in (("enc", encoder), *((f"cls_{side}", one) for side, one in classifiers.items())):
        fill_module(module, _SEED, under=f"{prefix}.")
    return encoder, classifiers


def record_grids(encoder: Any) -> dict[str, np.ndarray]:
    """Embed all patches of an image as the official evaluation does."""
    from codes import inspection

    image = 0.2 * draw("grid", (1, _GRID_SIDE, _GRID_SIDE, 3), _SEED)
    return {
        "grid_32": inspection.infer(image, encoder.enc, K=32, S=8),
        "grid_64": inspection.infer(image, encoder, K=64, S=16),
    }


def record_training(encoder: Any, classifiers: Mapping[int, Any]) -> dict[str, np.ndarray]:
    """Run the official losses and optimiser over patches at recorded places, without noise."""
    from codes import datasets

    images = 0.2 * draw("images", (_BATCH, 3, _SIDE, _SIDE), _SEED)
    np.random.seed(_SEED)  # noqa: NPY002 - the state that the official code draws from
    table = np.load("data.npy")
    arrays: dict[str, Any] = {}
    patches: dict[int, Any] = {}
    for side in (64, 32):
        rows = table[np.random.randint(len(table), size=_BATCH)]  # noqa: NPY002 - as above
        drawn = [datasets.generate_coords_position_mine(_SIDE, _SIDE, side) for _ in range(_BATCH)]
        pairs = np.array([[places[row[0]], places[row[1]]] for places, row in zip(drawn, rows, strict=True)])
        close = np.array([datasets.generate_coords_svdd(_SIDE, _SIDE, side) for _ in range(_BATCH)])
        arrays |= {f"pairs_{side}": pairs, f"classes_{side}": rows[:, 2], f"close_{side}": close}
        first, second = (_cut(images, pairs[:, place], side) for place in (0, 1))
        patches[side] = (first, second, torch.from_numpy(rows[:, 2]))
        patches[-side] = tuple(_cut(images, close[:, place], side) for place in (0, 1))

    modules = {"enc": encoder, "cls_64": classifiers[64], "cls_32": classifiers[32]}
    named = {f"{prefix}.{key}": value for prefix, module in modules.items() for key, value in module.named_parameters()}
    optimiser = torch.optim.Adam(params=list(named.values()), lr=1e-4)
    trace = []
    for step in range(_STEPS):
        optimiser.zero_grad()
        relation = {
            64: classifiers[64].infer(classifiers[64], encoder, patches[64]),
            32: classifiers[32].infer(classifiers[32], encoder.enc, patches[32]),
        }
        compact = {
            64: datasets.SVDD_Dataset.infer(encoder, patches[-64]),
            32: datasets.SVDD_Dataset.infer(encoder.enc, patches[-32]),
        }
        loss = relation[64] + relation[32] + _LAMBDA * (compact[64] + compact[32])
        loss.backward()
        if step == 0:
            arrays["learnt"] = np.array(sorted(key for key, value in named.items() if value.grad is not None))
            arrays |= {f"gradnorm__{key}": named[key].grad.norm() for key in arrays["learnt"]}
        optimiser.step()
        trace.append([value.item() for value in (loss, relation[64], relation[32], compact[64], compact[32])])
    arrays["trace"] = np.array(trace)
    arrays |= {f"after__{key}": value.detach().flatten()[:_ENTRIES] for key, value in named.items()}
    return {name: np.asarray(value) for name, value in arrays.items()}


def _cut(images: np.ndarray, corners: np.ndarray, side: int) -> Tensor:
    from codes.utils import crop_image_CHW

    return torch.from_numpy(
        np.stack([crop_image_CHW(image, corner, side) for image, corner in zip(images, corners, strict=True)])
    )


def record_merging() -> dict[str, np.ndarray]:
    """Merge distances to neighbours: ordinary ones, and such as the official bounds decide."""
    from codes.inspection import weights_e_alpha

    ordinary = np.sort(np.abs(draw("distances", (1, 4, 8, 5), _SEED)) + np.float32(0.4), axis=-1)
    one = np.abs(draw("one", (1, 2, 4, 1), _SEED)) + np.float32(0.1)
    close = np.array([[[[0.0, 0.5, 0.6, 0.7, 0.8], [0.0476, 0.0526, 0.3, 0.3, 0.3]]]], dtype=np.float32)
    return {
        "merged": weights_e_alpha(ordinary),
        "merged_one": weights_e_alpha(one),
        "merged_close": weights_e_alpha(close),
    }


def record_spreading() -> dict[str, np.ndarray]:
    """Spread scores of patches over the pixels below them."""
    from codes.utils import distribute_scores

    small, large = (np.abs(draw(name, shape, _SEED)) for name, shape in (("s32", (1, 57, 57)), ("s64", (1, 13, 13))))
    return {
        "spread_32": distribute_scores(small, (_SIDE, _SIDE), K=32, S=4)[:, ::5, ::5],
        "spread_64": distribute_scores(large, (_SIDE, _SIDE), K=64, S=16)[:, ::5, ::5],
    }


def record_chain() -> dict[str, np.ndarray]:
    """Find neighbours, merge, spread, multiply and score, from embeddings on."""
    from codes.inspection import measure_emb_NN
    from codes.utils import distribute_scores

    maps = []
    for side, stride, count in ((64, 16, 13), (32, 4, 57)):
        queries = draw(f"queries_{side}", (1, count, count, 8), _SEED)
        bank = draw(f"bank_{side}", (1, 8, 8, 8), _SEED)
        # The graph index of the small patches is approximate and absent; the exact tree is the code's other choice.
        scores = measure_emb_NN(queries, bank, method="kdt", NN=5)
        maps.append(distribute_scores(scores, (_SIDE, _SIDE), K=side, S=stride))
    product = maps[0] * maps[1]
    return {"chain_map": product[:, ::5, ::5], "chain_score": product.max(axis=-1).max(axis=-1)}


def record_draws() -> dict[str, np.ndarray]:
    """Count how far pieces and neighbours lie from their centre, where nothing is clipped."""
    from codes import datasets

    arrays = {}
    for side in (32, 64):
        inside = range(side - 1, _SIDE - 2 * side + 2)
        moves, close, drawn = [], [], []
        for _ in range(_DRAWS):
            *pieces, centre = datasets.generate_coords_position_mine(_SIDE, _SIDE, side)
            drawn.append(centre)
            if centre[0] in inside and centre[1] in inside:
                moves.append(np.subtract(pieces, centre))
            first, second = datasets.generate_coords_svdd(_SIDE, _SIDE, side)
            if all(2 <= place <= _SIDE - side - 2 for place in first):
                close.append(np.subtract(second, first))
        steps, counts = np.unique(np.abs(np.stack(moves)[:, [0, 1, 2, 3, 5, 6, 7, 8]]), return_counts=True)
        arrays |= {f"steps_{side}": steps, f"steps_{side}_count": counts}
        arrays[f"moved_{side}"] = np.stack(moves)[:16]
        jumps, counts = np.unique(np.stack(close), axis=0, return_counts=True)
        arrays |= {f"close_steps_{side}": jumps, f"close_steps_{side}_count": counts}
    return arrays


if __name__ == "__main__":
    main()
