"""The frozen LLM behind five members: five families, likelihoods, answers, ranks, freezing, loading."""

from __future__ import annotations

import functools
import itertools
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    Gemma2Config,
    GraniteConfig,
    MambaConfig,
    MistralConfig,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from qformer.backbones import ranking
from qformer.backbones.decoder_only import DecoderOnly
from qformer.backbones.language import LanguageTower, same_language
from qformer.backbones.language_loading import load_language, load_profile
from qformer.cards import Decoding
from qformer.config import LanguageConfig, ProfileConfig
from qformer.errors import ConfigError, DataError
from qformer.sample import Row, Slot, Text, row_length, trained_tokens
from qformer.text import Joiner, Rendered
from tests.families import SEQ2SEQ, family_llm
from tests.tiny import FAMILIES, redraw, tiny_bert, tiny_llm

CAUSAL = [family for family in FAMILIES if family != "t5"]
QUERIES, WIDTH = 3, 32
EXAMPLES = [
    ("what colour is it", "it is red"),
    ("how many?", "three"),
    ("say the colour of the thing left of the cube. please", "green indeed indeed"),
    ("is there a bird in the picture", "no"),
]
CHOICES = ["it is red", "it is green indeed", "yes", "a photo of two cats near the big tree", "no"]


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Makes the directory of a family's tiny LLM, once."""
    root = tmp_path_factory.mktemp("llms")
    return functools.cache(lambda family: tiny_llm(root / family, family))


@pytest.fixture(scope="session")
def tower(saved: Any) -> Any:
    """Loads a family's tiny LLM, once for each set of settings."""
    return functools.cache(lambda family, **more: load_language(LanguageConfig(name=str(saved(family)), **more)))


def soft_tokens(reads: int = len(EXAMPLES)) -> Tensor:
    return torch.randn(reads, QUERIES, WIDTH, generator=torch.Generator().manual_seed(5))


def rows_of(llm: LanguageTower, *, answered: bool) -> list[Row]:
    joiner = Joiner(llm.tokenizer, llm.profile, None)
    return [
        joiner.row(Rendered(instruction, target), [read], answered=answered)
        for read, (instruction, target) in enumerate(EXAMPLES)
    ]


def own_loss(llm: LanguageTower, soft: Tensor, row: Row) -> tuple[Tensor, Tensor]:
    """Transformers' own summed loss of one row, from embeddings and labels written out by hand, and its logits."""
    embed = llm.model.get_input_embeddings()
    prompt, target = (row[:-1], row[-1].ids) if llm.is_encoder_decoder else (row, ())
    pieces = [soft[p.read] if isinstance(p, Slot) else embed(torch.tensor(p.ids).long()) for p in prompt]
    if llm.is_encoder_decoder:
        inputs = torch.cat([*pieces, embed(torch.tensor(llm.profile.closing))])[None]
        out = llm.model(inputs_embeds=inputs, labels=torch.tensor([target]))
    else:
        ids = [[-100] * QUERIES if isinstance(p, Slot) else p.ids if p.trained else [-100] * len(p.ids) for p in row]
        out = llm.model(inputs_embeds=torch.cat(pieces)[None], labels=torch.tensor([list(itertools.chain(*ids))]))
    return out.loss * trained_tokens(row), out.logits


# -- likelihood -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_log_likelihood_is_the_loss_of_transformers_itself(tower: Any, family: str) -> None:
    llm, soft = tower(family), soft_tokens()
    rows = rows_of(llm, answered=True)
    sums, counts = llm.log_likelihood(soft, rows)
    expected = torch.stack([-own_loss(llm, soft, row)[0] for row in rows])
    torch.testing.assert_close(sums, expected, rtol=1e-5, atol=1e-4)
    assert counts.tolist() == [trained_tokens(row) for row in rows]
    assert sums.dtype == torch.float32


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_scores_and_answers_as_its_rows_one_by_one(tower: Any, family: str) -> None:
    llm, soft = tower(family), soft_tokens()
    rows = rows_of(llm, answered=True)
    together = llm.log_likelihood(soft, rows)[0]
    alone = torch.cat([llm.log_likelihood(soft, [row])[0] for row in rows])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-4)
    prompts = rows_of(llm, answered=False)
    for settings in ({}, {"num_beams": 3, "length_penalty": -1.0}, {"repetition_penalty": 1.5, "min_new_tokens": 4}):
        answers = llm.generate(soft, prompts, max_new_tokens=8, **settings)
        assert answers == [llm.generate(soft, [prompt], max_new_tokens=8, **settings)[0] for prompt in prompts]
        assert any(answers)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_the_argmax_of_every_step(tower: Any, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    llm, soft = tower(family), soft_tokens()
    prompts = rows_of(llm, answered=False)
    written: list[list[int]] = []
    monkeypatch.setattr(llm, "_answers", lambda ids: [written.extend(ids.tolist())])
    llm.generate(soft, prompts, max_new_tokens=6, min_new_tokens=0)
    for prompt, ids in zip(prompts, written, strict=True):
        told: list[int] = []
        for _ in range(6):
            if llm.is_encoder_decoder:
                _, logits = own_loss(llm, soft, (*prompt, Text((*told, 0), trained=True)))
                told.append(int(logits[0, len(told)].argmax()))
            else:
                _, logits = own_loss(llm, soft, (*prompt, Text(tuple(told), trained=True)))
                told.append(int(logits[0, -1].argmax()))
            if told[-1] in llm._ends:
                break
        assert ids[: len(told)] == told


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_the_soft_tokens_and_no_weight(tower: Any, family: str) -> None:
    llm, soft = tower(family), soft_tokens().requires_grad_()
    rows = rows_of(llm, answered=True)
    llm.log_likelihood(soft, rows)[0].sum().backward()
    reference = soft_tokens().requires_grad_()
    sum(-own_loss(llm, reference, row)[0] for row in rows).backward()
    torch.testing.assert_close(soft.grad, reference.grad, rtol=1e-4, atol=1e-5)
    assert (soft.grad.norm(dim=(1, 2)) > 1e-3).all()
    assert not any(parameter.requires_grad for parameter in llm.parameters())


@pytest.mark.parametrize("family", CAUSAL)
def test_soft_tokens_may_stand_anywhere_and_several_spans_be_trained(tower: Any, family: str) -> None:
    llm, soft = tower(family), soft_tokens()
    rows: list[Row] = [
        (Text((5, 6)), Slot(1), Text((7, 8), trained=True), Text((9,)), Slot(0), Text((10,), trained=True)),
        (Slot(2), Text((5,)), Text((11, 12, 13), trained=True), Text((14,))),
    ]
    sums, counts = llm.log_likelihood(soft, rows)
    torch.testing.assert_close(sums, torch.stack([-own_loss(llm, soft, row)[0] for row in rows]), rtol=1e-5, atol=1e-4)
    assert counts.tolist() == [3, 3]
    assert llm.log_likelihood(soft, [(Slot(0), Text((5, 6)))])[0].item() == 0.0


def special_family(directory: Path, source: Path, kind: str) -> Path:
    """A family whose logits are capped or scaled behind the output layer."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.save_pretrained(directory)
    sizes = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 64, "pad_token_id": 3, "eos_token_id": 2, "bos_token_id": 1,
    }  # fmt: skip
    config = {
        "gemma2": lambda: Gemma2Config(**sizes, head_dim=8, sliding_window=6, final_logit_softcapping=2.0),
        "granite": lambda: GraniteConfig(**sizes, logits_scaling=4.0, embedding_multiplier=3.0),
    }[kind]()
    model = AutoModelForCausalLM.from_config(config)
    redraw(model, seed=0)
    model.save_pretrained(directory)
    return directory


def gradient(sums: Tensor, soft: Tensor) -> Tensor:
    """Of a loss in which each row has another weight."""
    return torch.autograd.grad((sums * torch.arange(1, len(sums) + 1)).sum(), soft)[0]


@pytest.mark.parametrize("kind", ["gemma2", "granite"])
def test_a_head_that_caps_or_scales_its_logits_is_noticed(tmp_path: Path, saved: Any, kind: str) -> None:
    llm = load_language(LanguageConfig(name=str(special_family(tmp_path / kind, saved("llama"), kind))))
    soft, rows = soft_tokens().requires_grad_(), rows_of(llm, answered=True)
    assert not llm._head_stands_alone
    assert llm._keeps_positions
    expected = torch.stack([-own_loss(llm, soft, row)[0] for row in rows])
    wanted = gradient(expected, soft)
    for keeps in (True, False):  # as a model that gives all logits or none
        llm._keeps_positions = keeps
        found = llm.log_likelihood(soft, rows)[0]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
        assert (gradient(found, soft) - wanted).norm() <= 1e-4 * wanted.norm()
    soft = soft.detach()
    scored = llm.rank(soft, rows_of(llm, answered=False), [CHOICES] * len(EXAMPLES))
    close(scored, apart(llm, soft, [CHOICES] * len(EXAMPLES)))


@pytest.mark.parametrize("family", CAUSAL)
def test_the_head_alone_gives_the_full_logits(tower: Any, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    llm, soft = tower(family), soft_tokens().requires_grad_()
    assert llm._head_stands_alone
    rows = rows_of(llm, answered=True)
    short = llm.log_likelihood(soft, rows)[0]
    seen = []
    head = llm.model.get_output_embeddings()
    hook = head.register_forward_hook(lambda module, given, out: seen.append(out.shape[:-1].numel()))
    llm.log_likelihood(soft, rows)
    hook.remove()
    assert seen == [sum(map(trained_tokens, rows))]
    monkeypatch.setitem(llm.__dict__, "_head_stands_alone", False)
    monkeypatch.setitem(llm.__dict__, "_keeps_positions", False)
    whole = llm.log_likelihood(soft, rows)[0]
    torch.testing.assert_close(whole, short, rtol=1e-5, atol=1e-4)
    wanted = gradient(whole, soft)
    assert (gradient(short, soft) - wanted).norm() <= 1e-4 * wanted.norm()


@pytest.mark.parametrize("family", [family for family in SEQ2SEQ if family != "bart"])
def test_an_encoder_decoders_head_writes_logits_of_trained_tokens_in_parts(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing scales its logits, as where T5 ties it to the embeddings."""
    llm = load_language(LanguageConfig(name=str(family_llm(tmp_path / family, family))))
    assert llm._head_stands_alone == (family != "t5")
    soft = torch.randn(len(EXAMPLES), QUERIES, llm.width, generator=torch.Generator().manual_seed(5)).requires_grad_()
    rows = rows_of(llm, answered=True)
    expected = torch.stack([-own_loss(llm, soft, row)[0] for row in rows])
    wanted = gradient(expected, soft)
    head = llm.model.get_output_embeddings()
    monkeypatch.setattr(ranking, "LOGITS_AT_ONCE", 4 * llm._embeddings.weight.shape[0])
    seen: list[int] = []
    hook = head.register_forward_hook(lambda module, given, out: seen.append(out.shape[:-1].numel()))
    sums = llm.log_likelihood(soft, rows)[0]
    torch.testing.assert_close(sums, expected, rtol=1e-5, atol=1e-4)
    assert (gradient(sums, soft) - wanted).norm() <= 1e-4 * wanted.norm()
    hook.remove()
    if llm._head_stands_alone:
        assert sum(seen) == 2 * sum(map(trained_tokens, rows)) and max(seen) <= 4  # forward, and again in backward


# -- ranking ----------------------------------------------------------------------------------------------------------


def apart(llm: LanguageTower, soft: Tensor, candidates: list[list[str]], *, end: bool = True) -> list[list[float]]:
    """Each candidate's log-likelihood, one row at a time."""
    joiner = Joiner(llm.tokenizer, llm.profile, None)
    prompts = rows_of(llm, answered=False)
    return [
        [
            llm.log_likelihood(soft, [(*prompt, Text(joiner.target_ids(c) if end else joiner.answer_ids(c), True))])[
                0
            ].item()
            for c in choices
        ]
        for prompt, choices in zip(prompts, candidates, strict=True)
    ]


def close(found: list[list[float]], expected: list[list[float]]) -> None:
    assert [len(scores) for scores in found] == [len(scores) for scores in expected]
    assert list(itertools.chain(*found)) == pytest.approx(list(itertools.chain(*expected)), rel=1e-5, abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("end", [True, False])
def test_ranks_are_log_likelihoods_whatever_is_ranked_beside_them(
    tower: Any, family: str, end: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm, soft = tower(family), soft_tokens()
    prompts = rows_of(llm, answered=False)
    candidates = [CHOICES, CHOICES[::-1], CHOICES[:1], [*CHOICES[1:3], CHOICES[1]]]
    expected = apart(llm, soft, candidates, end=end)
    assert llm.ranks == ("behind" if llm.is_encoder_decoder else "packed")
    found = llm.rank(soft, prompts, candidates, end=end)
    close(found, expected)
    assert found[3][0] == found[3][2]  # one candidate named twice
    alone = [llm.rank(soft, [p], [c], end=end)[0] for p, c in zip(prompts, candidates, strict=True)]
    close(alone, expected)
    close(llm.rank(soft, prompts[::-1], candidates[::-1], end=end)[::-1], expected)
    for way in ("packed", "behind", "apart"):
        if way != "packed" or not llm.is_encoder_decoder:
            monkeypatch.setitem(llm.__dict__, "ranks", way)
            close(llm.rank(soft, prompts, candidates, end=end), expected)
            for limit, value in (("SCORED_POSITIONS", 40), ("FED_TOKENS", 2), ("LOGITS_AT_ONCE", 3 * 320)):
                with monkeypatch.context() as limits:
                    limits.setattr(ranking, limit, value)
                    close(llm.rank(soft, prompts, candidates, end=end), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_is_computed_once_for_all_its_candidates(
    tower: Any, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm, soft = tower(family), soft_tokens()
    assert llm.ranks != "apart"
    joined, join = [], llm._join
    monkeypatch.setattr(llm, "_join", lambda soft, rows, **side: joined.append(len(rows)) or join(soft, rows, **side))
    llm.rank(soft, rows_of(llm, answered=False), [CHOICES] * len(EXAMPLES))
    assert joined == [len(EXAMPLES)]


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_mean_is_by_token_and_pmi_takes_off_the_score_without_slots(tower: Any, family: str) -> None:
    llm, soft = tower(family), soft_tokens()
    prompts, candidates = rows_of(llm, answered=False), [CHOICES] * len(EXAMPLES)
    sums = llm.rank(soft, prompts, candidates)
    joiner = Joiner(llm.tokenizer, llm.profile, None)
    lengths = [len(joiner.target_ids(choice)) for choice in CHOICES]
    close(
        llm.rank(soft, prompts, candidates, normalize="mean"),
        [[value / length for value, length in zip(scores, lengths, strict=True)] for scores in sums],
    )
    blind = [tuple(piece for piece in row if isinstance(piece, Text)) for row in prompts]
    without = llm.rank(soft, blind, candidates)
    close(
        llm.rank(soft, prompts, candidates, normalize="pmi"),
        [[a - b for a, b in zip(*pair, strict=True)] for pair in zip(sums, without, strict=True)],
    )


def test_a_state_that_cannot_be_shared_is_noticed(saved: Any) -> None:
    tokenizer, profile = load_profile(LanguageConfig(name=str(saved("llama"))))
    config = MambaConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, state_size=8, expand=1)
    model = AutoModelForCausalLM.from_config(config)
    redraw(model, seed=0)
    llm, soft = DecoderOnly(model, tokenizer, profile), soft_tokens()
    assert llm.ranks == "apart"
    prompts, candidates = rows_of(llm, answered=False), [CHOICES] * len(EXAMPLES)
    close(llm.rank(soft, prompts, candidates), apart(llm, soft, candidates))


def test_positions_that_are_counted_along_the_mask_cannot_be_packed(saved: Any) -> None:
    tokenizer, profile = load_profile(LanguageConfig(name=str(saved("llama"))))
    config = BloomConfig(vocab_size=len(tokenizer), hidden_size=32, n_layer=2, n_head=4)
    model = AutoModelForCausalLM.from_config(config)
    redraw(model, seed=0)
    llm, soft = DecoderOnly(model, tokenizer, profile), soft_tokens()
    assert llm.ranks == "behind"
    prompts, candidates = rows_of(llm, answered=False), [CHOICES] * len(EXAMPLES)
    close(llm.rank(soft, prompts, candidates), apart(llm, soft, candidates))


def test_blocks_that_look_back_a_little_way_are_not_packed_beyond_it(saved: Any, monkeypatch: Any) -> None:
    tokenizer, profile = load_profile(LanguageConfig(name=str(saved("llama"))))
    config = MistralConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=12,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    redraw(model, seed=0)
    llm, soft = DecoderOnly(model, tokenizer, profile), soft_tokens()
    prompts, candidates = rows_of(llm, answered=False), [CHOICES] * len(EXAMPLES)
    assert llm.ranks == "packed"
    assert max(row_length(prompt, soft.shape[1]) for prompt in prompts) > 12
    close(llm.rank(soft, prompts, candidates), apart(llm, soft, candidates))


def test_candidates_become_a_tree_that_says_which_place_predicts_which_token() -> None:
    candidates = ((5,), (5, 6), (5, 6, 7), (5, 8, 9), (6, 8))
    tree = ranking.tree_of(candidates)
    assert tree.ids.tolist() == [5, 6, 8, 6]
    assert tree.depths.tolist() == [0, 1, 1, 0]
    for owner, ids in enumerate(candidates):
        places, tokens = tree.places[tree.owners == owner].tolist(), tree.tokens[tree.owners == owner].tolist()
        assert tuple(tokens) == ids
        assert places[0] == 0
        assert [int(tree.ids[place - 1]) for place in places[1:]] == list(ids[:-1])
        for before, place in itertools.pairwise(places[1:]):
            assert tree.sees[place - 1, before - 1]
    assert tree.sees.sum() == 4 + 2  # each itself, and two of depth one what stands before them


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("seed", range(20))
def test_parts_hold_every_candidate_once_within_the_limits(packed: bool, seed: int, monkeypatch: Any) -> None:
    dice = random.Random(seed)
    for name, value in (("SCORED_POSITIONS", 200), ("FED_TOKENS", 9), ("LOGITS_AT_ONCE", 50 * 7)):
        monkeypatch.setattr(ranking, name, value)
    rows = [(Slot(0), Text(tuple(range(dice.randint(1, 20))))) for _ in range(dice.randint(1, 6))]
    candidates = [
        [tuple(dice.choices(range(3), k=dice.randint(1, 5))) for _ in range(dice.randint(1, 40))] for _ in rows
    ]
    seen: dict[Row, list[tuple[int, ...]]] = {}

    def score(groups: Any) -> Tensor:
        fed = [len(ranking.tree_of(group.candidates).ids) for group in groups]
        longest = max(row_length(group.prompt, 4) for group in groups)
        words = max(len(ids) for group in groups for ids in group.candidates)
        count = len(groups) if packed else sum(len(group.candidates) for group in groups)
        wide = longest + (max(fed) if packed else words)
        assert count == 1 or count * wide <= 200
        assert max(fed) <= 9
        assert count == 1 or count * (max(fed) + 1 if packed else words) <= 50
        for group in groups:
            seen.setdefault(group.prompt, []).extend(group.candidates)
        return torch.tensor([float(sum(ids)) for group in groups for ids in group.candidates])

    found = ranking.ranked(score, rows, candidates, "sum", queries=4, vocabulary=7, packed=packed)
    assert found == [[float(sum(ids)) for ids in choices] for choices in candidates]
    for row, choices in zip(rows, candidates, strict=True):
        assert set(choices) <= set(seen[row])
    for scored in seen.values():
        assert len(scored) == len(set(scored))


def test_ranking_nothing_gives_nothing(tower: Any) -> None:
    assert tower("gpt2").rank(soft_tokens(), [], []) == []


def test_ranking_refuses_what_cannot_be_scored(tower: Any) -> None:
    llm, soft = tower("gpt2"), soft_tokens()
    prompt: Row = (Slot(0),)
    with pytest.raises(ConfigError, match="normalize is 'max'; it takes 'sum', 'mean' or 'pmi'"):
        llm.rank(soft, [prompt], [["a"]], normalize="max")
    with pytest.raises(ConfigError, match="a prompt has no candidates"):
        llm.rank(soft, [prompt], [[]])
    empty = load_language(LanguageConfig(name=str(llm.model.name_or_path), profile=ProfileConfig(separator="")))
    with pytest.raises(ConfigError, match="the candidate '' has no token to score"):
        empty.rank(soft, [prompt], [["a", ""]], end=False)
    with pytest.raises(DataError, match="nothing before its first trained token"):
        llm.rank(soft, [prompt], [["a"]], normalize="pmi")


def test_a_long_candidate_is_cut_alike_with_and_without_its_end_mark(saved: Any) -> None:
    llm = load_language(LanguageConfig(name=str(saved("gpt2")), target_limit=4))
    joiner = Joiner(llm.tokenizer, llm.profile, None)
    [[ended]] = ranking.requested(joiner, [()], [["it is green indeed"]], end=True)
    [[bare]] = ranking.requested(joiner, [()], [["it is green indeed"]], end=False)
    assert len(ended) == 4
    assert ended == (*bare, *llm.profile.end)
    assert joiner.truncations.targets == 2


# -- answering --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_decoding_defaults_in_the_models_folder_change_nothing(
    tmp_path: Path, saved: Any, tower: Any, family: str
) -> None:
    trapped = tmp_path / family
    shutil.copytree(saved(family), trapped)
    file = trapped / "generation_config.json"
    file.write_text(
        json.dumps(
            {
                **json.loads(file.read_text()), "do_sample": True, "temperature": 5.0, "top_k": 3, "num_beams": 4,
                "repetition_penalty": 9.0, "no_repeat_ngram_size": 1, "max_new_tokens": 2, "eos_token_id": [4, 5, 6, 7],
                "forced_eos_token_id": 9, "suppress_tokens": list(range(10, 60)), "bad_words_ids": [[61], [62]],
            }
        )
    )  # fmt: skip
    soft, clean = soft_tokens(), tower(family)
    prompts = rows_of(clean, answered=False)
    llm = load_language(LanguageConfig(name=str(trapped)))
    assert llm.generate(soft, prompts) == clean.generate(soft, prompts)
    sampled = [
        torch.manual_seed(3) and each.generate(soft, prompts, do_sample=True, top_p=0.9) for each in (llm, clean)
    ]
    assert sampled[0] == sampled[1]


def test_an_answer_ends_at_its_end_mark_and_before_a_stop_string(saved: Any) -> None:
    llm = load_language(LanguageConfig(name=str(saved("llama")), profile=ProfileConfig(stop=["", "red", " is"])))
    words = llm.tokenizer("a photo it is red indeed", add_special_tokens=False).input_ids
    after = llm.tokenizer("no", add_special_tokens=False).input_ids
    ids = torch.tensor([[*words, *llm.profile.end, *after], [*after, *llm.profile.end, *words]])
    assert llm._answers(ids) == ["a photo it", "no"]
    other = load_language(LanguageConfig(name=str(saved("llama")), profile=ProfileConfig(end=[words[1]])))
    assert other._ends == [words[1], llm.tokenizer.eos_token_id]
    assert other._answers(ids[:1]) == [llm.tokenizer.decode(words[:1])]


def test_every_decoding_value_is_given(tower: Any) -> None:
    settings = tower("llama")._decoding({"num_beams": 2, "do_sample": True})
    assert set(Decoding.__dataclass_fields__) <= set(settings)
    assert (settings["top_k"], settings["early_stopping"]) == (0, False)


def test_a_pad_mark_that_the_model_lacks_is_not_fed_to_it(tmp_path: Path, saved: Any) -> None:
    shutil.copytree(saved("gpt2"), tmp_path / "llm")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "llm")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(tmp_path / "llm")
    llm = load_language(LanguageConfig(name=str(tmp_path / "llm")))
    assert llm.profile.pad == llm.model.get_input_embeddings().weight.shape[0]
    soft, prompts = soft_tokens(), rows_of(llm, answered=False)
    answers = llm.generate(soft, prompts)
    assert answers == [llm.generate(soft, [prompt])[0] for prompt in prompts]
    assert torch.isfinite(llm.log_likelihood(soft, rows_of(llm, answered=True))[0]).all()


# -- frozen -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_with_gradient_checkpointing_layers_run_twice_and_nothing_else_changes(tower: Any, family: str) -> None:
    plain, llm = tower(family), tower(family, gradient_checkpointing=True)
    rows = rows_of(plain, answered=True)
    layers = [module for module in llm.model.modules() if isinstance(module, GradientCheckpointingLayer)]
    # Newer releases recompute a layer's `forward`, behind its hooks; a module with weights inside it runs each time.
    inner = [next(part for part in layer.modules() if [*part.parameters(recurse=False)]) for layer in layers]
    llm.log_likelihood(soft_tokens(), rows)  # the head has been asked about
    runs, results = [], []
    hooks = [part.register_forward_pre_hook(lambda module, given: runs.append(module)) for part in inner]
    for model in (plain, llm):
        soft = soft_tokens().requires_grad_()
        sums = model.train().log_likelihood(soft, rows)[0]
        sums.sum().backward()
        results.append((sums.detach(), soft.grad))
    assert len(layers) >= 2
    assert [runs.count(part) for part in inner] == [2] * len(layers)
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)
    runs.clear()
    llm.eval().log_likelihood(soft_tokens().requires_grad_(), rows)[0].sum().backward()
    assert [runs.count(part) for part in inner] == [1] * len(layers)
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_and_ranks_in_the_middle_of_training_are_those_of_evaluation(tower: Any, family: str) -> None:
    plain, llm, soft = tower(family), tower(family, gradient_checkpointing=True).train(), soft_tokens()
    prompts, candidates = rows_of(plain, answered=False), [CHOICES] * len(EXAMPLES)
    assert llm.generate(soft, prompts) == plain.generate(soft, prompts)
    close(llm.rank(soft, prompts, candidates), plain.rank(soft, prompts, candidates))
    assert llm.model.training
    llm.eval()


def test_without_gradient_checkpointing_the_llm_never_leaves_evaluation_mode(tower: Any) -> None:
    llm = tower("opt").train()
    assert llm.training
    assert not any(module.training for module in llm.model.modules())
    llm.eval()


def test_a_model_without_gradient_checkpointing_is_refused(tower: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = tower("gpt2")
    monkeypatch.setattr(type(llm.model), "supports_gradient_checkpointing", False)
    with pytest.raises(ConfigError, match=r"language\.gradient_checkpointing is true, and GPT2LMHeadModel does not"):
        DecoderOnly(llm.model, llm.tokenizer, llm.profile, gradient_checkpointing=True)


# -- widths, fingerprints, precision ----------------------------------------------------------------------------------


def test_the_embedding_norm_counts_the_models_own_scaling(tmp_path: Path, saved: Any, tower: Any) -> None:
    llm = tower("llama")
    assert llm.width == WIDTH
    assert llm.embedding_norm() == pytest.approx(float(llm.model.get_input_embeddings().weight.norm(dim=1).mean()))
    gemma = load_language(LanguageConfig(name=str(special_family(tmp_path / "gemma", saved("llama"), "gemma2"))))
    bare = float(gemma.model.get_input_embeddings().weight.norm(dim=1).mean())
    assert gemma.embedding_norm() == pytest.approx(bare * WIDTH**0.5, rel=1e-3)


@pytest.mark.parametrize("rows", [48, 260, 1500])
def test_a_fingerprint_outlasts_precision_and_added_rows_and_tells_models_apart(
    tower: Any, rows: int, tmp_path: Path
) -> None:
    llm = load_language(LanguageConfig(name=str(tiny_llm(tmp_path / "llm", "llama"))))
    torch.manual_seed(1)
    llm.model.resize_token_embeddings(rows)
    first = llm.fingerprint()
    assert first.shape == (64, WIDTH)
    assert first.dtype == torch.float32
    llm.model.resize_token_embeddings(rows + 3)
    assert torch.equal(llm.fingerprint(), first)
    llm.model.to(torch.bfloat16)
    assert same_language(llm.fingerprint(), first)
    assert not torch.equal(llm.fingerprint(), first)
    assert not same_language(first * 1.03, first)
    assert not same_language(first[:, :8], first)
    other = load_language(LanguageConfig(name=str(tiny_llm(tmp_path / "other", "llama", seed=1))))
    assert not same_language(other.fingerprint(), first)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_dtype_is_the_one_asked_for_and_gradients_come_back_in_float32(tower: Any, family: str) -> None:
    llm, soft = tower(family, dtype="bfloat16"), soft_tokens().requires_grad_()
    assert {parameter.dtype for parameter in llm.model.parameters()} == {torch.bfloat16}
    rows = rows_of(llm, answered=True)
    sums, _ = llm.log_likelihood(soft, rows)
    sums.sum().backward()
    assert sums.dtype == soft.grad.dtype == torch.float32
    exact = tower(family).log_likelihood(soft_tokens(), rows)[0]
    torch.testing.assert_close(sums, exact, rtol=0.1, atol=1.0)
    close_enough = llm.rank(soft.detach(), rows_of(llm, answered=False), [CHOICES] * len(EXAMPLES))
    flat = torch.tensor(close_enough)
    torch.testing.assert_close(
        flat, torch.tensor(apart(llm, soft.detach(), [CHOICES] * len(EXAMPLES))), rtol=0.1, atol=1.0
    )


def test_a_t5_with_a_head_of_its_own_keeps_it(tmp_path: Path, saved: Any, tower: Any) -> None:
    """Flan-T5 unties what T5's class ties when it is built or tied again."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(saved("t5"), tmp_path / "flan")
    weights = load_file(tmp_path / "flan" / "model.safetensors")
    weights["lm_head.weight"] = torch.randn(weights["shared.weight"].shape, generator=torch.Generator().manual_seed(9))
    save_file(weights, tmp_path / "flan" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "flan" / "config.json").read_text())
    (tmp_path / "flan" / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    llm = load_language(LanguageConfig(name=str(tmp_path / "flan")))
    torch.testing.assert_close(llm.model.get_output_embeddings().weight, weights["lm_head.weight"])
    torch.testing.assert_close(llm.model.get_input_embeddings().weight, weights["shared.weight"])
    soft, rows = soft_tokens(), rows_of(llm, answered=True)
    expected = torch.stack([-own_loss(llm, soft, row)[0] for row in rows])
    torch.testing.assert_close(llm.log_likelihood(soft, rows)[0], expected, rtol=1e-5, atol=1e-4)


# -- what a user may get wrong ----------------------------------------------------------------------------------------


def test_rows_that_no_llm_can_score_are_refused(tower: Any) -> None:
    soft = soft_tokens()
    with pytest.raises(DataError, match="nothing before its first trained token"):
        tower("llama").log_likelihood(soft, [(Text((5, 6), trained=True),)])
    for row in (
        (Slot(0), Text((5,), trained=True), Text((6,)), Text((7,), trained=True)),
        (Slot(0), Text((5,), trained=True), Text((6,))),
        (Slot(0), Text((5,))),
    ):
        with pytest.raises(DataError, match=r"one trained span a row, the last; set turns: each"):
            tower("t5").log_likelihood(soft, [row])


def test_rows_longer_than_the_llm_are_refused(tower: Any) -> None:
    soft, llm = soft_tokens(), tower("gpt2")
    long: Row = (Slot(0), Text((5,) * 250))
    with pytest.raises(DataError, match=r"a row takes 273 positions .*and the LLM has 256; lower language\.instr"):
        llm.log_likelihood(soft, [(*long, Text((6,) * 20, trained=True))])
    with pytest.raises(DataError, match="a row takes 283 positions"):
        llm.generate(soft, [long], max_new_tokens=30)
    with pytest.raises(DataError, match="a row takes 2"):
        llm.rank(soft, [long], [["a photo of a small dog"]])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"name": "nowhere/at-all"},
            r"language\.name is 'nowhere/at-all', and no LLM can be read from there .*; give a",
        ),
        ({"name": "/no/such/folder"}, r"language\.name is '/no/such/folder', and no LLM can be read"),
        ({"dtype": "half"}, r"language\.dtype is 'half'; it takes float32, bfloat16, float16, float64"),
    ],
)
def test_an_llm_that_cannot_be_had_is_a_config_error(saved: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_language(LanguageConfig(**{"name": str(saved("llama")), **settings}))


def test_t5_in_float16_is_refused_with_the_reason(saved: Any) -> None:
    with pytest.raises(ConfigError, match=r"T5 overflows in it .* use bfloat16 or float32"):
        load_language(LanguageConfig(name=str(saved("t5")), dtype="float16"))


def test_broken_missing_and_foreign_weights_are_refused(tmp_path: Path, saved: Any) -> None:
    for name in ("broken", "missing", "foreign"):
        shutil.copytree(saved("llama"), tmp_path / name)
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{}")
    (tmp_path / "missing" / "model.safetensors").unlink()
    tiny_llm(tmp_path / "gpt2", "gpt2")
    for file in (tmp_path / "gpt2").glob("tokenizer*"):
        shutil.copy(file, tmp_path / "foreign" / file.name)
    for name in ("broken", "missing"):
        with pytest.raises(ConfigError, match="no LLM can be read from there"):
            load_language(LanguageConfig(name=str(tmp_path / name)))
    with pytest.raises(ConfigError, match=r"its tokenizer has \d+ words and the model \d+ embeddings"):
        load_language(LanguageConfig(name=str(tmp_path / "foreign")))


def test_an_encoder_without_an_output_layer_is_no_llm(tmp_path: Path) -> None:
    bert = tiny_bert(tmp_path / "bert")
    tokenizer = AutoTokenizer.from_pretrained(bert)
    tokenizer.add_special_tokens({"eos_token": "[SEP]"})
    tokenizer.save_pretrained(bert)
    with pytest.raises(ConfigError, match=r"its weights lack \d+ of BertLMHeadModel's tensors \('cls\..*' …\)"):
        load_language(LanguageConfig(name=str(bert)))


def test_random_weights_need_no_weight_file(tmp_path: Path, saved: Any) -> None:
    for family in ("qwen2", "t5"):
        shutil.copytree(saved(family), tmp_path / family)
        (tmp_path / family / "model.safetensors").unlink()
        llm = load_language(LanguageConfig(name=str(tmp_path / family), pretrained=False))
        assert torch.isfinite(llm.log_likelihood(soft_tokens(), rows_of(llm, answered=True))[0]).all()


def test_a_decoder_without_a_start_is_refused(tmp_path: Path, saved: Any) -> None:
    shutil.copytree(saved("t5"), tmp_path / "t5")
    (tmp_path / "t5" / "generation_config.json").unlink()
    file = tmp_path / "t5" / "config.json"
    config = json.loads(file.read_text())
    del config["decoder_start_token_id"]
    file.write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"config\.json lacks decoder_start_token_id"):
        load_language(LanguageConfig(name=str(tmp_path / "t5")))


@pytest.mark.parametrize("family", FAMILIES)
def test_tokenizer_and_profile_are_read_without_weights(tmp_path: Path, saved: Any, tower: Any, family: str) -> None:
    shutil.copytree(saved(family), tmp_path / family)
    (tmp_path / family / "model.safetensors").unlink()
    tokenizer, profile = load_profile(LanguageConfig(name=str(tmp_path / family), target_limit=9))
    assert profile.as_dict() == {**tower(family).profile.as_dict(), "target_limit": 9}
    assert len(tokenizer) == len(tower(family).tokenizer)
