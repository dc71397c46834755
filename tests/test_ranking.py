"""Thousands of candidates behind one prompt: the scores of one forward pass each, within a budget of positions."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from qformer.backbones import ranking
from qformer.backbones.encoder_decoder import EncoderDecoder
from qformer.backbones.language import LanguageTower
from qformer.backbones.language_loading import load_language
from qformer.backbones.ranking import Group
from qformer.config import LanguageConfig
from qformer.sample import Row, Slot, Text
from qformer.text import Joiner, Rendered
from tests.families import family_llm
from tests.tiny import WORDS

QUERIES = 3
VOCABULARY = sorted(set(" ".join(WORDS).replace(".", "").replace(":", "").replace("?", "").split()))


@pytest.fixture(scope="module", params=["llama", "bloom", "t5"])
def llm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LanguageTower:
    """One LLM of each way: packed, behind a decoder-only's cache, behind an encoder–decoder's."""
    return load_language(LanguageConfig(name=str(family_llm(tmp_path_factory.mktemp("llm"), request.param))))


def answers(count: int) -> list[str]:
    """Distinct answers of one to three words, many of which begin alike."""
    phrases = itertools.chain.from_iterable(itertools.product(VOCABULARY, repeat=words) for words in (1, 2, 3))
    return [" ".join(phrase) for phrase in itertools.islice(phrases, count)]


def fed(llm: LanguageTower, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Notes the rows and the positions of everything that the LLM's body is given from here on."""
    seen: list[tuple[int, int]] = []
    body = llm.model.get_decoder() if llm.is_encoder_decoder else llm.model.base_model
    forward = body.forward

    def noted(*given: Any, **named: Any) -> Any:
        inputs = next(named[name] for name in ("inputs_embeds", "input_ids") if named.get(name) is not None)
        seen.append((inputs.shape[0], inputs.shape[1]))
        return forward(*given, **named)

    monkeypatch.setattr(body, "forward", noted)
    return seen


def asked(llm: LanguageTower) -> tuple[Tensor, Row]:
    soft = torch.randn(1, QUERIES, llm.width, generator=torch.Generator().manual_seed(5))
    return soft, Joiner(llm.tokenizer, llm.profile, None).row(Rendered("what is it"), [0], answered=False)


@pytest.mark.parametrize("count", [2_423, 10_000])
def test_thousands_of_candidates_score_as_alone_within_the_budget(
    llm: LanguageTower, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    soft, prompt = asked(llm)
    choices = answers(count)
    assert len(set(choices)) == count
    assert llm.ranks == ("packed" if "Llama" in type(llm.model).__name__ else "behind")
    seen = fed(llm, monkeypatch)
    [found] = llm.rank(soft, [prompt], [choices])
    assert max(rows * positions for rows, positions in seen) <= ranking.SCORED_POSITIONS
    words = llm.model.get_input_embeddings().weight.shape[0]
    assert max(rows * positions for rows, positions in seen) * words <= ranking.LOGITS_AT_ONCE
    joiner = Joiner(llm.tokenizer, llm.profile, None)
    ids = [joiner.target_ids(choice) for choice in choices]
    # What is fed at the least, beginnings not shared: all tokens but the last of each, and the prompt.
    least = sum(len(each) - 1 for each in ids)
    beside = sum(rows * positions for rows, positions in seen) - least
    assert beside < 0.4 * least

    some = random.Random(0).sample(range(count), 150)
    rows = [(*prompt, Text(ids[number], trained=True)) for number in some]
    with torch.no_grad():
        alone = llm.log_likelihood(soft, rows)[0].tolist()
    picked = [found[number] for number in some]
    assert picked == pytest.approx(alone, rel=1e-5, abs=1e-4)
    assert order(picked) == order(alone)
    # A few of them, turned round, score as among all the others.
    [few] = llm.rank(soft, [prompt], [[choices[number] for number in reversed(some)]])
    assert few[::-1] == pytest.approx(picked, rel=1e-5, abs=1e-4)


def order(values: list[float]) -> list[int]:
    return sorted(range(len(values)), key=values.__getitem__)


def test_a_small_budget_changes_no_score(llm: LanguageTower, monkeypatch: pytest.MonkeyPatch) -> None:
    soft, prompt = asked(llm)
    other: Row = (Slot(0), Text((7, 8, 9, 10, 11)))
    choices = answers(300)
    wanted = llm.rank(soft, [prompt, other], [choices, choices[::-1]])
    seen = fed(llm, monkeypatch)
    monkeypatch.setattr(ranking, "SCORED_POSITIONS", 200)
    monkeypatch.setattr(ranking, "FED_TOKENS", 40)
    found = llm.rank(soft, [prompt, other], [choices, choices[::-1]])
    assert max(rows * positions for rows, positions in seen) <= 200
    for one, two in zip(found, wanted, strict=True):
        assert one == pytest.approx(two, rel=1e-5, abs=1e-4)


def test_candidates_of_an_encoder_decoder_score_alike_in_one_pass(llm: LanguageTower) -> None:
    """As a GPU is given few of them: prompts of unlike length, candidates that begin alike and of one token."""
    if not isinstance(llm, EncoderDecoder):
        pytest.skip("a decoder-only LLM reads prompt and candidates in one pass in any case")
    soft = torch.randn(2, QUERIES, llm.width, generator=torch.Generator().manual_seed(5))
    candidates = ((7,), (8, 9, 10), (8, 11, 12, 13))
    groups = [Group((Slot(0), Text((3, 4, 5))), candidates), Group((Slot(1), Text((6,))), candidates[:2])]
    with torch.no_grad():
        found, behind, apart = (score(soft, groups) for score in (llm._at_once, llm._behind, llm._apart))
    assert found.shape == (5,)
    torch.testing.assert_close(found, apart, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, behind, rtol=1e-5, atol=1e-5)


def test_a_gpu_is_given_one_pass_where_a_cpu_takes_two(llm: LanguageTower, monkeypatch: pytest.MonkeyPatch) -> None:
    if not isinstance(llm, EncoderDecoder):
        pytest.skip("a decoder-only LLM reads prompt and candidates in one pass in any case")
    taken: list[str] = []
    assert llm.ranks == "behind"
    monkeypatch.setattr(EncoderDecoder, "_at_once", lambda *given: taken.append("at once"))
    monkeypatch.setattr(EncoderDecoder, "_behind", lambda *given: taken.append("behind"))
    llm._scored(torch.empty(0), ())
    monkeypatch.setattr(EncoderDecoder, "device", torch.device("cuda"))
    llm._scored(torch.empty(0), ())
    assert taken == ["behind", "at once"]
