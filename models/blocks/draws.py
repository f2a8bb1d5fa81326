"""All randomness of a training step in one generator, so that a resumed run equals an uninterrupted one."""

import torch


def generator_of_step(seed: int, step: int) -> torch.Generator:
    """Return a new generator on the CPU whose draws follow from the run's seed and the step alone."""
    return torch.Generator().manual_seed(seed * 2**32 + step)
