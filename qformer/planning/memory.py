"""Memory of a run by part, and which setting to change where it does not fit.  Bytes throughout."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qformer.planning.trace import Held, LanguageHeld

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
IN_BITS = {8: 1.0, 4: 0.5 + 4 / 64}
"""Bytes of a quantised weight; in 4 bits with a float32 scale for every 64 of them."""
CONTEXT = 1e9
"""Taken for what a GPU's driver and libraries hold for themselves: an assumption."""
AT_WORK = 4e8
"""What a process on a CPU holds beside its tensors and beyond importing: 0.2 GB of libraries once they work, and memory
that was freed and is not given back; of three sizes of runs 0.3 to 1.3 GB (`benchmarks/plan.py`).
"""
USABLE = 0.95
"""Share of a GPU's memory that a plan may fill; the rest is lost between blocks of unlike sizes: an assumption."""
ROOMS = (8192, 4096, 2048, 1024, 512)
"""Budgets of `train.micro_batch_tokens` that are tried."""
FLEETS = (2, 4, 8)
"""Numbers of GPUs that are tried."""


@dataclass(frozen=True)
class Weights:
    """Parameters of the parts: of the LLM those of its blocks' matrices, which quantisation takes, and the others."""

    vision: int
    blocks: int
    rest: int
    trained: int
    frozen: int
    """Of the adapter."""


@dataclass(frozen=True)
class Choice:
    """The settings that memory depends on, beside the sizes of the towers."""

    vision: str
    language: str
    bits: int | None = None
    checkpointing: bool = False
    computed: int = 0
    """Positions of the heaviest micro-batch."""
    several: bool = False
    """Whether a step has several micro-batches, so that gradients are there while later ones are computed."""
    gpus: int = 1
    sharded: bool = False
    """Whether the frozen LLM's blocks are spread over the GPUs (FSDP)."""


@dataclass(frozen=True)
class Activations:
    """What the heaviest micro-batch holds, as it was traced, and the positions it has."""

    encoder: Held
    adapter: Held
    language: LanguageHeld
    boundary: float
    """Bytes of what stands between two blocks of the LLM."""
    computed: int
    pixels: float = 0
    """Pictures of the steps that are at hand, where the model is on the same device as the data."""
    dtype: str = "float32"
    """What the LLM was traced in."""
    logits_alone: bool = False
    """Whether the head's part is as large as it gets, however many rows there are: its logits are written in parts."""


def weights(given: Weights, choice: Choice) -> dict[str, float]:
    """What stays for the whole run, by part."""
    each = IN_BITS[choice.bits] if choice.bits else BYTES[choice.language]
    share = choice.gpus if choice.sharded else 1
    return {
        "image encoder": float(given.vision * BYTES[choice.vision]),
        "LLM": given.blocks * each / share + given.rest * BYTES[choice.language],
        "adapter, float32": 4.0 * (given.trained + given.frozen),
        "AdamW's two averages": 8.0 * given.trained,
    }


def moments(given: Weights, held: Activations, choice: Choice, context: float) -> dict[str, dict[str, float]]:
    """What is held, by part, at the moments when most may be."""
    size = choice.computed / held.computed if held.computed else 1.0
    words = BYTES[choice.language] / BYTES[held.dtype]
    stays = weights(given, choice)
    if context:
        stays["libraries, driver (assumed)"] = context
    if held.pixels:
        stays["pictures of two steps"] = held.pixels
    gradients = 4.0 * given.trained * (2 if choice.gpus > 1 else 1)
    early = {"gradients": gradients} if choice.several else {}
    adapter = held.adapter.times(size)
    kept = held.language.recomputed(held.boundary) if choice.checkpointing else held.language.kept
    head = held.language.head if held.logits_alone else held.language.head.times(size)
    return {
        "while pictures are encoded": {**stays, **early, "encoder, for a moment": held.encoder.times(size).forward},
        "where the LLM's backward pass begins": {
            **stays,
            **early,
            "adapter's activations": adapter.kept,
            "LLM's activations": kept * size * words,
            "logits and loss": max(head.forward, head.backward),
        },
        "where the adapter's backward pass begins": {**stays, **early, "adapter's activations": adapter.kept},
        "where the adapter's backward pass ends": {**stays, "gradients": gradients},
    }


def peak(given: Weights, held: Activations, choice: Choice, context: float = 0) -> tuple[str, dict[str, float]]:
    """The moment when most is held, and what by part."""
    found = moments(given, held, choice, context)
    moment = max(found, key=lambda name: sum(found[name].values()))
    return moment, found[moment]


def bits_of(quantization: Mapping[str, Any] | None) -> int | None:
    """Bits of a weight by a quantisation's values: 4 where they say so, else 8."""
    if not quantization:
        return None
    said = " ".join(f"{name}={value}" for name, value in quantization.items()).lower()
    return 4 if any(word in said for word in ("load_in_4bit=true", "int4", "bits=4")) else 8


def lighter(choice: Choice, longest: int, *, on_gpu: bool) -> Iterator[tuple[str, Choice]]:
    """Settings that make a run lighter, the gentlest first, each on top of those before it.

    Smaller micro-batches and checkpointing change no result, narrower numbers do a little, fewer bits more.  An LLM
    that is spread over several GPUs stands last, and with all its bits, since it costs those GPUs.
    """
    for room in ROOMS:
        if longest <= room < choice.computed:
            choice = dataclasses.replace(choice, computed=room, several=True)
            yield f"train.micro_batch_tokens={room}", choice
    if not choice.checkpointing:
        choice = dataclasses.replace(choice, checkpointing=True)
        yield "language.gradient_checkpointing=true", choice
    if choice.language == "float32":
        choice = dataclasses.replace(choice, language="bfloat16")
        yield "language.dtype=bfloat16", choice
    if choice.vision == "float32":
        choice = dataclasses.replace(choice, vision="bfloat16")
        yield "vision.dtype=bfloat16", choice
    for bits in (8, 4):
        if choice.bits is None or bits < choice.bits:
            yield f"language.quantization={{load_in_{bits}bit: true}}", dataclasses.replace(choice, bits=bits)
    for number in FLEETS if on_gpu and choice.bits is None else ():
        if number > choice.gpus:
            spread = dataclasses.replace(choice, gpus=number, sharded=True)
            yield f"or, with all its bits, language.shard=true on {number} GPUs", spread
