"""Rows that share tensor rows: how they are put together, and that no LLM notices."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qformer.backbones import packing, ranking
from qformer.backbones.decoder_only import DecoderOnly
from qformer.backbones.language_loading import load_language
from qformer.config import LanguageConfig
from qformer.sample import Row, Slot, Text, row_length
from tests.families import CAUSAL, family_llm

WAYS = dict.fromkeys(CAUSAL, "positions") | {"opt": "mask", "mpt": "mask", "bloom": None}
EITHER = {"falcon"}
"""Older releases of transformers overlook its positions, newer ones do not."""
LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=40)
QUERIES = 3


@pytest.fixture(scope="session")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Loads a family's tiny LLM, once."""
    root = tmp_path_factory.mktemp("packed")
    saved = functools.cache(lambda family: family_llm(root / family, family))
    return functools.cache(lambda family, **more: load_language(LanguageConfig(name=str(saved(family)), **more)))


@given(LENGTHS, st.integers(8, 4096))
@settings(max_examples=200, deadline=None)
def test_every_row_stands_once_and_whole_in_some_tensor_row(lengths: list[int], width: int) -> None:
    bins = packing.cheapest(lengths, width)
    found = packing.packed(lengths, bins)
    rows, span = found.owners.shape
    assert sorted(number for numbers in bins for number in numbers) == list(range(len(lengths)))
    assert len(bins) == rows and span <= max(packing.WIDER) * max(lengths)
    for number, length in enumerate(lengths):
        places = (found.owners == number).nonzero()
        assert len(places) == length and len(set(places[:, 0].tolist())) == 1
        assert places[:, 1].diff().eq(1).all()
        assert found.positions[found.owners == number].tolist() == list(range(length))
    assert (found.firsts & (found.owners >= 0)).sum() == len(lengths)


@given(LENGTHS, st.integers(1, 4))
@settings(max_examples=200, deadline=None)
def test_few_bins_are_used(lengths: list[int], times: int) -> None:
    capacity = times * max(lengths)
    bins = packing.first_fit(lengths, capacity)
    assert all(sum(lengths[number] for number in numbers) <= capacity for numbers in bins)
    assert len(bins) <= 11 / 9 * -(-sum(lengths) // capacity) + 1 or len(bins) <= 2 * sum(lengths) / capacity + 1


def test_a_row_sees_itself_alone_and_not_ahead() -> None:
    found = packing.packed([2, 3], [[1, 0], []][:1]).mask(torch.float32)
    least = torch.finfo(torch.float32).min
    assert found.shape == (1, 1, 5, 5)
    sees = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]
    assert torch.equal(found[0, 0], torch.where(torch.tensor(sees).bool(), 0.0, least))


def test_wide_llms_take_longer_tensor_rows_where_that_saves_padding() -> None:
    lengths = [10, *[6] * 9]  # 6 + 6 does not fit into 10
    narrow, wide = packing.cheapest(lengths, 1), packing.cheapest(lengths, 4096)
    assert max(map(len, narrow)) == 1 and max(map(len, wide)) > 1


@pytest.mark.parametrize("family", CAUSAL)
def test_packed_rows_have_the_scores_and_gradients_of_padded_ones(
    tower: Any, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = tower(family)
    assert llm.packs == WAYS[family] or family in EITHER
    padded = _graded(llm, False, monkeypatch)
    asked: list[dict[str, Any]] = []
    given_by = llm._given
    monkeypatch.setattr(llm, "_given", lambda *all, **more: asked.append(given_by(*all, **more)) or asked[-1])
    packed = _graded(llm, True, monkeypatch)
    padded_to = len(row_lengths()) * max(row_lengths())
    rows, span = asked[0]["inputs_embeds"].shape[:2]
    assert (rows * span < 0.9 * padded_to) == (llm.packs is not None)
    for found, expected in zip(packed, padded, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert float(packed[0].sum()) == pytest.approx(float(padded[0].sum()), rel=1e-5)  # the loss
    assert (packed[2] - padded[2]).norm() <= 1e-4 * padded[2].norm()


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_neighbours_are_not_noticed_to_the_bit(tower: Any, family: str) -> None:
    llm = tower(family)
    soft = soft_tokens(llm)
    rows, bins = rows_of(), [range(len(rows_of()))]
    found = llm._likelihood(soft, rows, llm.packs, bins)[0]
    loud = soft.clone()
    loud[0] *= 100.0  # the first row's picture
    changed = llm._likelihood(loud, rows, llm.packs, bins)[0]
    assert not torch.equal(found[:1], changed[:1]) and torch.equal(found[1:], changed[1:])


def test_an_llm_that_mixes_rows_is_told_to_pad(tower: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tower("llama")
    llm = DecoderOnly(source.model, source.tokenizer, source.profile)
    given_by = llm._given
    monkeypatch.setattr(  # a model that goes by a mask of ones alone
        llm, "_given", lambda inputs, mask, positions, **more: given_by(inputs, torch.ones(inputs.shape[:2]), positions)
    )
    assert llm.packs is None


def test_packing_can_be_switched_off(tower: Any) -> None:
    assert tower("llama", packing=False).packs is None
    assert tower("llama").packs == "positions"


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_packed_rows_are_recomputed_in_gradient_checkpointing(
    tower: Any, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, llm = tower(family), tower(family, gradient_checkpointing=True)
    assert llm.packs == plain.packs
    expected = _graded(plain, True, monkeypatch)
    for found, wanted in zip(_graded(llm.train(), True, monkeypatch), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_logits_of_many_tokens_are_written_in_parts_and_nothing_changes(
    tower: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = tower("llama")
    expected = _graded(llm, True, monkeypatch)
    written: list[int] = []
    head = llm.model.get_output_embeddings()
    with monkeypatch.context() as patch:
        patch.setattr(ranking, "LOGITS_AT_ONCE", 4 * head.weight.shape[0])
        handle = head.register_forward_hook(lambda _, inputs, __: written.append(len(inputs[0])))
        found = _graded(llm, True, monkeypatch)
        handle.remove()
    assert sum(written) == 2 * int(expected[1].sum()) and max(written) <= 4  # forward, and again in backward
    for ours, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-6)


def soft_tokens(llm: Any) -> Tensor:
    return torch.randn(6, QUERIES, llm.width, generator=torch.Generator().manual_seed(3))


def rows_of() -> list[Row]:
    """Unlike lengths, some with two slots or two trained spans, one with a trained span right behind its slot."""
    return [
        (Slot(0), Text((5, 6, 7)), Text((8, 9), trained=True)),
        (Text((5,)), Slot(1), Text((6,)), Text((7,), trained=True)),
        (Text((9, 9)), Slot(2), Text((5, 6)), Slot(3), Text((7, 8, 9, 10, 11, 12, 5, 6, 7), trained=True)),
        (Slot(4), Text((7,), trained=True), Text((5, 6)), Text((8, 9, 10), trained=True), Text((5,))),
        (Slot(5), Text((5, 6, 7, 8, 9, 10, 11, 12, 5, 6, 7, 8, 9, 5, 6)), Text((7, 8), trained=True)),
    ]


def row_lengths() -> list[int]:
    return [row_length(row, QUERIES) for row in rows_of()]


def _graded(llm: Any, packed: bool, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor, Tensor]:
    """Sums, counts and the soft tokens' gradient."""
    with monkeypatch.context() as patch:
        patch.setattr(llm, "packing", packed)
        soft = soft_tokens(llm).requires_grad_()
        sums, counts = llm.log_likelihood(soft, rows_of())
        (sums * torch.arange(1, len(sums) + 1)).sum().backward()
    assert soft.grad is not None
    return sums.detach(), counts, soft.grad
