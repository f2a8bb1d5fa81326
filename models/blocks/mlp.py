"""The two-layer perceptron of transformer blocks."""

from torch import Tensor, nn
from torch.nn import functional


class Mlp(nn.Module):
    """C to ratio x C to C, with GELU between; no dropout, no residual.

    Args:
        channels: C.
        ratio: width of the hidden layer over C.
    """

    def __init__(self, channels: int, ratio: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, ratio * channels)
        self.fc2 = nn.Linear(ratio * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Transform the last axis of `(..., C)`."""
        result: Tensor = self.fc2(functional.gelu(self.fc1(x)))
        return result
