"""Where LAVIS computes or joins otherwise than transformers: one test per difference, reproduced by profile and preset.

Its own arithmetic is written out here by hand, on rows laid out as its code lays them out.
"""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

import qformer
from qformer import checkpoints, presets
from qformer.backbones.language_loading import load_language
from qformer.cards import Decoding
from qformer.config import LanguageConfig
from qformer.nn.qformer import QFormer, QFormerConnector, QFormerSize
from qformer.sample import Slot, Text
from qformer.text import Joiner, Rendered, profile_from_tokenizer
from tests.published import tiny_published
from tests.tiny import redraw, tiny_llm

EOS, PAD = 2, 3
QUERIES = 4
PROMPTS, TARGETS = ((5, 6, 7, 9), (11, 12)), ((20, 21, 22), (23, 24, 25, 26, 27))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("towers")


@pytest.fixture(scope="module")
def vicuna(folder: Path) -> Any:
    preset = presets.load("lavis_vicuna").language
    return load_language(LanguageConfig(name=str(tiny_llm(folder / "llama", "llama")), profile=preset.profile))


@pytest.fixture
def soft(vicuna: Any) -> Tensor:
    return torch.randn(2, QUERIES, vicuna.width, generator=torch.Generator().manual_seed(1))


def rows(answered: bool, profile: Any) -> list[Any]:
    return [
        (Slot(number), Text((*profile.opening, *prompt)))
        + ((Text((*target, *profile.end), trained=True),) if answered else ())
        for number, (prompt, target) in enumerate(zip(PROMPTS, TARGETS, strict=True))
    ]


def test_a_row_opens_and_ends_with_the_same_mark(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llm(folder / "llama", "llama"))
    profile = profile_from_tokenizer(tokenizer, presets.load("lavis_vicuna").language.profile)
    row = Joiner(tokenizer, profile, None).row(Rendered("what colour is it", "it is red"), [0], answered=True)
    words = tuple(tokenizer("what colour is it", add_special_tokens=False).input_ids)
    answer = tuple(tokenizer("it is red", add_special_tokens=False).input_ids)
    assert row == (Slot(0), Text((EOS, *words)), Text((*answer, EOS), trained=True))
    assert tokenizer.bos_token_id != EOS


@torch.no_grad()
def test_the_training_layout_puts_padding_behind_the_answer(vicuna: Any, soft: Tensor) -> None:
    """[queries][</s> instruction][answer </s>][padding], plain positions, the mean over all rows' answer tokens."""
    width = max(1 + len(p) + len(t) + 1 for p, t in zip(PROMPTS, TARGETS, strict=True))
    losses, counted = 0.0, 0
    for number, (prompt, target) in enumerate(zip(PROMPTS, TARGETS, strict=True)):
        ids = [EOS, *prompt, *target, EOS]
        pads = width - len(ids)
        inputs = torch.cat([soft[number], vicuna.model.get_input_embeddings()(torch.tensor(ids + [PAD] * pads))])
        mask = torch.tensor([1] * (QUERIES + len(ids)) + [0] * pads)
        logits = vicuna.model(inputs_embeds=inputs[None], attention_mask=mask[None]).logits[0]
        first = QUERIES + 1 + len(prompt)
        wanted = torch.tensor([*target, EOS])
        losses += torch.nn.functional.cross_entropy(logits[first - 1 :][: len(wanted)], wanted, reduction="sum").item()
        counted += len(wanted)
    sums, counts = vicuna.log_likelihood(soft, rows(True, vicuna.profile))
    assert -sums.sum().item() / counts.sum().item() == pytest.approx(losses / counted, rel=1e-5)


@torch.no_grad()
def test_padding_between_soft_tokens_and_prompt_takes_no_position(vicuna: Any, soft: Tensor) -> None:
    """LAVIS generates from [queries][padding][</s> prompt], with positions that pass over the padding."""
    width = max(map(len, PROMPTS)) + 1
    ids = [[PAD] * (width - 1 - len(prompt)) + [EOS, *prompt] for prompt in PROMPTS]
    mask = torch.tensor([[1] * QUERIES + [int(place >= width - 1 - len(p)) for place in range(width)] for p in PROMPTS])
    inputs = torch.cat([soft, vicuna.model.get_input_embeddings()(torch.tensor(ids))], dim=1)
    settings = {"num_beams": 3, "do_sample": False, "eos_token_id": EOS, "pad_token_id": PAD, "min_new_tokens": 1}
    generated = vicuna.model.generate(inputs_embeds=inputs, attention_mask=mask, max_new_tokens=8, **settings)
    theirs = [vicuna.tokenizer.decode(row, skip_special_tokens=True).strip() for row in generated]
    assert vicuna.generate(soft, rows(False, vicuna.profile), max_new_tokens=8, num_beams=3) == theirs


def test_the_length_of_vicunas_answers_counts_a_placeholder() -> None:
    vicuna, t5 = presets.load("lavis_vicuna"), presets.load("lavis_t5")
    assert vicuna.decoding["generate"].max_new_tokens == 256 - 1 and vicuna.decoding["answer"].max_new_tokens == 10 - 1
    assert t5.decoding["generate"].max_new_tokens == 256 and t5.decoding["answer"].max_new_tokens == 10


def test_blip_2s_lengths_are_counted_as_its_methods_count_them() -> None:
    """OPT: `generate` passes max_length, which counts the placeholder, and `predict_answers` max_new_tokens."""
    opt, t5 = presets.load("lavis_opt").decoding, presets.load("lavis_t5_blip2").decoding
    assert [each.max_new_tokens for each in (opt["generate"], opt["answer"])] == [30 - 1, 10]
    assert [each.max_new_tokens for each in (t5["generate"], t5["answer"])] == [30, 10]


@pytest.mark.parametrize(
    ("name", "repetition", "length"),
    [
        ("lavis_t5", 1.5, -1.0),
        ("lavis_vicuna", 1.5, 0.0),
        ("lavis_opt", 1.0, 0.0),
        ("lavis_t5_blip2", 1.0, -1.0),
    ],
)
def test_decoding_defaults_are_those_of_its_methods(name: str, repetition: float, length: float) -> None:
    decoding = presets.load(name).decoding
    assert [(d.num_beams, d.repetition_penalty, d.length_penalty) for d in decoding.values()] == [
        (5, repetition, 1.0),
        (5, repetition, length),
    ]
    assert all(isinstance(each, Decoding) and not each.do_sample for each in decoding.values())


@torch.no_grad()
def test_the_length_that_a_penalty_divides_by_counts_one_more_than_the_words(vicuna: Any, soft: Tensor) -> None:
    """For LAVIS the placeholder and no end mark, for transformers today the end mark and no placeholder."""
    ends = list(range(10, vicuna.model.config.vocab_size, 2))  # so many that a random model meets one soon
    prompt = vicuna.model.get_input_embeddings()(torch.tensor([[EOS, *PROMPTS[0]]]))
    inputs = torch.cat([soft[:1], prompt], dim=1)
    found = vicuna.model.generate(
        inputs_embeds=inputs, attention_mask=torch.ones(inputs.shape[:2], dtype=torch.long), num_beams=5,
        max_new_tokens=20, do_sample=False, length_penalty=-1.0, eos_token_id=ends, pad_token_id=PAD,
        num_return_sequences=5, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    lengths = set()
    for ids, score in zip(found.sequences, found.sequences_scores, strict=True):
        stop = next(place for place, each in enumerate(ids.tolist()) if each in ends)
        said = ids[: stop + 1]
        whole = torch.cat([inputs, vicuna.model.get_input_embeddings()(said)[None]], dim=1)
        logits = vicuna.model(inputs_embeds=whole).logits[0, inputs.shape[1] - 1 : -1]
        total = logits.log_softmax(-1).gather(1, said[:, None]).sum()
        assert score.item() == pytest.approx(total.item() * (1 + stop), rel=1e-4)
        lengths.add(stop)
    assert len(lengths) > 1


def test_an_answer_may_be_empty() -> None:
    """min_length is 1 and counts the placeholder, or the decoder's start: no new token is forced."""
    for name in ("lavis_t5", "lavis_vicuna", "lavis_opt", "lavis_t5_blip2"):
        assert [each.min_new_tokens for each in presets.load(name).decoding.values()] == [0, 0]


def test_an_unknown_mark_in_an_answer_is_left_out(vicuna: Any) -> None:
    """LAVIS makes id 0 an end mark before it decodes, and end marks are no text; it does not end the answer."""
    red, two = (vicuna.tokenizer(word, add_special_tokens=False).input_ids for word in ("red", "two"))
    lavis = [2 if each == 0 else each for each in [*red, 0, *two]]
    [ours] = vicuna._answers(torch.tensor([[*red, 0, *two]]))
    assert ours == vicuna.tokenizer.decode(lavis, skip_special_tokens=True).strip() == "red two"


def test_files_of_t5_that_read_no_instruction_are_of_its_blip_2() -> None:
    made = {"source": "x", "form": "lavis", "tensors": {}, "unused": (), "norm_eps": 1e-5}
    for projection, instruction, preset in (
        ("t5_proj", True, "lavis_t5"),
        ("t5_proj", False, "lavis_t5_blip2"),
        ("opt_proj", False, "lavis_opt"),
        ("llm_proj", True, "lavis_vicuna"),
        (None, True, "lavis"),
    ):
        size = QFormerSize(vision_width=8, instruction=instruction)
        assert checkpoints.Published(size=size, projection=projection, **made).preset == preset
        assert presets.load(preset).qformer.instruction == instruction


def test_instructions_are_cut_on_the_left_and_keep_their_opening(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llm(folder / "llama", "llama"))
    overrides = presets.load("lavis_vicuna").language.profile
    profile = profile_from_tokenizer(tokenizer, overrides, instruction_limit=5)
    words = tokenizer("what colour is it please", add_special_tokens=False).input_ids
    [_, prompt] = Joiner(tokenizer, profile, None).row(Rendered("what colour is it please"), [0], answered=False)
    assert prompt == Text((EOS, *words[-4:]))
    assert presets.load("lavis_vicuna").language.instruction_limit > 512, "prompts are not cut when answering"
    assert presets.load("lavis_vicuna").qformer.instruction_limit == 128


def test_answers_that_are_cut_keep_their_end_here(folder: Path) -> None:
    """A stated exception: LAVIS loses the end mark of an answer beyond 256 ids, and here it is kept."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_llm(folder / "llama", "llama"))
    profile = profile_from_tokenizer(tokenizer, presets.load("lavis_vicuna").language.profile, target_limit=4)
    ids = Joiner(tokenizer, profile, None).target_ids("it is red indeed please")
    assert len(ids) == 4 and ids[-1] == EOS
    assert presets.load("lavis_vicuna").language.target_limit == presets.load("lavis_t5").language.target_limit == 256


@torch.no_grad()
def test_vicunas_candidates_are_ranked_without_an_end_by_their_sum(vicuna: Any, soft: Tensor) -> None:
    """LAVIS: the mean over the padded row, which within a segment orders as the sum over the candidate's tokens."""
    candidates = ["red", "it is blue", "two cats", "no"]
    ranking = presets.load("lavis_vicuna").ranking
    ours = vicuna.rank(soft[:1], rows(False, vicuna.profile)[:1], [candidates], ranking.normalize, ranking.end)[0]
    ids = [vicuna.tokenizer(each, add_special_tokens=False).input_ids for each in candidates]
    longest = QUERIES + 1 + len(PROMPTS[0]) + max(map(len, ids)) - 1
    theirs = []
    for each in ids:
        words = vicuna.model.get_input_embeddings()(torch.tensor([EOS, *PROMPTS[0], *each]))
        logits = vicuna.model(inputs_embeds=torch.cat([soft[0], words])[None]).logits[0]
        first = QUERIES + 1 + len(PROMPTS[0])
        loss = torch.nn.functional.cross_entropy(logits[first - 1 : -1], torch.tensor(each), reduction="sum")
        theirs.append(loss.item() / longest)
    assert sorted(range(4), key=lambda n: -ours[n]) == sorted(range(4), key=theirs.__getitem__)
    assert ours == pytest.approx([-each * longest for each in theirs], rel=1e-4)


@torch.no_grad()
def test_t5s_candidates_are_ranked_with_their_end(folder: Path) -> None:
    tower = load_language(LanguageConfig(name=str(tiny_llm(folder / "t5", "t5"))))
    soft = torch.randn(1, QUERIES, tower.width)
    ranking = presets.load("lavis_t5").ranking
    [ours] = tower.rank(soft, [(Slot(0), Text((5, 6)))], [["red", "it is blue"]], ranking.normalize, ranking.end)
    words = tower.model.get_input_embeddings()(torch.tensor([5, 6, 1]))
    for score, candidate in zip(ours, ("red", "it is blue"), strict=True):
        labels = torch.tensor([tower.tokenizer(candidate).input_ids])  # </s> among them
        loss = tower.model(inputs_embeds=torch.cat([soft[0], words])[None], labels=labels).loss
        assert score == pytest.approx(-loss.item() * labels.shape[1], rel=1e-4)


def test_t5_computes_with_the_exact_gelu(folder: Path) -> None:
    name = str(tiny_llm(folder / "t5", "t5"))
    plain = load_language(LanguageConfig(name=name))
    exact = load_language(LanguageConfig(name=name, architecture=presets.load("lavis_t5").language.architecture))
    assert plain.model.config.dense_act_fn == "gelu_new" and exact.model.config.dense_act_fn == "gelu"
    soft, row = torch.randn(1, QUERIES, plain.width), [(Slot(0), Text((5, 6)), Text((7, 1), trained=True))]
    assert plain.log_likelihood(soft, row)[0] != exact.log_likelihood(soft, row)[0]
    x = torch.randn(50)
    acts = [m for m in exact.model.modules() if type(m).__name__ == "GELUActivation"]
    assert acts and torch.equal(acts[0](x), torch.nn.functional.gelu(x))


@torch.no_grad()
def test_the_norm_behind_the_encoder_has_its_own_epsilon(folder: Path, tmp_path: Path) -> None:
    size = QFormerSize(vision_width=24, hidden=64, layers=2, heads=1, intermediate=48, vocabulary=30, queries=QUERIES)
    made = QFormerConnector(QFormer(size), 32)
    redraw(made, 7)
    torch.save({"model": checkpoints.renamed_for(made.state_dict(), "lavis", "llm_proj")}, tmp_path / "x.pth")
    whole = tiny_published(folder, "llama")
    ours = qformer.load(tmp_path / "x.pth", str(whole), str(folder / "llm-llama"), report=str)
    tokens = ours.encode(torch.randn(1, 3, 32, 32)).values * 1e-3  # small enough for an epsilon to matter
    normed = (tokens - tokens.mean(-1, keepdim=True)) / (tokens.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(
        ours.connector.norm(tokens), normed * made.norm.weight + made.norm.bias, rtol=1e-4, atol=1e-5
    )
    assert qformer.load(whole, report=str).connector.norm.eps == 1e-6


def test_the_encoder_is_read_one_block_early_without_its_norm() -> None:
    for name in ("lavis_t5", "lavis_t5_blip2", "lavis_vicuna", "lavis_opt"):
        vision = presets.load(name).vision
        assert (vision.block, vision.norm, vision.class_token) == (-2, False, True)
        assert vision.eval_transform.mode == "squash"


def test_opt_ends_an_answer_with_a_line_break() -> None:
    preset = presets.load("lavis_opt")
    assert preset.language.profile.end == [50118] and not preset.qformer.instruction


def test_the_comparison_says_not_run_until_both_sides_have_run(tmp_path: Path) -> None:
    script = Path(__file__).parent.parent / "benchmarks" / "against_lavis.py"
    table = runpy.run_path(str(script))["table"]
    assert table(tmp_path).count("not run | not run | not run | not run") == 3
    values = {"soft prompts": torch.ones(1, 4, 8), "loss": torch.tensor([2.0]), "greedy tokens": ["a dog"]}
    torch.save(values, tmp_path / "lavis.pt")
    torch.save({**values, "loss": torch.tensor([2.1])}, tmp_path / "qformer.pt")
    lines = table(tmp_path).splitlines()
    assert lines[2].endswith("| 0.0e+00 | True |") and lines[3].endswith("| 5.0e-02 | False |")
    assert lines[4].endswith("| a dog | a dog | | True |")


def test_the_frozen_llm_drops_nothing_out_in_training_here(folder: Path) -> None:
    """A stated exception: LAVIS leaves a frozen T5 in training mode, so that its dropout disturbs every step."""
    tower = load_language(LanguageConfig(name=str(tiny_llm(folder / "t5", "t5")))).train()
    assert any(isinstance(each, torch.nn.Dropout) and each.p > 0 for each in tower.model.modules())
    soft = torch.randn(1, QUERIES, tower.width, generator=torch.Generator().manual_seed(2))
    row = [(Slot(0), Text((5, 6)), Text((7, 1), trained=True))]
    once, again = (tower.log_likelihood(soft, row)[0] for _ in range(2))
    assert torch.equal(once, again)
    tower.model.train()
    assert not torch.equal(once, tower.log_likelihood(soft, row)[0])
