"""Task cards: what a data set is, how its files are read, what the model is asked, and how its answers are scored."""

from __future__ import annotations

import copy
import functools
import itertools
import math
import string
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf

from qformer import config, resources
from qformer.config import DataConfig, RunConfig
from qformer.errors import ConfigError, did_you_mean

MEDIA = ("images", "videos")
"""Roles under `files` that name folders, where what records are about lies; each may be a list of folders."""


@dataclass(frozen=True)
class Decoding:
    """How an answer is generated; every value is explicit, so that no model folder's defaults slip in."""

    max_new_tokens: int = 30
    min_new_tokens: int = 1
    num_beams: int = 1
    length_penalty: float = 1.0
    repetition_penalty: float = 1.0
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        config.check_numbers("decoding", self, "max_new_tokens", "num_beams", least=1)
        config.check_numbers("decoding", self, "min_new_tokens", most=self.max_new_tokens)
        config.check_numbers("decoding", self, "length_penalty", least=-math.inf)
        config.check_numbers("decoding", self, "repetition_penalty", "temperature", above=True)
        config.check_numbers("decoding", self, "top_p", above=True, most=1)


def check_template(template: str, where: str) -> None:
    """Refuse a text whose fields cannot be filled by name.

    Raises:
        ConfigError: braces that do not pair, or a field that is more than a name in braces.
    """
    hint = "a field is a name in braces, as {question}, and a brace itself is written twice"
    try:
        pieces = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(f"{where}: '{template}' cannot be filled ({error}); {hint}.") from None
    for _, name, form, conversion in pieces:
        if name is not None and (form or conversion or not name or name.isdigit() or set(name) & set(".[]")):
            raise ConfigError(f"{where}: '{template}' cannot be filled by name; {hint}.")


def _check_common(section: str, files: Mapping[str, Any], preface: Iterable[str]) -> None:
    for role, given in files.items():
        paths = given if isinstance(given, list) and given and role in MEDIA else [given]
        if not all(isinstance(path, str) and path for path in paths):
            raise ConfigError(
                f"{section}.files.{role} is {given!r}; it takes a path, or as files.images or files.videos a list of "
                f"folders."
            )
    for piece in preface:
        check_template(piece, f"{section}.preface")


@dataclass(frozen=True)
class TrainCard:
    """How a set is trained on."""

    reader: str
    """A name in `qformer.data.readers.READERS`."""
    files: dict[str, Any]
    """The reader's files and folders by role, relative to data.root; under `images` and `videos` a list may stand."""
    template: str
    """The templates (a shipped name or a YAML file) one of which is drawn for each sample and pass."""
    size: int | None = None
    """S_d, the published number of samples that p_d is computed from; null: the number of records read."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further settings of the reader."""
    answer: Literal["most_frequent", "sampled", "uniform_distinct"] = "most_frequent"
    """Which of several reference answers is trained on; `sampled` weighs them by their count."""
    target: str = "{answer}"
    """What the LLM learns to write, over the sample's fields and the drawn `answer`."""
    turns: Literal["each", "whole", "last"] = "each"
    """Dialogues: one row per turn, one row with every answer trained, or the last turn's alone with the others read."""
    preface: list[str] = field(default_factory=list)
    """What stands before the template, piece by piece; a piece whose fields are absent or empty vanishes."""

    def __post_init__(self) -> None:
        config.check_numbers("train", self, "size", least=1)
        check_template(self.target, "train.target")
        _check_common("train", self.files, self.preface)


@dataclass(frozen=True)
class EvalCard:
    """How a set is scored."""

    reader: str
    files: dict[str, Any]
    template: str
    split: str
    answer: Literal["generate", "rank"]
    metric: str
    """A name in `qformer.evaluate.metrics.METRICS`."""
    size: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    metric_options: dict[str, Any] = field(default_factory=dict)
    candidates: list[str] = field(default_factory=list)
    """Answers to rank, the same for all samples; empty: the sample's own."""
    normalize: Literal["sum", "mean", "pmi"] = "sum"
    end: bool = True
    """Whether a candidate's end mark is scored too."""
    question_type: str | None = None
    """The field that the most-frequent-answer baseline is counted by."""
    submission: str | None = None
    """The form of the file for a test server that is written beside the predictions: a name in
    `qformer.evaluate.submission.FORMS`."""
    decoding: Decoding = field(default_factory=Decoding)
    preface: list[str] = field(default_factory=list)
    """As in training."""

    def __post_init__(self) -> None:
        config.check_numbers("eval", self, "size", least=1)
        _check_common("eval", self.files, self.preface)
        for candidate in self.candidates:
            if not candidate.strip() or self.candidates.count(candidate) > 1:
                raise ConfigError(
                    f"eval.candidates holds '{candidate}' {'twice' if candidate.strip() else 'which has no words'}; "
                    f"each candidate is a text of its own."
                )


@dataclass(frozen=True)
class Download:
    """A file or an archive that a set is read from, and where it must lie."""

    what: str
    """Its name, and of an archive what is taken from it."""
    source: str
    """Where it is to be had: a site and a page, in words."""
    into: str
    """The file or folder under data.root that it must be, or be unpacked in."""
    gigabytes: float
    """About how much disk it takes once it lies there."""

    def __post_init__(self) -> None:
        config.check_numbers("downloads", self, "gigabytes")


@dataclass(frozen=True)
class TaskCard:
    """One data set."""

    name: str
    version: int
    title: str = ""
    role: Literal["held_in", "held_out"] = "held_in"
    """held_out: measured zero-shot, refused in any training mixture."""
    category: str = ""
    licence: str = ""
    source: str = ""
    """Where the files are to be had, and the layout they are expected in, in one line."""
    downloads: list[Download] = field(default_factory=list)
    """The same, file by file."""
    train: TrainCard | None = None
    eval: EvalCard | None = None
    notes: list[str] = field(default_factory=list)
    """What the paper leaves open and which choice was made."""
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Named changes, taken as `name:variant`, or several as `name:one+other`; null takes a file or an option away."""
    variant: str = ""

    @property
    def key(self) -> str:
        """The name with its variant: what samples, files and scores are filed under."""
        return f"{self.name}:{self.variant}" if self.variant else self.name


def load(name: str) -> TaskCard:
    """The card of a shipped name, `name:variant`, `name:one+other`, or a YAML file; a file may have variants behind it.

    However several variants are ordered, the card has them in the order of its file: they are one card and one recipe.

    Raises:
        ConfigError: no such card or variant, variants that contradict each other, an unknown key, a wrong type.
    """
    base, _, variant = name.partition(":")
    path = resources.find("tasks", base, "task card")
    return copy.deepcopy(_loaded(path, _content(path), variant))


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None  # reading it as YAML says what is wrong


@functools.lru_cache(maxsize=256)  # a tenth of a second a card, and commands ask for all of them more than once
def _loaded(path: Path, content: bytes | None, variant: str) -> TaskCard:
    """A card, as long as its file holds `content`."""
    raw = config.read_yaml(path)
    config.check_shape(TaskCard, raw, str(path))
    known = raw.pop("variants", None) or {}
    if variant:
        parts = _parts(path, variant, known)
        variant = "+".join(parts)
        raw = OmegaConf.to_container(OmegaConf.merge(raw, *parts.values()))  # type: ignore[assignment]
        for section in ("train", "eval"):
            for group in ("files", "options"):  # null takes away what the card has and the variant's reader has not
                given = (raw.get(section) or {}).get(group)
                if given:
                    raw[section][group] = {name: value for name, value in given.items() if value is not None}
    for section, kind in (("train", TrainCard), ("eval", EvalCard)):
        missing = [
            key
            for key in kind.__dataclass_fields__
            if raw.get(section) is not None and key not in raw[section] and _required(kind, key)
        ]
        if missing:
            raise ConfigError(f"{path}: {section} lacks {', '.join(missing)}.")
    for key in ("name", "version"):
        if key not in raw:
            raise ConfigError(f"{path}: the card lacks '{key}'.")
    card = config.structured(TaskCard, [(str(path), raw)])
    return replace(card, variant=variant, variants=known)


def _parts(path: Path, variant: str, known: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The changes of one variant or of several, in the file's order.

    Raises:
        ConfigError: one is not known, named twice, or sets what another sets to something else.
    """
    asked = variant.split("+")
    for name in asked:
        if name not in known:
            raise ConfigError(f"{path}: no variant '{name}'.{did_you_mean(name, known)}")
        if asked.count(name) > 1:
            raise ConfigError(f"{path}: the variant '{name}' is named twice in '{variant}'; name it once.")
        config.check_shape(TaskCard, known[name], f"{path}: variant '{name}'")
    parts = {name: changes or {} for name, changes in known.items() if name in asked}
    for (one, mine), (other, theirs) in itertools.combinations(parts.items(), 2):
        if key := _contradicted(mine, theirs):
            raise ConfigError(
                f"{path}: the variants '{one}' and '{other}' both set {key}, and not alike, so they do not go "
                f"together; name one of them, or write a variant of your own."
            )
        for reads, sets in ((one, other), (other, one)):
            if key := _for_another(parts[reads], parts[sets]):
                raise ConfigError(
                    f"{path}: the variant '{reads}' has a reader of its own, and '{sets}' sets {key} for the card's, "
                    f"so they do not go together; name one of them, or write a variant of your own."
                )
    return parts


def _contradicted(one: Any, other: Any, where: str = "") -> str:
    """The first key, dotted, that two sets of changes set to different values; empty where there is none."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        shared = (key for key in one if key in other)
        found = (_contradicted(one[key], other[key], f"{where}.{key}" if where else key) for key in shared)
        return next(filter(None, found), "")
    return where if one != other else ""


def _for_another(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """What a set of changes sets for a section's reader where another set replaces that; empty where nothing is."""
    for section in ("train", "eval"):
        mine, theirs = one.get(section) or {}, other.get(section) or {}
        if "reader" in mine:
            for group in ("files", "options"):
                if group in theirs:
                    return f"{section}.{group}"
    return ""


def load_all(
    names: Iterable[str], section: Literal["train", "eval"], *, allow_held_out: bool = False
) -> dict[str, TaskCard]:
    """Cards by key for training or for scoring; "held_in" and "held_out" stand for all cards of that role.

    Raises:
        ConfigError: a card is held out and asked for in training, unless that is allowed, or has no such section, or is
            named twice.
    """
    cards: dict[str, TaskCard] = {}
    for name in _expand(names, section):
        card = load(name)
        if section == "train" and card.role == "held_out" and not allow_held_out:
            raise ConfigError(
                f"data.tasks names '{name}', which is held out: it is measured zero-shot and never trained on. "
                f"Take it out of the mixture, or set data.allow_held_out: true to fine-tune on it."
            )
        if getattr(card, section) is None:
            raise ConfigError(f"the card '{name}' has no '{section}' section, so it cannot be used there.")
        if card.key in cards:
            raise ConfigError(f"the card '{card.key}' is named twice.")
        cards[card.key] = card
    return cards


def mixture(data: DataConfig) -> tuple[dict[str, TaskCard], dict[str, float]]:
    """The cards of a training mixture and their multipliers on p_d, both by key.

    Raises:
        ConfigError: as `load_all`, or `data.variant` meets a card that is named with a variant of its own.
    """
    named: dict[str, float] = {}
    for name, multiplier in data.tasks.items():
        for each in _expand([name], "train"):
            if data.variant is not None and ":" in each:
                raise ConfigError(
                    f"data.variant is '{data.variant}', and data.tasks names '{each}', which has a variant already; "
                    f"name the card without one, or leave data.variant out."
                )
            named[f"{each}:{data.variant}" if data.variant is not None else each] = multiplier
    cards = load_all(named, "train", allow_held_out=data.allow_held_out)
    return cards, dict(zip(cards, named.values(), strict=True))


def validated(settings: RunConfig) -> dict[str, TaskCard]:
    """The cards that a run's checkpoints are chosen by.

    Raises:
        ConfigError: as `load_all`, or one is held out: what is chosen by its score is not measured zero-shot.
    """
    cards = load_all(settings.validation.tasks, "eval")
    for key, card in cards.items():
        if card.role == "held_out" and not settings.data.allow_held_out:
            raise ConfigError(
                f"validation.tasks names '{key}', which is held out: a checkpoint that is chosen by its score is not "
                f"measured zero-shot. Name held-in cards, or set data.allow_held_out: true to fine-tune on it."
            )
        if card.eval is not None and card.eval.metric == "submission":
            raise ConfigError(
                f"validation.tasks names '{key}', whose answers only a test server has, so it gives no score to choose "
                f"a checkpoint by; name another split."
            )
    return cards


def _expand(names: Iterable[str], section: str) -> list[str]:
    expanded: list[str] = []
    for name in names:
        if name in ("held_in", "held_out"):
            expanded += [each for each, (role, sections) in _shipped().items() if role == name and section in sections]
        else:
            expanded.append(name)
    return expanded


@functools.cache
def _shipped() -> dict[str, tuple[str, set[str]]]:
    """Role and sections of every shipped card by name; read once, since that takes seconds."""
    loaded = [load(name) for name in resources.names("tasks")]
    sections = ("train", "eval")
    return {card.name: (card.role, {each for each in sections if getattr(card, each) is not None}) for card in loaded}


def _required(kind: type, key: str) -> bool:
    import dataclasses

    entry = kind.__dataclass_fields__[key]  # type: ignore[attr-defined]
    return entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING


def probabilities(
    sizes: Mapping[str, int], multipliers: Mapping[str, float], sampling: str = "sqrt"
) -> dict[str, float]:
    """p_d of each set: √S_d (or S_d, or 1) times its multiplier, over the sum (InstructBLIP, section 2.3)."""
    power = {"sqrt": 0.5, "proportional": 1.0, "uniform": 0.0}[sampling]
    weights = {name: size**power * multipliers.get(name, 1.0) for name, size in sizes.items()}
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}
