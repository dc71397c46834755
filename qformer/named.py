"""The towers that settings and callers name, found and read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from qformer import resources
from qformer.backbones import language_loading
from qformer.backbones import vision as vision_backbone
from qformer.backbones.language import LanguageTower
from qformer.backbones.vision import FrozenTower, OwnTower
from qformer.checkpoints import PICKLES
from qformer.config import LanguageConfig, RunConfig, VisionConfig

EVA_CLIP_G = "eva_giant_patch14_clip_224"
"""timm's name of the encoder whose weights LAVIS calls eva_vit_g.pth."""

Tower = TypeVar("Tower", VisionConfig, LanguageConfig)


def located(tower: Tower) -> Tower:
    """A tower's settings with shipped names (`demo:…`) turned into directories."""
    return dataclasses.replace(tower, name=resources.located(tower.name))


@dataclass(frozen=True)
class Named:
    """What the caller of `load` says about the towers."""

    vision: str | VisionConfig | Callable[[Tensor], Any] | None
    language: str | LanguageConfig | None
    changes: dict[str, Any]
    """Of the LLM's settings."""
    revision: str | None

    @property
    def encoder(self) -> Callable[[Tensor], Any] | None:
        """An encoder of the caller's own."""
        return None if isinstance(self.vision, str | VisionConfig | None) else self.vision

    def seen(self, own: VisionConfig) -> VisionConfig:
        """The encoder's settings: the caller's own, or those around the adapter under the caller's name."""
        if isinstance(self.vision, VisionConfig):
            return self.vision
        if not isinstance(self.vision, str):
            return own
        if Path(self.vision).suffix in PICKLES:
            return dataclasses.replace(own, name=EVA_CLIP_G, checkpoint=self.vision, revision=None)
        return dataclasses.replace(own, name=self.vision, checkpoint=None, revision=None)

    def spoken(self, own: LanguageConfig) -> LanguageConfig:
        """The LLM's settings, likewise."""
        chosen = self.language
        if not isinstance(chosen, LanguageConfig):
            chosen = own if chosen is None else dataclasses.replace(own, name=chosen, revision=None)
        return dataclasses.replace(chosen, **self.changes)


def load_towers(
    settings: RunConfig, own: Callable[[Tensor], Any] | None = None
) -> tuple[tuple[FrozenTower | OwnTower, LanguageTower], RunConfig]:
    """Both towers, and the settings with the name of an encoder that was brought."""
    if own is None:
        vision_backbone.check_vision(located(settings.vision))
    encoder, settings = load_encoder(settings, own)
    return (encoder, language_loading.load_language(located(settings.language))), settings


def load_encoder(settings: RunConfig, own: Callable[[Tensor], Any] | None) -> tuple[FrozenTower | OwnTower, RunConfig]:
    """The encoder that the settings name, or one that was brought, under whose name the settings then go."""
    if own is None:
        return vision_backbone.load_vision(located(settings.vision)), settings
    tower = OwnTower(own)
    return tower, dataclasses.replace(settings, vision=VisionConfig(name=tower.name))
