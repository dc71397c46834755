"""How the demo's tiny towers were made: `python -m qformer.demo.towers OUT`, some hours on one core.

An image encoder that names what stands where, two LLMs that read described scenes and answer questions about them, and
a BERT that has read the same words.  Each is written as an ordinary checkpoint of transformers, in float16.  The seeds
are not those of the demo; the encoder sees no pair of colour and shape that is held out, the LLMs no picture.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qformer.demo import scenes
from qformer.demo.descriptions import TEXT_SEED, corpus
from qformer.demo.llm import READERS, train_llm
from qformer.demo.pretraining import Clock, save_half, say, set_rate
from qformer.demo.scenes import Dice, Scene

PICTURE_SEED, PICTURE_TEST_SEED = 71_001, 71_002

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
