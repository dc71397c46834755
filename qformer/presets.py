"""The conventions that published adapters were trained with, as data: towers' ends, rows, decoding.  No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from qformer import config
from qformer.cards import Decoding
from qformer.config import LanguageConfig, QFormerConfig, VisionConfig


@dataclass(frozen=True)
class Ranking:
    """How candidates are scored: the arguments of `VLM.rank`."""

    normalize: Literal["sum", "mean", "pmi"] = "sum"
    end: bool = True


@dataclass(frozen=True)
class Preset:
    """Settings around an adapter that its weights do not tell."""

    name: str
    version: int
    source: str
    """Where it was read."""
    vision: VisionConfig = field(default_factory=VisionConfig)
    language: LanguageConfig = field(default_factory=LanguageConfig)
    qformer: QFormerConfig = field(default_factory=QFormerConfig)
    decoding: dict[str, Decoding] = field(default_factory=dict)
    """By purpose: `generate` for free text, `answer` for short answers."""
    ranking: Ranking = field(default_factory=Ranking)


def load(name: str) -> Preset:
    """A preset shipped under `configs/presets`, or a YAML file of the same form.

    Raises:
        ConfigError: no such preset, or a wrong key or type in it.
    """
    return config.shipped(Preset, "configs/presets", name, "preset")
