"""What ST-MAE's transition is worth: the same network, beside one whose codes stay where they are.

Without the exchange of the two halves each place is rebuilt from its own code: a plain auto-encoder of features, of the
same size, backbone and recipe. Everything else, and the table, is `planted_defects.py`'s, whose options this takes.

    .venv/bin/python tests/benchmarks/st_mae_transition.py ../shared/data/magnetic_tile --detector st_mae
    .venv/bin/python tests/benchmarks/planted_defects.py ../shared/data/magnetic_tile --detector st_mae
"""

import sys
from pathlib import Path

from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from models.st_mae import StMae, _join_halves, _part_halves, _pick
from tests.benchmarks import planted_defects


def _rebuild_in_place(self: StMae, patches: Tensor, order: Tensor, raster: Tensor) -> Tensor:
    """Return what `StMae._rebuild` would, were the codes of the two halves not exchanged."""
    tokens = self.patch_norm(self.patch_embedding(patches)) + self.positions
    codes = _join_halves(self.encoder(_part_halves(_pick(tokens, order))))
    placed = self.decoder_embedding(codes) + self.decoder_positions[order]
    rebuilt: Tensor = self.prediction(_pick(self.decoder(placed), raster))
    return rebuilt


if __name__ == "__main__":
    StMae._rebuild = _rebuild_in_place  # type: ignore[method-assign]  # a copy of the whole detector would hide one line
    planted_defects.main()
