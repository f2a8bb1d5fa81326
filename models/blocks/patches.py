"""Feature maps as rows of square patches, and back."""

from torch import Tensor


def patchify(features: Tensor, patch: int) -> Tensor:
    """Cut `(B, C, h, w)` into `(B, N, k k C)`: row in patch, column in patch, channel (fastest)."""
    batch, channels, height, width = features.shape
    x = features.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, patch * patch * channels)


def unpatchify(patches: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """Put `(B, N, k k C)` back together to `(B, C, h, w)`; `grid` is in patches, height first."""
    rows, columns = grid
    x = patches.reshape(-1, rows, columns, patch, patch, patches.shape[2] // patch**2)
    x = x.permute(0, 5, 1, 3, 2, 4)  # (B, C, rows, k, columns, k)
    return x.flatten(4, 5).flatten(2, 3)
