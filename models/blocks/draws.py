"""All randomness of a training step in one generator, so that a resumed run equals an uninterrupted one."""

import torch

from models.detector import Step

# Below it lies the step, so that no draw is made twice in a run.
_SHARE = 2**24


def generator_of_step(seed: int, step: int) -> torch.Generator:
    """Return a new generator on the CPU whose draws follow from the run's seed, the step and its share alone."""
    share = step.share if isinstance(step, Step) else 0
    return torch.Generator().manual_seed(seed * 2**32 + share * _SHARE + step)
