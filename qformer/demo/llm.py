"""How the demo's LLMs learn to read described scenes and to answer questions about them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from qformer.demo import scenes
from qformer.demo.descriptions import (
    FINDING,
    FORMS,
    JUDGING,
    TEXT_SEED,
    TEXT_TEST_SEED,
    Description,
    Exchange,
    asked,
    corpus,
    described,
    groups,
    text_scene,
)
from qformer.demo.pretraining import Clock, Muon, save_half, say, set_rate
from qformer.demo.scenes import Dice

TEXT_BATCH, TEXT_LENGTH = 24, 88
GROUP_WORDS = 8
QUESTION_WEIGHT = 0.02
ANSWER_TOKENS = 4
"""A longer answer counts as much as one of so many tokens, or captions would be most of the loss."""
POINTER_WEIGHT = 0.5


@dataclass(frozen=True)
class Stage:
    """What is read for some steps: few things and plain questions first.

    A share `terse` of the questions is cut to its key words, "colour small cube"; a share `plain` of the others stands
    without a template around it.  With `telling` there are captions, dialogues and questions to write as well.  The
    description is disturbed by `noise`, and by up to `drift`, as `read` says.
    """

    steps: int
    things: tuple[int, ...]
    forms: Sequence[str]
    count: int
    noise: float = 0.0
    drift: float = 0.0
    terse: float = 0.0
    plain: float = 0.0
    telling: bool = False


@dataclass(frozen=True)
class Course:
    """Stages under one schedule of the rate, whose greatest value is a share of the optimizers' own."""

    rate: float
    stages: tuple[Stage, ...]

    @property
    def steps(self) -> int:
        """Of all its stages."""
        return sum(stage.steps for stage in self.stages)


COURSES = (
    Course(
        1.0,
        (
            Stage(480, (2, 3), FINDING, 5, terse=1.0, plain=1.0),
            Stage(420, (2, 3), FINDING, 3, terse=0.4, plain=1.0),
            Stage(1800, (2, 3, 4), JUDGING, 3, noise=0.1, terse=0.1, plain=0.8),
            Stage(3300, (3, 4), FORMS, 2, noise=0.2, plain=0.2, telling=True),
        ),
    ),
    Course(0.3, (Stage(900, (3, 4), FORMS, 2, drift=1.0, plain=0.2, telling=True),)),
)
"""Finding by key words, then in questions; judging; every form; every form disturbed."""
TEXT_STEPS = sum(course.steps for course in COURSES)


def lesson(step: int) -> tuple[Stage, Course, int]:
    """The stage and the course of a step, and its number in the course."""
    for course in COURSES:
        if step < course.steps:
            for stage, end in zip(course.stages, accumulate(each.steps for each in course.stages), strict=True):
                if step < end:
                    return stage, course, step
        step -= course.steps
    raise IndexError(step)


@dataclass(frozen=True)
class Reader:
    """An LLM of the demo: its family in transformers, width, words."""

    family: str
    width: int
    vocabulary: int


READERS = {
    "language": Reader("Llama", 128, 768),
    "other": Reader("Mistral", 96, 640),
}
"""By folder.  The second is what a tuned Q-Former is carried to; of a family whose tokenizer transformers reads as it
was written (it gives Qwen2's a way of its own to cut texts)."""


@dataclass(frozen=True)
class Texts:
    """Rows of described scenes, several exchanges each, none of which sees another.

    groups (B, C, 8): token ids of each position of the description, 0 where there is none.  ids, targets, weights
    (B, T); positions (B, C + T); mask (B, 1, C + T, C + T), 0 where a position may look and -inf where not.
    mentions (M, 3): row, place in T and depth of the last token of words that name one thing, where depth counts the
    mentions that end there before; things (M, 6): that thing, as `POINTS` counts.
    """

    groups: Tensor
    ids: Tensor
    targets: Tensor
    weights: Tensor
    positions: Tensor
    mask: Tensor
    mentions: Tensor
    things: Tensor


POINTS: dict[str, tuple[Any, ...]] = {**scenes.VALUES, "row": (0, 1, 2), "column": (0, 1, 2)}
"""What a mention of a thing should bring to mind, and the values it may have."""
DEPTHS = 2
"""Mentions of this depth and deeper are left to themselves: no block is left to use them."""


class Writer:
    """Makes rows of token ids, and remembers those of texts it has seen."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}

    def ids(self, text: str) -> list[int]:
        """Token ids without marks."""
        if text not in self._known:
            if len(self._known) > 200_000:
                self._known.clear()
            self._known[text] = self.tokenizer(text, add_special_tokens=False).input_ids
        return self._known[text]

    def mentions(self, exchange: Exchange) -> Iterator[tuple[int, int, scenes.Thing]]:
        """Place in the exchange's ids of the last token of each mention, its depth, the thing."""
        question, last, depth = exchange.turns[0][0], -1, 0
        for words, thing in exchange.mentions:
            at = question.find(words)
            if at >= 0:
                place = len(self.ids(question[: at + len(words)]))  # words end where tokens do; BOS comes first
                depth = depth + 1 if place == last else 0
                last = place
                if depth < DEPTHS:
                    yield place, depth, thing

    def exchange(self, exchange: Exchange) -> tuple[list[int], list[bool]]:
        """Ids of BOS, question, answer, EOS …, and which of them are answer."""
        ids, answer = [self.tokenizer.bos_token_id], [False]
        for question, reply in exchange.turns:
            asked, said = self.ids(question), [*self.ids(" " + reply), self.tokenizer.eos_token_id]
            ids += asked + said
            answer += [False] * len(asked) + [True] * len(said)
        return ids, answer

    def rows(self, found: Sequence[Description], *, words: bool, length: int = TEXT_LENGTH) -> Texts:
        """Rows of at most `length` tokens behind the description.

        With `words` the description is read word by word; otherwise each phrase is one position, all its words at once.
        """
        told = []
        for each in found:
            phrases = [self.ids(" " + phrase) for phrase in each.groups]
            told.append([[one] for phrase in phrases for one in [*phrase, *self.ids(",")]] if words else phrases)
        first, count = max(map(len, told)), len(found)
        groups = np.zeros((count, first, 1 if words else GROUP_WORDS), dtype=np.int64)
        ids, targets = np.zeros((2, count, length), dtype=np.int64)
        weights = np.zeros((count, length), dtype=np.float32)
        positions = np.zeros((count, first + length), dtype=np.int64)
        block = np.full((count, first + length), -1)
        mentions: list[tuple[int, int, int]] = []
        things: list[list[int]] = []
        for row, (each, phrases) in enumerate(zip(found, told, strict=True)):
            for place, phrase in enumerate(phrases):
                groups[row, place, : len(phrase)] = phrase
            positions[row, : len(phrases)] = np.arange(len(phrases))
            block[row, : len(phrases)] = 0
            at = 0
            for number, exchange in enumerate(each.exchanges, 1):
                tokens, answer = self.exchange(exchange)
                end = at + len(tokens)
                if end > length:
                    continue
                ids[row, at:end] = tokens
                targets[row, at : end - 1] = tokens[1:]
                share = min(1.0, ANSWER_TOKENS / sum(answer))
                weights[row, at : end - 1] = np.where(answer[1:], share, QUESTION_WEIGHT)
                positions[row, first + at : first + end] = np.arange(len(tokens)) + len(phrases)
                block[row, first + at : first + end] = number
                for place, depth, thing in self.mentions(exchange):
                    mentions.append((row, at + place, depth))
                    things.append([values.index(getattr(thing, point)) for point, values in POINTS.items()])
                at = end
        return Texts(
            torch.from_numpy(groups),
            torch.from_numpy(ids),
            torch.from_numpy(targets),
            torch.from_numpy(weights),
            torch.from_numpy(positions),
            _mask(torch.from_numpy(block)),
            torch.tensor(mentions, dtype=torch.long).view(-1, 3),
            torch.tensor(things, dtype=torch.long).view(-1, len(POINTS)),
        )


class Steps(Dataset[Texts]):
    """The texts of every step of the LLM's training, a function of the step alone."""

    def __init__(self, writer: Writer):
        self.writer = writer

    def __len__(self) -> int:
        return TEXT_STEPS

    def __getitem__(self, step: int) -> Texts:
        stage, _, _ = lesson(step)
        found = []
        for number in range(step * TEXT_BATCH, (step + 1) * TEXT_BATCH):
            scene = text_scene(TEXT_SEED, number, stage.things)
            found.append(
                described(
                    scene,
                    Dice("text", TEXT_SEED, number),
                    count=stage.count,
                    forms=stage.forms,
                    terse=stage.terse,
                    plain=stage.plain,
                    telling=stage.telling,
                )
            )
        return self.writer.rows(found, words=bool(stage.noise or stage.drift) and step % 10 == 9)


def _mask(block: Tensor) -> Tensor:
    """Block 0 is the description, -1 nothing: every block sees what stands before it in itself and the description."""
    size = block.shape[1]
    same = (block[:, :, None] == block[:, None, :]) | (block[:, None, :] == 0)
    allowed = same & (block[:, None, :] >= 0) & torch.ones(size, size, dtype=torch.bool).tril()
    allowed |= torch.eye(size, dtype=torch.bool)
    return torch.zeros(allowed.shape).masked_fill(~allowed, float("-inf"))[:, None]


def make_tokenizer(folder: Path, vocabulary: int) -> Any:
    """A byte-level BPE with most words of the scenes as one token, and BOS in front of a text; written to folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    marks = ["<pad>", "<s>", "</s>"]
    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=marks,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    every = [
        f" {word} {word}s"
        for words in (*scenes.VALUES.values(), scenes.WORDS, scenes.ROWS, scenes.COLUMNS)
        for word in words
    ]
    found.train_from_iterator([*corpus(1500), *(200 * every)], trainer)
    found.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=found, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_llm(reader: Reader) -> Any:
    """The LLM with fresh weights: 4 blocks."""
    import transformers

    config = getattr(transformers, f"{reader.family}Config")(
        vocab_size=reader.vocabulary, hidden_size=reader.width, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, intermediate_size=3 * reader.width, max_position_embeddings=512,
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=0, initializer_range=0.08,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    for layer in model.model.layers:
        start_by_likeness(layer.self_attn)
    return model


@torch.no_grad()
def start_by_likeness(attention: Any) -> None:
    """Let half of the heads look at positions like their own, the others everywhere, and all copy what is there.

    Queries and keys of the first heads start equal, the output as the values' transpose (after Trockman and Kolter
    2023): finding a thing by its words is then learnt in hundreds of steps rather than thousands.
    """
    half = attention.q_proj.weight.shape[0] // 2
    attention.k_proj.weight.copy_(attention.q_proj.weight)
    for everywhere in (attention.q_proj.weight[half:], attention.k_proj.weight[half:]):
        nn.init.normal_(everywhere, std=0.02)
    nn.init.orthogonal_(attention.v_proj.weight)
    attention.o_proj.weight.copy_(0.5 * attention.v_proj.weight.T)


class Pointers(nn.Module):
    """What the LLM should know of a thing where words for it end: a teacher's questions, not kept.

    A thing's own words are asked for behind the second block, words by its relation to another behind the third, so
    that blocks are left to compare things.  Without this, judging takes many times the steps to begin.
    """

    def __init__(self, width: int):
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(width, sum(map(len, POINTS.values()))) for _ in range(DEPTHS))

    def forward(self, states: Sequence[Tensor], texts: Texts) -> Tensor:
        """Mean cross-entropy in nats of a thing's values; states: (B, T, D) behind the embeddings and every block."""
        losses = []
        for depth, head in enumerate(self.heads):
            chosen = texts.mentions[:, 2] == depth
            rows, places, _ = texts.mentions[chosen].unbind(1)
            found = head(states[2 + depth][rows, places]).split([len(values) for values in POINTS.values()], dim=1)
            for logits, truth in zip(found, texts.things[chosen].unbind(1), strict=True):
                losses.append(F.cross_entropy(logits, truth, reduction="sum"))
        return torch.stack(losses).sum() / max(1, texts.things.numel())


def read(model: Any, texts: Texts, noise: float = 0.0, drift: float = 0.0) -> list[Tensor]:
    """Hidden states (B, T, D) behind the description: of the embeddings and of every block, the last one normed.

    A position of several words is the sum of their embeddings over the root of their number.  As shares of the
    description's own size, `noise` is added to it, and in every row, of strengths drawn up to `drift`, more noise and
    one direction for all positions: soft prompts tend to have one in common.
    """
    table = model.get_input_embeddings()
    real = (texts.groups > 0).float()
    summed = (table(texts.groups) * real[..., None]).sum(2) / real.sum(2).clamp(min=1).sqrt()[..., None]
    if noise or drift:
        rows, size = len(summed), summed.detach().square().mean().sqrt()
        strength = noise + drift * torch.rand(rows, 1, 1)
        shared = drift * torch.rand(rows, 1, 1) * torch.randn(rows, 1, summed.shape[2])
        summed = summed + size * (strength * torch.randn_like(summed) + shared)
    inputs = torch.cat([summed, table(texts.ids)], 1)
    found = model.model(
        inputs_embeds=inputs,
        attention_mask=texts.mask,
        position_ids=texts.positions,
        use_cache=False,
        output_hidden_states=True,
    )
    return [states[:, texts.groups.shape[1] :] for states in found.hidden_states]


def train_llm(out: Path, name: str) -> None:
    """Write an LLM of `READERS` and its tokenizer to `out`/`name`."""
    torch.manual_seed(TEXT_SEED)
    folder, reader = out / name, READERS[name]
    tokenizer, model = make_tokenizer(folder, reader.vocabulary), make_llm(reader)
    writer = Writer(tokenizer)
    model.train()
    matrices = [
        p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name and "lm_head" not in name
    ]
    pointers = Pointers(model.config.hidden_size)
    others = [p for p in model.parameters() if all(p is not m for m in matrices)] + list(pointers.parameters())
    optimizers = [Muon(matrices, lr=0.02), torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0)]
    clock = Clock(name, TEXT_STEPS)
    for step, texts in enumerate(DataLoader(Steps(writer), batch_size=None, num_workers=1, prefetch_factor=4)):
        stage, course, place = lesson(step)
        for optimizer in optimizers:
            set_rate(optimizer, place, course.steps, warmup=50, most=course.rate)
        states = read(model, texts, stage.noise, stage.drift)
        picked = texts.weights > 0
        loss = F.cross_entropy(model.lm_head(states[-1][picked]), texts.targets[picked], reduction="none")
        weights = texts.weights[picked]
        loss = (loss * weights).sum() / weights.sum()
        pointed = pointers(states, texts)
        model.zero_grad()
        pointers.zero_grad()
        (loss + POINTER_WEIGHT * pointed).backward()
        for optimizer in optimizers:
            optimizer.step()
        clock.tick(step, loss, pointed)
        last = step == TEXT_STEPS - 1
        if step % 200 == 199 or last:
            scores = answer_accuracy(model, writer, 400 if last else 80)
            save_half(model, folder)
            (folder / "scores.json").write_text(
                json.dumps({"steps": step + 1, **scores}, indent=1) + "\n", encoding="utf-8"
            )
            say(f"{json.dumps(scores)}")


@torch.no_grad()
def answer_accuracy(model: Any, writer: Writer, count: int) -> dict[str, float]:
    """Share of exchanges whose answer is greedily right, by form, on `count` described scenes of another seed."""
    model.eval()
    right: dict[str, list[bool]] = {}
    for start in range(0, count, 40):
        found = []
        for number in range(start, start + 40):
            dice = Dice("test", TEXT_TEST_SEED, number)
            scene = text_scene(TEXT_TEST_SEED, number, (3, 4))
            exchanges = []
            for form in scenes.FORMS:
                every = list(scenes.FORMS[form](scene, dice))
                if every:
                    answer = dice.choose(sorted({ask.answer for ask in every}))
                    exchanges.append(asked(dice.choose([ask for ask in every if ask.answer == answer]), dice))
            found.append(Description(groups(scene, dice), tuple(exchanges)))
        texts = writer.rows(found, words=False, length=600)
        best = model.lm_head(read(model, texts)[-1]).argmax(-1) == texts.targets
        for row, each in enumerate(found):
            at = 0
            for exchange in each.exchanges:
                tokens, marked = writer.exchange(exchange)
                if at + len(tokens) <= 600:
                    said = torch.tensor(marked[1:])
                    right.setdefault(exchange.form, []).append(bool(best[row, at : at + len(tokens) - 1][said].all()))
                    at += len(tokens)
    model.train()
    return {form: round(sum(marks) / len(marks), 3) for form, marks in sorted(right.items())}
