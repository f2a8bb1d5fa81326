"""Ten strong changes that make a picture look foreign: sources of artificial defects, made from good frames.

The ten are those of Zavrtanik, Kristan, Skocaj, "DRAEM", ICCV 2021, arXiv:2108.07610, after which the published methods
change their photographs; written for tensors, so that no image library is needed.

Rules: every draw comes from the generator that was given (on the CPU), so a step can be repeated; an image is
`(3, H, W)` float32 in [0, 1] and stays so, on its own device.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

_LARGEST_HUE_TURN = 50 / 255 * 2 * math.pi
_LARGEST_TURN = math.pi / 4


def draw_uniform(low: float, high: float, generator: torch.Generator) -> float:
    """Draw one number of [low, high)."""
    return low + (high - low) * float(torch.rand((), generator=generator))


def augment_strongly(image: Tensor, generator: torch.Generator, count: int = 3) -> Tensor:
    """Apply `count` different changes, drawn from the ten, in the order of the draw.

    Args:
        image: `(3, H, W)` float32 in [0, 1].
        generator: of the choice and of every strength.
        count: how many, at most ten.

    Returns:
        An image of the same shape and range.
    """
    for drawn in torch.randperm(len(CHANGES), generator=generator)[:count].tolist():
        image = CHANGES[drawn](image, generator).clamp(0, 1)
    return image


def change_gamma(image: Tensor, generator: torch.Generator) -> Tensor:
    """Raise each channel to a power of its own, from 0.5 to 2."""
    return image ** torch.empty(3, 1, 1).uniform_(0.5, 2, generator=generator).to(image.device)


def change_brightness(image: Tensor, generator: torch.Generator) -> Tensor:
    """Multiply by 0.8 to 1.2 and shift by up to 30 grey values."""
    gain, shift = draw_uniform(0.8, 1.2, generator), draw_uniform(-30 / 255, 30 / 255, generator)
    return image * gain + shift


def change_sharpness(image: Tensor, generator: torch.Generator) -> Tensor:
    """Move away from the 3x3 mean, or toward it: by a factor from 0.1, nearly the mean, to 1.9."""
    blurred = functional.avg_pool2d(image[None], 3, stride=1, padding=1, count_include_pad=False)[0]
    return torch.lerp(blurred, image, draw_uniform(0.1, 1.9, generator))


def change_hue(image: Tensor, generator: torch.Generator) -> Tensor:
    """Turn hues by up to 50 of 255 steps of the circle, and make colours paler or stronger by up to a half."""
    turn = draw_uniform(-_LARGEST_HUE_TURN, _LARGEST_HUE_TURN, generator)
    strength = draw_uniform(0.5, 1.5, generator)
    grey = image.mean(dim=0, keepdim=True)
    colour = image - grey
    # Rodrigues' formula about the grey axis; colour has no part along it.
    across = (colour.roll(1, dims=0) - colour.roll(-1, dims=0)) / math.sqrt(3)
    return grey + strength * (math.cos(turn) * colour + math.sin(turn) * across)


def solarise(image: Tensor, generator: torch.Generator) -> Tensor:
    """Invert what is brighter than a value from 32 to 128."""
    threshold = draw_uniform(32 / 255, 128 / 255, generator)
    return torch.where(image >= threshold, 1 - image, image)


def posterise(image: Tensor, generator: torch.Generator) -> Tensor:
    """Keep 2, 4, 8 or 16 evenly spaced values."""
    steps: int = 2 ** int(torch.randint(1, 5, (), generator=generator)) - 1
    return (image * steps).round() / steps


def invert(image: Tensor, _: torch.Generator) -> Tensor:
    """Exchange dark and bright."""
    return 1 - image


def stretch_contrast(image: Tensor, _: torch.Generator) -> Tensor:
    """Stretch each channel to [0, 1]; one that is constant stays."""
    low, high = image.amin(dim=(1, 2), keepdim=True), image.amax(dim=(1, 2), keepdim=True)
    return torch.where(high > low, (image - low) / (high - low).clamp_min(1e-6), image)


def equalise(image: Tensor, _: torch.Generator) -> Tensor:
    """Give each pixel the share of its channel's pixels that are not brighter."""
    values = image.flatten(1).contiguous()
    ranks = torch.searchsorted(values.sort(dim=1).values, values, right=True)
    return (ranks.to(image.dtype) / values.shape[1]).reshape(image.shape)


def rotate(image: Tensor, generator: torch.Generator) -> Tensor:
    """Turn about the middle by up to 45 degrees; what comes in from outside is mirrored."""
    height, width = image.shape[1:]
    turn = draw_uniform(-_LARGEST_TURN, _LARGEST_TURN, generator)
    cosine, sine = math.cos(turn), math.sin(turn)
    matrix = torch.tensor([[[cosine, -sine * height / width, 0], [sine * width / height, cosine, 0]]])
    grid = functional.affine_grid(matrix.to(image), [1, 3, height, width], align_corners=False)
    return functional.grid_sample(image[None], grid, padding_mode="reflection", align_corners=False)[0]


CHANGES: tuple[Callable[[Tensor, torch.Generator], Tensor], ...] = (
    change_gamma,
    change_brightness,
    change_sharpness,
    change_hue,
    solarise,
    posterise,
    invert,
    stretch_contrast,
    equalise,
    rotate,
)
