"""How the demo's tiny towers were made: `python -m qformer.demo.towers OUT`, some hours on one core.

An image encoder that names what stands where, two LLMs that read described scenes and answer questions about them, and
a BERT that has read the same words.  Each is written as an ordinary checkpoint of transformers, in float16.  The seeds
are not those of the demo; the encoder sees no pair of colour and shape that is held out, the LLM no picture.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from qformer.demo import scenes
from qformer.demo.scenes import Dice, Scene
from qformer.text import lettered, load_templates

PICTURE_SEED, PICTURE_TEST_SEED = 71_001, 71_002
TEXT_SEED, TEXT_TEST_SEED = 72_001, 72_002

# -- the image encoder ------------------------------------------------------------------------------------------------

PICTURE_STEPS, PICTURE_BATCH = 800, 64
HEADS: dict[str, tuple[str, ...]] = {
    "colour": tuple(scenes.COLOURS),
    "shape": scenes.SHAPES,
    "size": tuple(scenes.SIZES),
    "material": scenes.MATERIALS,
    "word": ("", *scenes.WORDS),
}
GRID = 6
IGNORED = -100


@dataclass(frozen=True)
class Pictures:
    """pixels (B, 3, 96, 96) in [-1, 1]; labels: head -> (B, 36), `IGNORED` where there is nothing to name."""

    pixels: Tensor
    labels: dict[str, Tensor]


def picture_scene(seed: int, number: int, *, held_out: bool = False, strange: bool = False) -> Scene:
    """What the encoder's pictures show: two to five things.

    With `strange`, two fifths of the things have a colour without a name and more than that a shape without one, so
    that shapes are not learnt by the colours they come in, nor colours by their shapes.
    """
    scene = scenes.sample_scene(seed, number, held_out=held_out, things=(2, 3, 4, 5))
    if not strange:
        return scene
    dice = Dice("strange", seed, number)
    things = []
    for thing in scene.things:
        if dice.chance(0.4):
            thing = dataclasses.replace(thing, colour=unnamed_colour(dice))
        elif dice.chance(0.75):
            thing = dataclasses.replace(thing, shape=f"blob {dice.below(500)}")
        things.append(thing)
    return dataclasses.replace(scene, things=tuple(things))


def unnamed_colour(dice: Dice) -> str:
    """A colour that is far from all six that have a name."""
    while True:
        tint = [16 * dice.below(16) for _ in range(3)]
        if all(
            sum((a - b) ** 2 for a, b in zip(tint, named, strict=True)) > 90**2 for named in scenes.COLOURS.values()
        ):
            return "#{:02x}{:02x}{:02x}".format(*tint)


def pictures(found: Sequence[Scene]) -> Pictures:
    """Scenes as pixels, and what each of the 6 × 6 tokens should name: the thing in its cell, and where that is."""
    pixels = torch.stack([torch.from_numpy(np.array(scenes.draw(scene))) for scene in found])
    pixels = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
    labels = {head: torch.full((len(found), GRID, GRID), IGNORED) for head in HEADS}
    labels["thing"] = torch.zeros(len(found), GRID, GRID, dtype=torch.long)
    lines = torch.arange(GRID) // 2
    labels["row"] = lines[:, None].expand(len(found), GRID, GRID).clone()
    labels["column"] = lines[None, :].expand(len(found), GRID, GRID).clone()
    for number, scene in enumerate(found):
        for thing in scene.things:
            cell = number, slice(2 * thing.row, 2 * thing.row + 2), slice(2 * thing.column, 2 * thing.column + 2)
            labels["thing"][cell] = 1
            for head, values in HEADS.items():
                value = getattr(thing, head) or ""
                if value in values:
                    labels[head][cell] = values.index(value)
    return Pictures(pixels, {head: values.flatten(1) for head, values in labels.items()})


class Namer(nn.Module):
    """The encoder with a linear head for every attribute; only the encoder is kept."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import ResNetConfig, ResNetModel

        config = ResNetConfig(embedding_size=32, hidden_sizes=[32, 64, 128], depths=[1, 1, 2], layer_type="basic")
        config.image_size = scenes.PICTURE
        self.encoder = ResNetModel(config)
        sizes = {head: len(values) for head, values in HEADS.items()} | {"thing": 2, "row": 3, "column": 3}
        self.heads = nn.ModuleDict({head: nn.Linear(128, size) for head, size in sizes.items()})

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """(B, 3, 96, 96) -> head -> logits (B, 36, values)."""
        tokens = self.encoder(pixels).last_hidden_state.flatten(2).transpose(1, 2)
        return {name: head(tokens) for name, head in self.heads.items()}


def train_encoder(out: Path, steps: int = PICTURE_STEPS) -> None:
    """Write the image encoder to `out`/image, with what it can do alone."""
    torch.manual_seed(PICTURE_SEED)
    model = Namer().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    clock = Clock("image", steps)
    for step in range(steps):
        set_rate(optimizer, step, steps, warmup=50)
        first = step * PICTURE_BATCH
        batch = pictures([picture_scene(PICTURE_SEED, first + n, strange=True) for n in range(PICTURE_BATCH)])
        found = model(batch.pixels.contiguous(memory_format=torch.channels_last))
        losses = [F.cross_entropy(found[head].flatten(0, 1), truth.flatten()) for head, truth in batch.labels.items()]
        loss = torch.stack(losses).sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        clock.tick(step, loss)
        if step % 250 == 249 or step == steps - 1:
            seen = name_accuracy(model, held_out=False)
            new = name_accuracy(model, held_out=True)
            write_encoder(model, out / "image", seen, new, step + 1)
            say(f"seen pairs {seen}, held-out pairs {new}")


@torch.no_grad()
def name_accuracy(model: Namer, *, held_out: bool, count: int = 400) -> dict[str, float]:
    """Share of tokens with a thing in their cell that are named right, on scenes of another seed."""
    model.eval()
    batch = pictures([picture_scene(PICTURE_TEST_SEED, n, held_out=held_out) for n in range(count)])
    found: dict[str, list[Tensor]] = {}
    for start in range(0, count, 100):
        for head, logits in model(batch.pixels[start : start + 100]).items():
            found.setdefault(head, []).append(logits.argmax(-1))
    model.train()
    scores = {}
    for head, parts in found.items():
        truth = batch.labels[head]
        scores[head] = round(float((torch.cat(parts) == truth)[truth != IGNORED].float().mean()), 4)
    return scores


def write_encoder(model: Namer, folder: Path, seen: dict[str, float], new: dict[str, float], steps: int) -> None:
    """The encoder as a transformers checkpoint with its preprocessing, float16."""
    save_half(model.encoder, folder)
    settings = {
        "image_processor_type": "ConvNextImageProcessor",
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "resample": 2,
        "size": {"shortest_edge": scenes.PICTURE},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    (folder / "scores.json").write_text(
        json.dumps({"steps": steps, "seen pairs": seen, "held-out pairs": new}, indent=1) + "\n", encoding="utf-8"
    )


# -- described scenes -------------------------------------------------------------------------------------------------

FORM_WEIGHTS = {
    "attribute": 3, "relation": 4, "word": 1, "place": 2, "exists": 2, "side": 4, "count": 1, "query": 4, "two_step": 2,
    "verify": 4, "choose": 3, "statement": 5, "which": 3, "options": 3,
}  # fmt: skip
FORMS = [form for form, weight in FORM_WEIGHTS.items() for _ in range(weight)]
FINDING = ("attribute", "place")
JUDGING = (
    "attribute", "place", "exists", "side", "side", "statement", "statement", "relation", "query", "verify", "word",
)  # fmt: skip
TOLD = ("attribute", "exists", "place", "relation", "side", "count", "word")
"""Forms of a dialogue's questions, which are answered in sentences."""


@dataclass(frozen=True)
class Exchange:
    """What is asked and answered in words; a dialogue has several turns.

    `mentions`: words of the first question that name one thing, and that thing.
    """

    turns: tuple[tuple[str, str], ...]
    form: str = ""
    mentions: tuple[tuple[str, scenes.Thing], ...] = ()


@dataclass(frozen=True)
class Description:
    """A scene in words: a group a phrase, in no order; and what is asked about it."""

    groups: tuple[str, ...]
    exchanges: tuple[Exchange, ...]


@cache
def wordings(name: str) -> tuple[str, ...]:
    """The shipped templates of a name."""
    return tuple(load_templates(name).templates)


def text_scene(seed: int, number: int, things: Sequence[int]) -> Scene:
    """What the LLM reads about: half of the scenes have the pairs that no training picture shows."""
    return scenes.sample_scene(seed, number, held_out=number % 2 == 1, things=things)


def described(
    scene: Scene,
    dice: Dice,
    *,
    count: int,
    forms: Sequence[str] = FORMS,
    terse: float = 0.0,
    plain: float = 0.0,
    telling: bool = True,
) -> Description:
    """A scene with two questions in each of `count` forms and, where `telling`, a caption, a dialogue, a VQG pair."""
    exchanges: list[Exchange] = []
    for _ in range(count):
        form = dice.choose(forms)
        found = list(scenes.FORMS[form](scene, dice))
        for _ in range(2):
            if found:
                answer = dice.choose(sorted({ask.answer for ask in found}))
                ask = dice.choose([ask for ask in found if ask.answer == answer])
                if ask.type in TERSE and dice.chance(terse):
                    exchanges.append(Exchange(((in_brief(ask.question), ask.answer),), form, ask.mentions))
                elif not ask.options and dice.chance(plain):
                    exchanges.append(Exchange(((ask.question, ask.answer),), form, ask.mentions))
                else:
                    exchanges.append(asked(ask, dice))
    if not telling:
        return Description(groups(scene, dice), tuple(dice.shuffled(exchanges)))
    if dice.chance(0.7):
        exchanges.append(
            Exchange(((dice.choose(wordings("caption")), scenes.captions(scene, 1, dice.below(99))[0]),), "caption")
        )
    told = dice.shuffled(scenes.FORMS[dice.choose(TOLD)](scene, dice))
    if len(told) > 1 and dice.chance(0.5):
        exchanges.append(Exchange(tuple((ask.question, ask.sentence) for ask in told[:2]), "dialogue"))
    if told and dice.chance(0.25):
        wording = dice.choose(wordings("vqg")).format(answer=told[0].answer)
        exchanges.append(Exchange(((wording, told[0].question),), "vqg"))
    return Description(groups(scene, dice), tuple(dice.shuffled(exchanges)))


TERSE = (*scenes.ATTRIBUTES, "place")
UNSAID = {"What", "is", "the", "of", "that", "Of", "Which", "How"}


def in_brief(question: str) -> str:
    """The key words of a question: "What colour is the small cube?" is "colour small cube"."""
    return " ".join(word for word in question.removesuffix("?").split() if word not in UNSAID)


def groups(scene: Scene, dice: Dice) -> tuple[str, ...]:
    """A phrase a thing; some places are said to hold nothing, and some things are told twice or in part."""
    told = [scenes.phrase(thing) for thing in scene.things]
    taken = {thing.place for thing in scene.things}
    free = [f"{row} {column}" for row in scenes.ROWS for column in scenes.COLUMNS if f"{row} {column}" not in taken]
    told += [f"nothing {place}" for place in dice.shuffled(free)[: dice.below(len(free) + 1)]]
    if dice.chance(0.3):
        told.append(dice.choose(told))
    return tuple(dice.shuffled(told))


def asked(ask: scenes.Ask, dice: Dice) -> Exchange:
    """A question in one of the wordings that the library's templates have."""
    fields = {"question": ask.question, "statement": ask.question, "options": lettered(ask.options)}
    if ask.form == "statement":
        wording = wordings("vsr_zero_shot")[0]
    elif ask.options and dice.chance(0.8):
        wording = wordings("multiple_choice")[0]
    else:
        chance = dice.below(10)
        wording = (
            "{question}" if chance < 5 else wordings("short_answer")[0] if chance < 7 else dice.choose(wordings("vqa"))
        )
    return Exchange(((wording.format(**fields), ask.answer),), ask.form, ask.mentions)


def corpus(count: int) -> Iterator[str]:
    """Texts for tokenizers and the BERT: descriptions, questions and answers."""
    for number in range(count):
        dice = Dice("corpus", TEXT_SEED, number)
        found = described(text_scene(TEXT_SEED, number, (2, 3, 4)), dice, count=6)
        yield ", ".join(found.groups) + "."
        for exchange in found.exchanges:
            for question, answer in exchange.turns:
                yield f"{question} {answer}"


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


# -- the LLM ----------------------------------------------------------------------------------------------------------


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


def courses(found: int, told: int, judged: int, asked: int, disturbed: int) -> tuple[Course, ...]:
    """By their stages' steps: finding by key words, then in questions; judging; every form; every form disturbed."""
    return (
        Course(
            1.0,
            (
                Stage(found, (2, 3), FINDING, 5, terse=1.0, plain=1.0),
                Stage(told, (2, 3), FINDING, 3, terse=0.4, plain=1.0),
                Stage(judged, (2, 3, 4), JUDGING, 3, noise=0.1, terse=0.1, plain=0.8),
                Stage(asked, (3, 4), FORMS, 2, noise=0.2, plain=0.2, telling=True),
            ),
        ),
        Course(0.3, (Stage(disturbed, (3, 4), FORMS, 2, drift=1.0, plain=0.2, telling=True),)),
    )


COURSES = courses(480, 420, 1800, 3300, 900)
SHORT_COURSES = courses(420, 320, 1200, 900, 260)
"""The same with fewer steps for judging and for all forms."""


@dataclass(frozen=True)
class Reader:
    """An LLM of the demo: its family in transformers, width, words, and what it is taught."""

    family: str
    width: int
    vocabulary: int
    heads: int = 4
    courses: tuple[Course, ...] = COURSES

    @property
    def steps(self) -> int:
        """Of all its courses."""
        return sum(course.steps for course in self.courses)

    def lesson(self, step: int) -> tuple[Stage, Course, int]:
        """The stage and the course of a step, and its number in the course."""
        for course in self.courses:
            if step < course.steps:
                for stage, end in zip(course.stages, accumulate(each.steps for each in course.stages), strict=True):
                    if step < end:
                        return stage, course, step
            step -= course.steps
        raise IndexError(step)


READERS = {
    "language": Reader("Llama", 128, 768),
    "other": Reader("Qwen2", 96, 640, courses=SHORT_COURSES),
}
"""By folder.  The second is what a tuned Q-Former is carried to."""


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

    def __init__(self, writer: Writer, reader: Reader):
        self.writer, self.reader = writer, reader

    def __len__(self) -> int:
        return self.reader.steps

    def __getitem__(self, step: int) -> Texts:
        stage, _, _ = self.reader.lesson(step)
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


def make_llm(reader: Reader) -> Any:
    """The LLM with fresh weights: 4 blocks."""
    import transformers

    heads = reader.heads
    config = getattr(transformers, f"{reader.family}Config")(
        vocab_size=reader.vocabulary, hidden_size=reader.width, num_hidden_layers=4, num_attention_heads=heads,
        num_key_value_heads=heads, intermediate_size=3 * reader.width, max_position_embeddings=512,
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


def train_llm(out: Path, name: str = "language") -> None:
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
    clock = Clock(name, reader.steps)
    for step, texts in enumerate(DataLoader(Steps(writer, reader), batch_size=None, num_workers=1, prefetch_factor=4)):
        stage, course, place = reader.lesson(step)
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
        last = step == reader.steps - 1
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


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal (Jordan and others 2024), for matrices; in float32: bfloat16 is slow on many CPUs."""

    def __init__(self, params: Any, lr: float, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update; matrices of one shape are treated together."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for p in group["params"]:
                by_shape.setdefault(p.shape, []).append(p)
            for same in by_shape.values():
                directions = []
                for p in same:
                    state = self.state[p]
                    if not state:
                        state["momentum"] = torch.zeros_like(p)
                    state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                    assert p.grad is not None
                    directions.append(p.grad.lerp(state["momentum"], group["momentum"]))
                turned = orthogonal(torch.stack(directions))
                scale = max(1.0, same[0].shape[0] / same[0].shape[1]) ** 0.5
                for p, direction in zip(same, turned, strict=True):
                    p.mul_(1 - 0.01 * group["lr"]).add_(direction, alpha=-group["lr"] * scale)


def orthogonal(matrices: Tensor, rounds: int = 5) -> Tensor:
    """(N, A, B) -> the nearest orthogonal matrices, about, by Newton and Schulz's iteration."""
    tall = matrices.shape[1] > matrices.shape[2]
    found = matrices.mT if tall else matrices
    found = found / (found.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(rounds):
        square = found @ found.mT
        found = 3.4445 * found + (-4.7750 * square + 2.0315 * square @ square) @ found
    return found.mT if tall else found


# -- the BERT ---------------------------------------------------------------------------------------------------------

BERT_STEPS, BERT_BATCH, BERT_LENGTH = 900, 48, 40


def make_wordpiece(folder: Path, texts: Sequence[str]) -> Any:
    """A lower-case WordPiece tokenizer as BERT has it; written to folder with its vocab.txt."""
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertTokenizerFast  # type: ignore[attr-defined]

    folder.mkdir(parents=True, exist_ok=True)
    found = BertWordPieceTokenizer(lowercase=True)
    found.train_from_iterator(texts, vocab_size=600, min_frequency=20, show_progress=False)
    found.save_model(str(folder))
    tokenizer = BertTokenizerFast(vocab=str(folder / "vocab.txt"), do_lower_case=True)
    tokenizer.save_pretrained(folder)
    return tokenizer


def train_bert(out: Path, steps: int = BERT_STEPS) -> None:
    """Write the BERT and its tokenizer to `out`/bert: it guesses words left out of descriptions, questions, answers."""
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(TEXT_SEED)
    folder = out / "bert"
    texts = list(corpus(3000))
    tokenizer = make_wordpiece(folder, texts)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=384,
        max_position_embeddings=160, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = BertForMaskedLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    clock = Clock("bert", steps)
    for step in range(steps):
        set_rate(optimizer, step, steps, warmup=50)
        dice = Dice("bert", TEXT_SEED, step)
        chosen = [dice.choose(texts) for _ in range(BERT_BATCH)]
        read = tokenizer(chosen, padding=True, truncation=True, max_length=BERT_LENGTH, return_tensors="pt")
        real = read.attention_mask.bool() & (read.input_ids > tokenizer.mask_token_id)
        hidden = real & (torch.rand(real.shape) < 0.2)
        shown = read.input_ids.masked_fill(hidden & (torch.rand(real.shape) < 0.85), tokenizer.mask_token_id)
        found = model(input_ids=shown, attention_mask=read.attention_mask).logits
        loss = F.cross_entropy(found[hidden], read.input_ids[hidden])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        clock.tick(step, loss)
    save_half(model.bert, folder)
    scores = {"steps": steps, "loss on words left out": round(loss.item(), 3)}
    (folder / "scores.json").write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")


# -- what all share ---------------------------------------------------------------------------------------------------


def say(line: str) -> None:
    """Progress, at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


class Clock:
    """Prints a line now and then: step, mean losses since the last line, seconds."""

    def __init__(self, name: str, steps: int, every: int = 50):
        self.name, self.steps, self.every = name, steps, every
        self.began = time.perf_counter()
        self.seen: list[list[float]] = []

    def tick(self, step: int, *losses: Tensor) -> None:
        """Count one step's losses."""
        self.seen.append([loss.item() for loss in losses])
        if (step + 1) % self.every == 0:
            seconds = time.perf_counter() - self.began
            means = " ".join(f"{sum(column) / len(column):.4f}" for column in zip(*self.seen, strict=True))
            say(f"{self.name} {step + 1}/{self.steps} loss {means} {seconds:.0f} s")
            self.seen.clear()


def set_rate(optimizer: torch.optim.Optimizer, step: int, steps: int, warmup: int, most: float = 1.0) -> None:
    """Linear warm-up, then cosine to zero, up to a share `most` of each group's first rate."""
    share = most * min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))
    for group in optimizer.param_groups:
        group.setdefault("full_rate", group["lr"])
        group["lr"] = group["full_rate"] * share


def save_half(model: Any, folder: Path) -> None:
    """Write a transformers model as float16 safetensors, without changing the one in memory."""
    import copy

    folder.mkdir(parents=True, exist_ok=True)
    copy.deepcopy(model).to(torch.float16).save_pretrained(folder)


def main() -> None:
    """Train and write the towers that are asked for (all by default)."""
    parser = argparse.ArgumentParser(prog="python -m qformer.demo.towers", description=__doc__)
    parser.add_argument("out", type=Path, help="a folder for the towers' folders")
    every = ("image", *READERS, "bert")
    parser.add_argument("--only", choices=every, nargs="*", default=every)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if "image" in options.only:
        train_encoder(options.out)
    for name in READERS:
        if name in options.only:
            train_llm(options.out, name)
    if "bert" in options.only:
        train_bert(options.out)


if __name__ == "__main__":
    main()
