"""transformers' InstructBLIP and BLIP-2 with every parameter redrawn, and what `load` makes of them: the same numbers.

*Equal* is float32: forward within 1e-4, loss 1e-5 relative, gradients 1e-4 relative per tensor, tokens exact.  Key
biases are left out: their gradient is zero.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Blip2ForConditionalGeneration, InstructBlipForConditionalGeneration

import qformer
from qformer.checkpoints import published_name
from qformer.config import VisionConfig
from qformer.sample import Slot, Text
from qformer.vlm import VLM
from tests.published import QUERIES, tiny_published

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"num_key_value_heads": 4}),
    "llama-grouped": ("llama", {"num_key_value_heads": 2}),
    "t5-tied": ("t5", {}),
    "t5-untied": ("t5", {"untied": True}),
    "opt": ("opt", {"kind": "blip-2"}),
}
IDS, MASK = torch.tensor([[2, 8, 9, 11, 3], [2, 10, 3, 0, 0]]), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
PROMPTS, TARGETS = ((5, 6, 7, 9), (11, 12)), ((20, 21, 22), (23, 24, 25, 26, 27))
DECODING = {
    "greedy": {"max_new_tokens": 9},
    "beams": {"max_new_tokens": 9, "num_beams": 3},
    "long beams": {"max_new_tokens": 9, "num_beams": 3, "length_penalty": 2.0},
    "short beams": {"max_new_tokens": 9, "num_beams": 4, "length_penalty": -1.0},
    "no word twice": {"max_new_tokens": 9, "repetition_penalty": 1.5},
    "beams, no word twice": {"max_new_tokens": 9, "num_beams": 3, "repetition_penalty": 1.5, "length_penalty": 0.5},
}


class Pair:
    """Our model and theirs from one directory, and the same questions put to both."""

    def __init__(self, directory: Path, ours: VLM, theirs: Any):
        self.directory, self.ours, self.theirs = directory, ours, theirs
        self.form = theirs.config.model_type
        self.reads = self.form == "instructblip"
        self.image = theirs.config.image_token_id
        self.pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))

    def our_soft(self, ours: VLM, pixels: Tensor) -> Tensor:
        return ours.soft_prompts(pixels, IDS, MASK) if self.reads else ours.soft_prompts(pixels)

    def their_input(self, pixels: Tensor) -> dict[str, Any]:
        read = {"qformer_input_ids": IDS, "qformer_attention_mask": MASK} if self.reads else {}
        return {"pixel_values": pixels, **read}

    def their_soft(self, pixels: Tensor, **more: Any) -> Tensor:
        return self.theirs.get_image_features(**self.their_input(pixels), return_dict=True, **more).pooler_output

    def their_rows(self, *, answered: bool, left: bool = False) -> dict[str, Tensor]:
        """Ids, mask and labels as their processor and its users make them."""
        profile = self.ours.language.profile
        front = [self.image] * QUERIES
        rows, labels = [], []
        for prompt, target in zip(PROMPTS, TARGETS, strict=True):
            words = [*profile.opening, *prompt, *profile.closing]
            behind = [*target, *profile.end] if answered and not profile.encoder_decoder else []
            rows.append((words, behind))
            labels.append([*target, *profile.end] if profile.encoder_decoder else behind)
        width = max(len(words) + len(behind) for words, behind in rows)
        pads = [[profile.pad] * (width - len(words) - len(behind)) for words, behind in rows]
        real = [[0] * len(pad) for pad in pads]
        given: dict[str, Any] = {"input_ids": [], "attention_mask": [], "labels": []}
        for (words, behind), pad, none, label in zip(rows, pads, real, labels, strict=True):
            ones = [1] * len(words + behind)
            given["input_ids"].append([*front, *(pad + words if left else words + behind + pad)])
            given["attention_mask"].append([1] * QUERIES + (none + ones if left else ones + none))
            longest = max(map(len, labels))
            given["labels"].append(
                label + [-100] * (longest - len(label))
                if profile.encoder_decoder
                else [-100] * (QUERIES + len(words)) + behind + [-100] * len(pad)
            )
        if not answered:
            del given["labels"]
        return {name: torch.tensor(value) for name, value in given.items()}

    def our_rows(self, *, answered: bool) -> list[Any]:
        profile = self.ours.language.profile
        return [
            (Slot(number), Text((*profile.opening, *prompt)))
            + ((Text((*target, *profile.end), trained=True),) if answered else ())
            for number, (prompt, target) in enumerate(zip(PROMPTS, TARGETS, strict=True))
        ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("published")


@pytest.fixture(scope="module", params=KINDS)
def pair(folder: Path, request: pytest.FixtureRequest) -> Pair:
    family, options = KINDS[request.param]
    directory = tiny_published(folder, family, **options)
    kind = Blip2ForConditionalGeneration if "kind" in options else InstructBlipForConditionalGeneration
    return Pair(directory, qformer.load(directory, report=str), kind.from_pretrained(directory).eval())


@torch.no_grad()
def test_soft_prompts_are_equal(pair: Pair) -> None:
    torch.testing.assert_close(
        pair.our_soft(pair.ours, pair.pixels), pair.their_soft(pair.pixels), rtol=1e-4, atol=1e-4
    )


@torch.no_grad()
def test_positions_of_larger_pictures_are_interpolated_alike(pair: Pair) -> None:
    settings = VisionConfig(name=str(pair.directory), norm=False, image_size=48)
    larger = qformer.load(pair.directory, vision=settings, report=str)
    pixels = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(4))
    theirs = pair.their_soft(pixels, interpolate_pos_encoding=True)
    torch.testing.assert_close(pair.our_soft(larger, pixels), theirs, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(theirs, pair.their_soft(pair.pixels), atol=1e-2)


def test_loss_and_gradients_of_every_adapter_parameter_are_equal(pair: Pair) -> None:
    pair.theirs.zero_grad()
    pair.ours.zero_grad()
    their_loss = pair.theirs(**pair.their_input(pair.pixels), **pair.their_rows(answered=True)).loss
    their_loss.backward()
    sums, counts = pair.ours.language.log_likelihood(
        pair.our_soft(pair.ours, pair.pixels), pair.our_rows(answered=True)
    )
    our_loss = -sums.sum() / counts.sum()
    our_loss.backward()
    assert our_loss.item() == pytest.approx(their_loss.item(), rel=1e-5)
    gradients = {name: each.grad for name, each in pair.theirs.named_parameters()}
    compared = 0
    for name, parameter in pair.ours.connector.named_parameters():
        theirs = gradients[published_name(name, pair.form)]
        if not parameter.requires_grad:
            assert theirs is None or not theirs.any(), name
            continue
        if name.endswith("key.bias"):
            continue
        assert parameter.grad is not None and theirs is not None, name
        theirs = theirs.reshape(parameter.shape)
        assert float((parameter.grad - theirs).norm()) <= 1e-4 * float(theirs.norm()), name
        assert theirs.any() or "text_feed_forward" in name, name
        compared += 1
    assert compared > 60


@pytest.mark.filterwarnings("ignore:Passing `repetition_penalty`:UserWarning")
@pytest.mark.parametrize("decoding", DECODING)
@torch.no_grad()
def test_tokens_are_equal(pair: Pair, decoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, language = DECODING[decoding], pair.ours.language
    ends = language._ends
    monkeypatch.setattr(language, "_answers", lambda generated: [cut(row, ends) for row in generated.tolist()])
    soft, rows = pair.our_soft(pair.ours, pair.pixels), pair.our_rows(answered=False)
    ours = language.generate(soft, rows, **settings)
    fixed = {"do_sample": False, "min_new_tokens": 1, "eos_token_id": ends, "pad_token_id": language.profile.pad}
    if settings.get("repetition_penalty") and not language.is_encoder_decoder:
        # Their `generate` hands the prompt's ids on, and would punish the words of the question too.
        theirs = []
        for number, row in enumerate(rows):
            words = pair.theirs.get_input_embeddings()(torch.tensor(row[1].ids))
            inputs = torch.cat([soft[number], words])[None]
            [ids] = pair.theirs.language_model.generate(inputs_embeds=inputs, **settings, **fixed).tolist()
            theirs.append(cut(ids, ends))
    else:
        given = pair.their_rows(answered=False, left=not language.is_encoder_decoder)
        generated = pair.theirs.generate(**pair.their_input(pair.pixels), **given, **settings, **fixed)
        front = 1 if language.is_encoder_decoder else given["input_ids"].shape[1]
        theirs = [cut(row, ends) for row in generated[:, front:].tolist()]
    assert ours == theirs
    assert any(ours)


def cut(ids: list[int], ends: list[int]) -> list[int]:
    return ids[: next((place for place, each in enumerate(ids) if each in ends), len(ids))]
