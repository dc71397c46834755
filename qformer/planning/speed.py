"""How fast the parts run: on a known GPU by a share of its peak and what launching takes, here by timing single blocks.

Blocks are made with random weights at their true width; nothing is read from disk.
"""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from qformer import config
from qformer.backbones.stacks import blocks_of
from qformer.config import RunConfig, TrainConfig
from qformer.errors import ConfigError, lookup
from qformer.nn.losses import token_log_likelihood
from qformer.nn.qformer import QFormer, QFormerConnector, QFormerSize
from qformer.nn.tokens import Tokens
from qformer.planning.shapes import MicroBatch
from qformer.planning.trace import computing, cut, faked, materialised, run_language
from qformer.planning.work import EncoderWork, LLMWork, former_step
from qformer.train.optim import optimizer_for

PARTS = ("encoder", "adapter", "language", "head")
ADAM_BYTES = 28
"""AdamW reads a weight, its gradient and two averages, and writes all but the gradient."""
CHAIN, REPEATS = 4, 7
ENOUGH_SECONDS = 4.0
"""A part's repeats end when they have taken so long."""
MOST_WORK = {"cpu": 1.5e11, "cuda": 2e13}
"""Operations of one timing at most; larger micro-batches are timed by a part of their rows."""
MALLOC = {-1: 2**31 - 1, -3: 1 << 25}
"""M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h, the latter at the most that it comes to by itself."""
MOST_WEIGHTS = 1 << 30
"""Bytes of blocks that are made for one timing, beyond the first."""


@dataclass(frozen=True)
class GPU:
    """A GPU of `configs/planning/gpus.yaml`."""

    memory: float = 0.0
    bandwidth: float = 0.0
    bfloat16: float | None = None
    float16: float | None = None
    float32: float | None = None
    source: str = ""


@dataclass(frozen=True)
class GPUs:
    """The known GPUs, the share of its peak that each part is taken to reach, as it is written and compiled, and the
    seconds that launching one of its operations takes.
    """

    gpus: dict[str, GPU] = field(default_factory=dict)
    efficiency: dict[str, float] = field(default_factory=dict)
    compiled: dict[str, float] = field(default_factory=dict)
    launch: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Speed:
    """Floating-point operations a second by part, seconds that AdamW and clipping take for a parameter, and seconds
    that whatever a part launches takes at least, however little it has to do.
    """

    rates: dict[str, float]
    optimizer: float
    launch: dict[str, float] = field(default_factory=dict)

    def seconds(self, work: dict[str, float], launches: dict[str, float]) -> dict[str, float]:
        """Of a micro-batch, by part, each with so many operations launched."""
        least = {part: each * launches.get(part, 0.0) for part, each in self.launch.items()}
        return {part: max(amount / self.rates[part], least.get(part, 0.0)) for part, amount in work.items() if amount}


@cache
def known() -> GPUs:
    """The GPUs shipped here."""
    return config.shipped(GPUs, "configs/planning", "gpus", "list of GPUs")


def gpu(name: str) -> GPU:
    """A known GPU.

    Raises:
        ConfigError: no such GPU is known.
    """
    return lookup(known().gpus, name, "GPU")


def computes_in(settings: RunConfig) -> dict[str, str]:
    """The type of number that each part's products are made in."""
    own = {"encoder": settings.vision.dtype, "adapter": "float32", "language": settings.language.dtype}
    own["head"] = own["language"]
    return {part: "bfloat16" if autocast_of(settings, dtype) else dtype for part, dtype in own.items()}


def autocast_of(settings: RunConfig, dtype: str = "float32") -> torch.dtype | None:
    """What products with weights of this type are cast to, as `precision.in_own` has it; None: to nothing."""
    cast = settings.train.precision == "bfloat16" and dtype == "float32"
    return torch.bfloat16 if cast else None


def on(name: str, settings: RunConfig, efficiency: float | None = None) -> Speed:
    """The speed of a known GPU under these settings.

    Raises:
        ConfigError: no such GPU, or one without a number type that is asked for; a share out of range.
    """
    if efficiency is not None and not 0 < efficiency <= 1:
        raise ConfigError(f"plan: --efficiency is {efficiency:g}; it is a share of the peak, above 0 and at most 1.")
    found, rates = gpu(name), {}
    shares = shares_of(settings, efficiency)
    for part, dtype in computes_in(settings).items():
        top = getattr(found, dtype, None)
        if top is None:
            have = ", ".join(each for each in ("bfloat16", "float16", "float32") if getattr(found, each))
            raise ConfigError(
                f"plan: the settings have the {part} computed in {dtype}, for which '{name}' is not known to have a "
                f"peak; it has {have}. Change train.precision, vision.dtype and language.dtype, or name another GPU."
            )
        rates[part] = top * 1e12 * shares[part]
    launch = {} if efficiency or settings.train.compile else known().launch
    return Speed(rates, ADAM_BYTES / (found.bandwidth * 1e9), launch)


def shares_of(settings: RunConfig, efficiency: float | None = None) -> dict[str, float]:
    """Of a GPU's peak that each part is taken to reach."""
    if efficiency is not None:
        return dict.fromkeys(PARTS, efficiency)
    return known().compiled if settings.train.compile else known().efficiency


# -- here -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stopwatch:
    """Medians of what work takes on a device."""

    device: torch.device
    clock: Callable[[], float] = time.perf_counter
    autocast: torch.dtype | None = None

    def seconds(self, work: Callable[[], Any]) -> float:
        """Of one call: the median of several, after one that is not counted; a single one where it takes long."""
        first = self._once(work)
        if first > ENOUGH_SECONDS:
            return first
        taken: list[float] = []
        while len(taken) < REPEATS and (len(taken) < 3 or sum(taken) < ENOUGH_SECONDS):
            taken.append(self._once(work))
        return statistics.median(taken)

    @property
    def most(self) -> float:
        """Operations of one timing at most."""
        return MOST_WORK.get(self.device.type, MOST_WORK["cuda"])

    def _once(self, work: Callable[[], Any]) -> float:
        self._wait()
        began = self.clock()
        with computing(self.device.type, self.autocast):
            work()
        self._wait()
        return self.clock() - began

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def here(
    settings: RunConfig,
    micro: MicroBatch,
    tower: Any,
    encoder: EncoderWork,
    model: Any,
    work: LLMWork,
    size: QFormerSize,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> Speed:
    """The speed of this machine at a usual micro-batch; towers are on the meta device and stay there."""
    if device.type == "cpu":
        _keep_what_is_freed()
    watch = Stopwatch(device, clock, autocast_of(settings))
    seeing, reading = (
        dataclasses.replace(watch, autocast=autocast_of(settings, each.dtype))
        for each in (settings.vision, settings.language)
    )
    rates = {
        "encoder": _encoder_rate(tower, encoder, micro, seeing),
        "language": _language_rate(model, work, micro, reading),
        "head": _head_rate(model, work, micro, reading),
    }
    rates["adapter"], optimizer = _adapter(settings.train, size, work.width, encoder.tokens, micro, watch)
    return Speed(rates, optimizer)


def _keep_what_is_freed() -> None:
    """Have this process keep memory for its next tensors, where its allocator is glibc's.

    A run comes to that by itself, since something of it lies behind whatever is freed; a part that is timed alone would
    give all back and be charged for each page anew, a seventh of its time.
    """
    if sys.platform == "linux":
        set_option: Any = getattr(ctypes.CDLL(None), "mallopt", None)
        for option, value in MALLOC.items() if set_option else ():
            set_option(option, value)


def _encoder_rate(tower: Any, work: EncoderWork, micro: MicroBatch, watch: Stopwatch) -> float:
    """Of its blocks, or of the whole encoder where it has no list of alike ones."""
    pictures = max(1, min(micro.pictures, int(watch.most / work.picture)))
    side = tower.settings.size
    run = lambda: tower(torch.zeros(pictures, 3, side, side, device="meta"))  # noqa: E731
    found = blocks_of(tower)
    with torch.no_grad():
        if len(found) != 1:
            with materialised(tower, watch.device):
                _draw(tower)
                pixels = torch.randn(pictures, 3, side, side, device=watch.device)
                return work.picture * pictures / watch.seconds(lambda: tower(pixels))
        [(given, block)] = _captured(run, [found[0][1][-1]])
        with FlopCounterMode(display=False) as counter:
            block(*given[0], **given[1])
        chain = [_real(block, watch.device) for _ in range(_copies(block, len(found[0][1])))]
        [args, kwargs] = _filled(given, watch.device)

        def through() -> None:
            for each in chain:
                each(*args, **kwargs)

        return counter.get_total_flops() * len(chain) / watch.seconds(through)


def _language_rate(model: Any, work: LLMWork, micro: MicroBatch, watch: Stopwatch) -> float:
    """Of its blocks, forward and backward, at as many rows as can be timed."""
    fewer = _fewer(micro, watch.most * work.decoder.layers / work.step(micro))
    stacks = blocks_of(model)
    depths = [min(2, len(blocks)) for _, blocks in stacks]
    seconds = 0.0
    with cut(model, stacks, depths), faked(model):
        lasts = [blocks[depth - 1] for (_, blocks), depth in zip(stacks, depths, strict=True)]
        found = _captured(lambda: forward(model, fewer), lasts)
    for (given, block), (_, blocks) in zip(found, stacks, strict=True):
        chain = [_real(block, watch.device) for _ in range(_copies(block, len(blocks)))]
        args, kwargs = _filled(given, watch.device, like=work.width)
        seconds += len(blocks) * watch.seconds(partial(_there_and_back, chain, args, kwargs)) / len(chain)
    return work.step(fewer) / seconds


def _there_and_back(chain: Sequence[nn.Module], args: Any, kwargs: Any) -> None:
    """Through blocks one behind the other and back, each time with graphs and gradients of its own."""
    hidden = kwargs.get("hidden_states", args[0] if args else None)
    x = hidden
    for each in chain:
        if args:
            made = each(x, *args[1:], **kwargs)
        else:
            made = each(**{**kwargs, "hidden_states": x})
        x = made if isinstance(made, Tensor) else made[0]
    x.backward(torch.ones_like(x))
    hidden.grad = None


def _head_rate(model: Any, work: LLMWork, micro: MicroBatch, watch: Stopwatch) -> float:
    """Of the head and the loss behind it."""
    weight = model.get_output_embeddings().weight
    positions = micro.trained if work.encoder is None else micro.written * micro.length
    positions = max(1, min(positions, int(watch.most / (4 * weight.numel()))))
    head = _random(torch.empty(weight.shape, dtype=weight.dtype, device=watch.device))
    hidden = _random(torch.empty(positions, weight.shape[1], dtype=weight.dtype, device=watch.device))
    hidden.requires_grad_()
    targets = torch.zeros(positions, dtype=torch.long, device=watch.device)

    def score() -> None:
        token_log_likelihood(nn.functional.linear(hidden, head), targets).sum().backward()
        hidden.grad = None

    return 4 * positions * weight.numel() / watch.seconds(score)


def _adapter(
    train: TrainConfig, size: QFormerSize, width: int, tokens: int, micro: MicroBatch, watch: Stopwatch
) -> tuple[float, float]:
    """The rate of a shallow Q-Former of the true width, and AdamW's seconds for a parameter of it."""
    layers = min(size.layers, 2 * size.cross_attention_every)
    shallow = dataclasses.replace(size, layers=layers, vocabulary=min(size.vocabulary, 1000))
    share = max(1 / micro.reads, min(1.0, watch.most / former_step(shallow, width, tokens, micro)))
    fewer = dataclasses.replace(
        micro, reads=max(1, int(micro.reads * share)), pictures=max(1, int(micro.pictures * share))
    )
    connector = QFormerConnector(QFormer(shallow), width).to(watch.device)
    values = torch.randn(fewer.pictures, tokens, size.vision_width, device=watch.device)
    pictures = None
    if fewer.reads != fewer.pictures:
        pictures = torch.arange(fewer.reads, device=watch.device) % fewer.pictures
    instruction = None
    if size.instruction and fewer.instruction:
        ids = torch.zeros(fewer.reads, fewer.instruction, dtype=torch.long, device=watch.device)
        instruction = ids, torch.ones_like(ids, dtype=torch.bool)
    parameters = {name: each for name, each in connector.named_parameters() if each.requires_grad}

    def learn() -> None:
        soft = connector(Tokens(values, pictures=pictures), instruction)
        soft.backward(torch.ones_like(soft))
        for each in parameters.values():
            each.grad = None

    rate = former_step(shallow, width, tokens, fewer) / watch.seconds(learn)
    for each in parameters.values():
        each.grad = torch.full_like(each, 1e-3)
    optimizer = optimizer_for(parameters, train)

    def update() -> None:
        nn.utils.clip_grad_norm_(parameters.values(), math.inf)
        optimizer.step()

    return rate, watch.seconds(update) / sum(each.numel() for each in parameters.values())


def forward(model: Any, micro: MicroBatch) -> None:
    """An LLM through its blocks, with tensors such as a micro-batch gives it."""
    table = model.get_input_embeddings().weight
    run_language(model, torch.empty(micro.rows, micro.span, table.shape[1], dtype=table.dtype), micro)


def _fewer(micro: MicroBatch, share: float) -> MicroBatch:
    """A micro-batch of a share of its rows, at least one."""
    share = min(1.0, share)
    return dataclasses.replace(
        micro, rows=max(1, int(micro.rows * share)), written=max(1, int(micro.written * share)) if micro.written else 0
    )


def _captured(run: Callable[[], Any], blocks: Sequence[nn.Module]) -> list[tuple[Any, nn.Module]]:
    """What blocks are called with, each with its block."""
    found: list[Any] = []
    hooks = [
        block.register_forward_pre_hook(lambda module, args, kwargs: found.append((args, kwargs)), with_kwargs=True)
        for block in blocks
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return list(zip(found, blocks, strict=True))


def _filled(given: Any, device: torch.device, like: int | None = None) -> Any:
    """Arguments like those on the meta device, with numbers; rows that are `like` wide take gradients."""

    def fill(each: Any) -> Any:
        if not isinstance(each, Tensor):
            return each
        made = _random(torch.empty(each.shape, dtype=each.dtype, device=device))
        return made.requires_grad_(like is not None and made.ndim == 3 and made.shape[-1] == like)

    args, kwargs = tree_map(fill, given)
    return [args, kwargs]


def _random(tensor: Tensor) -> Tensor:
    if tensor.is_floating_point():
        return tensor.normal_(0.0, 0.02)
    return tensor.fill_(1)


def _real(module: nn.Module, device: torch.device) -> nn.Module:
    """A copy of a module on the meta device, with small random numbers."""
    made = copy.deepcopy(module).to_empty(device=device)
    _draw(made)
    return made


@torch.no_grad()
def _draw(module: nn.Module) -> None:
    for each in (*module.parameters(), *module.buffers()):
        _random(each)


def _copies(block: nn.Module, layers: int) -> int:
    """How many blocks are timed one behind the other: some, so that weights and activations do not stay in a cache."""
    each = sum(parameter.nbytes for parameter in block.parameters())
    if next(block.parameters()).dtype == torch.float16:
        return 1  # which takes a CPU a hundred times as long
    return max(1, min(CHAIN, layers, MOST_WEIGHTS // max(1, each)))
