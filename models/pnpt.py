"""PNPT: one transformer rebuilds the features of many lines, prompted by what is normal for the line of the frame.

The frozen features of a line's good frames are averaged, place by place: the line's prompt. A transformer rebuilds a
frame's features in two streams, one that starts from the prompt and one that starts from the frame; they are encoded
together and each is decoded on the condition of the other. Where frame and rebuilt features point apart, it is odd.

Paper: Yao, Cao, Luo, Zhang, Yu, Shen, "Prior Normality Prompt Transformer for Multi-class Industrial Image Anomaly
Detection", IEEE Transactions on Industrial Informatics 2024, arXiv:2406.11507.
Reference code: none was published. Only the abstract and two summaries could be read. Certain are the averaged features
as prompts, patches of several sizes that give each scale equally many tokens, two streams coupled in an encoder and
conditioned on each other in decoders, and a cosine loss over scales. The inside of encoder and decoders is a
reconstruction after the same authors' other codes (hmyao22/DADF, hmyao22/GLCF, luow23/TFA-Net, luow23/AMI-Net).

Chosen where the paper could not be read, or changed, each with its reason:
* a WideResNet-50-2 at strides 4, 8 and 16, which the authors use elsewhere;
* a prompt keeps its places; `prompt="global"` averages them too, as "pooled and averaged" may mean;
* embedded scales are added; concatenated ones would need three times the width;
* frame and prompt are encoded as one row of tokens, so that all four couplings exist; `sace="dual"` is DADF's way, in
  which the prompt's stream has values of its own only;
* every line is shown equally often, because lines differ in the number of their frames;
* gradients are clipped at norm 1; the authors' other codes do not clip;
* the descent is in float32 throughout, where those codes scale gradients for half precision, which a CPU gains nothing
  from;
* the last iteration is kept, not the epoch that is best on the test frames: a plant has no test frames;
* hiding a token's own place from the sample stream's attention is left out: the skip around it shows that place again;
* all sizes are free, so that one CPU core can train and serve a small network.

The line of a frame is told by whoever asks. `retrieve_line` guesses it, and refuses what is like no line. Left out:
that guess in the service. Every request names its line in its address, and where a service guessed it, a part might be
judged by another line's thresholds and pass; so retrieval is for Python alone.
Left out too: figures of each stream in an evaluation, which is of what the line's verdicts rest on. `maps_by_stream`
tells both maps, and a detector with a `prior_share` of 1 or 0 is judged by one stream. And a line that is added without
fitting: `judge` takes any prompts, but nobody measured what they are worth, so no command makes them.

Symbols: F_i = `features`, one map `(B, C, h, w)` a scale · P_i^c = `pool`, a row a line · X = `tokens`, T^c = `prompts`
(B, N, D) · Z_X, Z_P = the encoded streams · A^P, A^S = the maps of the prior and the sample stream · omega =
`prior_share` · eta = `squared_error_weight`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.backbones import CnnBackbone
from models.blocks.draws import generator_of_step
from models.blocks.dual_attention import DualBlock
from models.blocks.initial_values import draw_xavier
from models.blocks.jitter import jitter_tokens
from models.blocks.maps import reduce_map, require_image_size
from models.blocks.mlp import Mlp
from models.blocks.on_backbone import OnBackbone
from models.blocks.packing import MapShape, map_shapes, pack, unpack
from models.blocks.patches import unpatchify
from models.blocks.smoothing import SmoothUpsampling
from models.blocks.transformer import SelfAttention, TransformerBlock, sincos_positions
from models.detector import AnomalyOutput, GradientStage, PassStage, Recipe, Stage

UNKNOWN_LINE = -1
"""What `retrieve_line` says of a frame that is like no line; nothing accepts it as a line."""

_EPS = 1e-6  # of every cosine
_SLACK = 1e-5  # of similarities: float32 rounds them differently in batches of another size

_PAPER_RECIPE = Recipe(
    optimiser="adamw",
    learning_rate=1e-4,
    final_learning_rate=1e-4,
    weight_decay=0.01,
    batch_size=16,
    betas=(0.9, 0.95),
    epochs=300,
    clip_gradient_norm=1.0,
    balance_lines=True,
)


@dataclass(frozen=True)
class PnptConfig:
    """Defaults are those of the authors' other codes, or chosen here: the paper's own could not be read.

    Attributes:
        backbone: timm's name; WideResNet-50-2 with torchvision's first weights.
        layers: indices of the tapped stages, ascending; strides 4, 8 and 16.
        image_size: `(height, width)`, multiples of the largest stride.
        lines: how many lines are fitted together.
        token_channels: D, a multiple of 4 and of the heads (512).
        encoder_blocks: depth of the encoder that couples the streams (4).
        decoder_blocks: depth of each of the two decoders (4).
        heads: attention heads (8).
        mlp_ratio: width of each hidden layer over D (4).
        sace: whether frame and prompt are encoded as one row of tokens, or as two streams that share keys.
        prompt: whether a prompt keeps its places or is the same everywhere.
        prior_share: omega, of the prior stream's map in the anomaly map; the rest is the sample stream's.
        squared_error_weight: eta, of the mean squared error beside the cosine distance; 0 for none.
        jitter: noise on the frame's tokens in training, as a multiple of their norm over D; UniAD's is 20, 0 for none.
        blur_sigma: standard deviation of the Gaussian in pixels of the image.
        score_reduction: largest value of the anomaly map, or its standard deviation.
        seed: seeds the initial values and the jitter.
        recipe: the descent.
    """

    backbone: str = "wide_resnet50_2.tv_in1k"
    layers: tuple[int, ...] = (1, 2, 3)
    image_size: tuple[int, int] = (256, 256)
    lines: int = 1
    token_channels: int = 512
    encoder_blocks: int = 4
    decoder_blocks: int = 4
    heads: int = 8
    mlp_ratio: int = 4
    sace: Literal["joint", "dual"] = "joint"
    prompt: Literal["spatial", "global"] = "spatial"
    prior_share: float = 0.5
    squared_error_weight: float = 0.0
    jitter: float = 0.0
    blur_sigma: float = 4.0
    score_reduction: Literal["maximum", "deviation"] = "maximum"
    seed: int = 1
    recipe: Recipe = _PAPER_RECIPE


class Retrieval(NamedTuple):
    """What a detector thinks which lines frames show.

    Attributes:
        line_index: `(B,)` int64, `UNKNOWN_LINE` where a frame is like none of them.
        similarity: `(B,)` float32 in [-1, 1], to the nearest line, also where that is not near enough.
    """

    line_index: Tensor
    similarity: Tensor


class _PatchEmbedding(nn.Module):
    """Hierarchical patch embedding (HPE): cut each scale into equally many patches, embed, and add the scales."""

    def __init__(self, shapes: Sequence[MapShape], patches: Sequence[int], channels: int) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(
            nn.Conv2d(shape[0], channels, patch, stride=patch) for shape, patch in zip(shapes, patches, strict=True)
        )

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Embed maps `(B, C, h, w)`: `(B, N, D)`."""
        scales = [embed(one) for embed, one in zip(self.embeddings, features, strict=True)]
        return torch.stack(scales).sum(dim=0).flatten(2).transpose(1, 2)


class _JointEncoder(nn.Module):
    """Semantic alignment coupling encoding (SACE): both streams in one row of tokens."""

    def __init__(self, config: PnptConfig) -> None:
        super().__init__()
        width, heads, ratio = config.token_channels, config.heads, config.mlp_ratio
        self.blocks = nn.ModuleList(TransformerBlock(width, heads, ratio) for _ in range(config.encoder_blocks))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor, prompts: Tensor) -> tuple[Tensor, Tensor]:
        """Return Z_X and Z_P, both `(B, N, D)`."""
        x = torch.cat((tokens, prompts), dim=1)  # (B, 2 N, D)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return x[:, : tokens.shape[1]], x[:, tokens.shape[1] :]


class _DualEncoder(nn.Module):
    """SACE after DADF: the prompt's stream looks at the frame's keys and mixes values of its own only."""

    def __init__(self, config: PnptConfig) -> None:
        super().__init__()
        width, heads, ratio = config.token_channels, config.heads, config.mlp_ratio
        self.blocks = nn.ModuleList(DualBlock(width, heads, ratio) for _ in range(config.encoder_blocks))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor, prompts: Tensor) -> tuple[Tensor, Tensor]:
        """Return Z_X and Z_P, both `(B, N, D)`."""
        for block in self.blocks:
            tokens, prompts = block(tokens, prompts)
        return self.norm(tokens), self.norm(prompts)


class _CrossAttention(nn.Module):
    """Softmax attention of tokens to those of a condition."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.queries = nn.Linear(channels, channels)
        self.keys_values = nn.Linear(channels, 2 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        queries = self.queries(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
        pairs = self.keys_values(condition).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        keys, values = pairs.unbind()  # each (B, heads, N, D / heads)
        read = functional.scaled_dot_product_attention(queries, keys, values)
        result: Tensor = self.proj(read.transpose(1, 2).flatten(2))
        return result


class _ConditionedBlock(nn.Module):
    """Self-attention, attention to the condition, and a perceptron, each with a norm before and a skip around."""

    def __init__(self, channels: int, heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn = SelfAttention(channels, heads)
        self.norm2 = nn.LayerNorm(channels)
        self.cross = _CrossAttention(channels, heads)
        self.norm3 = nn.LayerNorm(channels)
        self.mlp = Mlp(channels, mlp_ratio)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        x = x + self.cross(self.norm2(x), condition)
        result: Tensor = x + self.mlp(self.norm3(x))
        return result


class _Decoder(nn.Module):
    """Contextual semantic conditional decoding (CSCD) of one stream, on the condition of the other."""

    def __init__(self, config: PnptConfig) -> None:
        super().__init__()
        width, heads, ratio = config.token_channels, config.heads, config.mlp_ratio
        self.blocks = nn.ModuleList(_ConditionedBlock(width, heads, ratio) for _ in range(config.decoder_blocks))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Decode tokens `(B, N, D)`, keeping their shape."""
        for block in self.blocks:
            x = block(x, condition)
        result: Tensor = self.norm(x)
        return result


class _PromptTransformer(nn.Module):
    """All that is learnt: maps `(B, C, h, w)` of a frame and tokens of a prompt to both rebuilt pyramids."""

    positions: Tensor

    def __init__(self, shapes: Sequence[MapShape], config: PnptConfig, generator: torch.Generator) -> None:
        super().__init__()
        width = config.token_channels
        self.grid = (shapes[-1][1], shapes[-1][2])
        self.patches = [shape[1] // self.grid[0] for shape in shapes]
        self.embedding = _PatchEmbedding(shapes, self.patches, width)
        self.register_buffer("positions", sincos_positions(self.grid, width), persistent=False)
        self.sample_stream = nn.Parameter(torch.empty(width))
        self.prior_stream = nn.Parameter(torch.empty(width))
        self.encoder = _JointEncoder(config) if config.sace == "joint" else _DualEncoder(config)
        self.prior_decoder = _Decoder(config)
        self.sample_decoder = _Decoder(config)
        self.predictions = nn.ModuleList(
            nn.Linear(width, patch * patch * shape[0]) for shape, patch in zip(shapes, self.patches, strict=True)
        )
        for stream in (self.sample_stream, self.prior_stream):
            nn.init.normal_(stream, std=0.02, generator=generator)
        draw_xavier(self, generator)

    def embed_sample(self, features: Sequence[Tensor], disturb: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Return X of a frame's maps, `(B, N, D)`; what is embedded may be disturbed before it is told its place."""
        tokens: Tensor = self.embedding(features)
        return (tokens if disturb is None else disturb(tokens)) + self.positions + self.sample_stream

    def embed_prompt(self, features: Sequence[Tensor]) -> Tensor:
        """Return T of a prompt's maps, `(B, N, D)`."""
        tokens: Tensor = self.embedding(features) + self.positions + self.prior_stream
        return tokens

    def forward(self, tokens: Tensor, prompts: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return what the prior and the sample stream rebuild, shaped as the features are."""
        sample, prior = self.encoder(tokens, prompts)
        return (
            self._predict(self.prior_decoder(prior, condition=sample)),
            self._predict(self.sample_decoder(sample, condition=prior)),
        )

    def _predict(self, tokens: Tensor) -> list[Tensor]:
        return [
            unpatchify(predict(tokens), self.grid, patch)
            for predict, patch in zip(self.predictions, self.patches, strict=True)
        ]


class Pnpt(OnBackbone):
    """Prior normality prompt transformer over a frozen CNN pyramid, for one line or several.

    Raises:
        ValueError: if the configuration contradicts itself or the backbone.
    """

    pool: Tensor
    prompts: Tensor
    least_similarity: Tensor
    is_measured: Tensor
    is_embedded: Tensor

    def __init__(self, config: PnptConfig) -> None:
        super().__init__()
        self.config = config
        self.image_size = config.image_size
        self.lines = config.lines
        self.backbone = CnnBackbone(config.backbone, config.layers)
        _refuse_misfits(config, self.backbone.strides)
        self.shapes = map_shapes(self.backbone.channels, self.backbone.strides, config.image_size)
        self.transformer = _PromptTransformer(self.shapes, config, torch.Generator().manual_seed(config.seed))
        self.smoothings = nn.ModuleList(
            SmoothUpsampling(shape[1:], config.image_size, config.blur_sigma, align_corners=False)
            for shape in self.shapes
        )
        size = sum(math.prod(shape) for shape in self.shapes)
        self.register_buffer("pool", torch.zeros(config.lines, size))
        places = math.prod(self.transformer.grid)
        self.register_buffer("prompts", torch.zeros(config.lines, places, config.token_channels))
        self.register_buffer("least_similarity", torch.ones(config.lines))
        self.register_buffer("is_measured", torch.zeros((), dtype=torch.bool))
        self.register_buffer("is_embedded", torch.zeros((), dtype=torch.bool))
        # An exported graph can't branch on a tensor, so a plain copy of `is_embedded` is kept beside it.
        self._may_run = False
        self.register_load_state_dict_post_hook(Pnpt._copy_flag)  # type: ignore[no-untyped-call]  # torch's
        self._forget()

    def _copy_flag(self, _: object = None) -> None:
        self._may_run = bool(self.is_embedded)

    def _forget(self) -> None:
        self._sums = torch.zeros(0, dtype=torch.float64)
        self._counts = torch.zeros(self.lines, dtype=torch.int64)

    def stages(self) -> Sequence[Stage]:
        """Return the pass that averages the lines' features, the descent, and the pass that embeds the averages."""
        return [
            PassStage("prompts", None, self.finish_prompts, self.observe_prompts),
            GradientStage(
                name="reconstruction",
                loss=None,
                parameters=list(self.transformer.parameters()),
                recipe=self.config.recipe,
                encode=self.encode,
                line_loss=self.loss,
            ),
            PassStage("similarities", None, self.finish_similarities, self.observe_similarities),
        ]

    def observe_prompts(self, images: Tensor, line_index: Tensor) -> None:
        """Add the features of good images `(B, 3, H, W)` to the sums of their lines `(B,)`, in float64."""
        if not self._sums.numel():
            self._sums = torch.zeros(self.pool.shape, dtype=torch.float64)
        self._sums.index_add_(0, line_index.cpu(), self.encode(images).double().cpu())
        self._count(line_index)

    def finish_prompts(self) -> None:
        """Keep the average of each line.

        Raises:
            RuntimeError: if a line has no frames.
        """
        self._refuse_missing_lines()
        self.pool.copy_(self._sums / self._counts[:, None])
        self.is_measured.fill_(True)
        self._forget()

    @torch.no_grad()
    def observe_similarities(self, images: Tensor, line_index: Tensor) -> None:
        """Keep how little a good image `(B, 3, H, W)` may resemble the prompt of its own line `(B,)`."""
        if not bool(self._counts.any()):
            self.least_similarity.fill_(1)
        is_own = line_index[:, None] == torch.arange(self.lines, device=line_index.device)
        least = torch.where(is_own, self._similarities(images), 1.0).amin(dim=0)
        self.least_similarity.copy_(torch.minimum(self.least_similarity, least))
        self._count(line_index)

    @torch.no_grad()
    def finish_similarities(self) -> None:
        """Keep the prompts as the learnt embedding sees them; it does not change any more.

        Raises:
            RuntimeError: if a line has no frames.
        """
        self._refuse_missing_lines()
        self.prompts.copy_(self.transformer.embed_prompt(self._prompt_maps()))
        self.is_embedded.fill_(True)
        self._may_run = True
        self._forget()

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Return F of images `(B, 3, H, W)`, all scales in one row: `(B, sum of C h w)`.

        Raises:
            ValueError: if the images have another size than `image_size`.
            RuntimeError: if the backbone has no weights.
        """
        return pack(self._see(images))

    def loss(self, encoded: Tensor, line_index: Tensor, step: int) -> dict[str, Tensor]:
        """Return the cosine distances of both streams, each summed over scales, of encoded good frames.

        L = sum over s in {P, S} and i of mean over places of 1 - cos(F_i, F^_i^s); with eta above 0 also eta times the
        mean squared errors.

        Args:
            encoded: `(B, sum of C h w)`.
            line_index: `(B,)` int64.
            step: seeds the jitter.

        Raises:
            RuntimeError: if the prompts were not averaged.
        """
        features = unpack(encoded, self.shapes)
        prompts = self.transformer.embed_prompt(self._prompt_maps()).index_select(0, line_index)
        tokens = self.transformer.embed_sample(features, self._jitter(step) if self.config.jitter else None)
        prior, sample = self.transformer(tokens, prompts)
        terms = {"prior": _mean_distance(features, prior), "sample": _mean_distance(features, sample)}
        if self.config.squared_error_weight:
            errors = _squared_error(features, prior) + _squared_error(features, sample)
            terms["squared error"] = self.config.squared_error_weight * errors
        return terms

    def _jitter(self, step: int) -> Callable[[Tensor], Tensor]:
        return lambda tokens: jitter_tokens(tokens, self.config.jitter, generator_of_step(self.config.seed, step))

    @torch.no_grad()
    def retrieve_line(self, images: Tensor) -> Retrieval:
        """Guess which lines images `(B, 3, H, W)` show, by the direction of their mean coarsest features.

        A frame is of no known line if it resembles the nearest line's prompt less than each good frame of that line
        did. That bound is optimistic: those frames made the prompt and lie nearer to it than new ones. After one frame
        most new good frames are refused, after some dozens few; how many is a matter of the line.

        Raises:
            ValueError: if the images have another size than `image_size`.
            RuntimeError: if a pass has not run.
        """
        self._refuse_unfitted()
        similarity, nearest = self._similarities(images).max(dim=1)
        is_known = similarity >= self.least_similarity[nearest] - _SLACK
        return Retrieval(torch.where(is_known, nearest, UNKNOWN_LINE), similarity)

    def forward(self, images: Tensor, line_index: Tensor | None = None) -> AnomalyOutput:
        """Judge images `(B, 3, H, W)` float32 in [0, 1] of the lines `(B,)` int64; see `LineConditioned`.

        Raises:
            ValueError: if the images have another size than `image_size`, or a line was not fitted on.
            RuntimeError: if a pass has not run, or the backbone has no weights.
        """
        return self.judge(images, self.choose_prompts(images.shape[0], line_index))

    def judge(self, images: Tensor, prompts: Tensor) -> AnomalyOutput:
        """Judge images by prompts `(B, N, D)` that may come from elsewhere; see `choose_prompts` and `forward`."""
        prior, sample = self.maps_by_stream(images, prompts)
        anomaly_map = self.config.prior_share * prior + (1 - self.config.prior_share) * sample
        return AnomalyOutput(anomaly_map, reduce_map(anomaly_map, self.config.score_reduction))

    def maps_by_stream(self, images: Tensor, prompts: Tensor) -> tuple[Tensor, Tensor]:
        """Return A^P and A^S of images `(B, 3, H, W)`, both `(B, H, W)`: summed over scales, resized and smoothed.

        Args:
            images: float32 in [0, 1].
            prompts: `(B, N, D)`, the tokens of each image's line.

        Raises:
            ValueError: if the images have another size than `image_size`.
            RuntimeError: if the backbone has no weights.
        """
        features = self._see(images)
        prior, sample = self.transformer(self.transformer.embed_sample(features), prompts)
        return self._smooth(features, prior), self._smooth(features, sample)

    def choose_prompts(self, count: int, line_index: Tensor | None = None) -> Tensor:
        """Return the prompts of so many images, `(B, N, D)`.

        Args:
            count: B.
            line_index: `(B,)` int64, or None for the only line.

        Raises:
            ValueError: if an index is out of range, or is left out where there are several lines.
            RuntimeError: if a pass has not run.
        """
        self._refuse_unfitted()
        if line_index is None:
            if self.lines != 1:
                raise ValueError(f"this detector was fitted on {self.lines} lines; tell which one each image shows")
            return self.prompts.expand(count, -1, -1)
        # A graph can't look at values; there the host does.
        if not torch.compiler.is_compiling() and bool(((line_index < 0) | (line_index >= self.lines)).any()):
            raise ValueError(
                f"this detector was fitted on the lines 0 to {self.lines - 1} and knows no line of the indices "
                f"{sorted(set(line_index.tolist()) - set(range(self.lines)))}"
            )
        return self.prompts.index_select(0, line_index)

    def _see(self, images: Tensor) -> list[Tensor]:
        """Return F, one map `(B, C, h, w)` a scale."""
        require_image_size(images, self.image_size)
        with torch.no_grad():
            features: list[Tensor] = self.backbone(images)
        return features

    def _prompt_maps(self) -> list[Tensor]:
        """Return the prompt of each line, one map `(lines, C, h, w)` a scale."""
        if not bool(self.is_measured):
            raise RuntimeError("the prompts were not averaged yet; run the pass stages over the good frames first")
        maps = unpack(self.pool, self.shapes)
        if self.config.prompt == "spatial":
            return maps
        return [one.mean(dim=(2, 3), keepdim=True).expand_as(one) for one in maps]

    def _similarities(self, images: Tensor) -> Tensor:
        """Return the cosine of each image's mean coarsest feature with that of each line's prompt: `(B, lines)`."""
        seen, known = (maps[-1].mean(dim=(2, 3)) for maps in (self._see(images), self._prompt_maps()))
        return functional.normalize(seen, dim=1, eps=_EPS) @ functional.normalize(known, dim=1, eps=_EPS).T

    def _smooth(self, features: Sequence[Tensor], rebuilt: Sequence[Tensor]) -> Tensor:
        maps = [
            smooth(_distances(*pair))
            for smooth, pair in zip(self.smoothings, zip(features, rebuilt, strict=True), strict=True)
        ]
        return torch.stack(maps).sum(dim=0)

    def _count(self, line_index: Tensor) -> None:
        self._counts += torch.bincount(line_index.cpu(), minlength=self.lines)

    def _refuse_unfitted(self) -> None:
        if not self._may_run:
            raise RuntimeError("the prompts were not embedded yet; run the pass stages over the good frames first")

    def _refuse_missing_lines(self) -> None:
        missing = [index for index, count in enumerate(self._counts.tolist()) if count == 0]
        if missing:
            raise RuntimeError(f"no good frames were observed of the lines {missing}; a prompt needs at least one")


def _refuse_misfits(config: PnptConfig, strides: Sequence[int]) -> None:
    coarsest = strides[-1]
    if any(side % coarsest for side in config.image_size):
        raise ValueError(f"image size {config.image_size} is not a multiple of the stride {coarsest}")
    if any(coarsest % stride for stride in strides):
        raise ValueError(f"the strides {tuple(strides)} do not divide each other")
    if config.token_channels % config.heads or config.token_channels % 4:
        raise ValueError(f"{config.token_channels} channels must be a multiple of 4 and of {config.heads} heads")
    if config.lines < 1:
        raise ValueError(f"a detector is fitted on at least one line, not {config.lines}")
    if not 0 <= config.prior_share <= 1:
        raise ValueError(f"prior_share is a share, from 0 to 1, not {config.prior_share}")


def _distances(features: Tensor, rebuilt: Tensor) -> Tensor:
    """Return 1 - cos at every place of two maps `(B, C, h, w)`: `(B, h, w)`."""
    return 1 - functional.cosine_similarity(features, rebuilt, dim=1, eps=_EPS)


def _mean_distance(features: Sequence[Tensor], rebuilt: Sequence[Tensor]) -> Tensor:
    """Return the mean cosine distance of each scale, summed over scales."""
    return torch.stack([_distances(*pair).mean() for pair in zip(features, rebuilt, strict=True)]).sum()


def _squared_error(features: Sequence[Tensor], rebuilt: Sequence[Tensor]) -> Tensor:
    """Return the mean squared error of each scale, summed over scales."""
    return torch.stack([functional.mse_loss(*pair) for pair in zip(rebuilt, features, strict=True)]).sum()
