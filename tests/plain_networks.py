"""Parts of networks written out in NumPy and float64, for tests that recompute a detector by its formulas.

Only weights are taken from torch's modules, never what a module computes. Rows are `(N, C)`, grids `(h, w)`.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import erf
from torch import Tensor, nn

Array = NDArray[np.float64]


def array_of(tensor: Tensor) -> Array:
    """Return a tensor's values in float64."""
    values: Array = tensor.detach().double().numpy()
    return values


def shake(parameters: Sequence[nn.Parameter], deviation: float = 0.2) -> None:
    """Move weights away from where they begin, as fitting would: no bias is 0 and no scale 1 any more."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(deviation * torch.randn(parameter.shape, generator=generator))


def cosine(first: Array, second: Array) -> float:
    """Return the cosine of two vectors."""
    return float(first @ second / np.sqrt((first @ first) * (second @ second)))


def linear(rows: Array, layer: nn.Linear) -> Array:
    """Multiply rows with a layer's weights and add its bias."""
    return rows @ array_of(layer.weight).T + array_of(layer.bias)


def normalise(rows: Array, norm: nn.LayerNorm) -> Array:
    """Give each row mean 0 and variance 1, then the norm's own scale and shift."""
    centred = rows - rows.mean(axis=1, keepdims=True)
    spread = np.sqrt((centred**2).mean(axis=1, keepdims=True) + norm.eps)
    return centred / spread * array_of(norm.weight) + array_of(norm.bias)


def perceptron(rows: Array, first: nn.Linear, second: nn.Linear) -> Array:
    """Two layers with the exact GELU between them."""
    hidden = linear(rows, first)
    return linear(hidden * 0.5 * (1 + erf(hidden / np.sqrt(2))), second)


def attend(queries: Array, keys: Array, values: Array, heads: int) -> Array:
    """Read values by softmax attention, head by head: each has its own run of channels."""
    read = []
    for q, k, v in zip(*(np.split(rows, heads, axis=1) for rows in (queries, keys, values)), strict=True):
        shares = np.exp(q @ k.T / np.sqrt(q.shape[1]))
        read.append(shares / shares.sum(axis=1, keepdims=True) @ v)
    return np.concatenate(read, axis=1)


def embed(grid: Array, kernel: Array, bias: Array) -> Array:
    """Multiply each square patch of a map `(C, h, w)` with kernels `(D, C, k, k)`, row by row: `(N, D)`."""
    patch = kernel.shape[2]
    _, height, width = grid.shape
    cuts = [
        grid[:, row : row + patch, column : column + patch].ravel()
        for row in range(0, height, patch)
        for column in range(0, width, patch)
    ]
    return np.array(cuts) @ kernel.reshape(len(bias), -1).T + bias


def place(rows: Array, grid: tuple[int, int], patch: int) -> Array:
    """Put rows `(N, k k C)` back to a map `(C, h, w)`; in each the channel is fastest, then the column."""
    channels = rows.shape[1] // patch**2
    placed = np.empty((channels, grid[0] * patch, grid[1] * patch))
    for token, row in enumerate(rows):
        top, left = token // grid[1] * patch, token % grid[1] * patch
        placed[:, top : top + patch, left : left + patch] = row.reshape(patch, patch, channels).transpose(2, 0, 1)
    return placed


def positions(grid: tuple[int, int], channels: int) -> Array:
    """Return sine-cosine positions, row by row: column first, then row; sines first, then cosines."""
    quarter = channels // 4
    rows = []
    for row in range(grid[0]):
        for column in range(grid[1]):
            angles = [[place / 10000 ** (j / quarter) for j in range(quarter)] for place in (column, row)]
            rows.append(np.concatenate([wave(angle) for angle in angles for wave in (np.sin, np.cos)]))
    return np.array(rows)


def cosine_distances(first: Array, second: Array) -> Array:
    """Return 1 - cosine of two maps `(C, h, w)` at each place: `(h, w)`."""
    apart = np.empty(first.shape[1:])
    for row, column in np.ndindex(*apart.shape):
        apart[row, column] = 1 - cosine(first[:, row, column], second[:, row, column])
    return apart


def resize(grids: Array, size: tuple[int, int], *, align_corners: bool) -> Array:
    """Resize grids `(..., h, w)` bilinearly, along one axis and then along the other."""
    for axis, new in ((-2, size[0]), (-1, size[1])):
        old = grids.shape[axis]
        places = np.linspace(0, old - 1, new) if align_corners else (np.arange(new) + 0.5) * old / new - 0.5
        shares = np.array([np.interp(places, np.arange(old), one) for one in np.eye(old)])
        grids = np.moveaxis(np.tensordot(grids, shares, axes=(axis, 0)), -1, axis)
    return grids


def top_mean(grid: Array, fraction: float) -> float:
    """Return the mean of a grid's largest values, their number rounded down."""
    return float(np.sort(grid.ravel())[-int(fraction * grid.size) :].mean())
