"""Training, ranking and generation of the paper's models on one GPU, against transformers: `python benchmarks/gpu.py`.

Towers and Q-Former have their true sizes and random weights, made on the GPU from configs: nothing is downloaded.  The
settings are those of the shipped configs, batch and micro-batches among them.  Rows are as long as
`configs/planning/lengths.yaml` states for the thirteen sets, drawn as a run draws them; of the first steps that one is
timed whose work is nearest to their mean.  transformers' `InstructBlipForConditionalGeneration` has the same weights
(the LLM is the same object), frozen towers in bfloat16, and takes the same rows as one padded batch with a picture a
row, or in the largest halves of it that fit.  Both compute under autocast to bfloat16, ours all but its frozen towers;
pictures, features and ids lie in the memory of the machine at first, pinned as a run's loader leaves them (ids of ours
are not), and are moved within what is timed.  transformers has cuDNN's attention, which a run does without
(`qformer/devices.py`), and the LLM's norms as it writes them, which a run has fused (`qformer/backbones/fused.py`).

Every pair does the same work in turn, after an untimed round in which soft tokens and losses are compared; *faster* is
the median of the pairs' ratios.  The share of peak is `qformer plan`'s count of operations, over the time they took and
the data sheet's peak.

- training: forward, backward, AdamW; and with the encoder's outputs at hand, as `vision.cache` keeps them;
- ranking: as `benchmarks/ranking.py` measures it, 4 and 100 candidates behind a prefix of 72, and 4 behind each of 8;
- generation: as `benchmarks/speed.py` measures it, 16 prompts, greedy, 20 new tokens each.

`--set KEY=VALUE …` changes settings of both configs (train.micro_batch_tokens=4096, train.compile=true).  Without a
GPU nothing is measured, unless by `--device cpu --size tiny`, the same code with models that are no work.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import gc
import json
import math
import platform
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import ranking
import speed
import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import InstructBlipConfig, InstructBlipForConditionalGeneration

from qformer import config, devices, exporting, hub
from qformer.assemble import Picture, Pixels, Prepared
from qformer.backbones import blueprints, fused
from qformer.backbones.decoder_only import DecoderOnly
from qformer.backbones.encoder_decoder import EncoderDecoder
from qformer.backbones.language import LanguageTower
from qformer.checkpoints import renamed_for
from qformer.config import RunConfig
from qformer.nn.qformer import QFormer, QFormerConnector
from qformer.planning import memory, plan, shapes
from qformer.planning import speed as peaks
from qformer.sample import Batch, Slot, Text
from qformer.text import Profile
from qformer.train import compiling
from qformer.train.optim import optimizer_for
from qformer.train.step import train_step
from qformer.untokenized import MissingTokenizer
from qformer.vlm import VLM

GOALS = {"instructblip_flant5xl": 340, "instructblip_vicuna7b": 130}
"""Samples a second that are aimed at on an H200."""
PARTS = ("training", "cached", "ranking", "generation")
COMPUTED = torch.bfloat16
CACHED = torch.float16
"""What features are kept in."""
NEAR = 0.2
"""How near the two come, relatively, at least: an encoder in float16 and one in bfloat16 round differently."""
NOTHING = "–"
Part = tuple[dict[str, Tensor], float]
"""Rows as transformers takes them, and their share of a step's trained tokens."""

TINY_WIDTH = 48
TINY_VISION = {
    "architecture": "eva_giant_patch14_clip_224", "num_classes": 0,
    "model_args": {"embed_dim": TINY_WIDTH, "depth": 3, "num_heads": 4},
    "pretrained_cfg": {"input_size": [3, 224, 224], "num_classes": 0},
}  # fmt: skip
TINY_LANGUAGE = {
    "google/flan-t5-xl": {
        "d_model": TINY_WIDTH, "d_ff": 64, "d_kv": 12, "num_heads": 4, "num_layers": 2, "num_decoder_layers": 2,
    },
    "lmsys/vicuna-7b-v1.1": {
        "hidden_size": TINY_WIDTH, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 4, "head_dim": 12,
    },
}  # fmt: skip
TINY_WORDS = 1000
TINY_QFORMER = {"hidden": TINY_WIDTH, "layers": 2, "heads": 4, "intermediate": 64}


# -- the machine ------------------------------------------------------------------------------------------------------


def known_gpu(name: str) -> str | None:
    """The GPU of `configs/planning/gpus.yaml` that a device calls itself by; None where it is none of them."""
    words = set(re.findall(r"[a-z0-9]+", name.lower()))
    words |= {word.removesuffix("gb") for word in words}
    fitting = [known for known in peaks.known().gpus if set(known.split("-")) <= words]
    return max(fitting, key=lambda known: known.count("-"), default=None)


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def waited(device: torch.device, work: Callable[[], Any]) -> Callable[[], None]:
    """The same work, done when it returns."""

    def whole() -> None:
        work()
        wait(device)

    return whole


def clock_of(device: torch.device) -> Callable[[], float]:
    """A clock that waits for the device first."""

    def now() -> float:
        wait(device)
        return time.perf_counter()

    return now


def most_held(device: torch.device, work: Callable[[], Any]) -> int:
    """Bytes that tensors take at the most while work is done; 0 where nobody counts them."""
    if device.type != "cuda":
        work()
        return 0
    wait(device)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    wait(device)
    return torch.cuda.max_memory_allocated(device)


def release(device: torch.device) -> None:
    """Give back what nothing holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def machine(device: torch.device, repeats: int) -> str:
    """What was measured with."""
    versions = [f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "timm", "accelerate")]
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        runtime = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
        what = f"{found.name}, {found.total_memory / 1e9:.0f} GB, {runtime}"
    else:
        what = f"{platform.machine()}, threads: {torch.get_num_threads()}"
    return f"{what}, Python {platform.python_version()}, {', '.join(versions)}, bfloat16, {repeats} pairs\n"


# -- the models -------------------------------------------------------------------------------------------------------


def settings_of(name: str, size: str, folder: Path, changes: Sequence[str]) -> RunConfig:
    """A shipped config; no data set is there, so that lengths are those that are stated."""
    settings = config.load(name, [f"data.root={folder / 'nothing'}", f"data.index={folder / 'index'}", *changes])
    if size != "tiny":
        return settings
    ranking.IDS = TINY_WORDS
    (folder / "vision").mkdir(exist_ok=True)
    (folder / "vision" / "config.json").write_text(json.dumps(TINY_VISION), encoding="utf-8")
    architecture = {**settings.language.architecture, **TINY_LANGUAGE[settings.language.name], "vocab_size": TINY_WORDS}
    return dataclasses.replace(
        settings,
        vision=dataclasses.replace(settings.vision, name=str(folder / "vision"), dtype="bfloat16"),
        language=dataclasses.replace(settings.language, architecture=architecture),
        qformer=dataclasses.replace(settings.qformer, **TINY_QFORMER),
        train=dataclasses.replace(settings.train, steps=2, batch_size=6, micro_batch_tokens=600),
    )


def ours_of(settings: RunConfig, found: plan.Sizes, device: torch.device) -> VLM:
    """The model of a config with random weights, made on the device."""
    devices.choose_attention(device)
    vision = blueprints.blank_vision(settings.vision, device)
    llm, _ = blueprints.blank_language(settings.language, device)
    with torch.device(device):
        connector = QFormerConnector(QFormer(found.former), found.language.width, norm_eps=settings.qformer.norm_eps)
    coder = bool(llm.config.is_encoder_decoder)
    if coder:
        llm.config.decoder_start_token_id = 0  # T5's, which the shipped sizes do not tell
    end = 1 if coder else 2
    profile = Profile(
        layout="plain", opening=(), end=(end,), pad=0, closing=(end,) if coder else (), encoder_decoder=coder
    )
    unread = MissingTokenizer("random weights have no tokenizer", bos=1, eos=end, pad=0)
    kind: type[LanguageTower] = EncoderDecoder if coder else DecoderOnly
    checkpointing, packing = settings.language.gradient_checkpointing, settings.language.packing
    language = kind(llm.eval(), unread, profile, gradient_checkpointing=checkpointing, packing=packing)
    return VLM(vision, connector, language, unread, settings)


def theirs_of(model: VLM, device: torch.device) -> tuple[Any, int]:
    """transformers' model with the same weights and the very same LLM, and the id that stands for a soft token."""
    llm, size = model.language.model, model.connector.size
    image = int(llm.get_input_embeddings().weight.shape[0]) - 1
    described, tensors = exporting._vision(model)
    shallow = copy.deepcopy(llm.config)  # an LLM of a layer, whose place ours takes
    shallow.num_hidden_layers = 1
    if hasattr(shallow, "num_decoder_layers"):
        shallow.num_decoder_layers = 1
    whole = InstructBlipConfig(
        vision_config=described,
        qformer_config=exporting._qformer_config(size),
        text_config=shallow,
        num_query_tokens=size.queries,
        image_token_index=image,
    )
    with torch.device(device):
        theirs: Any = InstructBlipForConditionalGeneration(whole)
    theirs.language_model, theirs.config.text_config = llm, llm.config
    theirs.vision_model.to(COMPUTED)
    state = {f"vision_model.{name}": tensor for name, tensor in tensors.items()}
    state |= renamed_for(model.connector.state_dict(), "instructblip")
    lacking, strange = theirs.load_state_dict(state, strict=False)
    assert not strange and all(name.startswith("language_model.") for name in lacking), (lacking, strange)
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_(not name.startswith(("vision_model.", "language_model.")))
    return theirs, image


# -- the rows ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """The rows of a step, the pictures they look at, the micro-batches that they are cut into, and their operations."""

    rows: tuple[Prepared, ...]
    pixels: Pixels
    batches: tuple[Batch, ...]
    work: dict[str, float]


def steps_of(settings: RunConfig, found: plan.Sizes, data: plan.Data, model: VLM) -> list[Step]:
    """The first steps of a run, with random ids and pictures in the place of data."""
    assembler = model.assembler(training=True)
    language = model.language
    packs, apart = language.packs is not None, language.is_encoder_decoder
    maker = shapes.maker_of(settings, data.mixture, {}, packs=packs, apart=apart)
    steps = []
    for number in range(len(data.steps.steps)):
        drawn, _ = shapes.rows_of(maker, number, data.cards, None, settings)
        rows = [filled(each, number * 100_000 + place) for place, each in enumerate(drawn)]
        dice = torch.Generator().manual_seed(number)
        size = model.vision.settings.size
        names = dict.fromkeys(name for each in rows for name in each.pictures)
        pixels = {name: Picture(torch.randn(3, size, size, generator=dice)) for name in names}
        groups = list(maker.groups(rows))
        amounts: dict[str, float] = dict.fromkeys(peaks.PARTS, 0.0)
        for group in groups:
            micro = shapes.shape(group, settings.qformer.queries, data.kind)
            for part, amount in plan.work_of(settings, found, micro).items():
                amounts[part] += amount
        batches = tuple(pinned(assembler.batch(group, pixels), model.device) for group in groups)
        steps.append(Step(tuple(rows), pixels, batches, amounts))
    return steps


def pinned(batch: Batch, device: torch.device) -> Batch:
    """A batch as a run's loader hands it out."""
    return batch.pin_memory() if device.type == "cuda" else batch


def filled(row: Prepared, seed: int) -> Prepared:
    """A row with random ids, as many as before."""
    pieces = (
        piece if isinstance(piece, Slot) else Text(speed.ids(len(piece.ids), seed + 7 * place), piece.trained)
        for place, piece in enumerate(row.row)
    )
    return dataclasses.replace(row, instruction=speed.ids(len(row.instruction), seed), row=tuple(pieces))


def usual(steps: Sequence[Step]) -> Step:
    """The step whose work is nearest to the mean."""
    amounts = [sum(step.work.values()) for step in steps]
    return min(steps, key=lambda step: abs(sum(step.work.values()) - statistics.mean(amounts)))


# -- what is timed ----------------------------------------------------------------------------------------------------


class Both:
    """The same model twice on the device, ours and that of transformers, each with its optimizer; and some steps."""

    def __init__(self, settings: RunConfig, found: plan.Sizes, data: plan.Data, device: torch.device):
        self.settings, self.device = settings, device
        self.accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="bf16")
        self.ours = ours_of(settings, found, device)
        self.theirs, self.image = theirs_of(self.ours, device)
        self.mine = optimizer_for(self.ours.trainable(), settings.train)
        trained = [parameter for parameter in self.theirs.parameters() if parameter.requires_grad]
        self.other = torch.optim.AdamW(trained, lr=settings.train.warmup_rate, fused=True)
        self.steps = steps_of(settings, found, data, self.ours)
        self.step = usual(self.steps)
        self.losses: dict[str, float] = {}
        self.firsts: list[float] = []
        """Seconds of steps that were taken for the first time, all but the very first, which loads kernels."""
        if settings.train.compile:
            compiling.compile_blocks(self.ours)

    @property
    def closing(self) -> tuple[int, ...] | None:
        """What ends a prompt of an encoder–decoder."""
        language = self.ours.language
        return language.profile.closing if language.is_encoder_decoder else None

    @contextmanager
    def as_torch_chooses(self) -> Iterator[None]:
        """A while with the LLM, which is the same object, as transformers writes it, and with attention by cuDNN too,
        where torch would take it: shapes come again and again here.
        """
        torch.backends.cuda.enable_cudnn_sdp(True)
        try:
            with fused.as_written(self.ours.language.model):
                yield
        finally:
            devices.choose_attention(self.device)

    def autocast(self) -> torch.autocast:
        """What training computes in."""
        return torch.autocast(self.device.type, COMPUTED)

    def our_step(self, batches: Sequence[Batch]) -> None:
        """A step as a run takes it."""
        limit = self.settings.train.max_norm
        report = train_step(
            self.ours, self.ours.objective, batches, batches[0], self.mine, self.accelerator, limit
        )  # fmt: skip
        self.losses["ours"] = report.loss

    def take_all(self) -> None:
        """All steps once, as a run takes them: each has shapes that were not seen before."""
        now = clock_of(self.device)
        for number, step in enumerate(self.steps):
            began = now()
            self.our_step(step.batches)
            if number:
                self.firsts.append(now() - began)

    def their_step(self, parts: Sequence[Part]) -> None:
        """The same by transformers: a backward pass for each part, with its share of the loss."""
        total = torch.zeros((), device=self.device)
        with compiling.as_written(self.ours), self.as_torch_chooses():
            for given, weight in parts:
                with self.autocast():
                    loss = self.theirs(**self.moved(given)).loss * weight
                loss.backward()
                total += loss.detach()
        self.other.step()
        self.other.zero_grad(set_to_none=True)
        self.losses["theirs"] = float(total)

    def moved(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        """What transformers' model is given, on the device."""
        return {name: each.to(self.device, non_blocking=True) for name, each in given.items()}

    def padded(self, rows: int) -> list[Part]:
        """The step's rows as transformers takes them, so many at a time, each part with its share of the tokens."""
        assembler, every = self.ours.assembler(training=True), self.step.rows
        batches = [
            assembler.batch(every[start : start + rows], self.step.pixels) for start in range(0, len(every), rows)
        ]
        counts = [self.ours.objective.counts(batch)["answer"] for batch in batches]
        given = [speed.theirs_of(batch, image=self.image, closing=self.closing) for batch in batches]
        if self.device.type == "cuda":
            given = [{name: each.pin_memory() for name, each in part.items()} for part in given]
        return [(each, count / sum(counts)) for each, count in zip(given, counts, strict=True)]

    def fitting(self) -> list[Part]:
        """The step's rows for transformers: all at once, or in the largest halves that fit."""
        rows = len(self.step.rows)
        while True:
            try:
                parts = self.padded(rows)
                self.their_step(parts)
                return parts
            except torch.OutOfMemoryError:
                if rows == 1:
                    raise
            self.other.zero_grad(set_to_none=True)  # behind the handler, whose error holds what did not fit
            release(self.device)
            rows = -(-rows // 2)

    @torch.no_grad()
    def kept(self) -> list[Batch]:
        """The step's batches with the encoder's outputs in the place of pictures, as a feature cache brings them."""
        found = []
        for batch in self.step.batches:
            features = self.ours.encode(batch.pixels).values.to(CACHED).cpu()
            numbers = tuple(range(batch.pictures))
            kept = dataclasses.replace(batch, pixels=batch.pixels[:0], features=features, featured=numbers)
            found.append(pinned(kept, self.device))
        return found

    @torch.no_grad()
    def compare(self) -> str:
        """How near the two come in a few rows, without dropout: more than rounding would be another model."""
        rows = list({row.pictures: row for row in self.step.rows}.values())[:4]
        batch = self.ours.assembler(training=True).batch(rows, self.step.pixels)
        given = self.moved(speed.theirs_of(batch, image=self.image, closing=self.closing))
        seen: dict[str, list[Tensor]] = {"encoder's outputs": [], "soft tokens": []}
        places = (
            ("encoder's outputs", self.ours.connector.norm),
            ("soft tokens", self.ours.connector.projection),
            ("encoder's outputs", self.theirs.vision_model.post_layernorm),
            ("soft tokens", self.theirs.language_projection),
        )
        hooks = [
            module.register_forward_hook(lambda *each, what=what: seen[what].append(each[-1].float()))
            for what, module in places
        ]
        self.ours.eval(), self.theirs.eval()
        with self.autocast(), compiling.as_written(self.ours):
            mine = self.ours(batch)["answer"] / self.ours.objective.counts(batch)["answer"]
            with self.as_torch_chooses():
                losses = torch.stack([mine, self.theirs(**given).loss])
        for hook in hooks:
            hook.remove()
        pairs = {**{what: (own, other) for what, (own, other, *_) in seen.items()}, "loss": losses.unbind()}
        away = {what: float((own - other).norm() / own.norm()) for what, (own, other) in pairs.items()}
        assert all(each <= NEAR for each in away.values()), away
        return ", ".join(f"{what} {each:.2%}" for what, each in away.items())

    def own_bytes(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Of a model and its optimizer, without the LLM that both have."""
        shared = {id(parameter) for parameter in self.ours.language.parameters()}
        weights = [parameter for parameter in model.parameters() if id(parameter) not in shared]
        state = [each for values in optimizer.state.values() for each in values.values() if isinstance(each, Tensor)]
        return sum(each.nbytes for each in (*weights, *state))


def training(both: Both, only: Sequence[str], repeats: int, top: float | None) -> Iterator[tuple[str, float, int]]:
    """Rows of steps with and without features at hand; each with its seconds and the bytes that ours held."""
    if not {"training", "cached"} & set(only):
        return
    settings, device = both.settings, both.device
    both.ours.train(), both.theirs.train()
    both.theirs.vision_model.eval(), both.theirs.language_model.eval()  # frozen towers stay so, as ours do
    parts = both.fitting()
    beside = both.own_bytes(both.theirs, both.other)
    our_most = most_held(device, both.take_all) - beside
    beside = both.own_bytes(both.ours, both.mine)
    their_most = most_held(device, lambda: both.their_step(parts)) - beside
    theirs = waited(device, lambda: both.their_step(parts))
    for part in ("training", "cached"):
        if part not in only:
            continue
        cached = part == "cached"
        batches = both.kept() if cached else both.step.batches
        ours = waited(device, partial(both.our_step, batches))
        if cached:
            our_most = most_held(device, ours) - both.own_bytes(both.theirs, both.other)
        theirs(), ours()
        assert all(map(math.isfinite, both.losses.values())), both.losses
        pairs = speed.in_turn(theirs, ours, repeats)
        work = sum(amount for each, amount in both.step.work.items() if not (cached and each == "encoder"))
        goal = NOTHING if cached or settings.name not in GOALS else f"{GOALS[settings.name]}/s"
        size = settings.train.batch_size
        what = (
            f"step of {size} samples{', features at hand' if cached else ''}, {max(map(rows_in, parts))} rows at a time"
        )
        row = (
            f"{speed.line(what, goal, pairs)} {rates(size, pairs[1])} | {share(work, pairs[1], top)} | "
            f"{gigabytes(their_most)} | {gigabytes(our_most)} |"
        )
        yield row, statistics.median(pairs[1]), our_most


def ranked(both: Both, repeats: int) -> Iterator[str]:
    """Candidates behind a prompt, against a pass each."""
    for (prompts, count), asked in speed.RANKED.items():
        pairs = ranking.measure(both.ours.language, count, repeats, clock_of(both.device), prompts)
        what = f"{speed.ranked_what(prompts, count)}, against a pass each by the same LLM"
        yield f"{speed.line(what, asked, pairs)} {rates(prompts, pairs[1])} | {NOTHING} | {NOTHING} | {NOTHING} |"


def generation(both: Both, repeats: int) -> str:
    """16 prompts, greedy; words of random weights differ by rounding, their number does not."""
    model, coder = both.ours, both.ours.language.is_encoder_decoder
    batch = speed.batch([(prompt, 0) for prompt in speed.PROMPTS], len(speed.PROMPTS))
    given = speed.theirs_of(batch, left=not coder, image=both.image, closing=both.closing)
    read = 1 if coder else given["input_ids"].shape[1]
    decoding = {
        "max_new_tokens": speed.NEW_TOKENS, "do_sample": False, "pad_token_id": model.language.profile.pad,
        "eos_token_id": model.language.profile.end[0],
    }  # fmt: skip
    new: dict[str, int] = {}

    @torch.inference_mode()
    def our_words() -> None:
        new["ours"] = model.language.write(*model.seen(batch), max_new_tokens=speed.NEW_TOKENS).shape[1]

    @torch.inference_mode()
    def their_words() -> None:
        with both.autocast(), both.as_torch_chooses():
            new["theirs"] = both.theirs.generate(**both.moved(given), **decoding).shape[1] - read

    model.eval(), both.theirs.eval()
    slow, fast = waited(both.device, their_words), waited(both.device, our_words)
    slow(), fast()
    assert new["ours"] == new["theirs"] == speed.NEW_TOKENS, new
    pairs = speed.in_turn(slow, fast, repeats)
    what = f"generation, {len(speed.PROMPTS)} prompts, {speed.NEW_TOKENS} tokens each"
    row = speed.line(what, speed.ASKED["generation"], pairs)
    return f"{row} {rates(len(speed.PROMPTS), pairs[1])} | {NOTHING} | {NOTHING} | {NOTHING} |"


# -- the tables -------------------------------------------------------------------------------------------------------


def table(settings: RunConfig, options: argparse.Namespace, device: torch.device) -> Iterator[str]:
    """The lines of one config."""
    with hub.asked_if_there():
        found = plan.sizes(settings)
        data = plan.look(settings, found)
        both = Both(settings, found, data, device)
    top = (peaks.gpu(options.gpu).bfloat16 or 0) * 1e12 if options.gpu else None
    yield f"## {settings.name}\n"
    yield (
        "| work | asked | transformers (s) | qformer (s) | faster | range | qformer, samples/s | share of peak | "
        "memory of transformers | memory of qformer |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|"
    notes = [f"{described(both)} transformers' numbers are away from ours by: {both.compare()}."]
    for row, seconds, most in training(both, options.only, options.repeats, top):
        yield row
        if options.gpu and len(notes) == 1 and "training" in options.only:
            notes.append(planned(settings, found, data, options.gpu, seconds, most))
    if both.firsts:
        notes.append(f"Steps that came for the first time: {', '.join(f'{each:.3g}' for each in both.firsts)} s.")
    with compiling.as_written(both.ours):
        if "ranking" in options.only:
            yield from ranked(both, options.repeats)
        if "generation" in options.only:
            yield generation(both, options.repeats)
    yield ""
    yield from notes


def described(both: Both) -> str:
    """What the step is made of."""
    step, work = both.step, sum(both.step.work.values())
    pictures = len({name for row in step.rows for name in row.pictures})
    parts = ", ".join(f"{part} {amount / work:.0%}" for part, amount in step.work.items())
    return (
        f"The step: {both.settings.train.batch_size} samples, {len(step.rows)} rows, {pictures} pictures, "
        f"{len(step.batches)} micro-batches, {work / 1e12:.3g} · 10¹² operations ({parts})."
    )


def planned(settings: RunConfig, found: plan.Sizes, data: plan.Data, gpu: str, seconds: float, most: int) -> str:
    """What `qformer plan` says of such steps, and how far off it is."""
    made = plan.reckon(settings, found, data.steps, peaks.on(gpu, settings))
    tensors = made.bytes - memory.CONTEXT
    slower, larger = f"{made.step / seconds - 1:+.0%}", f" ({tensors / most - 1:+.0%})" if most > 0 else ""
    return (
        f"`qformer plan` on {gpu} ({peaks.gpu(gpu).source}): {made.step:.3g} s a step ({slower}), "
        f"{settings.train.batch_size / made.step:.3g} samples/s, {gigabytes(tensors)} of tensors{larger}."
    )


def rates(samples: int, seconds: Sequence[float]) -> str:
    """Samples a second: the median and the range."""
    middle, least, most = (samples / each for each in (statistics.median(seconds), max(seconds), min(seconds)))
    return f"**{middle:.3g}** ({least:.3g}–{most:.3g})"


def share(work: float, seconds: Sequence[float], top: float | None) -> str:
    """Of the peak, where it is known."""
    return f"{work / statistics.median(seconds) / top:.0%}" if top else NOTHING


def gigabytes(amount: float) -> str:
    """Where it was counted."""
    return f"{amount / 1e9:.3g} GB" if amount > 0 else NOTHING


def rows_in(part: Part) -> int:
    """How many rows a part has."""
    return len(part[0]["input_ids"])


def main() -> None:
    """Print the tables in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="*", choices=list(GOALS), default=list(GOALS))
    parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu goes with --size tiny")
    parser.add_argument("--size", choices=("true", "tiny"), default="true")
    parser.add_argument("--gpu", choices=list(peaks.known().gpus), help="what the device is, if its name does not tell")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="changes to the configs")
    options = parser.parse_args()
    if options.device == "cpu" and options.size != "tiny":
        parser.error("--device cpu goes with --size tiny: models of true size would take hours on it")
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("not measured: no GPU (--device cpu --size tiny runs the same code with models that are no work)")
    device = torch.device("cpu") if options.device == "cpu" else torch.device("cuda", 0)
    if device.type == "cuda":
        options.gpu = options.gpu or known_gpu(torch.cuda.get_device_name(device))
    print(machine(device, options.repeats))
    for name in options.configs:
        with tempfile.TemporaryDirectory() as folder:
            settings = settings_of(name, options.size, Path(folder), options.set)
            for line in table(settings, options, device):
                print(line, flush=True)
        print()
        release(device)


if __name__ == "__main__":
    main()
