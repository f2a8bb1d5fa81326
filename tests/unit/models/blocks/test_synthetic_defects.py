"""Artificial defects: what is drawn, where it may lie, and that every draw can be repeated."""

import math

import pytest
import torch

from models.blocks.synthetic_defects import (
    draw_perlin_mask,
    draw_texture,
    jitter_colours,
    paste_defects,
    perlin_noise,
    plant_foreign_pictures,
    plant_textures,
    shuffle_tiles,
)

_SIZE = (48, 64)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_noise_at_lattice_points_is_zero():
    """Gradient noise vanishes at its lattice and nowhere exceeds one by much; here the corners and the middle."""
    noise = perlin_noise((64, 128), (2, 2), _generator())

    lattice = noise[[0, 0, 31, -1, -1]][:, [0, 63, -1]]
    assert noise.shape == (64, 128)
    assert lattice.abs().max() < 0.1
    assert 0.3 < noise.abs().max() <= 1.1


def test_noise_when_cells_grow_then_it_is_finer():
    """More cells change more from pixel to pixel."""
    steps = [perlin_noise((64, 64), (cells, cells), _generator()).diff(dim=1).abs().mean() for cells in (1, 4, 16)]

    assert steps[0] < steps[1] < steps[2]


def test_noise_when_turned_by_a_right_angle_then_axes_change_places():
    """Coarse along height and fine along width becomes the reverse."""
    straight = perlin_noise((64, 64), (1, 16), _generator())
    turned = perlin_noise((64, 64), (1, 16), _generator(), turn=torch.pi / 2)

    assert straight.diff(dim=1).abs().mean() > 2 * straight.diff(dim=0).abs().mean()
    assert turned.diff(dim=0).abs().mean() > 2 * turned.diff(dim=1).abs().mean()


def test_masks_are_binary_and_never_empty():
    """Fifty draws in a row hold zeros and ones, and some of each."""
    generator = _generator()
    masks = torch.stack([draw_perlin_mask(_SIZE, generator) for _ in range(50)])

    assert set(masks.unique().tolist()) == {0.0, 1.0}
    assert masks.amax(dim=(1, 2)).min() == 1
    assert 0.01 < masks.mean() < 0.4


def test_mask_when_drawn_then_is_noise_above_its_threshold_on_a_turned_lattice():
    """Cells are a power of two along each axis, by itself, and the lattice is turned by up to 90 degrees."""
    mask = draw_perlin_mask(_SIZE, _generator(3))

    generator = _generator(3)
    rows, columns = 2 ** torch.randint(0, 6, (2,), generator=generator)
    turn = math.pi * (float(torch.rand((), generator=generator)) - 0.5)
    noise = perlin_noise(_SIZE, (int(rows), int(columns)), generator, turn)
    assert torch.equal(mask, (noise > 0.5).float())


def test_mask_when_the_threshold_is_out_of_reach_then_refuses():
    """An impossible setting ends, rather than trying for ever."""
    with pytest.raises(ValueError, match="threshold 2"):
        draw_perlin_mask(_SIZE, _generator(), threshold=2)


def test_mask_when_an_area_is_asked_for_then_all_others_are_drawn_again():
    """Neither specks nor areas that leave hardly any frame are kept; empty ones only where they are wanted."""
    generator = _generator()
    masks = [draw_perlin_mask(_SIZE, generator, area=(0.05, 0.2), may_be_empty=True) for _ in range(60)]

    shares = [float(mask.mean()) for mask in masks]
    assert all(share == 0 or 0.05 <= share <= 0.2 for share in shares)
    assert 3 <= shares.count(0) <= 10


def test_mask_when_no_draw_has_the_area_then_refuses():
    """An area that noise never has ends with a sentence."""
    with pytest.raises(ValueError, match=r"share of 0\.99 to 1"):
        draw_perlin_mask(_SIZE, _generator(), area=(0.99, 1.0))


def test_foreign_pictures_when_opaque_replace_their_area_and_nothing_else():
    """Outside of the mask every pixel is kept to the last bit; an empty mask leaves the image as it is."""
    images = torch.rand(24, 3, *_SIZE, generator=_generator())

    planted, masks = plant_foreign_pictures(images, _generator(1))

    changed = (planted != images).any(dim=1)
    empty = ~masks.flatten(1).any(dim=1)
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    assert not changed[masks == 0].any()
    assert changed[masks == 1].float().mean() > 0.9
    assert 1 <= empty.sum() <= 4
    assert torch.equal(planted[empty], images[empty])
    assert planted.min() >= 0
    assert planted.max() <= 1


def test_foreign_pictures_when_a_frame_is_flat_then_some_of_its_defects_come_from_the_frame_beside_it():
    """Drawn textures have soft grain and a flat frame gives none; only the other frame is as rough as this."""
    flat, rough = torch.full((3, *_SIZE), 0.5), torch.rand(1, *_SIZE, generator=_generator()).round().expand(3, -1, -1)
    images = torch.stack((flat, rough + torch.tensor([0.0, -1e-3, 1e-3])[:, None, None])).clamp(0, 1)

    rough_ones = 0
    for seed in range(30):
        planted, masks = plant_foreign_pictures(images, _generator(seed))
        beside = planted[0].diff(dim=2).abs()[:, masks[0, :, 1:] * masks[0, :, :-1] > 0]
        rough_ones += bool(beside.numel()) and bool(beside.mean() > 0.3)

    assert 3 <= rough_ones <= 15


@pytest.mark.parametrize("count", [1, 3])
def test_foreign_pictures_when_the_generator_is_the_same_then_are_the_same(count):
    """A step can be repeated, also where a frame has no other one beside it."""
    images = torch.rand(count, 3, *_SIZE, generator=_generator())

    first, _ = plant_foreign_pictures(images, _generator(3))
    torch.rand(1)
    again, _ = plant_foreign_pictures(images, _generator(3))

    assert torch.equal(first, again)


def test_foreign_pictures_when_transparent_then_the_image_shows_through():
    """At an opacity of a tenth no pixel moves by more than that."""
    images = torch.rand(8, 3, *_SIZE, generator=_generator())

    planted, _ = plant_foreign_pictures(images, _generator(1), opacity=(0.1, 0.1))

    assert 0.05 < (planted - images).abs().max() <= 0.1 + 1e-6


def test_textures_are_colours_in_range_and_differ():
    """Textures are images in [0, 1] with something to see, and no two are alike."""
    generator = _generator()
    textures = torch.stack([draw_texture(_SIZE, generator) for _ in range(8)])

    assert textures.shape == (8, 3, *_SIZE)
    assert textures.min() >= 0
    assert textures.max() <= 1
    assert (textures.std(dim=(2, 3)).amax(dim=1) > 0.02).all()
    assert (textures[:-1] - textures[1:]).abs().mean(dim=(1, 2, 3)).min() > 0.02


def test_shuffled_tiles_are_the_same_pixels_in_another_order():
    """Nothing is lost or invented, and a rest that fills no tile stays."""
    image = torch.rand(3, 19, 17, generator=_generator())

    shuffled = shuffle_tiles(image, _generator(1), tiles=4)

    assert not torch.equal(shuffled, image)
    torch.testing.assert_close(shuffled.flatten(1).sort().values, image.flatten(1).sort().values)
    assert torch.equal(shuffled[:, 16:], image[:, 16:])


def test_jittered_colours_stay_in_range():
    """White stays below one and black above zero."""
    image = torch.stack([torch.zeros(3, 4), torch.ones(3, 4)], dim=1)

    jittered = jitter_colours(image, _generator())

    assert jittered.min() >= 0
    assert jittered.max() <= 1


def test_planted_images_change_inside_their_masks_only():
    """Outside the mask every pixel is kept; inside most are changed; the values stay in [0, 1]."""
    images = torch.rand(6, 3, *_SIZE, generator=_generator())

    planted, masks = plant_textures(images, _generator(1))

    changed = (planted != images).any(dim=1)
    assert masks.shape == (6, *_SIZE)
    assert not changed[masks == 0].any()
    assert changed[masks == 1].float().mean() > 0.9
    assert planted.min() >= 0
    assert planted.max() <= 1


def test_planted_textures_when_opacity_is_a_range_then_each_shows_a_share_of_its_own():
    """One share holds all over a defect, and shares cover the range: faint defects are learnt beside clear ones."""
    images = torch.rand(12, 3, *_SIZE, generator=_generator())

    planted, masks = plant_textures(images, _generator(1), (0.2, 1.0))
    covered, _ = plant_textures(images, _generator(1), (1.0, 1.0))

    shares = []
    for image, mixed, whole, mask in zip(images, planted, covered, masks, strict=True):
        moved = (whole - image)[:, mask == 1]
        shares.append(float(((mixed - image)[:, mask == 1] * moved).sum() / moved.square().sum()))
        torch.testing.assert_close(mixed, image + shares[-1] * mask * (whole - image), rtol=0, atol=1e-5)
    assert all(0.2 <= share <= 1 for share in shares)
    assert min(shares) < 0.4
    assert max(shares) > 0.8


def test_planted_images_when_the_generator_is_the_same_then_are_the_same():
    """A step can be repeated, whatever was drawn before from torch's own generator."""
    images = torch.rand(2, 3, *_SIZE, generator=_generator())

    first, _ = plant_textures(images, _generator(3))
    torch.rand(1)
    again, _ = plant_textures(images, _generator(3))
    other, _ = plant_textures(images, _generator(4))

    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_planted_images_when_grey_then_stay_grey():
    """A grey line never shows colour, so colour must not be what tells a planted defect."""
    images = torch.rand(6, 1, *_SIZE, generator=_generator()).expand(-1, 3, -1, -1)
    donor_masks = torch.ones(1, *_SIZE)

    planted, _ = plant_textures(images, _generator(1))
    foreign, _ = plant_foreign_pictures(images, _generator(1))
    pasted, _ = paste_defects(images, torch.rand(1, 3, *_SIZE, generator=_generator(2)), donor_masks, _generator(3))

    for grey in (planted, foreign, pasted):
        torch.testing.assert_close(grey, grey[:, :1].expand_as(grey))


def test_pasted_defects_keep_their_area_and_lie_inside_the_image():
    """A defect is moved and mirrored as a whole: its pixel count stays, none is wrapped around the border."""
    images = torch.zeros(8, 3, *_SIZE)
    donors, donor_masks = torch.ones(1, 3, *_SIZE), torch.zeros(1, *_SIZE)
    donor_masks[0, 3:9, 50:62] = 1

    pasted, masks = paste_defects(images, donors, donor_masks, _generator())

    assert (masks.sum(dim=(1, 2)) == 72).all()
    for mask in masks:
        rows, columns = mask.nonzero().unbind(dim=1)
        assert rows.max() - rows.min() == 5
        assert columns.max() - columns.min() == 11
    assert (pasted.amax(dim=1) > 0).eq(masks > 0).all()
    assert len({tuple(mask.nonzero()[0].tolist()) for mask in masks}) > 1
