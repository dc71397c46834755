"""The settings of a run as frozen dataclasses, and strict reading of YAML into them.  No torch is imported here."""

from __future__ import annotations

import dataclasses
import math
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


def check_numbers(
    section: str, settings: object, *names: str, least: float = 0, above: bool = False, most: float = math.inf
) -> None:
    """Refuse settings that are not finite or out of range; null is left alone.

    Raises:
        ConfigError: a value below `least` (or equal to it, with `above`) or beyond `most`.
    """
    for name in names:
        value = getattr(settings, name)
        if value is None or (math.isfinite(value) and least <= value <= most and not (above and value == least)):
            continue
        needed = f"{'above' if above else 'at least'} {least}" + (f" and at most {most}" if most < math.inf else "")
        if not math.isfinite(value):
            needed = f"a finite number{f', {needed}' if least > -math.inf else ''}"
        raise ConfigError(f"{section}.{name} is {value}; it must be {needed}.")


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

    @property
    def chance(self) -> str:
        """The settings by which one picture gives many tensors; empty where it gives one."""
        drawn = ["mode: random_crop"] * (self.mode == "random_crop") + [f"flip: {self.flip:g}"] * (self.flip > 0)
        return ", ".join(drawn)


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
    cache: str | None = None
    """A folder where the encoder's outputs are kept, so that a picture is opened and encoded once, by all runs that
    read it alike; null: none.  Transforms may then leave nothing to chance."""
    cache_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """How numbers are kept there; null: as the encoder gives them, which changes nothing."""

    def __post_init__(self) -> None:
        check_numbers("vision", self, "image_size", least=1)
        if self.cache is None:
            return
        for name in ("train_transform", "eval_transform"):
            chance = getattr(self, name).chance
            if chance:
                raise ConfigError(
                    f"vision.cache keeps one view of each picture, and vision.{name} leaves the view to chance "
                    f"({chance}); set vision.{name} to {{mode: squash}} (or crop, or pad, with flip: 0), or leave "
                    f"vision.cache out."
                )


@dataclass(frozen=True)
class ProfileConfig:
    """What to change in the profile that is read off the LLM's tokenizer; null keeps what was read."""

    name: str | None = None
    """A shipped profile (`profiles/`) or a YAML file of that form, in place of what is read off the tokenizer."""
    layout: Literal["plain", "chat"] | None = None
    system: str | None = None
    """The system turn of a chat layout.  Null and empty: none, or an empty one where the LLM's own template would put
    one in by itself; but a named profile has one of its own, and null keeps it."""
    separator: str | None = None
    """Text between prompt and target."""
    opening: list[int] | None = None
    end: list[int] | None = None
    stop: list[str] | None = None
    slots_first: bool | None = None
    """Plain layout: soft tokens before the opening ids (as the paper's code) or behind them."""

    def __post_init__(self) -> None:
        if self.end is not None and not self.end:
            raise ConfigError(
                "language.profile.end is []; it takes at least one token id, or null for the tokenizer's own end mark."
            )


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
    shard: bool = False
    """Each process holds a part of the LLM's blocks, not all of them: for LLMs that no GPU of a machine holds alone.
    Needs several processes."""
    packing: bool = True
    """Rows of unlike length share tensor rows where a decoder-only LLM can keep them apart; false pads each."""
    architecture: dict[str, Any] = field(default_factory=dict)
    """Values that take the place of those in the model's config.json (dense_act_fn …)."""
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    instruction_limit: int = 128
    """Token ids of an instruction that are kept, from its right end."""
    target_limit: int = 256
    """Token ids of a target that are kept, from its left end, the end mark among them."""

    def __post_init__(self) -> None:
        check_numbers("language", self, "instruction_limit", least=1)
        check_numbers("language", self, "target_limit", least=1 + len(self.profile.end or [0]))


INIT_PARTS = (
    "norm", "queries", "embeddings", "self_attention", "cross_attention", "query_feed_forward", "text_feed_forward",
    "text", "projection", "frames",
)  # fmt: skip
"""Parts of an adapter that a source may give, or a run train; `text` is embeddings and text_feed_forward together."""


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
    Or an adapter that is here: a run, a saved one, a model of transformers, a file of LAVIS.
    Or a list of sources, each `{from: SOURCE, parts: [...], strict: true}`: the first that covers a part gives it."""
    tokenizer: str | None = None
    """Where the instruction's tokenizer is read from; null: from `init`."""
    queries: int = 32
    hidden: int | None = None
    """Width; null: that of `init`, or 768."""
    layers: int | None = None
    heads: int | None = None
    intermediate: int | None = None
    frames: int | None = None
    """Frames of a video that are told apart by a learned embedding, which starts at zero; 0: none; null: as many as
    `init` has, or none.  How many frames are looked at is a card's business (options.frames)."""
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
    """embeddings: a projection made anew is scaled so that soft tokens start as long as the LLM's embeddings."""

    def __post_init__(self) -> None:
        if not isinstance(self.init, str | None):
            init_sources(self.init)
        names = ("queries", "cross_attention_every", "hidden", "layers", "heads", "intermediate")
        check_numbers("qformer", self, *names, least=1)
        check_numbers("qformer", self, "instruction_limit", least=3)
        check_numbers("qformer", self, "frames")
        if self.hidden and self.heads and self.hidden % self.heads:
            raise ConfigError(f"qformer.hidden ({self.hidden}) must divide evenly by qformer.heads ({self.heads}).")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"qformer.dropout is {self.dropout}; it is a chance, at least 0 and below 1.")


@dataclass(frozen=True)
class DataConfig:
    """Where the data sets are and what happens to broken records."""

    root: str = "."
    """The folder that the cards' paths start from."""
    index: str | None = None
    """Where annotations are kept once they were read (see `qformer data index`); null: `.qformer-index` under the root
    or, where that cannot be written, the user's cache."""
    tasks: dict[str, float] = field(default_factory=dict)
    """The training mixture: card (a shipped name, `name:variant`, or a YAML file) and its multiplier on p_d."""
    variant: str | None = None
    """Takes every card of the mixture in this variant (`plain`, say); null: as `tasks` names them."""
    allow_held_out: bool = False
    """Fine-tuning on a set that is otherwise measured zero-shot; its score is then a fine-tuned one."""
    sampling: Literal["sqrt", "proportional", "uniform"] = "sqrt"
    """p_d in proportion to the square root of the set's size, to the size, or the same for all."""
    per_picture: int | None = None
    """Up to so many records on one picture come one behind the other in their set's order, so that a step encodes fewer
    pictures (of sets that have several draws in a step); null: every record's place is its own."""
    on_error: Literal["fail", "skip"] = "fail"
    workers: int = 0
    """Processes that read and transform pictures beside the training process."""
    max_pixels: int = 100_000_000
    """A picture beyond this many pixels is refused before it is decoded."""

    def __post_init__(self) -> None:
        check_numbers("data", self, "workers")
        check_numbers("data", self, "max_pixels", least=1)
        check_numbers("data", self, "per_picture", least=2, most=64)
        for name, multiplier in self.tasks.items():
            if not (math.isfinite(multiplier) and multiplier > 0):
                raise ConfigError(
                    f"data.tasks: the multiplier of '{name}' is {multiplier}; it must be above 0 (a card that is not "
                    f"to be drawn from is left out)."
                )


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation."""

    steps: int = 1000
    batch_size: int = 16
    """Samples in a step, over all processes."""
    micro_batch_tokens: int | None = None
    """LLM positions a forward pass may hold, padding among them where rows are padded (an encoder–decoder's on both of
    its sides); null: a process takes its share of a step at once."""
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
    """bfloat16 computes under autocast, and frozen towers in half precision in their own; weights, gradients and
    optimizer states stay float32.
    """
    compile: bool = False
    """Whether training steps run the blocks of towers and Q-Former as torch.compile makes them, which takes minutes at
    the start.  Losses and gradients are equal but for rounding; a run that goes on is so too, not to the bit."""
    log_every: int = 10
    monitor_every: int = 100
    """Steps between the costlier readings (query cosine, attention entropy, image-shuffle gap); 0: none."""
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    log_with: list[str] = field(default_factory=list)
    """Trackers of accelerate (tensorboard, wandb …) beside metrics.jsonl."""
    only: list[str] = field(default_factory=list)
    """Parts of the adapter that are trained, by the names that `qformer.init` has for them; empty: all of it."""

    def __post_init__(self) -> None:
        for part in self.only:
            if part not in INIT_PARTS:
                raise ConfigError(f"train.only: unknown part '{part}'.{did_you_mean(part, INIT_PARTS)}")
        counts = ("steps", "batch_size", "micro_batch_tokens", "log_every", "checkpoint_every", "keep_checkpoints")
        check_numbers("train", self, *counts, least=1)
        check_numbers("train", self, "rate", "max_norm", above=True)
        check_numbers("train", self, "warmup_rate", "warmup_steps", "final_rate", "weight_decay", "monitor_every")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"train.betas is {list(self.betas)}; it takes two numbers, each at least 0 and below 1.")


@dataclass(frozen=True)
class ValidationConfig:
    """What is scored while training goes on; the checkpoint with the best mean over these tasks is kept as `best`."""

    tasks: list[str] = field(default_factory=list)
    """Held-in cards with an `eval` section; none: no validation, and the last checkpoint is the run's result."""
    every: int = 3000
    """Steps between validations; the last step is validated too."""
    limit: int | None = None
    """Score a seeded subset of this many samples of each set, the same at every validation."""
    batch_size: int = 32

    def __post_init__(self) -> None:
        check_numbers("validation", self, "every", "limit", "batch_size", least=1)


@dataclass(frozen=True)
class EvaluateConfig:
    """What is scored when training is done."""

    tasks: list[str] = field(default_factory=list)
    limit: int | None = None
    """Score a seeded subset of this many samples; every score is then marked as partial."""
    batch_size: int = 32
    shuffled: bool = True
    """Whether each score is repeated with shuffled pictures."""

    def __post_init__(self) -> None:
        check_numbers("evaluate", self, "limit", "batch_size", least=1)


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
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 1 << 63:
            raise ConfigError(f"seed is {self.seed}; it must be at least 0 and below 2^63.")

    @property
    def directory(self) -> Path:
        """The run directory."""
        return Path(self.output or f"runs/{self.name}")


def load(source: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The settings of a shipped config name or a YAML file, with `key=value` overrides on top.

    A file may name a parent with `extends: NAME`, a shipped name or a file beside it: its own values win, key by key.
    `replaces: [data.tasks]` names what is not merged: there the file's own value stands alone.  Cards given as files
    are looked for beside the config first.  `data.tasks={…}` takes the place of the file's mixture,
    `data.tasks.CARD=2.0` changes one card of it.

    Raises:
        ConfigError: no such file, an unknown key, a wrong type, a value that cannot work; says file and key.
    """
    path = resources.find("configs", str(source), "config")
    config = _overridden(_with_parents(path, seen=()), overrides)
    for section, key in (("vision", "name"), ("language", "name")):
        if not getattr(getattr(config, section), key):
            raise ConfigError(f"{path}: {section}.{key} is not set; it takes a name or a directory.")
    beside = {_card_beside(path, name): weight for name, weight in config.data.tasks.items()}
    scored, validated = (
        [_card_beside(path, name) for name in section.tasks] for section in (config.evaluate, config.validation)
    )
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, tasks=beside),
        validation=dataclasses.replace(config.validation, tasks=validated),
        evaluate=dataclasses.replace(config.evaluate, tasks=scored),
    )


def changed(settings: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """Settings with `key=value` overrides on top, as `load` takes them.

    Raises:
        ConfigError: as `load`.
    """
    return _overridden([("settings", dataclasses.asdict(settings))], overrides)


def _overridden(layers: Sequence[tuple[str, Mapping[str, Any]]], overrides: Sequence[str]) -> RunConfig:
    changes, mixture, whole = _command_line(overrides)
    if whole:
        layers = [(where, _without(raw, ["data", "tasks"])) for where, raw in layers]
    if mixture is not None:
        changes = [*changes, {"data": {"tasks": mixture}}]
    return structured(RunConfig, [*layers, *(("command line", change) for change in changes)])


def save(config: Any, path: Path) -> None:
    """Write settings as YAML that `load` reads back to the same values."""
    path.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)), encoding="utf-8")


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file as plain dicts and lists; interpolations are left for `structured`."""
    try:
        node = OmegaConf.load(path)
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file; check its path.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: it cannot be read: {error}") from None
    except Exception as error:  # the YAML library raises many kinds
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    container = OmegaConf.to_container(node)
    if not isinstance(container, dict):
        raise ConfigError(f"{path}: holds a list or a single value; it must hold named settings.")
    return typing.cast(dict[str, Any], container)


def shipped(cls: type[Config], kind: str, name: str, what: str) -> Config:
    """A file of the folder `kind` that is shipped by a name, or a YAML file of the same form, as a frozen dataclass.

    Raises:
        ConfigError: there is no such file (`what` says of what kind), or a wrong key or type in it.
    """
    path = resources.find(kind, name, what)
    return structured(cls, [(str(path), read_yaml(path))])


def structured(cls: type[Config], layers: Sequence[tuple[str, Mapping[str, Any]]]) -> Config:
    """Named layers of plain settings merged into a frozen dataclass, later ones winning.

    Raises:
        ConfigError: prefixed with the name of the layer at fault.
    """
    merged = OmegaConf.structured(cls)
    for where, raw in layers:
        check_shape(cls, raw, where)
        try:
            merged = OmegaConf.merge(merged, OmegaConf.create(dict(raw)))
        except OmegaConfBaseException as error:
            raise ConfigError(f"{where}: {_first_line(error)}") from None
    try:
        return typing.cast(Config, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{layers[-1][0]}: {_first_line(error)}") from None
    except ConfigError as error:
        raise ConfigError(f"{' + '.join(dict.fromkeys(where for where, raw in layers if raw))}: {error}") from None


def _with_parents(path: Path, seen: tuple[Path, ...]) -> list[tuple[str, Mapping[str, Any]]]:
    """A file's settings behind those of its parent, its parent's parent …, each under its name."""
    if path.resolve() in seen:
        raise ConfigError(f"{path}: 'extends' leads back to itself.")
    own = read_yaml(path)
    parent, replaced = own.pop("extends", None), own.pop("replaces", None)
    if parent is None and replaced is None:
        return [(str(path), own)]
    if not isinstance(parent, str):
        raise ConfigError(
            f"{path}: 'extends' is {_shown(parent)}; it takes the parent's name, a shipped config or a YAML file."
        )
    if not isinstance(replaced, list | None) or not all(isinstance(key, str) for key in replaced or ()):
        raise ConfigError(f"{path}: 'replaces' is {_shown(replaced)}; it takes a list of keys, such as [data.tasks].")
    beside = path.parent / parent
    source = beside if beside.suffix in (".yaml", ".yml") else Path(parent)
    try:
        found = resources.find("configs", str(source), "config")
    except ConfigError as error:
        raise ConfigError(f"{path}: 'extends' names a parent that is not there: {error}") from None
    layers = _with_parents(found, (*seen, path.resolve()))
    for key in replaced or ():
        layers = [(where, _without(raw, key.split("."))) for where, raw in layers]
    return [*layers, (str(path), own)]


def _card_beside(config: Path, name: str) -> str:
    """A card given as a relative file is one beside the config if it is there."""
    file, colon, variant = name.partition(":")
    if file.endswith((".yaml", ".yml")) and (config.parent / file).is_file():
        return f"{config.parent / file}{colon}{variant}"
    return name


def _command_line(overrides: Sequence[str]) -> tuple[list[dict[str, Any]], Any, bool]:
    """Changes in their order, what they say of the mixture (None: nothing), and whether it is said as a whole."""
    changes: list[dict[str, Any]] = []
    mixture: Any = None
    whole = False
    for text in overrides:
        key, equals, _ = text.partition("=")
        if not equals or not all(key.split(".")):
            raise ConfigError(f"command line: '{text}' is not of the form key=value.")
        card = key.removeprefix("data.tasks.") if key.startswith("data.tasks.") else None
        try:
            # A card's name may hold dots of its own, as files do.
            change = OmegaConf.from_dotlist([text if card is None else f"data.tasks{text[len(key) :]}"])
            raw = typing.cast(dict[str, Any], OmegaConf.to_container(change))
        except Exception as error:  # the YAML library raises many kinds
            raise ConfigError(
                f"command line: '{text}' has no value that YAML can read ({' '.join(str(error).split())})."
            ) from None
        if card is not None:
            mixture = {**(mixture if isinstance(mixture, dict) else {}), card: raw["data"]["tasks"]}
        elif key == "data.tasks":
            mixture, whole = raw["data"]["tasks"], True
        else:
            changes.append(raw)
    return changes, mixture, whole


def _without(raw: Mapping[str, Any], key: Sequence[str]) -> dict[str, Any]:
    """Plain settings without one of them, which is named by the keys that lead to it."""
    first, *rest = key
    inner = raw.get(first)
    if rest and isinstance(inner, Mapping):
        return {**raw, first: _without(inner, rest)}
    return {name: value for name, value in raw.items() if rest or name != first}


def check_shape(kind: Any, raw: Any, where: str, key: str = "") -> None:
    """Refuse what YAML may hold in the place of a setting: unknown keys, lists for mappings, booleans for words.

    YAML reads a bare no, off or yes as a boolean, and a text field would silently hold 'False'.

    Raises:
        ConfigError: says where, which key, what was found, and what belongs there.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if raw is None or (isinstance(raw, str) and "${" in raw):  # null is judged by its field, ${…} when it is resolved
        return
    wanted = _belongs(kind, origin)
    if origin in (types.UnionType, typing.Union):
        inner = [argument for argument in arguments if argument is not type(None)]
        if len(inner) == 1 or (isinstance(raw, bool) and bool not in inner and str in inner):
            check_shape(inner[0] if len(inner) == 1 else str, raw, where, key)
    elif wanted is not None and not isinstance(raw, wanted[0]):
        raise ConfigError(f"{where}: {key} is {_shown(raw)}; it takes {wanted[1]}.")
    elif dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        for name, value in raw.items():
            if name in hints:
                check_shape(hints[name], value, where, f"{key}.{name}" if key else str(name))
            else:
                raise ConfigError(
                    f"{where}: unknown key '{f'{key}.{name}' if key else name}'.{did_you_mean(str(name), hints)}"
                )
    elif origin is list:
        for number, value in enumerate(raw):
            check_shape(arguments[0], value, where, f"{key}[{number}]")
    elif origin is dict:
        for name, value in raw.items():
            if isinstance(name, bool):
                raise ConfigError(f"{where}: {key} has the key {name}, a YAML boolean; put the word in quotes.")
            check_shape(arguments[1], value, where, f"{key}.{name}")
    elif isinstance(raw, bool) and (kind is str or origin is Literal):
        raise ConfigError(
            f"{where}: {key} is the YAML boolean {str(raw).lower()} where a word belongs; put the word in quotes "
            f"(YAML reads a bare no, off, yes or on as a boolean)."
        )


def _belongs(kind: Any, origin: Any) -> tuple[tuple[type, ...], str] | None:
    """Python types that may stand where a kind of setting is wanted, and a name for them; None: not judged here."""
    if dataclasses.is_dataclass(kind) or origin is dict:
        return (Mapping,), "named values"
    if origin is list:
        return (list, tuple), "a list"
    if kind in (str, int, float, bool) or origin is Literal:
        return (str, int, float, bool), "one value"
    return None


def _shown(raw: Any, most: int = 60) -> str:
    if isinstance(raw, bool):
        return f"the YAML boolean {str(raw).lower()}"
    text = f"'{raw}'" if isinstance(raw, str) else str(raw)
    return text if len(text) <= most else f"{text[:most]} …"


def _first_line(error: Exception) -> str:
    key = getattr(error, "full_key", None)
    message = str(error).splitlines()[0]
    return f"{key}: {message}" if key and key not in message else message
