"""The frozen image encoder: any timm or transformers vision model as (B, P, V) tokens.

B pictures, P tokens, V width, h × w patch grid.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn

from qformer.backbones import inside
from qformer.config import VisionConfig
from qformer.errors import ConfigError, did_you_mean, reason
from qformer.nn.tokens import Tokens
from qformer.tensorfiles import load_tensors, read_pickle

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
HEADS = ("head", "classifier", "fc", "head_dist")
INSIDE_LAVIS = "visual_encoder."
"""What an encoder's tensors begin with in a file of LAVIS that holds an adapter too."""
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class VisionTower(Protocol):
    """What the rest needs of an encoder; bring any callable with a width."""

    width: int

    def __call__(self, pixels: Tensor) -> Tokens:
        """(B, 3, H, W) -> tokens (B, P, V)."""
        ...


@dataclass(frozen=True)
class VisionSettings:
    """How an encoder wants its pictures; known without its weights.  `patch`: pixels a side, 1 where there is none."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    patch: int = 1


OWN = "callable:"
"""What the name of an encoder begins with that was given as a callable."""


class OwnTower(nn.Module):
    """An encoder that a user brings, frozen if it has weights: pictures, audio, sensors, anything.

    A callable with `width` (V) that takes B signals, as they stand in `Batch.pixels`, and gives `Tokens` or a tensor
    (B, P, V).  For pictures out of files it also has `settings`, a `VisionSettings`.
    """

    def __init__(self, encoder: Any):
        super().__init__()
        kind = getattr(encoder, "name", None) or getattr(encoder, "__qualname__", type(encoder).__qualname__)
        width = getattr(encoder, "width", None)
        if not isinstance(width, int):
            raise ConfigError(
                f"the encoder '{kind}' was given as a callable, and its width is {width}; give it an attribute "
                f"`width`, the length of its tokens."
            )
        self.encoder, self.width, self.name, self.revision = encoder, width, f"{OWN}{kind}", None
        self.requires_grad_(False)
        self.eval()

    @property
    def settings(self) -> VisionSettings:
        """How its pictures are to be made.

        Raises:
            ConfigError: it does not say.
        """
        found = getattr(self.encoder, "settings", None)
        if found is None:
            raise ConfigError(
                f"the encoder '{self.name}' does not say how pictures are made for it; give it an attribute `settings` "
                f"(a VisionSettings), or make batches of its signals by hand."
            )
        return cast(VisionSettings, found)

    def train(self, mode: bool = True) -> OwnTower:
        """Frozen in mode too."""
        return super().train(False)

    def forward(self, signals: Tensor) -> Tokens:
        """Signals (B, …) -> tokens (B, P, V).

        Raises:
            ConfigError: it gives something else.
        """
        found = self.encoder(signals)
        tokens = found if isinstance(found, Tokens) else Tokens(found)
        shape = tuple(getattr(tokens.values, "shape", ()))
        if len(shape) != 3 or shape[0] != len(signals) or shape[2] != self.width:
            raise ConfigError(
                f"the encoder '{self.name}' gave {shape or type(found).__name__} for {len(signals)} signals; it is to "
                f"give tokens ({len(signals)}, P, {self.width}), as its width says."
            )
        return tokens


class FrozenTower(nn.Module):
    """A frozen model and the way to its tokens; stays in evaluation mode.  `settings`: the pictures it wants."""

    def __init__(
        self,
        model: nn.Module,
        read: Callable[[Tensor], Tokens],
        width: int,
        settings: VisionSettings,
        config: VisionConfig,
    ):
        super().__init__()
        self.model, self.read, self.width = model, read, width
        self.settings, self.name, self.revision = settings, config.name, config.revision
        model.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> FrozenTower:
        """Frozen in mode too."""
        return super().train(False)

    def forward(self, pixels: Tensor) -> Tokens:
        """(B, 3, H, W) -> tokens (B, P, V) in the tower's dtype."""
        return self.read(pixels.to(next(self.model.parameters()).dtype))


def kind_of(config: VisionConfig) -> Literal["timm", "transformers"]:
    """Which library a name belongs to.

    Raises:
        ConfigError: it is no directory of a model, no timm name, and no hub id.
    """
    import timm

    name = config.name
    if name.startswith(OWN):
        raise ConfigError(
            f"vision.name is '{name}', an encoder that was given as a callable; give it again, as in "
            f"load(..., vision=encoder)."
        )
    folder = Path(name)
    if folder.is_dir():
        file = folder / "config.json"
        try:
            raw = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        except ValueError as error:
            raise ConfigError(f"vision.name: {file} is not valid JSON ({error}).") from None
        if "model_type" in raw:
            return "transformers"
        if "architecture" in raw:
            return "timm"
        raise ConfigError(
            f"vision.name is the directory '{name}', and its config.json names no model (neither 'model_type' nor "
            f"'architecture'); for weights of a timm model, set vision.name to the model and vision.checkpoint to them."
        )
    if name.startswith(("hf-hub:", "local-dir:", "timm/")) or timm.is_model(name.split(".")[0]):
        return "timm"
    if name.count("/") == 1 and not name.startswith((".", "/")):
        return "transformers"
    near = did_you_mean(name, timm.list_models()).split(" Known:")[0]
    raise ConfigError(
        f"vision.name is '{name}', which is no directory, no timm model and no hub id.{near} "
        f"Give a timm name (timm.list_models()), a directory with config.json, or a hub id like owner/name."
    )


def check_vision(config: VisionConfig) -> None:
    """Refuse, before any weight is read, what cannot work.

    Raises:
        ConfigError: an unknown name or dtype, numbers that cannot be right, or a checkpoint that is not there.
    """
    if config.dtype not in DTYPES:
        raise ConfigError(f"vision.dtype is '{config.dtype}'; it takes {', '.join(DTYPES)}.")
    for name, triple in (("mean", config.mean), ("std", config.std)):
        if triple is not None and (len(triple) != 3 or (name == "std" and min(triple) <= 0)):
            raise ConfigError(
                f"vision.{name} is {list(triple)}; it takes three numbers, one a colour{', above 0' * (name == 'std')}."
            )
    if config.image_size is not None and config.image_size < 1:
        raise ConfigError(f"vision.image_size is {config.image_size}; it takes pixels a side, at least 1.")
    kind = kind_of(config)
    if config.checkpoint is not None:
        if kind == "transformers":
            raise ConfigError(
                f"vision.checkpoint goes with a timm name, and '{config.name}' is a transformers model that brings its "
                f"own weights; leave vision.checkpoint out."
            )
        _checkpoint_file(config.checkpoint)
    if config.revision is not None and kind == "timm" and not config.name.startswith(("hf-hub:", "timm/")):
        raise ConfigError(
            f"vision.revision goes with a hub id, and '{config.name}' is timm's own name, whose tag says which "
            f"weights; leave vision.revision out, or name the hub id (timm/…)."
        )


def vision_settings(config: VisionConfig) -> VisionSettings:
    """Size, mean, std and interpolation: the model's own, or what the settings say instead.

    Raises:
        ConfigError: no model can be made of the name, or patches would not fill the pictures.
    """
    own = _timm_settings(config) if kind_of(config) == "timm" else _transformers_settings(config)
    if (config.image_size or 0) % own.patch:
        below = config.image_size // own.patch * own.patch if config.image_size else 0
        near = " or ".join(str(size) for size in (below, below + own.patch) if size)
        raise ConfigError(
            f"vision.image_size is {config.image_size}, and the patches of '{config.name}' are {own.patch} pixels "
            f"wide, so that a rim would be lost; take {near}."
        )
    return VisionSettings(
        size=config.image_size or own.size,
        mean=tuple(config.mean or own.mean),
        std=tuple(config.std or own.std),
        interpolation=config.interpolation or own.interpolation,
        patch=own.patch,
    )


def load_vision(config: VisionConfig) -> FrozenTower:
    """The encoder that the settings name, frozen.

    Raises:
        ConfigError: unknown names, weights that do not fit, a block that is not there.
    """
    check_vision(config)
    return _load_timm(config) if kind_of(config) == "timm" else _load_transformers(config)


# -- timm -------------------------------------------------------------------------------------------------------------


def _timm_name(config: VisionConfig) -> str:
    if Path(config.name).is_dir():
        return f"local-dir:{config.name}"
    name = f"hf-hub:{config.name}" if config.name.startswith("timm/") else config.name
    return f"{name}@{config.revision}" if config.revision else name


def _timm_settings(config: VisionConfig) -> VisionSettings:
    import timm
    from timm.data import resolve_data_config

    try:
        with torch.device("meta"):
            model = timm.create_model(_timm_name(config), pretrained=False, num_classes=0)
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(f"vision.name is '{config.name}', and timm makes no model of it ({reason(error)}).") from None
    data = resolve_data_config({}, model=model)
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", 1)
    patch = patch if isinstance(patch, int) else patch[0]
    return VisionSettings(data["input_size"][-1], data["mean"], data["std"], data["interpolation"], patch)


def _load_timm(config: VisionConfig) -> FrozenTower:
    import timm

    settings = vision_settings(config)
    resized: dict[str, Any] = {"img_size": settings.size} if config.image_size else {}
    download = config.pretrained and config.checkpoint is None
    try:
        model = timm.create_model(_timm_name(config), pretrained=download, num_classes=0, **resized)
    except TypeError:  # networks of feature maps take any size and no such argument
        model = timm.create_model(_timm_name(config), pretrained=download, num_classes=0)
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"vision.name '{config.name}': its weights cannot be had ({reason(error)}); give a local file "
            f"as vision.checkpoint."
        ) from None
    if config.checkpoint is not None:
        _fill(model, config.checkpoint, _unread(model, config))
    model = cast(Any, model.to(DTYPES[config.dtype]))
    if config.block is None and config.norm:
        return FrozenTower(
            model,
            lambda pixels: _timm_tokens(model, model.forward_features(pixels), config),
            model.num_features,
            settings,
            config,
        )
    return _timm_block(model, config, settings)


def _timm_tokens(model: Any, features: Any, config: VisionConfig) -> Tokens:
    """Whatever `forward_features` gives: (B, N, C) tokens, or a feature map in either layout.

    Raises:
        ConfigError: it gives several of them.
    """
    if not isinstance(features, Tensor):
        raise ConfigError(
            f"vision.name is '{config.name}', which gives {len(features)} maps of features and not one; set "
            f"vision.block, such as -1, to read one of them, or name another encoder."
        )
    if features.ndim == 3:
        prefix = getattr(model, "num_prefix_tokens", 0)
        return Tokens(features if config.class_token else features[:, prefix:], None, _grid(features.shape[1] - prefix))
    if getattr(model, "output_fmt", "NCHW") == "NHWC":
        features = features.permute(0, 3, 1, 2)
    return Tokens(features.flatten(2).transpose(1, 2), None, (features.shape[2], features.shape[3]))


def _timm_block(model: Any, config: VisionConfig, settings: VisionSettings) -> FrozenTower:
    """A block other than the last, or the last without its norm; of a ViT, what lies behind it is dropped."""
    if not hasattr(model, "forward_intermediates"):
        raise ConfigError(
            f"vision.name is '{config.name}', whose blocks this release of timm does not give one by one; read its end "
            f"(vision.block: null, vision.norm: true), install a newer timm, or name another encoder."
        )
    blocks = len(getattr(model, "feature_info", []) or getattr(model, "blocks", []))
    chosen = (config.block if config.block is not None else -1) % max(1, blocks)
    if not blocks or not -blocks <= (config.block or -1) < blocks:
        raise ConfigError(
            f"vision.block is {config.block}; '{config.name}' has {blocks} blocks: it takes {-blocks} to {blocks - 1}."
        )
    prefix = getattr(model, "num_prefix_tokens", 0)
    is_tokens = "return_prefix_tokens" in inspect.signature(model.forward_intermediates).parameters
    if is_tokens:  # what lies behind the block is neither kept in memory nor computed
        model.prune_intermediate_layers(indices=[chosen], prune_norm=not config.norm, prune_head=True)

    def read(pixels: Tensor) -> Tokens:
        if not is_tokens:
            [map_] = model.forward_intermediates(pixels, indices=[chosen], intermediates_only=True)
            return Tokens(map_.flatten(2).transpose(1, 2), None, (map_.shape[2], map_.shape[3]))
        [found] = model.forward_intermediates(
            pixels, indices=[chosen], norm=config.norm, output_fmt="NLC", intermediates_only=True,
            return_prefix_tokens=bool(prefix), stop_early=True,
        )  # fmt: skip
        if not prefix:
            return Tokens(found, None, _grid(found.shape[1]))
        patches, marks = found
        values = torch.cat([marks, patches], 1) if config.class_token else patches
        return Tokens(values, None, _grid(patches.shape[1]))

    with torch.no_grad():
        width = read(torch.zeros(1, 3, settings.size, settings.size, dtype=DTYPES[config.dtype])).values.shape[-1]
    return FrozenTower(model, read, width, settings, config)


def _unread(model: Any, config: VisionConfig) -> Callable[[str], bool]:
    """Which of a model's tensors do not matter: those behind the block that is read, and heads."""
    blocks = len(getattr(model, "blocks", []))
    last = (config.block if config.block is not None else -1) % max(1, blocks)

    def behind(name: str) -> bool:
        first, _, rest = name.partition(".")
        if first == "blocks":
            return blocks > 0 and int(rest.partition(".")[0]) > last
        return first in HEADS or (not config.norm and first in ("norm", "fc_norm"))

    return behind


def _fill(model: nn.Module, checkpoint: str, unread: Callable[[str], bool]) -> None:
    """Fill a timm model from a local file; what is not read may be missing from either."""
    file = _checkpoint_file(checkpoint)
    if file.suffix == ".safetensors":
        tensors = load_tensors(file)
    else:
        held = read_pickle(file)
        held = held.get("model", held.get("state_dict", held))
        tensors = {name: tensor for name, tensor in held.items() if isinstance(tensor, Tensor)}
    inner = {n.removeprefix(INSIDE_LAVIS): t for n, t in tensors.items() if n.startswith(INSIDE_LAVIS)}
    tensors = inner or tensors
    own = model.state_dict()
    if "pos_embed" in own and "pos_embed" in tensors and own["pos_embed"].shape != tensors["pos_embed"].shape:
        marks = getattr(model, "num_prefix_tokens", 0)
        tensors["pos_embed"] = _resampled(tensors["pos_embed"], own["pos_embed"], marks)
    strays = ("num_batches_tracked", "inv_freq", "relative_position_index")
    missing = sorted(n for n in own.keys() - tensors.keys() if not n.endswith(strays) and not unread(n))
    unexpected = sorted(n for n in tensors.keys() - own.keys() if not n.endswith(strays) and not unread(n))
    shared = own.keys() & tensors.keys()
    differing = sorted(n for n in shared if own[n].shape != tensors[n].shape and not unread(n))
    for what, listed in (("lacks", missing), ("has unknown", unexpected), ("has other shapes for", differing)):
        if listed:
            more = f" and {len(listed) - 5} more" if len(listed) > 5 else ""
            raise ConfigError(
                f"vision.checkpoint {file} {what} {', '.join(listed[:5])}{more}; it belongs to another model."
            )
    fitting = {name: tensors[name] for name in shared if own[name].shape == tensors[name].shape}
    model.load_state_dict(fitting, strict=False)


def _resampled(found: Tensor, wanted: Tensor, marks: int) -> Tensor:
    """Learned positions (1, marks + P, V) for another grid: bicubic, as LAVIS and transformers do; as it was if odd."""
    side, new = round((found.shape[1] - marks) ** 0.5), round((wanted.shape[1] - marks) ** 0.5)
    if side * side != found.shape[1] - marks or new * new != wanted.shape[1] - marks:
        return found
    grid = found[:, marks:].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
    grid = nn.functional.interpolate(grid, (new, new), mode="bicubic", align_corners=False)
    return torch.cat([found[:, :marks], grid.flatten(2).transpose(1, 2).to(found.dtype)], dim=1)


def _checkpoint_file(checkpoint: str) -> Path:
    path = Path(checkpoint)
    if path.is_dir():
        found = sorted(path.glob("*.safetensors")) or sorted(path.glob("*.pth")) or sorted(path.glob("*.bin"))
        if not found:
            raise ConfigError(f"vision.checkpoint: no .safetensors or .pth file in {path}.")
        return found[0]
    if not path.is_file():
        raise ConfigError(f"vision.checkpoint: there is no file {path}.")
    return path


# -- transformers -----------------------------------------------------------------------------------------------------


def _transformers_config(config: VisionConfig) -> Any:
    from transformers import AutoConfig

    try:
        found = AutoConfig.from_pretrained(config.name, revision=config.revision)
    except Exception as error:  # files that are broken raise all kinds
        raise ConfigError(
            f"vision.name is '{config.name}', and no model can be read from there ({reason(error)}); give "
            f"a directory with config.json, a hub id, or a timm name."
        ) from None
    if getattr(getattr(found, "vision_config", found), "image_size", None) is None and not hasattr(
        found, "num_channels"
    ):
        raise ConfigError(
            f"vision.name is '{config.name}', a model of type '{found.model_type}', which takes no pictures; name a "
            f"vision model."
        )
    return found


def _transformers_settings(config: VisionConfig) -> VisionSettings:
    from transformers import AutoImageProcessor

    found = _transformers_config(config)
    size = getattr(getattr(found, "vision_config", found), "image_size", 224)
    size = size if isinstance(size, int) else size[0]
    patch = getattr(getattr(found, "vision_config", found), "patch_size", 1)
    patch = patch if isinstance(patch, int) else 1
    try:
        processor = AutoImageProcessor.from_pretrained(config.name, revision=config.revision)
    except (OSError, ValueError):
        return VisionSettings(size, CLIP_MEAN, CLIP_STD, "bicubic", patch)
    filters = {0: "nearest", 2: "bilinear", 3: "bicubic"}
    resample = filters.get(int(processor.resample), "bicubic")
    return VisionSettings(size, tuple(processor.image_mean), tuple(processor.image_std), resample, patch)


def _load_transformers(config: VisionConfig) -> FrozenTower:
    from transformers import AutoModel

    settings, found = vision_settings(config), _transformers_config(config)
    dtype = DTYPES[config.dtype]
    tower = inside.vision(found)
    kind: Any = AutoModel
    if tower is not None:
        found, kind = tower.config, tower.kind
    more = _without_pooler(found) if tower is None else tower.arguments
    if config.pretrained:
        try:
            with nullcontext() if tower is None else inside.unreported():
                model, report = kind.from_pretrained(
                    config.name, revision=config.revision, dtype=dtype, output_loading_info=True, **more
                )
        except Exception as error:  # files that are broken raise all kinds
            raise ConfigError(f"vision.name '{config.name}': its weights cannot be read ({reason(error)}).") from None
        lacking = sorted(name for name in report["missing_keys"] if not name.startswith(("pooler", "text_model")))
        if lacking:
            raise ConfigError(
                f"vision.name '{config.name}': its weights lack {', '.join(lacking[:5])}"
                f"{f' and {len(lacking) - 5} more' if len(lacking) > 5 else ''}."
            )
    elif tower is None:
        model = AutoModel.from_config(found, dtype=dtype, **more)
    else:
        model = kind(found).to(dtype)
    model = getattr(model, "vision_model", model)
    stages = getattr(model.config, "depths", None)  # networks of feature maps have stages
    blocks = len(stages) if stages else getattr(model.config, "num_hidden_layers", 0)
    if config.block is not None and not blocks:
        raise ConfigError(
            f"vision.block is {config.block}, and '{config.name}' does not say how many blocks it has; leave it out."
        )
    if config.block is not None and not -blocks <= config.block < blocks:
        raise ConfigError(
            f"vision.block is {config.block}; '{config.name}' has {blocks} blocks: it takes {-blocks} to {blocks - 1}."
        )
    bare = tower is not None and not config.norm
    if bare:  # the norm behind the encoder is the adapter's
        model.post_layernorm = nn.Identity()
    able = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
    interpolate = {"interpolate_pos_encoding": True} if config.image_size and able else {}

    def read(pixels: Tensor) -> Tokens:
        if config.block is None and (config.norm or bare):
            values = model(pixel_values=pixels, **interpolate).last_hidden_state
        else:
            states = model(pixel_values=pixels, output_hidden_states=True, **interpolate).hidden_states
            values = states[(config.block if config.block is not None else -1) % blocks + 1]
            norm = getattr(model, "post_layernorm", getattr(model, "layernorm", None))
            values = norm(values) if config.norm and norm is not None and values.ndim == 3 else values
        if values.ndim == 4:
            return Tokens(values.flatten(2).transpose(1, 2), None, (values.shape[2], values.shape[3]))
        patch = getattr(model.config, "patch_size", None)
        patches = (settings.size // patch) ** 2 if isinstance(patch, int) else values.shape[1]
        patches = min(patches, values.shape[1])  # networks that merge patches have fewer, and no marks
        marks = values.shape[1] - patches
        return Tokens(values if config.class_token else values[:, marks:], None, _grid(patches))

    return FrozenTower(model, read, _width_of(model, read, settings, config), settings, config)


def _width_of(model: Any, read: Callable[[Tensor], Tokens], settings: VisionSettings, config: VisionConfig) -> int:
    """The length of an encoder's tokens, which are asked for once.

    Raises:
        ConfigError: it wants more than pictures, or hides parts of them at random, as in its pre-training.
    """
    picture = torch.zeros(1, 3, settings.size, settings.size, dtype=DTYPES[config.dtype])
    hides = bool(getattr(model.config, "mask_ratio", None)) and not picture.is_meta
    if hides:  # then no two patches are to be alike, as they are in a blank picture
        picture = torch.linspace(0, 1, picture.numel(), dtype=picture.dtype).view(picture.shape)
    model.eval()
    try:
        with torch.no_grad():
            found = [read(picture).values for _ in range(1 + hides)]
    except (TypeError, AttributeError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"vision.name '{config.name}': a {type(model).__name__} gives no tokens of pictures alone "
            f"({reason(error)}); name another encoder, or give a callable of your own."
        ) from None
    if hides and not torch.equal(*found):
        raise ConfigError(
            f"vision.name '{config.name}': a {type(model).__name__} hides parts of a picture at random, so that its "
            f"tokens are never the same; name another encoder."
        )
    return int(found[0].shape[-1])


def _without_pooler(found: Any) -> dict[str, bool]:
    """The pooler is of no use here, and many checkpoints lack its weights; not every class knows the argument."""
    from transformers import MODEL_MAPPING

    kind = MODEL_MAPPING.get(type(found), None)
    known = kind is not None and "add_pooling_layer" in inspect.signature(cast(Any, kind)).parameters
    return {"add_pooling_layer": False} if known else {}


def _grid(patches: int) -> tuple[int, int] | None:
    side = round(patches**0.5)
    return (side, side) if side * side == patches else None
