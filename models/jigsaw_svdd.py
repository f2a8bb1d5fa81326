"""Jigsaw-SVDD (SCL-VI): an encoder that can do a jigsaw of good parts knows every good patch; a strange one is odd.

A small patch encoder is trained from scratch to tell the relative position of any two pieces of a 3 x 3 jigsaw, while
patches a pixel or two apart are pulled together. All good patches then form a memory bank. A patch is scored by its
distances to the nearest good patches, merged by "affinity augmentation"; the maps of two patch sizes are multiplied.

Paper: Wang, Yao, Yu, "SCL-VI: Self-supervised Context Learning for Visual Inspection of Industrial Defects",
arXiv:2311.06504; it builds on Patch SVDD (Yi, Yoon, arXiv:2006.16067).
Reference code: wangpeng000/VisualInspection; its README shows an MIT badge, but there is no licence file. Nothing of it
is copied.

Deviations from the reference code, each with its reason:
* centres of the jigsaw and pairs of neighbours are drawn where no piece leaves the image; the code clips them, so that
  near a border different cells coincide and their labels contradict each other;
* the centre's column is jittered from its column; the code takes its row, so piece 4 comes from the wrong place;
* affinities are bounded below and above: in the code a distance of exactly zero gets the smallest weight and the bound
  20 -> 15 makes weights fall where they should rise;
* nearest patches are found exactly, by a matrix product, in a bank that a greedy coreset may bound; the code uses an
  approximate index over everything. The bank keeps float32: neighbours that are pulled together strongly
  (lambda of 0.03 and above) leave embeddings that differ by less than float16's steps;
* a step may learn from all 36 pairs of a jigsaw instead of one (`pairs`), which a short descent on a CPU needs;
* a step may draw fewer jigsaws of large pieces than of small ones (`large_share`): a large piece costs as much as four
  small ones, and what a descent on a CPU needs first is steps;
* a step may draw several pairs of neighbours from a frame (`neighbour_pairs`), and the two patches of a pair may be
  brightened or darkened apart from each other (`brightness_noise`): one encoder is to judge parts under every exposure;
* frames may be mirrored beyond their border before patches are taken (`margin`): a pixel in a corner lies under one
  patch and one in the middle under many, whose mean varies less, so that the largest values of good frames' maps lie
  near the border;
* the map is not blurred, which the code does for display alone: so the score, the map's maximum before any blur, can
  follow a region of interest;
* an epoch is one pass over the frames, so the code's 400 epochs of 100 draws a frame are 40,000 passes of one draw; a
  step never shows a frame twice, and each pass drops its incomplete batch. So a recipe of epochs makes other steps
  than the code's 400 times 100 n / 64, n the number of frames: with 30 frames 40,000 of 30 draws instead of 18,400 of
  64, with 100 40,000 instead of 62,400, with 127 40,000 instead of 79,200, with 209 120,000 instead of 130,400. From
  64 frames on, `iterations` of 625 n in place of `epochs` are the code's number to half a percent. The loop that all
  detectors share shows a frame once an epoch;
* the last epoch counts; the code keeps all of them and looks at test frames after each, and trains in 399 of its 400,
  because the first only looks;
* piece 4 may also stay where it is, one of the offsets within its bound; in the code it always moves.
As in the code: the classifier's last weight is normalised and, unless `learn_projection`, never learns; the two maps
are not normalised before the product. Frames in the bank have distance 0 to themselves, so none of them may be judged:
thresholds come from frames that were held out.

One encoder, two ways, equal up to float32 rounding. Training cuts patches out and encodes each one. Inference
(`_PatchEncoder.encode_grid`) shares between overlapping patches what can be shared exactly:
* the first convolution has no padding, so it runs once over the image; means and variances of its group norm are pooled
  from cells, and the max pooling, which commutes with the norm's affine map up to its sign, runs once as well. Patches
  are cut behind it, at half the resolution;
* the 64-pixel level reads its quadrants from the grid of the 32-pixel level: a dilated convolution over embeddings.
What follows the first norm is not shared: its statistics and the zero padding belong to one patch.

Symbols: x = centred images (B, 3, H, W) · K = patch side, 32 and 64 · S = `small_stride`, `large_stride` · h(p) =
embedding (n, D) · k = `neighbours` · d = distances (n, k) · alpha, beta, w, a = `merge_by_affinity` · lambda =
`compactness_weight` · M = rows of a bank · A32, A64 = maps (B, H, W).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.blocks.draws import generator_of_step
from models.blocks.initial_values import draw_defaults
from models.blocks.maps import require_image_size
from models.detector import AnomalyOutput, GradientStage, PassStage, Recipe, Stage

_SMALL, _LARGE = 32, 64  # K; the encoder's layers bring 32 pixels down to one
_GROUP = 8  # channels of every group norm
_FILTERED, _POOLED = 28, 14  # sides of a small patch behind the first convolution and behind its pooling
_CELL = 4  # side of the cells that statistics are pooled from; divides 28 and every stride
_CLOSEST = 1e-8  # smallest distance that an affinity is made of
_LARGEST_AFFINITY = 20.0  # bound of beta

# (rows, columns) from piece a to piece b > a of the 3 x 3 jigsaw; the place in the list is the class.
_RELATIONS = ((0, 1), (1, 0), (0, 2), (2, 0), (1, 1), (1, -1), (1, 2), (1, -2), (2, 1), (2, -1), (2, 2), (2, -2))

_PAPER_RECIPE = Recipe(
    optimiser="adam",
    learning_rate=1e-4,
    final_learning_rate=1e-4,
    weight_decay=0.0,
    batch_size=64,
    epochs=40_000,
)


@dataclass(frozen=True)
class JigsawSvddConfig:
    """Defaults are those of the reference code; what it leaves open is marked.

    Attributes:
        image_size: `(height, width)`; each side must hold the jigsaw of 64-pixel pieces and whole strides.
        encoder_channels: widths of the six convolutions before the embedding, multiples of 8.
        embedding_channels: D, a multiple of 8.
        hidden_channels: width of the 64-pixel level's hidden layer, and of the classifiers'.
        small_stride: S of the 32-pixel patches, a multiple of 4 that divides 32 and `large_stride`.
        large_stride: S of the 64-pixel patches.
        margin: how far frames are mirrored beyond their border before patches are taken, in pixels, a multiple of
            `large_stride`; 0 as published. From 64 - `large_stride` on each pixel lies under as many patches.
        neighbours: k of the affinity augmentation (open: the code trains with 1 and sweeps 1 to 20).
        pairs: what a step learns from each jigsaw: one drawn pair, as published, or all 36, weighted so that each class
            counts alike. The expected loss is the same; nine encoded pieces instead of two give 36 pairs, and a short
            descent gets off the plateau where it begins.
        large_share: of a step's frames, how many show the 64-pixel level its jigsaws and neighbours as well; 1 as
            published. The expected loss is the same.
        neighbour_pairs: how many pairs of neighbours a step draws from each frame and level; 1 as published. The
            expected loss is the same.
        brightness_noise: standard deviation of the shift that all values of a neighbour share, of the range [0, 1];
            0 as published. Embeddings learn to overlook it, and with it broad shades.
        compactness_weight: lambda (open for each product: 0.001 for textures, 1 for objects).
        colour_noise: standard deviation of the shift of each channel of a jigsaw's piece, of the range [0, 1].
        pixel_noise: standard deviation of the noise of each of its values.
        learn_projection: let the classifier's last weight learn; in the code it does not.
        bank_rows: M, the most rows that a bank keeps (open); None keeps all that were seen.
        bank_candidates: the most rows that a coreset is chosen from, drawn evenly from all frames (open).
        seed: seeds initial values, draws and the coreset.
        recipe: the descent; 40,000 passes stand for 400 epochs of 100 draws an image, with fewer steps where a pass
            drops much of an incomplete batch: the numbers stand above.
    """

    score_reduction: ClassVar[Literal["maximum"]] = "maximum"

    image_size: tuple[int, int] = (256, 256)
    encoder_channels: tuple[int, int, int, int, int, int] = (96, 256, 384, 384, 256, 128)
    embedding_channels: int = 64
    hidden_channels: int = 128
    small_stride: int = 4
    large_stride: int = 16
    margin: int = 0
    neighbours: int = 5
    pairs: Literal["one", "all"] = "one"
    large_share: float = 1.0
    neighbour_pairs: int = 1
    brightness_noise: float = 0.0
    compactness_weight: float = 1e-3
    colour_noise: float = 0.02
    pixel_noise: float = 0.02
    learn_projection: bool = False
    bank_rows: int | None = 100_000
    bank_candidates: int = 1_000_000
    seed: int = 1
    recipe: Recipe = _PAPER_RECIPE


class _ResponseNorm(nn.Module):
    """Local response normalisation over 5 channels (alpha 1e-4, beta 0.75), its window written as a convolution."""

    window: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        places = torch.arange(channels)
        near = ((places[:, None] - places).abs() <= 2).to(torch.float32)
        self.register_buffer("window", (1e-4 / 5) * near[..., None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        root = (1 + functional.conv2d(x.square(), self.window)).rsqrt()
        return x * root * root.sqrt()  # to the power of -0.75, without the cost of a general power


class _PatchEncoder(nn.Module):
    """The network from 32 x 32 pixels to an embedding.

    The last norm sees groups of eight values and gives each group mean 0 and variance 1, so no embedding can shrink to
    zero. It does not keep different patches apart: that is left to the jigsaw, and early in a descent they lie close.
    """

    def __init__(self, channels: Sequence[int], embedding: int) -> None:
        super().__init__()
        first, second, third, fourth, fifth, sixth = channels
        self.embedding = embedding
        self.convolution = nn.Conv2d(3, first, 5)
        self.norm = _group_norm(first)
        self.deep = nn.Sequential(
            _ResponseNorm(first),
            *(nn.Conv2d(first, second, 5, padding=2), _group_norm(second), nn.ReLU(), nn.MaxPool2d(3, stride=2)),
            _ResponseNorm(second),
            *(nn.Conv2d(second, third, 3, padding=1), _group_norm(third), nn.ReLU()),
            *(nn.Conv2d(third, fourth, 3, padding=1), _group_norm(fourth), nn.ReLU()),
            *(nn.Conv2d(fourth, fifth, 3, padding=1), _group_norm(fifth), nn.ReLU()),
            nn.MaxPool2d(3, stride=2, padding=1),
            *(nn.Conv2d(fifth, sixth, 2), _group_norm(sixth)),
            *(nn.Conv2d(sixth, embedding, 2), _group_norm(embedding), nn.Tanh()),
        )

    def forward(self, patches: Tensor) -> Tensor:
        """Embed patches `(n, 3, 32, 32)`: `(n, D)` in (-1, 1)."""
        # Channels last: the order of memory in which a CPU convolves many small maps a third faster.
        x = self.convolution(patches.contiguous(memory_format=torch.channels_last))
        embedded: Tensor = self.deep(functional.max_pool2d(functional.relu(self.norm(x)), 3, stride=2, padding=1))
        return embedded.flatten(1)

    def encode_grid(self, images: Tensor, stride: int) -> Tensor:
        """Embed all patches of images `(B, 3, H, W)` at this stride: `(B, D, h, w)`, as `forward` would one by one."""
        filtered = self.convolution(images)  # (B, C, H - 4, W - 4)
        height, width = filtered.shape[2], filtered.shape[3]
        rows, columns = (height - _FILTERED) // stride + 1, (width - _FILTERED) // stride + 1
        mean, variance = self._patch_statistics(filtered, stride, (rows, columns))

        # The norm's weight decides for each channel whether the largest or the smallest value survives the pooling.
        sign = torch.where(self.norm.weight < 0, -1.0, 1.0)[:, None, None]
        pooled = _cut_pooled(filtered * sign, stride, (rows, columns))  # (B, h, w, C, 14, 14)
        scale = torch.rsqrt(variance + self.norm.eps) * self.norm.weight  # (B, h, w, C)
        shift = self.norm.bias - scale * mean
        x = functional.relu(pooled * scale.abs()[..., None, None] + shift[..., None, None])
        embedded: Tensor = self.deep(x.flatten(0, 2).contiguous(memory_format=torch.channels_last))
        return embedded.reshape(-1, rows, columns, self.embedding).permute(0, 3, 1, 2)

    def _patch_statistics(self, filtered: Tensor, stride: int, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return mean and variance of each patch and channel's group, `(B, h, w, C)` each.

        Variances add up from channels to cells to patches, each part from differences to its own mean: the mean square
        less the squared mean would lose the digits of a flat patch.
        """
        groups, height, width = filtered.shape[1] // _GROUP, filtered.shape[2] // _CELL, filtered.shape[3] // _CELL
        grouped = filtered.reshape(-1, groups, _GROUP, *filtered.shape[2:])
        pixel_mean = grouped.mean(dim=2)
        pixel_variance = (grouped - pixel_mean[:, :, None]).square().mean(dim=2)
        cell_mean = functional.avg_pool2d(pixel_mean, _CELL)
        pixels = pixel_mean.reshape(-1, groups, height, _CELL, width, _CELL)
        between_pixels = (pixels - cell_mean[:, :, :, None, :, None]).square().reshape(pixel_mean.shape)
        cell_variance = functional.avg_pool2d(pixel_variance + between_pixels, _CELL)

        side, step = _FILTERED // _CELL, stride // _CELL
        cells = _cut(cell_mean, side, step, grid)  # (B, groups, h, 7, w, 7)
        mean = cells.mean(dim=(3, 5))
        between_cells = (cells - mean[:, :, :, None, :, None]).square().mean(dim=(3, 5))
        variance = functional.avg_pool2d(cell_variance, side, stride=step) + between_cells
        return _of_channels(mean), _of_channels(variance)


class _Encoder(nn.Module):
    """The encoders of both patch sizes; the larger one reads four embeddings of the smaller one."""

    def __init__(self, config: JigsawSvddConfig) -> None:
        super().__init__()
        width = config.embedding_channels
        self.small_stride, self.large_stride = config.small_stride, config.large_stride
        self.patches = _PatchEncoder(config.encoder_channels, width)
        self.quadrants = nn.Conv2d(width, config.hidden_channels, 2)
        self.mixing = nn.Conv2d(config.hidden_channels, width, 1)

    def encode_small(self, patches: Tensor) -> Tensor:
        """Embed patches `(n, 3, 32, 32)`: `(n, D)`."""
        embedded: Tensor = self.patches(patches)
        return embedded

    def encode_large(self, patches: Tensor) -> Tensor:
        """Embed patches `(n, 3, 64, 64)`: `(n, D)`."""
        quadrants = patches.reshape(-1, 3, 2, _SMALL, 2, _SMALL).permute(0, 2, 4, 1, 3, 5)
        embedded = self.patches(quadrants.flatten(0, 2)).reshape(patches.shape[0], 2, 2, -1)
        return self._join(embedded.permute(0, 3, 1, 2), stride=1, dilation=1).flatten(1)

    def encode_grids(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Embed all patches of images `(B, 3, H, W)`: two grids `(B, D, h, w)`, of the small and the large patches."""
        small = self.patches.encode_grid(images, self.small_stride)
        stride, dilation = self.large_stride // self.small_stride, _SMALL // self.small_stride
        return small, self._join(small, stride, dilation)

    def _join(self, embedded: Tensor, stride: int, dilation: int) -> Tensor:
        weight, bias = self.quadrants.weight, self.quadrants.bias
        hidden = functional.conv2d(embedded, weight, bias, stride=stride, dilation=dilation)
        return torch.tanh(self.mixing(functional.leaky_relu(hidden, 0.1)))


class _RelationClassifier(nn.Module):
    """Tell from the difference of two embeddings how their pieces lie to each other."""

    projection: Tensor

    def __init__(self, channels: int, hidden: int, *, learn_projection: bool) -> None:
        super().__init__()
        self.hidden = nn.Sequential(
            *(nn.Linear(channels, hidden), nn.LeakyReLU(0.1)), *(nn.Linear(hidden, hidden), nn.LeakyReLU(0.1))
        )
        weight = torch.zeros(len(_RELATIONS), hidden)
        if learn_projection:
            self.projection = nn.Parameter(weight)
        else:
            self.register_buffer("projection", weight)
        self.bias = nn.Parameter(torch.zeros(len(_RELATIONS)))

    def initialise(self, generator: torch.Generator) -> None:
        """Draw PyTorch's defaults."""
        draw_defaults(self.hidden, generator)
        bound = self.projection.shape[1] ** -0.5
        nn.init.uniform_(self.projection, -bound, bound, generator=generator)
        nn.init.uniform_(self.bias, -bound, bound, generator=generator)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Return logits `(n, 12)` of embeddings `(n, D)`."""
        weight = self.projection / self.projection.norm(dim=0, keepdim=True)
        return functional.linear(self.hidden(first - second), weight, self.bias)


class _RowSample:
    """An even sample of rows whose number nobody knows beforehand: those with the smallest random keys."""

    def __init__(self, capacity: int, seed: int) -> None:
        self._capacity = capacity
        self._generator = torch.Generator().manual_seed(seed)
        self._rows: list[Tensor] = []
        self._keys: list[Tensor] = []
        self._held = 0

    def add(self, rows: Tensor) -> None:
        """Take rows `(n, D)` into account."""
        self._rows.append(rows)
        self._keys.append(torch.rand(rows.shape[0], generator=self._generator))
        self._held += rows.shape[0]
        if self._held >= 2 * self._capacity:
            self.rows()

    def rows(self) -> Tensor:
        """Return what was kept `(n, D)`, in the order in which it came."""
        rows, keys = torch.cat(self._rows), torch.cat(self._keys)
        if len(keys) > self._capacity:
            kept = keys.topk(self._capacity, largest=False).indices.sort().values
            rows, keys = rows[kept.to(rows.device)], keys[kept]
        self._rows, self._keys, self._held = [rows], [keys], len(keys)
        return rows


class JigsawSvdd(nn.Module):
    """The encoder, its two relation classifiers and the two banks of good patches.

    Buffers that a pass fills have no entries before it.

    Raises:
        ValueError: if the configuration contradicts itself.
    """

    mean_image: Tensor
    small_bank: Tensor
    large_bank: Tensor

    def __init__(self, config: JigsawSvddConfig) -> None:
        super().__init__()
        _refuse_misfits(config)
        self.config = config
        self.image_size = config.image_size
        self.encoder = _Encoder(config)
        channels, hidden = config.embedding_channels, config.hidden_channels
        self.small_classifier = _RelationClassifier(channels, hidden, learn_projection=config.learn_projection)
        self.large_classifier = _RelationClassifier(channels, hidden, learn_projection=config.learn_projection)
        generator = torch.Generator().manual_seed(config.seed)
        draw_defaults(self.encoder, generator)
        for classifier in (self.small_classifier, self.large_classifier):
            classifier.initialise(generator)

        self.register_buffer("mean_image", torch.empty(0, 3, *config.image_size))
        for name in ("small_bank", "large_bank"):
            self.register_buffer(name, torch.empty(0, channels))
        # A bank's length is known only after its pass, so a state brings its own.
        self.register_load_state_dict_pre_hook(JigsawSvdd._take_lengths)  # type: ignore[no-untyped-call]  # torch's
        for patch, stride in ((_SMALL, config.small_stride), (_LARGE, config.large_stride)):
            for axis, side in zip(("rows", "columns"), config.image_size, strict=True):
                matrix = _spread_matrix(side + 2 * config.margin, patch, stride)
                matrix = matrix[config.margin : config.margin + side]
                self.register_buffer(f"spread_{axis}_{patch}", matrix, persistent=False)
        self._sum: Tensor | None = None
        self._count = 0
        self._samples: tuple[_RowSample, _RowSample] | None = None

    def _take_lengths(self, state_dict: Mapping[str, Tensor], prefix: str, *_: object) -> None:
        for name in ("mean_image", "small_bank", "large_bank"):
            stored = state_dict.get(prefix + name)
            if stored is not None:
                own: Tensor = getattr(self, name)
                setattr(self, name, own.new_empty((stored.shape[0], *own.shape[1:])))

    def stages(self) -> Sequence[Stage]:
        """Return the look at the mean image, the descent, and the look that fills the banks."""
        return [
            PassStage("mean image", self.observe_image, self.finish_mean_image),
            GradientStage(
                name="jigsaw",
                loss=self.loss,
                parameters=[parameter for parameter in self.parameters() if parameter.requires_grad],
                recipe=self.config.recipe,
                encode=self.encode,
            ),
            PassStage("good patches", self.observe_patches, self.finish_banks),
        ]

    def observe_image(self, images: Tensor) -> None:
        """Add images `(B, 3, H, W)` to the mean image.

        Raises:
            ValueError: if the images have another size than `image_size`.
        """
        require_image_size(images, self.image_size)
        total = images.double().sum(dim=0)
        self._sum = total if self._sum is None else self._sum + total
        self._count += images.shape[0]

    def finish_mean_image(self) -> None:
        """Keep the mean of the observed images.

        Raises:
            RuntimeError: if no frames were observed.
        """
        if self._sum is None:
            raise RuntimeError("no frames were observed")
        self.mean_image = (self._sum / self._count).to(torch.float32)[None]
        self._sum, self._count = None, 0

    def encode(self, images: Tensor) -> Tensor:
        """Return images `(B, 3, H, W)` less the mean image, float32 in [-1, 1].

        Raises:
            ValueError: if the images have another size than `image_size`.
            RuntimeError: if the mean image was not measured.
        """
        require_image_size(images, self.image_size)
        if self.mean_image.shape[0] == 0:
            raise RuntimeError("the mean image was not measured yet; run the pass stages over the good frames first")
        return images - self.mean_image

    def loss(self, centred: Tensor, step: int) -> dict[str, Tensor]:
        """Return the cross-entropies and the weighted SVDD terms of both patch sizes for images `(B, 3, H, W)`."""
        generator = generator_of_step(self.config.seed, step)
        of_large = centred[: math.ceil(self.config.large_share * centred.shape[0])]  # a batch comes in random order
        terms = {}
        for name, patch, images, embed, classifier in (
            ("large", _LARGE, of_large, self.encoder.encode_large, self.large_classifier),
            ("small", _SMALL, centred, self.encoder.encode_small, self.small_classifier),
        ):
            draw = _draw_jigsaws if self.config.pairs == "all" else _draw_pairs
            corners, pairs, classes = draw(images.shape[0], self.image_size, patch, generator)
            embedded = embed(self._disturb(_cut_pieces(images, corners, patch), generator))
            embedded = embedded.reshape(corners.shape[1], images.shape[0], -1)  # (pieces, B, D)
            logits = classifier(embedded[pairs[:, 0]], embedded[pairs[:, 1]]).flatten(0, 1)
            classes = classes.to(logits.device)
            weight = (
                1 / classes.bincount(minlength=len(_RELATIONS)).clamp_min(1) if self.config.pairs == "all" else None
            )
            terms[f"relation_{name}"] = functional.cross_entropy(logits, classes, weight=weight)

            corners = _draw_neighbours(images.shape[0], self.config.neighbour_pairs, self.image_size, patch, generator)
            neighbours = self._change_brightness(_cut_pieces(images, corners, patch), generator)
            first, second = embed(neighbours).chunk(2)
            distance = (first - second).norm(dim=1).mean()
            terms[f"compactness_{name}"] = self.config.compactness_weight * distance
        return terms

    def _disturb(self, pieces: Tensor, generator: torch.Generator) -> Tensor:
        """Shift the colours of each piece `(n, 3, K, K)` and add noise."""
        colours = torch.randn(*pieces.shape[:2], 1, 1, generator=generator).to(pieces.device)
        noise = torch.randn(pieces.shape, generator=generator).to(pieces.device)
        return pieces + self.config.colour_noise * colours + self.config.pixel_noise * noise

    def _change_brightness(self, patches: Tensor, generator: torch.Generator) -> Tensor:
        """Brighten or darken each of the patches `(n, 3, K, K)` by an amount of its own."""
        if self.config.brightness_noise == 0:
            return patches
        shifts = torch.randn(patches.shape[0], 1, 1, 1, generator=generator).to(patches.device)
        return patches + self.config.brightness_noise * shifts

    @torch.no_grad()
    def observe_patches(self, images: Tensor) -> None:
        """Take the embeddings of all patches of images `(B, 3, H, W)` into account.

        Raises:
            ValueError: if the images have another size than `image_size`.
            RuntimeError: if the mean image was not measured.
        """
        if self._samples is None:
            capacity, seed = self.config.bank_candidates, self.config.seed
            self._samples = _RowSample(capacity, seed), _RowSample(capacity, seed)
        for sample, grid in zip(self._samples, self._embed_patches(images), strict=True):
            sample.add(_rows(grid))

    def finish_banks(self) -> None:
        """Keep the observed patches, or a coreset of them.

        Raises:
            RuntimeError: if no frames were observed.
        """
        if self._samples is None:
            raise RuntimeError("no frames were observed")
        rows = [_select_coreset(sample.rows(), self.config.bank_rows, self.config.seed) for sample in self._samples]
        self.small_bank, self.large_bank = rows
        self._samples = None

    def forward(self, images: Tensor) -> AnomalyOutput:
        """Judge images `(B, 3, H, W)` float32 in [0, 1].

        Raises:
            ValueError: if the images have another size than `image_size`.
            RuntimeError: if the mean image was not measured or the banks are empty.
        """
        small, large = self._embed_patches(images)
        if self.small_bank.shape[0] == 0:
            raise RuntimeError("there are no good patches yet; run the pass stages over the good frames first")
        anomaly_map = self._map(small, self.small_bank, _SMALL) * self._map(large, self.large_bank, _LARGE)
        return AnomalyOutput(anomaly_map, anomaly_map.amax(dim=(1, 2)))

    def _embed_patches(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Embed all patches of images `(B, 3, H, W)`, mirrored beyond their border: two grids `(B, D, h, w)`."""
        centred = self.encode(images)
        if self.config.margin:
            centred = functional.pad(centred, 4 * [self.config.margin], mode="reflect")
        return self.encoder.encode_grids(centred)

    def _map(self, grid: Tensor, bank: Tensor, patch: int) -> Tensor:
        """Return the map `(B, H, W)` of embeddings `(B, D, h, w)`: each pixel's mean over the patches that cover it."""
        distances = nearest_distances(_rows(grid), bank, self.config.neighbours)
        scores = merge_by_affinity(distances).reshape(-1, *grid.shape[2:])
        rows, columns = (self.get_buffer(f"spread_{axis}_{patch}") for axis in ("rows", "columns"))
        return rows @ scores @ columns.T


def nearest_distances(queries: Tensor, bank: Tensor, count: int) -> Tensor:
    """Return the distances of queries `(n, D)` to their nearest rows of a bank `(M, D)`: `(n, count)`, ascending.

    A matrix product finds the rows. Their distances are then measured from differences, because the product loses the
    digits of small ones, and another runtime would lose others. For the same reason it works on values around the
    bank's middle: patches that lie close together far from zero would be ranked by rounding.
    """
    middle = bank.mean(dim=0)
    centred = bank - middle
    ranking = centred.square().sum(dim=1) - 2 * (queries - middle) @ centred.T  # the query's own square orders nothing
    nearest = ranking.topk(count, dim=1, largest=False).indices
    return (queries[:, None] - bank[nearest]).square().sum(dim=2).sqrt()


def merge_by_affinity(distances: Tensor) -> Tensor:
    """Merge distances to the nearest good patches, so that a patch with one clearly closer neighbour scores low.

    alpha = d / sum of d, beta = 1 / alpha, w = softmax of beta, a = sum of w d (affinity augmentation,
    arXiv:2311.06504), with alpha and beta bounded.

    Args:
        distances: `(n, k)` float32, at least 0, in any order.

    Returns:
        `(n,)` float32, between the smallest and the largest distance.
    """
    bounded = distances.clamp_min(_CLOSEST)
    affinity = (bounded.sum(dim=1, keepdim=True) / bounded).clamp_max(_LARGEST_AFFINITY)
    return (torch.softmax(affinity, dim=1) * distances).sum(dim=1)


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(channels // _GROUP, channels)


def _rows(grid: Tensor) -> Tensor:
    """Turn `(B, D, h, w)` into `(B h w, D)`."""
    return grid.permute(0, 2, 3, 1).reshape(-1, grid.shape[1])


def _of_channels(groups: Tensor) -> Tensor:
    """Give each channel its group's value: `(B, groups, h, w)` to `(B, h, w, C)`."""
    return groups.permute(0, 2, 3, 1)[..., None].expand(-1, -1, -1, -1, _GROUP).flatten(3)


def _places(side: int, stride: int, count: int, device: torch.device) -> Tensor:
    """Return the places that `count` windows of a side hold, one window after the other: `(count side,)`."""
    starts = stride * torch.arange(count, device=device)
    return (starts[:, None] + torch.arange(side, device=device)).flatten()


def _cut(maps: Tensor, side: int, stride: int, grid: tuple[int, int]) -> Tensor:
    """Cut windows out of `(B, C, H, W)`: `(B, C, h, side, w, side)`."""
    rows = _places(side, stride, grid[0], maps.device)
    columns = _places(side, stride, grid[1], maps.device)
    cut = maps.index_select(2, rows).index_select(3, columns)
    return cut.reshape(-1, maps.shape[1], grid[0], side, grid[1], side)


def _cut_pooled(filtered: Tensor, stride: int, grid: tuple[int, int]) -> Tensor:
    """Cut what max pooling (3, stride 2, padding 1) makes of each 28 x 28 patch: `(B, h, w, C, 14, 14)`."""
    rows = _pool_and_cut(filtered, stride // 2, grid[0])  # (B, C, h 14, W)
    both = _pool_and_cut(rows.transpose(2, 3), stride // 2, grid[1])  # (B, C, w 14, h 14)
    patches = both.reshape(-1, filtered.shape[1], grid[1], _POOLED, grid[0], _POOLED)
    return patches.permute(0, 4, 2, 1, 5, 3)


def _pool_and_cut(maps: Tensor, stride: int, count: int) -> Tensor:
    """Pool and cut along the rows of `(B, C, H, W)`: `(B, C, count 14, W)`; the stride is in pooled rows.

    Only the first row of a patch meets its padding; its window holds two rows instead of three.
    """
    odd = maps[:, :, 1::2]
    two = torch.maximum(maps[:, :, 0::2], odd)
    three = torch.maximum(two[:, :, 1:], odd[:, :, :-1])
    places = _places(_POOLED, stride, count, maps.device)
    # The maxima of three rows lie behind those of two, and begin with the second.
    is_later = torch.arange(_POOLED * count, device=maps.device) % _POOLED > 0
    return torch.cat((two, three), dim=2).index_select(2, places + is_later * (maps.shape[2] // 2 - 1))


def _pairs_of_relations() -> tuple[Tensor, Tensor]:
    """Return the ordered pairs of cells of each relation, `(12, 6, 2)` padded, and how many there are, `(12,)`."""
    pairs: list[list[tuple[int, int]]] = [[] for _ in _RELATIONS]
    for first in range(9):
        for second in range(first + 1, 9):
            moved = (second // 3 - first // 3, second % 3 - first % 3)
            pairs[_RELATIONS.index(moved)].append((first, second))
    longest = max(len(own) for own in pairs)
    padded = [own + own[:1] * (longest - len(own)) for own in pairs]
    return torch.tensor(padded), torch.tensor([len(own) for own in pairs])


def _draw_jigsaws(
    count: int, size: tuple[int, int], patch: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw jigsaws: upper left corners `(count, 9, 2)`, the 36 pairs of pieces `(36, 2)`, their classes `(36 count,)`.

    A neighbour lies 3/4 K to K - 1 from the centre along each axis of its direction, so that edges need not continue;
    the centre piece itself is jittered by up to K/32. Classes are those of the first pair in all jigsaws, and so on.
    """
    cells = torch.arange(9)
    directions = torch.stack((cells // 3 - 1, cells % 3 - 1), dim=1)
    moves = directions * (3 * patch // 4 + torch.randint(patch // 4, (count, 9, 2), generator=generator))
    moves[:, 4] = _draw_within(-(patch // 32), patch // 32, (count, 2), generator)
    centres = [_draw_within(patch - 1, side - 2 * patch + 1, (count, 1), generator) for side in size]
    pairs, counts = _pairs_of_relations()
    own = [pairs[relation, :held] for relation, held in enumerate(counts.tolist())]
    classes = torch.arange(len(_RELATIONS)).repeat_interleave(counts).repeat_interleave(count)
    return torch.stack(centres, dim=2) + moves, torch.cat(own), classes


def _draw_pairs(
    count: int, size: tuple[int, int], patch: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw one pair of each of `count` jigsaws: corners `(count, 2, 2)`, the pair `(1, 2)`, its classes `(count,)`.

    A class is drawn first and then one of its pairs, which is the distribution of the code's table.
    """
    corners, _, _ = _draw_jigsaws(count, size, patch, generator)
    pairs, counts = _pairs_of_relations()
    classes = torch.randint(len(_RELATIONS), (count,), generator=generator)
    chosen = (torch.rand(count, generator=generator) * counts[classes]).long()
    pieces = pairs[classes, chosen]  # (count, 2)
    return corners[torch.arange(count)[:, None], pieces], torch.tensor([[0, 1]]), classes


def _draw_neighbours(count: int, pairs: int, size: tuple[int, int], patch: int, generator: torch.Generator) -> Tensor:
    """Draw pairs of patches up to K/32 apart along each axis, and apart, in each of `count` images.

    Returns:
        Corners `(count, 2 pairs, 2)`, all first ones before all second.
    """
    reach = patch // 32
    side = 2 * reach + 1
    # All moves in a row without the one in the middle, which is no move.
    drawn = torch.randint(side**2 - 1, (count, pairs), generator=generator)
    drawn = drawn + (drawn >= side**2 // 2)
    moves = torch.stack((drawn // side - reach, drawn % side - reach), dim=2)
    corners = [_draw_within(reach, length - patch - reach, (count, pairs), generator) for length in size]
    first = torch.stack(corners, dim=2)
    return torch.cat((first, first + moves), dim=1)


def _draw_within(low: int, high: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draw whole numbers from `low` to `high`, both of them included."""
    return torch.randint(low, high + 1, shape, generator=generator)


def _cut_pieces(images: Tensor, corners: Tensor, patch: int) -> Tensor:
    """Cut P pieces out of each image at corners `(B, P, 2)`: `(P B, 3, K, K)`, all first ones before all second."""
    corners = corners.to(images.device)
    places = torch.arange(patch, device=images.device)
    rows = (corners[..., 0, None] + places)[..., :, None]  # (B, P, K, 1)
    columns = (corners[..., 1, None] + places)[..., None, :]
    image = torch.arange(images.shape[0], device=images.device)[:, None, None, None]
    cut = images[image, :, rows, columns]  # (B, P, K, K, 3)
    return cut.permute(1, 0, 4, 2, 3).flatten(0, 1)


def _select_coreset(rows: Tensor, count: int | None, seed: int) -> Tensor:
    """Choose rows of `(n, D)` greedily, each the farthest from those before: `(count, D)`; all if there is room.

    The first one is drawn. Rows are taken around their middle, as in `nearest_distances`.
    """
    if count is None or rows.shape[0] <= count:
        return rows
    chosen = torch.empty(count, dtype=torch.int64, device=rows.device)
    chosen[0] = int(torch.randint(rows.shape[0], (), generator=torch.Generator().manual_seed(seed)))
    centred = rows - rows.mean(dim=0)
    squares = centred.square().sum(dim=1)
    farthest = torch.full_like(squares, math.inf)
    for place in range(1, count):
        last = chosen[place - 1]
        farthest = torch.minimum(farthest, squares - 2 * centred @ centred[last] + squares[last])
        chosen[place] = farthest.argmax()
    return rows[chosen]


def _spread_matrix(side: int, patch: int, stride: int) -> Tensor:
    """Return what gives each of `side` pixels the mean of the patches over it: `(side, patches)` float32.

    Patches lie on a full grid, so the mean over an image is the mean along its rows and then along its columns.
    """
    starts = stride * torch.arange((side - patch) // stride + 1)
    covered = torch.arange(side)[:, None] - starts
    covers = ((covered >= 0) & (covered < patch)).to(torch.float32)
    return covers / covers.sum(dim=1, keepdim=True)


def _refuse_misfits(config: JigsawSvddConfig) -> None:
    least = 3 * _LARGE - 2
    if min(config.image_size) < least:
        raise ValueError(f"a jigsaw of {_LARGE}-pixel pieces needs sides of {least} pixels, not {config.image_size}")
    _refuse_grid(config)
    if any(width < _GROUP or width % _GROUP for width in (*config.encoder_channels, config.embedding_channels)):
        raise ValueError(f"encoder_channels and embedding_channels must be multiples of {_GROUP}")
    of_one_frame = math.prod(
        (side + 2 * config.margin - _LARGE) // config.large_stride + 1 for side in config.image_size
    )
    most = of_one_frame if config.bank_rows is None else min(of_one_frame, config.bank_rows)
    if not 1 <= config.neighbours <= min(most, config.bank_candidates):
        raise ValueError(f"neighbours must lie between 1 and {most}, the patches that are sure to be in a bank")
    if not 0 < config.large_share <= 1:
        raise ValueError(f"large_share must lie in (0, 1], got {config.large_share}")
    if config.neighbour_pairs < 1:
        raise ValueError(f"neighbour_pairs must be at least 1, got {config.neighbour_pairs}")
    for name in ("compactness_weight", "brightness_noise"):
        if getattr(config, name) < 0:
            raise ValueError(f"{name} must not be negative, got {getattr(config, name)}")


def _refuse_grid(config: JigsawSvddConfig) -> None:
    small, large = config.small_stride, config.large_stride
    if small < _CELL or small % _CELL or _SMALL % small or large % small or not small <= large <= _LARGE:
        raise ValueError(
            f"small_stride must be 4, 8, 16 or 32, large_stride a multiple of it up to {_LARGE}; got {small}, {large}"
        )
    if any((side - _SMALL) % small or (side - _LARGE) % large for side in config.image_size):
        raise ValueError(f"patches at strides {small} and {large} do not end at the border of {config.image_size}")
    if config.margin % large or not 0 <= config.margin < min(config.image_size):
        raise ValueError(f"margin must be a multiple of {large} below the frame's sides, got {config.margin}")
