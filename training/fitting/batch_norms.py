"""What batch norms learn where a batch comes in shares, one after the other or in several processes."""

import torch
from torch import Tensor, nn

from training.fitting.checkpoint import is_backbone


class RunningStatistics:
    """What batch norms learn from the shares of one batch: the mean of what each share alone would have made of them.

    Args:
        detector: its frozen backbone learns nothing.
    """

    def __init__(self, detector: nn.Module) -> None:
        own = [
            module
            for name, module in detector.named_modules()
            if isinstance(module, nn.modules.batchnorm._NormBase) and not is_backbone(name)  # noqa: SLF001  (no other name)
        ]
        self._kept = [
            kept for module in own for kept in (module.running_mean, module.running_var) if isinstance(kept, Tensor)
        ]
        self._counters = [
            module.num_batches_tracked for module in own if isinstance(module.num_batches_tracked, Tensor)
        ]
        self._before, self._counted = ([one.clone() for one in ones] for ones in (self._kept, self._counters))
        # Differences, so that what no share changed stays as it is, to the bit.
        self.learnt = [torch.zeros_like(kept) for kept in self._kept]
        self._batches: list[Tensor] = []

    @torch.no_grad()
    def learn(self, weight: float) -> None:
        """Note what one share, of so much weight, has changed, and put it back."""
        for kept, before, learnt in zip(self._kept, self._before, self.learnt, strict=True):
            learnt.add_(kept - before, alpha=weight)
            kept.copy_(before)
        # A batch counts once, in however many shares it comes.
        self._batches = [now.clone() for now in self._counters]
        for counter, counted in zip(self._counters, self._counted, strict=True):
            counter.copy_(counted)

    @torch.no_grad()
    def apply(self) -> None:
        """Change the batch norms by what all shares have learnt."""
        for kept, learnt in zip(self._kept, self.learnt, strict=True):
            kept.add_(learnt)
        for counter, batches in zip(self._counters, self._batches, strict=True):
            counter.copy_(batches)
