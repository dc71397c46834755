"""The settings of a run as frozen dataclasses, and strict reading of YAML into them.  No torch is imported here."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qformer import resources
from qformer.errors import ConfigError, did_you_mean

Config = TypeVar("Config")


@dataclass(frozen=True)
class TransformConfig:
    """How a picture becomes a tensor."""

    mode: Literal["squash", "crop", "pad", "random_crop"] = "squash"
    """squash: both sides to the size; crop: short side to the size, then the centre; pad: long side to the size, mean
    colour around it; random_crop: a random part of the picture, resized to the size."""
    scale: list[float] = field(default_factory=lambda: [0.9, 1.0])
    """random_crop: least and greatest share of the area."""
    ratio: list[float] = field(default_factory=lambda: [0.75, 4 / 3])
    """random_crop: least and greatest width to height."""
    flip: float = 0.0
    """Chance of a mirror image (leave it at 0 where left and right matter)."""

    def __post_init__(self) -> None:
        for name in ("scale", "ratio"):
            pair = getattr(self, name)
            if len(pair) != 2 or not 0 < pair[0] <= pair[1]:
                raise ConfigError(f"{name} is {list(pair)}; it takes two numbers, 0 < least <= greatest.")
        if not 0 <= self.flip <= 1:
            raise ConfigError(f"flip is {self.flip}; it is a chance between 0 and 1.")


@dataclass(frozen=True)
class VisionConfig:
    """The frozen image encoder."""

    name: str = ""
    """A timm model name, a directory or hub id of a timm or transformers vision model."""
    checkpoint: str | None = None
    """Local weights for a timm name: a .safetensors or .pth file, or a directory that holds one."""
    revision: str | None = None
    pretrained: bool = True
    """False leaves the weights random (tests, timing)."""
    dtype: str = "float32"
    block: int | None = None
    """Which block's output is read, counted as Python does (-2: the last but one); null: the model's last output."""
    norm: bool = True
    """Whether the encoder's own final norm is applied.  A CLIP of transformers norms only its pooled class token: with
    true, tokens are its last hidden states, not normed; with true and `block`, they go through that norm."""
    class_token: bool = True
    """Whether class and register tokens are kept beside the patches."""
    image_size: int | None = None
    """Pixels a side; null: the model's own."""
    mean: list[float] | None = None
    std: list[float] | None = None
    interpolation: Literal["bilinear", "bicubic", "nearest"] | None = None
    train_transform: TransformConfig = field(default_factory=lambda: TransformConfig(mode="random_crop"))
    eval_transform: TransformConfig = field(default_factory=TransformConfig)


@dataclass(frozen=True)
class ProfileConfig:
    """What to change in the profile that is read off the LLM's tokenizer; null keeps what was read."""

    name: str | None = None
    """A shipped profile (`profiles/`) or a YAML file of that form, in place of what is read off the tokenizer."""
    layout: Literal["plain", "chat"] | None = None
    system: str | None = None
    """The system turn of a chat layout; null: none is given, though some templates then put in one of their own;
    empty: an empty one, which keeps theirs out.  A named profile has one of its own, and with an empty one none."""
    separator: str | None = None
    """Text between prompt and target."""
    opening: list[int] | None = None
    end: list[int] | None = None
    stop: list[str] | None = None
    slots_first: bool | None = None
    """Plain layout: soft tokens before the opening ids (as the paper's code) or behind them."""


@dataclass(frozen=True)
class LanguageConfig:
    """The frozen language model."""

    name: str = ""
    """A directory or hub id of any causal or sequence-to-sequence LLM."""
    revision: str | None = None
    pretrained: bool = True
    """False takes the architecture and the tokenizer, and leaves the weights random (tests, timing)."""
    dtype: str = "float32"
    quantization: dict[str, Any] | None = None
    """Values of one of transformers' quantisation configs, such as {load_in_4bit: true} (bitsandbytes) or
    {quant_method: quanto, weights: int8}; null: none.  The adapter stays as it is."""
    gradient_checkpointing: bool = False
    architecture: dict[str, Any] = field(default_factory=dict)
    """Values that take the place of those in the model's config.json (dense_act_fn …)."""
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    instruction_limit: int = 128
    """Token ids of an instruction that are kept, from its right end."""
    target_limit: int = 256
    """Token ids of a target that are kept, from its left end, the end mark among them."""


INIT_PARTS = (
    "norm", "queries", "embeddings", "self_attention", "cross_attention", "query_feed_forward", "text_feed_forward",
    "text", "projection",
)  # fmt: skip
"""Parts of an adapter that a source may give; `text` is embeddings and text_feed_forward together."""


@dataclass(frozen=True)
class InitSource:
    """One source of an adapter's start."""

    source: str
    """An adapter in any form `load` takes, a BERT checkpoint, `new` (drawn anew) or `copied` (from the other half)."""
    parts: tuple[str, ...] = ()
    """Which parts it gives; none: whatever it has that no source before it gave."""
    strict: bool = True
    """Whether what it is to give must be there in the right shape; otherwise it is made anew, and listed."""


def init_sources(given: Any) -> tuple[InitSource, ...]:
    """`qformer.init` as a list of sources.

    Raises:
        ConfigError: it is no list of `{from, parts, strict}`, or names an unknown part.
    """
    form = "a BERT checkpoint's name, or a list of sources like {from: stage1.pth, parts: [text]}"
    if isinstance(given, bool):
        raise ConfigError(
            f"qformer.init is the YAML boolean {str(given).lower()}; it takes {form}, the name in quotes where YAML "
            f"reads it as a boolean."
        )
    if not isinstance(given, list | tuple) or not given:
        raise ConfigError(f"qformer.init is {given!r}; it takes {form}.")
    sources = []
    for number, entry in enumerate(given):
        where = f"qformer.init[{number}]"
        if not isinstance(entry, Mapping) or not isinstance(entry.get("from"), str):
            raise ConfigError(f"{where} is {entry!r}; it takes a mapping with 'from', like {{from: stage1.pth}}.")
        for key in entry:
            if key not in ("from", "parts", "strict"):
                raise ConfigError(f"{where}: unknown key '{key}'.{did_you_mean(str(key), ('from', 'parts', 'strict'))}")
        parts, strict = entry.get("parts") or (), entry.get("strict", True)
        if not isinstance(parts, list | tuple) or not isinstance(strict, bool):
            raise ConfigError(f"{where}: parts is {parts!r} and strict {strict!r}; they take a list and true or false.")
        for part in parts:
            if part not in INIT_PARTS:
                raise ConfigError(f"{where}: unknown part '{part}'.{did_you_mean(str(part), INIT_PARTS)}")
        sources.append(InitSource(entry["from"], tuple(parts), strict))
    return tuple(sources)


@dataclass(frozen=True)
class QFormerConfig:
    """The trainable part between the two towers."""

    init: Any = None
    """A directory or hub id of a BERT checkpoint to start from; its depth and widths are taken over. null: random.
    Or a list of sources, each `{from: SOURCE, parts: [...], strict: true}`: the first that covers a part gives it."""
    tokenizer: str | None = None
    """Where the instruction's tokenizer is read from; null: from `init`."""
    queries: int = 32
    hidden: int | None = None
    """Width; null: that of `init`, or 768."""
    layers: int | None = None
    heads: int | None = None
    intermediate: int | None = None
    cross_attention_every: int = 2
    """Blocks 0, n, 2n … look at the picture."""
    instruction: bool = True
    """Whether the Q-Former reads the instruction (False: as BLIP-2)."""
    instruction_limit: int = 128
    """Ids of an instruction that are kept for the Q-Former, [CLS] and [SEP] among them."""
    dropout: float = 0.1
    norm_eps: float = 1e-5
    """Epsilon of the norm behind the encoder; a source that says another one wins."""
    soft_scale: Literal["none", "embeddings"] = "none"
    """embeddings: at the start the projection is scaled so that soft tokens are as long as the LLM's embeddings."""

    def __post_init__(self) -> None:
        if not isinstance(self.init, str | None):
            init_sources(self.init)
        if self.hidden and self.heads and self.hidden % self.heads:
            raise ConfigError(f"qformer.hidden ({self.hidden}) must divide evenly by qformer.heads ({self.heads}).")
        if self.queries < 1 or self.cross_attention_every < 1:
            raise ConfigError("qformer.queries and qformer.cross_attention_every must be at least 1.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"qformer.dropout is {self.dropout}; it is a chance, at least 0 and below 1.")


@dataclass(frozen=True)
class DataConfig:
    """Where the data sets are and what happens to broken records."""

    root: str = "."
    """The folder that the cards' paths start from."""
    tasks: dict[str, float] = field(default_factory=dict)
    """The training mixture: card (a shipped name, `name:variant`, or a YAML file) and its multiplier on p_d."""
    sampling: Literal["sqrt", "proportional", "uniform"] = "sqrt"
    """p_d in proportion to the square root of the set's size, to the size, or the same for all."""
    on_error: Literal["fail", "skip"] = "fail"
    workers: int = 0
    """Processes that read and transform pictures beside the training process."""
    max_pixels: int = 100_000_000
    """A picture beyond this many pixels is refused before it is decoded."""


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation."""

    steps: int = 1000
    batch_size: int = 16
    """Samples in a step, over all processes."""
    micro_batch_tokens: int | None = None
    """Padded LLM positions a forward pass may hold; null: a process takes its share of a step at once."""
    rate: float = 1e-5
    warmup_rate: float = 1e-8
    warmup_steps: int = 1000
    final_rate: float = 0.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    weight_decay: float = 0.05
    decay_queries: bool = False
    """Whether weight decay applies to the queries too (the original code decays them: their tensor is 3-D)."""
    max_norm: float | None = None
    """Gradient norm that steps are clipped to; null: no clipping."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 computes under autocast; weights, gradients and optimizer states stay float32."""
    log_every: int = 10
    monitor_every: int = 100
    """Steps between the costlier readings (query cosine, attention entropy, image-shuffle gap); 0: none."""
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    log_with: list[str] = field(default_factory=list)
    """Trackers of accelerate (tensorboard, wandb …) beside metrics.jsonl."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ConfigError(f"train.{name} is {getattr(self, name)}; it must be at least 1.")
        if self.micro_batch_tokens is not None and self.micro_batch_tokens < 1:
            raise ConfigError(f"train.micro_batch_tokens is {self.micro_batch_tokens}; it must be at least 1, or null.")
        if self.rate <= 0 or self.warmup_steps < 0 or self.weight_decay < 0:
            raise ConfigError("train.rate must be above 0, train.warmup_steps and train.weight_decay at least 0.")
        if self.max_norm is not None and self.max_norm <= 0:
            raise ConfigError(f"train.max_norm is {self.max_norm}; it must be above 0, or null for no clipping.")


@dataclass(frozen=True)
class EvaluateConfig:
    """What is scored when training is done."""

    tasks: list[str] = field(default_factory=list)
    limit: int | None = None
    """Score a seeded subset of this many samples; every score is then marked as partial."""
    batch_size: int = 32
    shuffled: bool = True
    """Whether each score is repeated with shuffled pictures."""


@dataclass(frozen=True)
class RunConfig:
    """Everything `qformer train` needs."""

    name: str = "run"
    seed: int = 0
    output: str | None = None
    """The run directory; null: runs/NAME."""
    vision: VisionConfig = field(default_factory=VisionConfig)
    language: LanguageConfig = field(default_factory=LanguageConfig)
    qformer: QFormerConfig = field(default_factory=QFormerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    @property
    def directory(self) -> Path:
        """The run directory."""
        return Path(self.output or f"runs/{self.name}")


def load(source: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The settings of a shipped config name or a YAML file, with `key=value` overrides on top.

    A file may name a parent with `extends: NAME`; its own values win.  Cards given as files are looked for beside the
    config first.

    Raises:
        ConfigError: no such file, an unknown key, a wrong type, a value that cannot work; says file and key.
    """
    path = resources.find("configs", str(source), "config")
    layers = _with_parents(path, seen=())
    try:
        changes = typing.cast(dict[str, Any], OmegaConf.to_container(OmegaConf.from_dotlist(list(overrides))))
    except OmegaConfBaseException as error:
        raise ConfigError(f"command line: {_first_line(error)}") from None
    for text in overrides:
        if "=" not in text:
            raise ConfigError(f"command line: '{text}' is not of the form key=value.")
    config = structured(RunConfig, [*layers, ("command line", changes)])
    for section, key in (("vision", "name"), ("language", "name")):
        if not getattr(getattr(config, section), key):
            raise ConfigError(f"{path}: {section}.{key} is not set; it takes a name or a directory.")
    beside = {_card_beside(path, name): weight for name, weight in config.data.tasks.items()}
    scored = [_card_beside(path, name) for name in config.evaluate.tasks]
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, tasks=beside),
        evaluate=dataclasses.replace(config.evaluate, tasks=scored),
    )


def save(config: Any, path: Path) -> None:
    """Write settings as YAML that `load` reads back to the same values."""
    path.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)), encoding="utf-8")


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file as plain dicts and lists; interpolations are left for `structured`."""
    try:
        node = OmegaConf.load(path)
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: it cannot be read: {error}") from None
    except Exception as error:  # the YAML library raises many kinds
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    container = OmegaConf.to_container(node)
    if not isinstance(container, dict):
        raise ConfigError(f"{path}: holds a list or a single value; it must hold named settings.")
    return typing.cast(dict[str, Any], container)


def structured(cls: type[Config], layers: Sequence[tuple[str, Mapping[str, Any]]]) -> Config:
    """Named layers of plain settings merged into a frozen dataclass, later ones winning.

    Raises:
        ConfigError: prefixed with the name of the layer at fault.
    """
    merged = OmegaConf.structured(cls)
    for where, raw in layers:
        _refuse_booleans_for_words(cls, raw, where, "")
        try:
            merged = OmegaConf.merge(merged, OmegaConf.create(dict(raw)))
        except OmegaConfBaseException as error:
            raise ConfigError(f"{where}: {_first_line(error)}") from None
    try:
        return typing.cast(Config, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{layers[-1][0]}: {_first_line(error)}") from None
    except ConfigError as error:
        raise ConfigError(f"{' + '.join(where for where, raw in layers if raw)}: {error}") from None


def _with_parents(path: Path, seen: tuple[Path, ...]) -> list[tuple[str, Mapping[str, Any]]]:
    if path.resolve() in seen:
        raise ConfigError(f"{path}: 'extends' leads back to itself.")
    own = read_yaml(path)
    parent = own.pop("extends", None)
    if parent is None:
        return [(str(path), own)]
    beside = path.parent / f"{parent}"
    source = beside if beside.suffix in (".yaml", ".yml") else Path(str(parent))
    return [*_with_parents(resources.find("configs", str(source), "config"), (*seen, path.resolve())), (str(path), own)]


def _card_beside(config: Path, name: str) -> str:
    """A card given as a relative file is one beside the config if it is there."""
    file, colon, variant = name.partition(":")
    if file.endswith((".yaml", ".yml")) and (config.parent / file).is_file():
        return f"{config.parent / file}{colon}{variant}"
    return name


def _refuse_booleans_for_words(kind: Any, raw: Any, where: str, key: str) -> None:
    """YAML reads a bare no, off or yes as a boolean, and a text field would silently hold 'False'."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        inner = [argument for argument in arguments if argument is not type(None)]
        if len(inner) == 1 or (isinstance(raw, bool) and bool not in inner and str in inner):
            _refuse_booleans_for_words(inner[0] if len(inner) == 1 else str, raw, where, key)
    elif dataclasses.is_dataclass(kind) and isinstance(raw, Mapping):
        hints = typing.get_type_hints(kind)
        for name, value in raw.items():
            if name in hints:
                _refuse_booleans_for_words(hints[name], value, where, f"{key}.{name}" if key else str(name))
            else:
                raise ConfigError(
                    f"{where}: unknown key '{f'{key}.{name}' if key else name}'.{did_you_mean(str(name), hints)}"
                )
    elif origin in (list, tuple) and isinstance(raw, (list, tuple)):
        for number, value in enumerate(raw):
            _refuse_booleans_for_words(arguments[0], value, where, f"{key}[{number}]")
    elif origin is dict and isinstance(raw, Mapping):
        for name, value in raw.items():
            if isinstance(name, bool):
                raise ConfigError(f"{where}: {key} has the key {name}, a YAML boolean; put the word in quotes.")
            _refuse_booleans_for_words(arguments[1], value, where, f"{key}.{name}")
    elif isinstance(raw, bool) and (kind is str or origin is Literal):
        raise ConfigError(
            f"{where}: {key} is the YAML boolean {str(raw).lower()} where a word belongs; put the word in quotes "
            f"(YAML reads a bare no, off, yes or on as a boolean)."
        )


def _first_line(error: Exception) -> str:
    key = getattr(error, "full_key", None)
    message = str(error).splitlines()[0]
    return f"{key}: {message}" if key and key not in message else message
