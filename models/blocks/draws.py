"""All randomness of a training step in one generator, so that a resumed run equals an uninterrupted one."""

import torch

from models.detector import Step

# torch's generator on the CPU looks at 32 bits of its seed: steps lie in the lower 24, shares in the upper 8, and seeds
# are far from each other. Counted from the default seed, whose draws the published figures were measured with.
_BITS = 2**32
_DEFAULT = 1
_SHARE = 2**24
_SEED = 0x9E3779B1  # 2^32 over the golden ratio, odd


def generator_of_step(seed: int, step: int) -> torch.Generator:
    """Return a new generator on the CPU whose draws follow from the run's seed, the step and its share alone."""
    share = step.share if isinstance(step, Step) else 0
    return torch.Generator().manual_seed(((seed - _DEFAULT) * _SEED + share * _SHARE + step) % _BITS)
