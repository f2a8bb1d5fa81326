"""What is PNPT's own: prompts of lines, their embedding, two streams that condition each other, and retrieval."""

import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor, nn

from models.backbones import untrained_weights
from models.blocks.packing import unpack
from models.blocks.patches import patchify, unpatchify
from models.detector import LineConditioned, Recipe
from models.pnpt import UNKNOWN_LINE, Pnpt, PnptConfig, _CrossAttention, _distances, _PatchEmbedding
from tests.plain_networks import (
    array_of,
    attend,
    cosine_distances,
    embed,
    linear,
    normalise,
    perceptron,
    place,
    positions,
    resize,
    shake,
)
from tests.tiny_detectors import TINY
from training.fitting.optimisers import build_optimiser, learning_rate_at

_SIZE = TINY["pnpt"].image_size
_BRIEF = replace(TINY["pnpt"].recipe, iterations=150)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _images(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, *_SIZE, generator=_generator(seed))


def _build(**changes: object) -> Pnpt:
    detector = Pnpt(replace(TINY["pnpt"], **changes))
    detector.load_backbone_weights(untrained_weights("test_resnet"))
    return detector.eval()


def _draw_lines(each: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draw two products in turn: upright stripes and large red and green squares, a little noise on both."""
    generator = _generator(seed)
    rows, columns = torch.meshgrid(torch.arange(_SIZE[0]), torch.arange(_SIZE[1]), indexing="ij")
    stripes = (0.5 + 0.3 * torch.sin(columns * (2 * math.pi / 8))).expand(3, *_SIZE)
    squares = ((rows // 16 + columns // 16) % 2).float()
    board = torch.stack((0.2 + 0.6 * squares, 0.8 - 0.6 * squares, torch.full(_SIZE, 0.1)))
    images = torch.stack((stripes, board)).repeat(each, 1, 1, 1)
    noise = 0.02 * torch.randn(images.shape, generator=generator)
    return (images + noise).clamp(0, 1), torch.tensor([0, 1]).repeat(each)


def _observe(detector: Pnpt, images: Tensor, line_index: Tensor, batch: int = 8) -> Pnpt:
    """Run both passes without the descent between them."""
    for stage in (detector.stages()[0], detector.stages()[2]):
        for some, lines in zip(images.split(batch), line_index.split(batch), strict=True):
            stage.show(some, lines)
        stage.finish()
    return detector


@cache
def _fitted() -> Pnpt:
    """Fit on two lines, a little longer than the registry's tests do."""
    detector = _build(lines=2, recipe=_BRIEF)
    images, line_index = _draw_lines(12)
    first, descent, last = detector.stages()
    first.show(images, line_index)
    first.finish()
    encoded, optimiser = detector.encode(images), build_optimiser(descent.recipe, descent.parameters)
    for step in range(_BRIEF.iterations):
        drawn = torch.randperm(len(images), generator=_generator(step))[: _BRIEF.batch_size]
        optimiser.zero_grad()
        sum(descent.terms(encoded[drawn], line_index[drawn], step).values()).backward()
        for group in optimiser.param_groups:
            group["lr"] = learning_rate_at(_BRIEF, step, _BRIEF.iterations)
        optimiser.step()
    last.show(images, line_index)
    last.finish()
    return detector.eval()


def test_config_holds_the_values_that_the_authors_use_elsewhere():
    """The published pyramid, width, depths and recipe are the defaults."""
    config = PnptConfig()

    assert (config.backbone, config.layers, config.image_size) == ("wide_resnet50_2.tv_in1k", (1, 2, 3), (256, 256))
    assert (config.token_channels, config.heads, config.mlp_ratio) == (512, 8, 4)
    assert (config.encoder_blocks, config.decoder_blocks) == (4, 4)
    assert (config.sace, config.prompt, config.score_reduction) == ("joint", "spatial", "maximum")
    assert (config.prior_share, config.squared_error_weight, config.jitter, config.blur_sigma) == (0.5, 0.0, 0.0, 4.0)
    assert config.recipe == Recipe(
        "adamw", 1e-4, 1e-4, 0.01, 16, (0.9, 0.95), epochs=300, clip_gradient_norm=1.0, balance_lines=True
    )


def test_network_of_the_published_widths_has_as_many_numbers_as_counted_by_hand():
    """Embedding, four coupling blocks, two times four conditioned blocks and heads follow from D, C and p alone."""
    config = replace(TINY["pnpt"], token_channels=32, encoder_blocks=4, decoder_blocks=4, mlp_ratio=4)
    detector = _build(**{field: getattr(config, field) for field in ("encoder_blocks", "decoder_blocks", "mlp_ratio")})

    width, patches = 32, detector.transformer.patches
    pixels = sum(patch**2 * shape[0] for patch, shape in zip(patches, detector.shapes, strict=True))
    embedding, heads = pixels * width + 3 * width, pixels * width + pixels
    norm, attention = 2 * width, 4 * width**2 + 4 * width
    perceptron = 8 * width**2 + 5 * width
    encoder = 4 * (attention + perceptron + 2 * norm) + norm
    decoders = 2 * (4 * (2 * attention + perceptron + 3 * norm) + norm)
    counted = sum(parameter.numel() for parameter in detector.parameters() if parameter.requires_grad)
    assert counted == embedding + 2 * width + encoder + decoders + heads


def test_patch_embedding_when_written_out_then_is_the_sum_over_scales():
    """Every scale gives as many tokens, each the product of its patch with a kernel, and the scales are added."""
    shapes, patches, width = [(3, 8, 8), (5, 4, 4), (7, 2, 2)], [4, 2, 1], 6
    embedding = _PatchEmbedding(shapes, patches, width)
    maps = [torch.randn(2, *shape, generator=_generator(i)) for i, shape in enumerate(shapes)]

    tokens = embedding(maps).detach().numpy()

    expected = np.zeros((2, 4, width))
    for one, layer, patch in zip(maps, embedding.embeddings, patches, strict=True):
        kernel, bias = layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy()
        pixels = one.double().numpy()
        for image in range(2):
            for token in range(4):
                row, column = (token // 2) * patch, (token % 2) * patch
                cut = pixels[image, :, row : row + patch, column : column + patch]
                expected[image, token] += (kernel * cut).sum(axis=(1, 2, 3)) + bias
    np.testing.assert_allclose(tokens, expected, rtol=0, atol=1e-5)  # float32 summation order
    assert all(
        torch.equal(unpatchify(patchify(one, patch), (2, 2), patch), one)
        for one, patch in zip(maps, patches, strict=True)
    )


def test_cross_attention_when_recomputed_in_numpy_then_agrees():
    """Queries come from the stream, keys and values from the condition; rows of weights sum to one."""
    attention = _CrossAttention(8, 2)
    x, condition = torch.randn(2, 3, 5, 8, generator=_generator()).unbind()

    read = attention(x, condition).detach().numpy()

    weights = {name: p.detach().double().numpy() for name, p in attention.named_parameters()}
    queries = x.double().numpy() @ weights["queries.weight"].T + weights["queries.bias"]
    pairs = condition.double().numpy() @ weights["keys_values.weight"].T + weights["keys_values.bias"]
    mixed = np.zeros((3, 5, 8))
    for image in range(3):
        for head in (slice(0, 4), slice(4, 8)):
            for token in range(5):
                logits = [queries[image, token, head] @ pairs[image, other, :8][head] / 2 for other in range(5)]
                shares = np.exp(logits) / np.exp(logits).sum()
                mixed[image, token, head] = sum(
                    share * pairs[image, other, 8:][head] for other, share in enumerate(shares)
                )
    expected = mixed @ weights["proj.weight"].T + weights["proj.bias"]
    np.testing.assert_allclose(read, expected, rtol=0, atol=1e-5)  # float32 against float64


def test_prompts_when_two_images_are_observed_then_are_their_mean():
    """The prompt of a line is the average of its own images' features and of no other's."""
    detector, images = _build(lines=2), _images(5)
    line_index = torch.tensor([0, 1, 0, 1, 1])

    detector.stages()[0].show(images, line_index)
    detector.stages()[0].finish()

    features = detector.encode(images).double()
    expected = torch.stack([features[[0, 2]].mean(dim=0), features[[1, 3, 4]].mean(dim=0)]).float()
    torch.testing.assert_close(detector.pool, expected, rtol=1e-6, atol=1e-6)


def test_prompts_when_batches_or_order_change_then_stay():
    """How the good frames come does not matter; 1e-5 is the backbone's float32 in batches of another size."""
    images, line_index = _draw_lines(5)
    order = torch.randperm(10, generator=_generator())

    one = _observe(_build(lines=2), images, line_index, batch=10)
    other = _observe(_build(lines=2), images[order], line_index[order], batch=3)

    torch.testing.assert_close(one.pool, other.pool, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(one.prompts, other.prompts, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(one.least_similarity, other.least_similarity, rtol=0, atol=1e-5)


def test_prompts_are_kept_and_not_learnt():
    """Averages and their embedding are in the state dict, and no optimiser sees them."""
    detector = _observe(_build(lines=2), *_draw_lines(2))

    learnt = {id(parameter) for parameter in detector.stages()[1].parameters}

    assert {"pool", "prompts", "least_similarity"} <= detector.state_dict().keys()
    assert not any(id(tensor) in learnt for tensor in (detector.pool, detector.prompts))
    assert isinstance(detector, LineConditioned)


def test_prompts_when_a_line_has_no_frames_then_refuse():
    """A line without good frames has no prompt, and the sentence names it."""
    detector = _build(lines=3)
    detector.observe_prompts(_images(2), torch.tensor([0, 2]))

    with pytest.raises(RuntimeError, match=r"lines \[1\]"):
        detector.finish_prompts()


def test_loss_when_the_prompts_are_missing_then_refuses():
    """Nothing is learnt towards a prompt of zeros."""
    detector = _build()

    with pytest.raises(RuntimeError, match="not averaged"):
        detector.loss(detector.encode(_images(1)), torch.tensor([0]), 0)


def test_stored_prompts_are_what_the_learnt_embedding_makes_of_the_averages():
    """They are embedded after the descent, so that inference and training see the same tokens."""
    detector = _fitted()

    embedded = detector.transformer.embed_prompt(unpack(detector.pool, detector.shapes))

    torch.testing.assert_close(detector.prompts, embedded)


def test_global_prompt_is_the_same_everywhere_before_it_is_told_its_place():
    """`prompt="global"` averages over places too."""
    detector = _observe(_build(prompt="global"), _images(2), torch.tensor([0, 0]))

    bare = detector.prompts - detector.transformer.positions - detector.transformer.prior_stream

    torch.testing.assert_close(bare, bare[:, :1].expand_as(bare))


def _block_slowly(rows: np.ndarray, block: nn.Module) -> np.ndarray:
    """Let rows attend to each other and pass the hidden layers, each with a norm before and a skip around."""
    parts = np.split(linear(normalise(rows, block.norm1), block.attn.qkv), 3, axis=1)
    rows = rows + linear(attend(*parts, block.attn.heads), block.attn.proj)
    return rows + perceptron(normalise(rows, block.norm2), block.mlp.fc1, block.mlp.fc2)


def _encode_slowly(encoder: nn.Module, sample: np.ndarray, prior: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return Z_X and Z_P: of one row of tokens, or, in DADF's way, of two that share the sample's keys."""
    if not hasattr(encoder.blocks[0].attn, "_split"):  # joint
        rows = np.concatenate((sample, prior))
        for block in encoder.blocks:
            rows = _block_slowly(rows, block)
        sample, prior = np.split(rows, 2)
    else:
        for block in encoder.blocks:
            q, k, v = np.split(linear(normalise(sample, block.norm1), block.attn.qkv), 3, axis=1)
            own_q, _, own_v = np.split(linear(normalise(prior, block.norm1), block.attn.qkv), 3, axis=1)
            read = [attend(*asked, block.attn.heads) for asked in ((q, k, v), (own_q, k, own_v))]
            sample, prior = (
                rows + linear(one, block.attn.proj) for rows, one in zip((sample, prior), read, strict=True)
            )
            sample, prior = (
                rows + perceptron(normalise(rows, block.norm2), block.mlp.fc1, block.mlp.fc2)
                for rows in (sample, prior)
            )
    return normalise(sample, encoder.norm), normalise(prior, encoder.norm)


def _decode_slowly(decoder: nn.Module, rows: np.ndarray, condition: np.ndarray) -> np.ndarray:
    """Attend to itself, then to the condition, then the hidden layers."""
    for block in decoder.blocks:
        parts = np.split(linear(normalise(rows, block.norm1), block.attn.qkv), 3, axis=1)
        rows = rows + linear(attend(*parts, block.attn.heads), block.attn.proj)
        keys, values = np.split(linear(condition, block.cross.keys_values), 2, axis=1)
        queries = linear(normalise(rows, block.norm2), block.cross.queries)
        rows = rows + linear(attend(queries, keys, values, block.cross.heads), block.cross.proj)
        rows = rows + perceptron(normalise(rows, block.norm3), block.mlp.fc1, block.mlp.fc2)
    return normalise(rows, decoder.norm)


@pytest.mark.parametrize("prompt", ["spatial", "global"])
@pytest.mark.parametrize("sace", ["joint", "dual"])
def test_map_and_loss_when_recomputed_in_numpy_then_agree(sace, prompt):
    """From the layers to the score: embedded sums, coupled streams, conditioned decoders, and both streams' cosines."""
    detector = _build(lines=2, sace=sace, prompt=prompt, encoder_blocks=2, decoder_blocks=2, prior_share=0.25)
    shake([*detector.transformer.parameters()], 0.1)
    good, line_index = _draw_lines(2)
    _observe(detector, good, line_index)
    image, of_line = _images(1, seed=1), torch.tensor([1])

    with torch.no_grad():
        output = detector(image, of_line)
        terms = {name: float(one) for name, one in detector.loss(detector.encode(image), of_line, 0).items()}
        layers, prompts = detector.backbone(image), detector.backbone(good[line_index == 1])

    network, grid, convolutions = detector.transformer, (4, 4), detector.transformer.embedding.embeddings
    seen = [array_of(layer)[0] for layer in layers]
    usual = [array_of(layer).mean(axis=0) for layer in prompts]
    if prompt == "global":
        usual = [np.broadcast_to(one.mean(axis=(1, 2), keepdims=True), one.shape) for one in usual]
    sample, prior = (
        sum(embed(one, *map(array_of, own.parameters())) for one, own in zip(maps, convolutions, strict=True))
        + positions(grid, 32)
        + array_of(stream)
        for maps, stream in ((seen, network.sample_stream), (usual, network.prior_stream))
    )
    sample, prior = _encode_slowly(network.encoder, sample, prior)
    decoded = {
        "prior": _decode_slowly(network.prior_decoder, prior, sample),
        "sample": _decode_slowly(network.sample_decoder, sample, prior),
    }
    maps, expected = {}, {}
    for name, rows in decoded.items():
        rebuilt = [
            place(linear(rows, head), grid, one.shape[1] // grid[0])
            for one, head in zip(seen, network.predictions, strict=True)
        ]
        apart = [cosine_distances(*pair) for pair in zip(seen, rebuilt, strict=True)]
        expected[name] = sum(one.mean() for one in apart)
        maps[name] = sum(
            ndimage.gaussian_filter(resize(one, _SIZE, align_corners=False), 4.0, truncate=4.0) for one in apart
        )
    assert terms == pytest.approx(expected, abs=1e-5)
    mixed = 0.25 * maps["prior"] + 0.75 * maps["sample"]
    np.testing.assert_allclose(output.anomaly_map[0].numpy(), mixed, rtol=0, atol=1e-5)
    assert float(output.score) == pytest.approx(mixed.max(), abs=1e-5)


def test_loss_when_recomputed_in_numpy_then_agrees():
    """L sums 1 - cos over streams and scales, each scale averaged over its places."""
    detector = _observe(_build(lines=2, squared_error_weight=0.5), *_draw_lines(1))
    encoded, line_index = detector.encode(_images(2)), torch.tensor([1, 0])

    with torch.no_grad():
        terms = {name: float(value) for name, value in detector.loss(encoded, line_index, 0).items()}

    features = unpack(encoded, detector.shapes)
    rebuilt = detector.transformer(detector.transformer.embed_sample(features), detector.prompts[line_index])
    expected = {"squared error": 0.0}
    for name, maps in zip(("prior", "sample"), rebuilt, strict=True):
        expected[name] = 0.0
        for one, other in zip(features, maps, strict=True):
            a, b = (np.moveaxis(t.detach().double().numpy(), 1, -1).reshape(-1, t.shape[1]) for t in (one, other))
            cosines = [u @ v / (np.linalg.norm(u) * np.linalg.norm(v)) for u, v in zip(a, b, strict=True)]
            expected[name] += np.mean([1 - cosine for cosine in cosines])
            expected["squared error"] += 0.5 * np.mean((a - b) ** 2)
    assert terms == pytest.approx(expected, abs=1e-5)


def test_loss_when_rebuilt_features_are_scaled_copies_then_is_zero():
    """The cosine forgives any positive scale."""
    detector = _observe(_build(), _images(2), torch.tensor([0, 0]))
    encoded = detector.encode(_images(2))
    features = unpack(encoded, detector.shapes)

    class Copies(nn.Module):
        def forward(self, *_: Tensor) -> tuple[list[Tensor], list[Tensor]]:
            return [3 * one for one in features], [0.5 * one for one in features]

    transformer = Copies()
    transformer.embed_sample, transformer.embed_prompt = (
        detector.transformer.embed_sample,
        detector.transformer.embed_prompt,
    )
    detector.transformer = transformer

    with torch.no_grad():
        terms = detector.loss(encoded, torch.tensor([0, 0]), 0)

    assert [float(value) for value in terms.values()] == pytest.approx([0, 0], abs=1e-5)


def test_distance_when_features_are_weak_then_is_theirs_and_of_none_at_all_is_one():
    """The guard of the cosine, a millionth, changes no length that features have, and nothing divides by nothing."""
    weak = 1e-4 * torch.randn(2, 1, 8, 3, 3, generator=_generator()).abs()

    distance = _distances(*weak)

    np.testing.assert_allclose(
        distance[0].numpy(), cosine_distances(*(array_of(one)[0] for one in weak)), rtol=0, atol=1e-5
    )
    assert (_distances(torch.zeros_like(weak[0]), weak[1]) == 1).all()


@pytest.mark.parametrize("stream", ["prior", "sample"])
@pytest.mark.parametrize("sace", ["joint", "dual"])
def test_gradient_reaches_the_embedding_through_each_stream(stream, sace):
    """Either stream alone teaches how frames and prompts are embedded; the frozen backbone learns nothing."""
    detector = _observe(_build(sace=sace), _images(2), torch.tensor([0, 0])).train()
    before = {name: value.clone() for name, value in detector.backbone.state_dict().items()}

    detector.loss(detector.encode(_images(2, seed=1)), torch.tensor([0, 0]), 0)[stream].backward()

    embedding = detector.transformer.embedding
    assert all(bool(parameter.grad.abs().sum() > 0) for parameter in embedding.parameters())
    assert all(parameter.grad is None for parameter in detector.backbone.parameters())
    assert all(torch.equal(value, before[name]) for name, value in detector.backbone.state_dict().items())


def test_dual_encoder_when_the_frame_is_the_same_everywhere_then_the_prompt_stream_ignores_it():
    """Keys of the frame steer what is read of the prompt, and its values are never mixed in."""
    encoder = _build(sace="dual").transformer.encoder
    prompts = torch.randn(1, 16, 32, generator=_generator())
    flat = torch.randn(2, 1, 32, generator=_generator(1)).expand(2, 16, 32)

    _, one = encoder(flat[:1], prompts)
    _, other = encoder(flat[1:], prompts)

    torch.testing.assert_close(one, other)


def test_jitter_when_switched_on_then_follows_from_the_step_and_leaves_the_target():
    """Noise lies on the tokens only, is drawn anew each step, and is absent from inference."""
    plain, noisy = (_observe(_build(jitter=jitter), _images(2), torch.tensor([0, 0])) for jitter in (0.0, 20.0))
    encoded, line_index = plain.encode(_images(2, seed=1)), torch.tensor([0, 0])

    quiet, first, again, other = (
        float(detector.loss(encoded, line_index, step)["sample"].detach())
        for detector, step in ((plain, 0), (noisy, 0), (noisy, 0), (noisy, 1))
    )

    assert first == again
    assert len({quiet, first, other}) == 3
    torch.testing.assert_close(noisy(_images(1)).score, plain(_images(1)).score)


def test_maps_when_recomputed_in_numpy_then_the_streams_are_mixed_by_their_share():
    """A = omega A^P + (1 - omega) A^S, and the score is its largest value or its deviation."""
    detector = _observe(_build(prior_share=0.25, score_reduction="deviation"), _images(2), torch.tensor([0, 0]))
    images = _images(2, seed=1)

    with torch.no_grad():
        prior, sample = detector.maps_by_stream(images, detector.choose_prompts(2))
        output = detector(images)

    expected = 0.25 * prior.numpy() + 0.75 * sample.numpy()
    np.testing.assert_allclose(output.anomaly_map.numpy(), expected, atol=1e-6)  # float32 rounding
    np.testing.assert_allclose(output.score.numpy(), expected.std(axis=(1, 2)), atol=1e-5)  # likewise, of a sum
    largest = replace(detector.config, score_reduction="maximum")
    detector.config = largest
    assert torch.equal(detector(images).score, output.anomaly_map.amax(dim=(1, 2)))


def test_prompt_of_another_line_when_fitted_then_changes_both_streams_and_raises_the_score():
    """The prompt matters: a good frame is odd by the measure of a line that it does not show."""
    detector = _fitted()
    images, line_index = _draw_lines(3, seed=1)

    with torch.no_grad():
        right = detector.maps_by_stream(images, detector.choose_prompts(6, line_index))
        wrong = detector.maps_by_stream(images, detector.choose_prompts(6, 1 - line_index))
        scores = detector(images, line_index).score, detector(images, 1 - line_index).score

    assert all(not torch.allclose(*pair, atol=1e-3) for pair in zip(right, wrong, strict=True))
    assert (scores[1] > scores[0]).all()


def test_planted_patch_when_fitted_on_two_lines_then_shows_and_the_prior_stream_copies_it_less():
    """A foreign patch scores higher than the clean area does, and A^P sees it at least as well as A^S."""
    detector = _fitted()
    images, line_index = _draw_lines(3, seed=1)
    planted = images.clone()
    planted[:, :, 16:40, 16:40] = torch.rand(3, 24, 24, generator=_generator(5))

    with torch.no_grad():
        prompts = detector.choose_prompts(6, line_index)
        clean = [maps[:, 20:36, 20:36].mean(dim=(1, 2)) for maps in detector.maps_by_stream(images, prompts)]
        seen = [maps[:, 20:36, 20:36].mean(dim=(1, 2)) for maps in detector.maps_by_stream(planted, prompts)]
        scores = detector(images, line_index).score, detector(planted, line_index).score

    by_prior, by_sample = (after - before for after, before in zip(seen, clean, strict=True))
    assert (scores[1] > scores[0]).all()
    assert (by_sample > 0).all()
    assert by_prior.mean() >= by_sample.mean()


def test_forward_when_lines_are_mixed_in_a_batch_then_each_image_keeps_its_answer():
    """An image's score depends on its own line and on no other image."""
    detector = _fitted()
    images, line_index = _draw_lines(2, seed=1)

    with torch.no_grad():
        together = detector(images, line_index).score
        alone = [detector(images[[i]], line_index[[i]]).score[0] for i in range(4)]

    torch.testing.assert_close(torch.stack(alone), together, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("line_index", [[0, 2], [-1, 0]], ids=["behind the last", "negative"])
def test_forward_when_a_line_was_not_fitted_on_then_refuses(line_index):
    """The indices that are not known are named, and none is taken for another line."""
    detector = _observe(_build(lines=2), *_draw_lines(1))

    with pytest.raises(ValueError, match=r"lines 0 to 1 and knows no line"):
        detector(_images(2), torch.tensor(line_index))


def test_forward_when_the_line_is_left_out_then_only_one_line_is_assumed():
    """With one line nothing need be said; with two nothing is guessed."""
    single = _observe(_build(), _images(2), torch.tensor([0, 0]))
    double = _observe(_build(lines=2), *_draw_lines(1))

    assert torch.equal(single(_images(1)).score, single(_images(1), torch.tensor([0])).score)
    with pytest.raises(ValueError, match="fitted on 2 lines"):
        double(_images(1))


def test_retrieve_line_when_frames_are_good_then_finds_each_line_and_else_none():
    """Frames of both lines are told apart, and a picture of neither is no line's; nothing accepts that answer."""
    detector = _fitted()
    images, line_index = _draw_lines(12)
    foreign = torch.rand(4, 3, *_SIZE, generator=_generator(3))

    known, unknown = detector.retrieve_line(images), detector.retrieve_line(foreign)

    assert torch.equal(known.line_index, line_index)
    assert (unknown.line_index == UNKNOWN_LINE).all()
    assert (unknown.similarity < known.similarity.min()).all()
    with pytest.raises(ValueError, match=r"\[-1\]"):
        detector(foreign, unknown.line_index)


def test_retrieve_line_when_frames_are_new_then_one_fitted_frame_refuses_most_and_many_refuse_few():
    """The bound is optimistic: it stands on the frames that made the prompt. No frame is taken for another line's."""
    fresh, line_index = _draw_lines(20, seed=77)

    found = [_observe(_build(lines=2), *_draw_lines(fitted)).retrieve_line(fresh).line_index for fitted in (1, 30)]

    after_one, after_many = ((lines == UNKNOWN_LINE).double().mean().item() for lines in found)
    assert after_one > 0.5
    assert after_many < 0.1
    assert all(((lines == line_index) | (lines == UNKNOWN_LINE)).all() for lines in found)


def test_retrieve_line_when_a_pass_has_not_run_then_refuses():
    """Without calibrated similarities nothing is retrieved."""
    with pytest.raises(RuntimeError, match="pass"):
        _build().retrieve_line(_images(1))


def test_judge_when_prompts_are_given_then_is_what_their_line_gives():
    """Prompts may come from outside of the network, and each image follows its own."""
    detector = _fitted()
    images, line_index = _draw_lines(2, seed=1)

    with torch.no_grad():
        given = detector.judge(images, detector.prompts[line_index])
        chosen = detector(images, line_index)

    assert torch.equal(given.anomaly_map, chosen.anomaly_map)
    assert torch.equal(given.score, chosen.score)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_size": (60, 64)}, "multiple of the stride"),
        ({"token_channels": 34}, "multiple of 4"),
        ({"heads": 3}, "3 heads"),
        ({"lines": 0}, "at least one line"),
        ({"prior_share": 1.5}, "share"),
    ],
    ids=["size", "width", "heads", "lines", "share"],
)
def test_config_when_it_contradicts_itself_then_is_refused(changes, words):
    """What can't be built says why before any frame is read."""
    with pytest.raises(ValueError, match=words):
        Pnpt(replace(TINY["pnpt"], **changes))
