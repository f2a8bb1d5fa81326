"""Frozen pretrained feature extractors, and the only door to timm.

A backbone takes images in [0, 1], normalises them as its weights were trained, and returns the outputs of chosen
layers. Two kinds: `CnnBackbone` returns feature maps, `VitBackbone` returns patch tokens. Both are built with random
weights and refuse to run until `load_weights` was called: a name that silently does not match would leave noise where
features should be. `untrained_weights` is the honest way to noise, for controls and tests.

Rules: layers after the last chosen one are deleted, hence never run; nothing here has a gradient or a training mode;
only `fetch_pretrained` uses the network.
"""

import importlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

_declared_operators: torch.library.Library | None = None
try:
    importlib.import_module("torchvision")
except RuntimeError:
    # timm imports torchvision, whose wheels for one kind of torch do not load their operators on another. It only
    # needs the two names to exist; nothing here calls them. The reference keeps the declaration alive.
    _declared_operators = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]  # torch's
    for _operator in ("nms", "qnms"):
        _schema = f"{_operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        _declared_operators.define(_schema)  # type: ignore[no-untyped-call]  # torch's

import timm  # noqa: E402  (torchvision must be importable first)
from timm.models._efficientnet_builder import decode_arch_def  # noqa: E402  (as above)
from timm.models.efficientnet import EfficientNet  # noqa: E402  (as above)
from timm.models.vision_transformer import VisionTransformer  # noqa: E402  (as above)

# Names that mean another variant than timm's own: MobileNet v1 of TensorFlow pads like TensorFlow and guards its batch
# norms with 1e-3. timm's own training of the architecture keeps its tagged name.
_VARIANTS: Mapping[str, Mapping[str, Any]] = {"mobilenetv1_100": {"pad_type": "same", "bn_eps": 1e-3}}


# The compact network of our own making: MobileNet v1's plan, narrow where pixels are many and wider at strides 8 and
# 16. ReLU instead of ReLU6, because a channel's scale can be folded through it exactly.
EMBEDDED = "embedded"
_EMBEDDED_STEM = 16
_EMBEDDED_PLAN = (["dsa_r1_k3_s1_c32"], ["dsa_r2_k3_s2_c64"], ["dsa_r2_k3_s2_c192"], ["dsa_r6_k3_s2_c384"])


class BackboneUnavailable(LookupError):
    """No pretrained weights of that name can be had from timm, now or at all."""


def _create(name: str, *, pretrained: bool = False) -> Any:
    """Build timm's complete network of that name."""
    if name == EMBEDDED:
        return _create_embedded()
    if not timm.is_model(name.split(".", maxsplit=1)[0]):
        raise ValueError(f"timm knows no backbone named {name!r}; see timm.list_models()")
    return timm.create_model(name, pretrained=pretrained, **_VARIANTS.get(name, {}))


def _create_embedded() -> Any:
    """Build timm's EfficientNet class to the embedded plan; strides 2, 4, 8, 16."""
    network: Any = EfficientNet(
        decode_arch_def(_EMBEDDED_PLAN),  # type: ignore[no-untyped-call]  # timm has no types there
        num_classes=0,
        num_features=0,
        stem_size=_EMBEDDED_STEM,
        pad_type="same",
        act_layer=nn.ReLU,
        norm_layer=partial(nn.BatchNorm2d, eps=1e-3),
    )
    network.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    return network


def fetch_pretrained(name: str) -> dict[str, Tensor]:
    """Download timm's pretrained weights of a backbone.

    Raises:
        BackboneUnavailable: if timm has none for this name, or the download fails.
    """
    if name in _VARIANTS:
        raise BackboneUnavailable(f"timm has no weights for {name}, which is the variant of its original authors")
    if name == EMBEDDED:
        raise BackboneUnavailable("the embedded backbone comes with Flawline and is downloaded from nowhere")
    try:
        state: dict[str, Tensor] = _create(name, pretrained=True).state_dict()
    except Exception as error:  # timm passes on whatever its download library raises; the caller needs one kind
        raise BackboneUnavailable(f"timm's download of {name} failed ({type(error).__name__})") from error
    return state


def untrained_weights(name: str, seed: int = 0) -> dict[str, Tensor]:
    """Return the random weights that timm starts training from: the control that pretraining has to beat.

    Batch norms keep mean 0 and variance 1, hence do nothing. The global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        state: dict[str, Tensor] = _create(name).state_dict()
    return state


class Backbone(nn.Module):
    """What both kinds share: normalisation, strict loading, and staying frozen.

    Attributes:
        name: timm's name.
        layers: indices of the layers whose outputs are returned, in order.
        channels: number of channels of each output.
        strides: pixels of the image per step of each output's grid.
    """

    name: str
    layers: tuple[int, ...]
    channels: tuple[int, ...]
    strides: tuple[int, ...]
    network: Any
    mean: Tensor
    std: Tensor

    def __init__(self, name: str, layers: Sequence[int], network: Any) -> None:
        super().__init__()
        if not layers or list(layers) != sorted(set(layers)):
            raise ValueError(f"layers must be given, ascending and without repetition: {tuple(layers)}")
        self.name = name
        self.layers = tuple(layers)
        self.is_loaded = False
        complete = set(network.state_dict())
        network.prune_intermediate_layers(list(layers), prune_norm=True, prune_head=True)
        self._cut = complete - set(network.state_dict())
        self.network = network.eval().requires_grad_(requires_grad=False)
        for key in ("mean", "std"):
            statistic = torch.tensor(network.pretrained_cfg[key], dtype=torch.float32)
            self.register_buffer(key, statistic.view(1, 3, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> "Backbone":  # noqa: ARG002  (the signature of nn.Module)
        """Stay in eval mode: a frozen backbone never updates its batch norms."""
        return super().train(mode=False)

    def load_weights(self, state_dict: Mapping[str, Tensor]) -> None:
        """Take weights in timm's naming; those of the cut later layers may be present or absent.

        Raises:
            ValueError: if a key is missing, unknown or has another shape; the sentence names it.
        """
        own = {key: value for key, value in self.network.state_dict().items() if not _is_counter(key)}
        given = {key: value for key, value in state_dict.items() if not _is_counter(key) and key not in self._cut}
        missing, unknown = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
        if missing or unknown:
            raise ValueError(f"weights do not fit {self.name}: {_name_some('missing', missing, 'unknown', unknown)}")
        for key, value in given.items():
            if value.shape != own[key].shape:
                shapes = f"{tuple(value.shape)}, expected {tuple(own[key].shape)}"
                raise ValueError(f"weights do not fit {self.name}: {key} has shape {shapes}")
        self.load_state_dict({f"network.{key}": value for key, value in given.items()}, strict=False)
        self.is_loaded = True

    def _normalise(self, images: Tensor) -> Tensor:
        """Bring images `(B, 3, H, W)` in [0, 1] to the statistics of pretraining."""
        if not self.is_loaded:
            raise RuntimeError(f"the backbone {self.name} has no weights yet; call load_weights first")
        return (images - self.mean) / self.std


class CnnBackbone(Backbone):
    """A convolutional pyramid cut behind its last chosen stage.

    Args:
        name: any timm network with intermediate features, for example "resnet18".
        layers: timm's stage indices (`out_indices`); for most networks stage i has stride 2^(i+1).

    Raises:
        ValueError: if timm does not know the name, or the network is a transformer.
    """

    def __init__(self, name: str, layers: Sequence[int], *, network: Any = None) -> None:
        network = _create(name) if network is None else network
        if isinstance(network, VisionTransformer) or not hasattr(network, "prune_intermediate_layers"):
            raise ValueError(f"{name} is not a convolutional network with intermediate features")
        stages = list(network.feature_info)
        if max(layers, default=0) >= len(stages):
            raise ValueError(f"{name} has stages 0 to {len(stages) - 1}, not {max(layers)}")
        super().__init__(name, layers, network)
        self.channels = tuple(int(stages[i]["num_chs"]) for i in layers)
        self.strides = tuple(int(stages[i]["reduction"]) for i in layers)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Extract features of images `(B, 3, H, W)` in [0, 1].

        Returns:
            One `(B, C, H / stride, W / stride)` float32 map for each chosen layer.

        Raises:
            RuntimeError: if no weights were loaded.
        """
        features: list[Tensor] = self.network.forward_intermediates(
            self._normalise(images),
            indices=list(self.layers),
            stop_early=True,
            output_fmt="NCHW",
            intermediates_only=True,
        )
        return features


class VitBackbone(Backbone):
    """A plain vision transformer, read at several blocks, without its final norm.

    Positions are interpolated once, when weights are loaded, by DINOv2's rule: bicubic with the scale (n + 0.1) / n0,
    which samples slightly off the grid that a plain resize to n would use. The graph holds them as a constant.

    Args:
        name: a timm vision transformer, for example "vit_base_patch14_reg4_dinov2".
        layers: 0-based indices of the tapped blocks.
        image_size: `(height, width)` of all images, multiples of the patch size.

    Raises:
        ValueError: if timm does not know the name, it is not a plain transformer, or the size does not fit.
    """

    positions: Tensor
    prefix: Tensor

    def __init__(self, name: str, layers: Sequence[int], image_size: tuple[int, int], *, network: Any = None) -> None:
        network = _create(name) if network is None else network
        if not isinstance(network, VisionTransformer) or network.pos_embed is None:
            raise ValueError(f"{name} is not a plain vision transformer with absolute positions")
        if max(layers, default=0) >= len(network.blocks):
            raise ValueError(f"{name} has blocks 0 to {len(network.blocks) - 1}, not {max(layers)}")
        super().__init__(name, layers, network)
        patch_height, patch_width = network.patch_embed.patch_size
        if image_size[0] % patch_height or image_size[1] % patch_width:
            raise ValueError(f"image size {image_size} is not a multiple of the patch size {patch_height}")
        self.grid = (image_size[0] // patch_height, image_size[1] // patch_width)
        self.channels = (int(network.embed_dim),) * len(layers)
        self.strides = (int(patch_height),) * len(layers)
        self.heads = int(self.network.blocks[0].attn.num_heads)
        self._place_tokens()
        self.register_load_state_dict_post_hook(VitBackbone._place_tokens)  # type: ignore[no-untyped-call]  # torch's

    @torch.no_grad()
    def _place_tokens(self, _: object = None) -> None:
        """Derive from the weights what every image shares: patch positions and the positioned extra tokens."""
        network = self.network
        prefix = [token for token in (network.cls_token, network.reg_token) if token is not None]
        extra = torch.cat(prefix, dim=1) if prefix else network.pos_embed[:, :0]
        embedding = network.pos_embed
        if not network.no_embed_class:
            extra = extra + embedding[:, : extra.shape[1]]
            embedding = embedding[:, extra.shape[1] :]
        height, width = network.patch_embed.grid_size
        positions = embedding.reshape(1, height, width, -1).permute(0, 3, 1, 2)  # (1, C, h, w)
        if (height, width) != self.grid:
            positions = functional.interpolate(
                positions,
                scale_factor=((self.grid[0] + 0.1) / height, (self.grid[1] + 0.1) / width),
                mode="bicubic",
                antialias=False,
            )
        self.register_buffer("positions", positions.flatten(2).transpose(1, 2).clone(), persistent=False)
        self.register_buffer("prefix", extra.clone(), persistent=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Extract patch tokens of images `(B, 3, H, W)` in [0, 1].

        Returns:
            One `(B, N, C)` float32 tensor for each tapped block, patches row by row; class and register tokens are
            dropped.

        Raises:
            RuntimeError: if no weights were loaded.
        """
        network = self.network
        patches = network.patch_embed.proj(self._normalise(images)).flatten(2).transpose(1, 2)  # (B, N, C)
        x = torch.cat((self.prefix.expand(images.shape[0], -1, -1), patches + self.positions), dim=1)
        x = network.norm_pre(x)
        tapped = []
        for index, block in enumerate(network.blocks):
            x = block(x)
            if index in self.layers:
                tapped.append(x[:, self.prefix.shape[1] :])
        return tapped


def build_backbone(name: str, layers: Sequence[int], image_size: tuple[int, int]) -> CnnBackbone | VitBackbone:
    """Build the backbone of that name, whichever kind it is; see the two classes."""
    network = _create(name)
    if isinstance(network, VisionTransformer):
        return VitBackbone(name, layers, image_size, network=network)
    return CnnBackbone(name, layers, network=network)


def _is_counter(key: str) -> bool:
    """Tell batch norm's counter of training steps, which inference never reads and many files leave out."""
    return key.endswith("num_batches_tracked")


def _name_some(*labelled: Any) -> str:
    """Put labels and their keys into one short phrase; long lists end in a count."""
    phrases = []
    for label, keys in zip(labelled[::2], labelled[1::2], strict=True):
        if keys:
            more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
            phrases.append(f"{label} {', '.join(keys[:5])}{more}")
    return "; ".join(phrases)
