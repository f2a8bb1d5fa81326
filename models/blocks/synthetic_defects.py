"""Artificial defects for detectors that learn to tell them: a tensor and a generator in, a tensor and a mask out.

Masks are thresholded Perlin noise, sources are textures that follow from a generator or the scrambled frame itself, as
in Zavrtanik, Kristan, Skocaj, "DRAEM", ICCV 2021, arXiv:2108.07610; defects that people marked can be pasted too. The
photographs of the published methods (DTD, ImageNet) can't be shipped with a product, so none is needed.

Rules: every draw comes from the generator that was given (on the CPU), so a step can be repeated; images are
`(B, 3, H, W)` float32 in [0, 1], masks `(B, H, W)` float32 of 0 and 1, height before width; results lie where the
images do.
"""

import math

import torch
from torch import Tensor

from models.blocks.augmentations import augment_strongly, draw_uniform

_OCTAVES = 4
_TILES = 8
_TRIES = 64  # a thresholded draw of noise is empty about one time in twenty


def perlin_noise(size: tuple[int, int], cells: tuple[int, int], generator: torch.Generator, turn: float = 0) -> Tensor:
    """Draw smooth gradient noise of about [-1, 1], `(H, W)` float32.

    Args:
        size: `(H, W)`.
        cells: cells of the gradient lattice along height and width; more cells, finer noise.
        generator: of the gradients.
        turn: angle in radians by which the lattice is turned about the middle.
    """
    height, width = size
    rows, columns = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    rows, columns = rows - height / 2, columns - width / 2
    down = ((math.cos(turn) * rows - math.sin(turn) * columns) / height + 0.5) * cells[0]
    right = ((math.sin(turn) * rows + math.cos(turn) * columns) / width + 0.5) * cells[1]
    down, right = down - down.min().floor(), right - right.min().floor()
    lattice = (int(down.max()) + 2, int(right.max()) + 2)
    angles = 2 * math.pi * torch.rand(lattice, generator=generator)
    gradients_y, gradients_x = angles.sin(), angles.cos()
    row, column = down.long(), right.long()
    cell, y, x = row * lattice[1] + column, down - row, right - column

    def reach(below: int, beside: int) -> Tensor:
        """Multiply the gradient of one corner of each cell with the way from there."""
        corner = cell + (below * lattice[1] + beside)
        return gradients_y.take(corner) * (y - below) + gradients_x.take(corner) * (x - beside)

    fade_y, fade_x = (way**3 * (way * (6 * way - 15) + 10) for way in (y, x))
    upper = torch.lerp(reach(0, 0), reach(0, 1), fade_x)
    lower = torch.lerp(reach(1, 0), reach(1, 1), fade_x)
    return math.sqrt(2) * torch.lerp(upper, lower, fade_y)


def draw_perlin_mask(
    size: tuple[int, int],
    generator: torch.Generator,
    *,
    largest_exponent: int = 5,
    threshold: float = 0.5,
    area: tuple[float, float] = (0.0, 1.0),
    may_be_empty: bool = False,
) -> Tensor:
    """Draw the area of a defect, `(H, W)` of 0 and 1.

    The cells along each axis are 2 to the power of 0 to `largest_exponent`, the lattice is turned by up to 90 degrees.

    Args:
        size: `(H, W)`.
        generator: of everything.
        largest_exponent: of the finest noise.
        threshold: of the noise; higher values give smaller areas.
        area: smallest and largest share of the image; a draw outside of them is repeated.
        may_be_empty: keep a draw without any area, which is no defect, as it comes: about one in twenty.

    Raises:
        ValueError: if the noise never passes the threshold, or never gives such an area.
    """
    for _ in range(_TRIES):
        exponents = torch.randint(0, largest_exponent + 1, (2,), generator=generator).tolist()
        turn = draw_uniform(-math.pi / 2, math.pi / 2, generator)
        noise = perlin_noise(size, (2 ** exponents[0], 2 ** exponents[1]), generator, turn)
        mask = (noise > threshold).to(torch.float32)
        share = float(mask.mean())
        if (share == 0 and may_be_empty) or (share > 0 and area[0] <= share <= area[1]):
            return mask
    raise ValueError(f"noise never passes the threshold {threshold} on a share of {area[0]:g} to {area[1]:g}")


def draw_texture(size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Draw a texture of two colours, cloudy or wavily striped, with grain: `(3, H, W)` float32 in [0, 1]."""
    turn = draw_uniform(-math.pi / 2, math.pi / 2, generator)
    start = int(torch.randint(0, 4, (), generator=generator))
    field = torch.zeros(size)
    for octave in range(_OCTAVES):
        cells = 2 ** (start + octave)
        field += perlin_noise(size, (cells, cells), generator, turn) / 2**octave
    if torch.rand((), generator=generator) < 0.5:
        period = draw_uniform(0.02, 0.2, generator) * min(size)
        rows, columns = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
        way = (math.cos(turn) * rows + math.sin(turn) * columns) / period
        field = torch.sin(2 * math.pi * way + 2 * field)
    share = torch.sigmoid(draw_uniform(1, 8, generator) * field)
    first, second = torch.rand(2, 3, 1, 1, generator=generator)
    grain = draw_uniform(0, 0.1, generator) * torch.randn(3, *size, generator=generator)
    return (torch.lerp(first, second, share) + grain).clamp(0, 1)


def shuffle_tiles(image: Tensor, generator: torch.Generator, tiles: int = _TILES) -> Tensor:
    """Put the tiles of an image `(3, H, W)` in random order; a rest that fills no tile stays where it is."""
    height, width = image.shape[1] // tiles, image.shape[2] // tiles
    inner = image[:, : height * tiles, : width * tiles]
    cut = inner.reshape(3, tiles, height, tiles, width).permute(1, 3, 0, 2, 4).flatten(0, 1)
    order = torch.randperm(tiles * tiles, generator=generator).to(image.device)
    mixed = cut[order].reshape(tiles, tiles, 3, height, width).permute(2, 0, 3, 1, 4)
    result = image.clone()
    result[:, : height * tiles, : width * tiles] = mixed.reshape(3, height * tiles, width * tiles)
    return result


def jitter_colours(image: Tensor, generator: torch.Generator) -> Tensor:
    """Change gamma, brightness and the balance of colours of an image `(3, H, W)` in [0, 1]."""
    gamma = torch.empty(3, 1, 1).uniform_(0.5, 2, generator=generator)
    gain = torch.empty(3, 1, 1).uniform_(0.8, 1.2, generator=generator)
    shift = draw_uniform(-0.12, 0.12, generator)
    return (image ** gamma.to(image.device) * gain.to(image.device) + shift).clamp(0, 1)


def plant_textures(
    images: Tensor, generator: torch.Generator, opacity: tuple[float, float] = (0.2, 1.0)
) -> tuple[Tensor, Tensor]:
    """Blend a foreign texture into an area of each image.

    Args:
        images: `(B, 3, H, W)` float32 in [0, 1].
        generator: of everything.
        opacity: range from which the share of the texture is drawn; DRAEM keeps up to 0.8 of the image.

    Returns:
        Images of the same shape, and the areas `(B, H, W)` of 0 and 1, none of them empty.
    """
    size = (images.shape[2], images.shape[3])
    planted, masks = [], []
    for image in images:
        mask = draw_perlin_mask(size, generator).to(image.device)
        if torch.rand((), generator=generator) < 0.5:
            source = draw_texture(size, generator).to(image.device)
        else:
            source = jitter_colours(shuffle_tiles(image, generator), generator)
        source = _as_grey_as(image, source)
        planted.append(torch.lerp(image, source, mask * draw_uniform(*opacity, generator)))
        masks.append(mask)
    return torch.stack(planted), torch.stack(masks)


def plant_foreign_pictures(
    images: Tensor,
    generator: torch.Generator,
    *,
    area: tuple[float, float] = (0.001, 0.4),
    opacity: tuple[float, float] = (1.0, 1.0),
) -> tuple[Tensor, Tensor]:
    """Put a foreign picture into an area of each image: a texture, or a good frame that is changed beyond recognition.

    Sources are, in equal parts, a drawn texture, the image itself, strongly changed and shuffled tile by tile, and
    another image of the batch, strongly changed.

    Args:
        images: `(B, 3, H, W)` float32 in [0, 1].
        generator: of everything.
        area: smallest and largest share of the image that a defect has.
        opacity: range from which the share of the picture is drawn; 1 covers what was there.

    Returns:
        Images of the same shape, and the areas `(B, H, W)` of 0 and 1. About one in twenty is empty: that image stays.
    """
    size = (images.shape[2], images.shape[3])
    planted, masks = [], []
    for index, image in enumerate(images):
        mask = draw_perlin_mask(size, generator, area=area, may_be_empty=True).to(image.device)
        kind = int(torch.randint(3, (), generator=generator))
        if kind == 0:
            source = draw_texture(size, generator).to(image.device)
        elif kind == 1:
            source = shuffle_tiles(augment_strongly(image, generator), generator)
        else:
            other = int(torch.randint(1, max(2, len(images)), (), generator=generator))
            source = augment_strongly(images[(index + other) % len(images)], generator)
        share = draw_uniform(*opacity, generator)
        planted.append(torch.lerp(image, _as_grey_as(image, source), mask * share))
        masks.append(mask)
    return torch.stack(planted), torch.stack(masks)


def paste_defects(
    images: Tensor, donors: Tensor, donor_masks: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Paste real defects, mirrored, moved and recoloured at random, on other images.

    Args:
        images: `(B, 3, H, W)` float32 in [0, 1].
        donors: `(n, 3, H, W)`, frames with a defect.
        donor_masks: `(n, H, W)` of 0 and 1, where it is; none empty.
        generator: of everything.

    Returns:
        Images of the same shape, and the areas `(B, H, W)` of 0 and 1, none of them empty.
    """
    pasted, masks = [], []
    for image in images:
        drawn = int(torch.randint(0, len(donors), (), generator=generator))
        donor, mask = _as_grey_as(image, jitter_colours(donors[drawn], generator)), donor_masks[drawn]
        for axis in (-2, -1):
            if torch.rand((), generator=generator) < 0.5:
                donor, mask = donor.flip(axis), mask.flip(axis)
            places = mask.amax(dim=-3 - axis).nonzero()  # rows or columns that the defect touches
            first, last = int(places.min()), int(places.max())
            move = int(torch.randint(-first, mask.shape[axis] - last, (), generator=generator))
            donor, mask = donor.roll(move, axis), mask.roll(move, axis)
        pasted.append(torch.where(mask > 0, donor, image))
        masks.append(mask)
    return torch.stack(pasted), torch.stack(masks)


def _as_grey_as(image: Tensor, source: Tensor) -> Tensor:
    """Take the colours from a source if the image has none: colour alone would give a planted defect away."""
    return source.mean(dim=0, keepdim=True).expand_as(source) if bool((image == image[:1]).all()) else source
