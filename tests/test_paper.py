"""The paper's runs: their mixture, their settings, and what a dry run says of them."""

from __future__ import annotations

import dataclasses

import pytest

from qformer import cards
from qformer.config import DataConfig, RunConfig, ValidationConfig
from qformer.errors import ConfigError

# -- mixtures ---------------------------------------------------------------------------------------------------------


def test_a_role_stands_for_its_cards_and_a_name_behind_it_wins() -> None:
    found, multipliers = cards.mixture(DataConfig(tasks={"held_in": 1.0, "aokvqa": 0.5}))
    assert set(found) == set(cards.load_all(["held_in"], "train"))
    assert multipliers == {**dict.fromkeys(found, 1.0), "aokvqa": 0.5}


def test_a_variant_is_taken_of_every_card() -> None:
    found, multipliers = cards.mixture(DataConfig(tasks={"aokvqa": 2.0}, variant="multiple_choice"))
    assert multipliers == {"aokvqa:multiple_choice": 2.0} and list(found) == list(multipliers)
    with pytest.raises(ConfigError, match=r"data\.variant is 'plain', and data\.tasks names 'aokvqa:multiple_choice'"):
        cards.mixture(DataConfig(tasks={"aokvqa:multiple_choice": 1.0}, variant="plain"))
    with pytest.raises(ConfigError, match=r"vqav2\.yaml: no variant 'upside_down'"):
        cards.mixture(DataConfig(tasks={"vqav2": 1.0}, variant="upside_down"))


def test_held_out_cards_are_trained_and_validated_on_where_that_is_allowed() -> None:
    settings = RunConfig(validation=ValidationConfig(tasks=["gqa"]), data=DataConfig(tasks={"gqa": 1.0}))
    with pytest.raises(ConfigError, match=r"set data\.allow_held_out: true to fine-tune on it"):
        cards.mixture(settings.data)
    with pytest.raises(ConfigError, match=r"validation\.tasks names 'gqa', which is held out"):
        cards.validated(settings)
    allowed = dataclasses.replace(settings, data=dataclasses.replace(settings.data, allow_held_out=True))
    assert list(cards.validated(allowed)) == ["gqa"]
    with pytest.raises(ConfigError, match="'gqa' has no 'train' section"):
        cards.mixture(allowed.data)
