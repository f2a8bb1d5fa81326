"""Ten strong changes of a picture: each does what it is called, stays in range and can be repeated."""

import pytest
import torch
from torch import Tensor

from models.blocks import augmentations
from models.blocks.augmentations import CHANGES, augment_strongly

every_change = pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _picture(seed: int = 0) -> Tensor:
    return torch.rand(3, 24, 32, generator=_generator(seed))


@every_change
def test_change_keeps_the_shape_and_is_the_same_under_the_same_seed(change):
    """Every draw comes from the generator, whatever was drawn before from torch's own."""
    first = change(_picture(), _generator(3))
    torch.rand(1)
    again = change(_picture(), _generator(3))

    assert first.shape == (3, 24, 32)
    assert first.dtype == torch.float32
    assert torch.equal(first, again)


@every_change
def test_change_does_something_and_leaves_its_input_alone(change):
    """The picture that was given stays, and another one is returned."""
    picture = _picture() * 0.8 + 0.1

    changed = change(picture, _generator(3))

    assert torch.equal(picture, _picture() * 0.8 + 0.1)
    assert (changed - picture).abs().mean() > 0.01


def test_augmented_pictures_stay_in_range_and_differ():
    """Three changes in a row leave [0, 1] nowhere, and the choice varies from draw to draw."""
    generator = _generator()

    drawn = torch.stack([augment_strongly(_picture(), generator) for _ in range(40)])

    assert drawn.min() >= 0
    assert drawn.max() <= 1
    assert torch.isfinite(drawn).all()
    assert (drawn[:-1] - drawn[1:]).abs().mean(dim=(1, 2, 3)).min() > 0.01


def test_augmented_picture_when_no_change_is_asked_for_is_the_picture():
    """The count is the number of changes."""
    assert torch.equal(augment_strongly(_picture(), _generator(), count=0), _picture())


def test_hue_when_turned_keeps_brightness_and_leaves_grey_alone():
    """Turning about the grey axis moves colours only, and all of them become paler or stronger alike."""
    picture = _picture()
    grey = picture[:1].expand(3, -1, -1)

    turned = augmentations.change_hue(picture, _generator(1))

    torch.testing.assert_close(turned.mean(dim=0), picture.mean(dim=0))
    torch.testing.assert_close(augmentations.change_hue(grey, _generator(1)), grey)
    ratio = (turned - turned.mean(dim=0)).norm(dim=0) / (picture - picture.mean(dim=0)).norm(dim=0)
    torch.testing.assert_close(ratio, ratio[:1, :1].expand_as(ratio), rtol=1e-4, atol=1e-4)


def test_equalised_channel_holds_its_ranks():
    """Values become the share of pixels that are not brighter, ties alike."""
    picture = torch.tensor([[0.2, 0.1], [0.2, 0.9]]).expand(3, 2, 2)

    equalised = augmentations.equalise(picture, _generator())

    torch.testing.assert_close(equalised[0], torch.tensor([[0.75, 0.25], [0.75, 1.0]]))


def test_stretched_channel_spans_the_range_and_a_constant_one_stays():
    """Contrast comes from what is there, and nothing is divided by zero."""
    picture = _picture() * 0.3 + 0.4
    picture[2] = 0.5

    stretched = augmentations.stretch_contrast(picture, _generator())

    assert stretched[:2].amin(dim=(1, 2)).tolist() == [0, 0]
    torch.testing.assert_close(stretched[:2].amax(dim=(1, 2)), torch.ones(2))
    assert torch.equal(stretched[2], picture[2])


def test_posterised_picture_has_few_values():
    """No more than sixteen levels are left."""
    levels = {len(augmentations.posterise(_picture(), _generator(seed)).unique()) for seed in range(12)}

    assert levels == {2, 4, 8, 16}


def test_rotated_picture_keeps_its_middle_and_turns_lengths_as_they_are():
    """A disc in the middle of an oblong picture stays a disc: pixels are square."""
    rows, columns = torch.meshgrid(torch.arange(24) - 11.5, torch.arange(32) - 15.5, indexing="ij")
    disc = ((rows.square() + columns.square()).sqrt() < 8).float().expand(3, -1, -1)

    turned = augmentations.rotate(disc, _generator(1))

    assert (turned - disc).abs().mean() < 0.05
