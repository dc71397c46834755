"""Prompts of unlike length that are read side by side: the tokens behind each are those behind padded ones."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qformer.backbones import packing, reading
from qformer.backbones.language_loading import load_language
from qformer.config import LanguageConfig
from qformer.sample import Row, Slot, Text
from tests.families import CAUSAL, family_llm

QUERIES = 2
PADDED = {"bloom"}
"""Counts along a padding mask, so that it cannot be told of two rows in one."""


@pytest.fixture(scope="session")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Loads a family's tiny LLM, once."""
    root = tmp_path_factory.mktemp("read")
    saved = functools.cache(lambda family: family_llm(root / family, family))
    return functools.cache(lambda family, **more: load_language(LanguageConfig(name=str(saved(family)), **more)))


def prompts() -> list[Row]:
    words = [(5, 6, 7, 8, 9, 10), (11,), (9, 12), (14, 13, 8)]
    return [(Slot(number), Text(ids)) for number, ids in enumerate(words)]


def soft_tokens(llm: Any) -> Tensor:
    dice = torch.Generator().manual_seed(0)
    scale = llm._embeddings.weight.std()
    return scale * torch.randn(len(prompts()), QUERIES, llm.width, generator=dice)


@given(st.lists(st.integers(2, 40), min_size=1, max_size=12), st.integers(1, 3))
@settings(max_examples=100, deadline=None)
def test_what_is_packed_comes_back_to_its_place(lengths: list[int], copies: int) -> None:
    """Embeddings that say whose they are and where they stand, through a cache that keeps them as they come."""
    most = max(lengths)
    inputs = torch.zeros(len(lengths), most, 2)
    for row, length in enumerate(lengths):
        inputs[row, most - length :, 0] = row + 1
        inputs[row, most - length :, 1] = torch.arange(1.0, length + 1)
    layout = reading.Layout.of(lengths, 64)
    found = layout.packed(inputs)
    assert (layout.packing.owners >= 0).sum() == sum(lengths) - len(lengths)

    class Kept:
        def update(self, keys: Tensor, values: Tensor, layer: int) -> None:
            self.keys, self.values, self.layer = keys, values, layer

    class Layer:
        keys, values = found[:, None], -found[:, None]

    kept = layout.padded([Layer], Kept(), copies)
    assert kept.layer == 0 and kept.keys.shape == (len(lengths) * copies, 1, most - 1, 2)
    for row, length in enumerate(lengths):
        for copy in range(copies):
            back = kept.keys[row * copies + copy, 0, most - length :]
            assert torch.equal(back, inputs[row, most - length : -1])
            assert torch.equal(kept.values[row * copies + copy, 0, most - length :], -back)


def test_reading_side_by_side_has_to_save_more_than_a_step() -> None:
    assert reading.worth([10, 4, 4]) and not reading.worth([10, 9, 9])
    assert not reading.worth([40, 1])  # nothing would be left of the second
    assert not reading.worth([7])


@pytest.mark.parametrize("family", CAUSAL)
def test_every_family_writes_the_same_tokens(tower: Any, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = tower(family)
    assert llm.reads_ahead == (family not in PADDED)
    soft = soft_tokens(llm)
    fed: list[tuple[int, int]] = []
    given_by = reading.Layout.packed

    def packed(layout: reading.Layout, inputs: Tensor) -> Tensor:
        found = given_by(layout, inputs)
        fed.append(found.shape[:2])
        return found

    monkeypatch.setattr(reading.Layout, "packed", packed)
    for decoding in ({"num_beams": 1}, {"num_beams": 3, "length_penalty": -1.0}, {"repetition_penalty": 1.5}):
        monkeypatch.setattr(llm, "packing", False)
        expected = llm.write(soft, prompts(), max_new_tokens=8, min_new_tokens=8, **decoding)
        assert not fed
        monkeypatch.setattr(llm, "packing", True)
        assert torch.equal(llm.write(soft, prompts(), max_new_tokens=8, min_new_tokens=8, **decoding), expected)
        if family not in PADDED:
            [(rows, span)] = fed
            assert rows * span < 0.8 * len(prompts()) * (QUERIES + 5)
        fed.clear()


def test_prompts_longer_than_a_window_are_padded(tower: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mask of packed rows shows everything, however far away."""
    llm = tower("mistral")
    rows = [(Slot(0), Text(tuple(range(3, 3 + 40)))), (Slot(1), Text((5,)))]
    assert llm._window < 40
    monkeypatch.setattr(llm, "_read", None)
    llm.write(soft_tokens(llm), rows, max_new_tokens=2)


def test_an_llm_that_mixes_rows_reads_them_padded(tower: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = load_language(LanguageConfig(name=tower("llama").model.name_or_path))
    monkeypatch.setattr(  # a mask that shows all neighbours
        packing.Packing, "mask", lambda rows, dtype: torch.zeros(len(rows.owners), 1, *rows.owners.shape[1:] * 2)
    )
    assert not llm.reads_ahead
    llm.write(soft_tokens(llm), prompts(), max_new_tokens=2)
