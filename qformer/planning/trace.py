"""What a forward and a backward pass hold in memory, and how many operations a GPU would launch for them, found by
running the real modules on tensors that hold nothing.

torch's fake tensors have shapes and types and no contents; how long each would live is what is counted.  Towers are
taken at a few blocks, and what a block adds is multiplied.
"""

from __future__ import annotations

import dataclasses
import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.modeling_outputs import BaseModelOutput

from qformer.backbones import fused, ranking
from qformer.backbones.stacks import blocks_of
from qformer.nn.losses import token_log_likelihood
from qformer.nn.qformer import QFormer, QFormerConnector, QFormerSize
from qformer.nn.tokens import Tokens
from qformer.planning.shapes import MicroBatch

NOTHING_TO_DO = frozenset({"prim::device", "aten::_unsafe_view", "aten::empty", "aten::empty_like", "aten::new_empty"})
"""Operations that compute nothing, beside views."""


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that are made inside and alive, and the most there ever were; operations that compute."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.launched = 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for each in tree_leaves((args, kwargs)):  # what was there before is none of ours, whatever views are made of it
            if isinstance(each, Tensor):
                self._note(each, 0)
        made = func(*args, **(kwargs or {}))
        self.launched += not (func.is_view or func.name().partition(".")[0] in NOTHING_TO_DO)
        for each in tree_leaves(made):
            if isinstance(each, Tensor):
                self._note(each, each.untyped_storage().nbytes())
        return made

    def _note(self, tensor: Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._known:
            return
        self._known[key] = weakref.finalize(storage, self._freed, key, size)
        self.live += size
        self.peak = max(self.peak, self.live)

    def _freed(self, key: int, size: int) -> None:
        del self._known[key]
        self.live -= size

    def highest(self, work: Callable[[], Any]) -> tuple[Any, int]:
        """What work gives, and the most bytes that were alive meanwhile."""
        self.peak = self.live
        made = work()
        return made, self.peak


@dataclass(frozen=True)
class Held:
    """Bytes of a part: kept for its backward pass; at the most in its forward pass; at the most in its backward.  And
    operations that are launched one by one, in both passes and in the forward pass alone.
    """

    kept: float
    forward: float = 0
    backward: float = 0
    launches: float = 0
    forward_launches: float = 0

    def __add__(self, other: Held) -> Held:
        return Held(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(self)))

    def times(self, number: float) -> Held:
        """So many times as much."""
        return Held(*(number * getattr(self, each.name) for each in fields(self)))


@contextmanager
def _counting(autocast: torch.dtype | None) -> Iterator[LiveBytes]:
    """Counts from here on, in the precision of a run; fake tensors are made before, within the same mode."""
    with computing("cpu", autocast), LiveBytes() as live:
        yield live


def computing(device: str, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """Products in this type of number, or in that of the weights."""
    return nullcontext() if dtype is None else torch.autocast(device, dtype)


@contextmanager
def faked(module: nn.Module) -> Iterator[None]:
    """A module on the meta device as if it were on the CPU, for a while."""
    with FakeTensorMode(allow_non_fake_inputs=True), materialised(module, torch.device("cpu")):
        yield


def encoder_held(tower: Any, micro: MicroBatch, autocast: torch.dtype | None = None) -> Held:
    """What an encoder, on the meta device, holds while it makes its tokens; no gradient is kept."""
    with faked(tower), torch.no_grad(), _counting(autocast) as live:
        pixels = torch.empty(micro.pictures, 3, tower.settings.size, tower.settings.size)
        _, most = live.highest(lambda: tower(pixels).values)
    return Held(0, most)


def former_held(
    size: QFormerSize, language_width: int, tokens: int, micro: MicroBatch, autocast: torch.dtype | None = None
) -> Held:
    """The adapter's activations, its inputs among them.

    Traced at the blocks between two looks at the picture, and at twice as many.
    """
    unit = size.cross_attention_every
    if size.layers <= 2 * unit:
        return _former_once(size, language_width, tokens, micro, autocast)
    few, more = (
        _former_once(dataclasses.replace(size, layers=layers), language_width, tokens, micro, autocast)
        for layers in (unit, 2 * unit)
    )
    return few + (more + few.times(-1)).times(size.layers / unit - 1)


def _former_once(
    size: QFormerSize, language_width: int, tokens: int, micro: MicroBatch, autocast: torch.dtype | None
) -> Held:
    with FakeTensorMode():
        connector = QFormerConnector(QFormer(size), language_width)
        with _counting(autocast) as live:
            values = torch.empty(micro.pictures, tokens, size.vision_width)
            pictures = torch.zeros(micro.reads, dtype=torch.long) if micro.reads != micro.pictures else None
            instruction = None
            if size.instruction and micro.instruction:
                ids = torch.zeros(micro.reads, micro.instruction, dtype=torch.long)
                instruction = ids, None
            soft, forward = live.highest(lambda: connector(Tokens(values, pictures=pictures), instruction))
            kept = live.live
            soft.sum().backward()
            del soft
    return Held(kept, forward, launches=live.launched)


@dataclass(frozen=True)
class LanguageHeld:
    """Activations of a frozen LLM: what does not depend on its depth, what each block of a stack adds, and the head.

    `backward` of the head is the most that is held when the backward pass begins, beyond what the blocks keep.
    """

    base: Held
    blocks: tuple[tuple[int, Held], ...]
    head: Held

    @property
    def kept(self) -> float:
        """All that the blocks keep for the backward pass."""
        return self.base.kept + sum(number * each.kept for number, each in self.blocks)

    def launches(self, again: bool) -> float:
        """All operations of blocks and head in both passes; `again`: those of the blocks' forward pass once more."""
        blocks = sum(number * (each.launches + again * each.forward_launches) for number, each in self.blocks)
        return self.base.launches + blocks

    def recomputed(self, boundary: float) -> float:
        """The same where each block keeps its inputs alone (`boundary` bytes) and is computed again, one at a time."""
        most = max((each.kept for _, each in self.blocks), default=0)
        return self.base.kept + boundary * sum(number for number, _ in self.blocks) + most


class _OneKernel(torch.autograd.Function):
    """An RMS norm as a GPU has it: it keeps its inputs and a number a row, where a CPU keeps what stands between."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0].clone(), None, None


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """A while in which the norms of `qformer.backbones.fused` are one kernel each; fake tensors are the CPU's."""
    before = fused.rms_norm
    fused.rms_norm = _OneKernel.apply
    try:
        yield
    finally:
        fused.rms_norm = before


def language_held(model: Any, micro: MicroBatch, queries: int, autocast: torch.dtype | None = None) -> LanguageHeld:
    """Activations of a frozen LLM on the meta device, and of the loss behind it."""
    stacks = blocks_of(model)
    least = [1] * len(stacks)

    def at(depths: Sequence[int]) -> tuple[Held, Held]:
        with cut(model, stacks, depths), faked(model):
            return _language_once(model, micro, queries, autocast)

    shallowest, head = at(least)
    base = shallowest
    blocks: list[tuple[int, Held]] = []
    for number, (_, stack) in enumerate(stacks):
        if len(stack) == 1:  # cannot be told from what is around it
            continue
        deeper, _ = at([depth + (place == number) for place, depth in enumerate(least)])
        block = deeper + shallowest.times(-1)
        base = base + block.times(-1)
        blocks.append((len(stack), block))
    return LanguageHeld(base, tuple(blocks), head)


@contextmanager
def cut(model: nn.Module, stacks: Sequence[tuple[str, Any]], depths: Sequence[int]) -> Iterator[None]:
    """A model with so many blocks of each stack, for a while."""
    for (name, blocks), depth in zip(stacks, depths, strict=True):
        _put(model, name, blocks[:depth])
    try:
        yield
    finally:
        for name, blocks in stacks:
            _put(model, name, blocks)


@contextmanager
def materialised(module: nn.Module, device: torch.device) -> Iterator[None]:
    """A module on the meta device with tensors on another in the place of its own, for a while; shared ones stay so."""

    def new(old: Tensor) -> Tensor:
        return torch.empty(old.shape, dtype=old.dtype, device=device)

    made: dict[int, nn.Parameter] = {}
    before = [(each, dict(each._parameters), dict(each._buffers)) for each in module.modules()]
    for each, parameters, buffers in before:
        for name, old in parameters.items():
            if old is not None and id(old) not in made:
                made[id(old)] = nn.Parameter(new(old), requires_grad=old.requires_grad)
            each._parameters[name] = None if old is None else made[id(old)]
        each._buffers.update({name: None if kept is None else new(kept) for name, kept in buffers.items()})
    try:
        yield
    finally:
        for each, parameters, buffers in before:
            each._parameters.update(parameters)
            each._buffers.update(buffers)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)


def _language_once(model: Any, micro: MicroBatch, queries: int, autocast: torch.dtype | None) -> tuple[Held, Held]:
    width, dtype = model.get_input_embeddings().weight.shape[1], model.get_input_embeddings().weight.dtype
    with _counting(autocast) as live:
        soft = torch.empty(max(1, micro.reads) * queries, width, requires_grad=True)
        live.live = 0
        words = torch.zeros(max(1, micro.rows * micro.span - len(soft)), dtype=torch.long)
        places = torch.zeros(micro.rows, micro.span, dtype=torch.long)

        def read() -> Tensor:
            table = torch.cat([model.get_input_embeddings()(words), soft.to(dtype)])
            return run_language(model, table[places], micro)

        hidden, forward = live.highest(read)
        kept, forward_launches = live.live, live.launched

        def score() -> Tensor:
            if model.config.is_encoder_decoder:
                flat = hidden.flatten(0, 1)
                return token_log_likelihood(flat, torch.zeros(len(flat), dtype=torch.long)).sum()
            chosen = hidden.flatten(0, 1)[torch.zeros(micro.trained, dtype=torch.long)]
            most = max(1, ranking.LOGITS_AT_ONCE // model.get_output_embeddings().weight.shape[0])
            if micro.trained > most:  # written in parts, of which one is held at a time
                chosen = chosen[:most]
            logits = model.get_output_embeddings()(chosen)
            return token_log_likelihood(logits, torch.zeros(len(logits), dtype=torch.long)).sum()

        loss, scoring = live.highest(score)
        scored = live.live
        _, backward = live.highest(loss.backward)
    whole = Held(kept, forward, launches=live.launched, forward_launches=forward_launches)
    return whole, Held(scored - kept, scoring - kept, backward - kept)


def run_language(model: Any, inputs: Tensor, micro: MicroBatch) -> Tensor:
    """Inputs (B, S, L) through an LLM as its tower runs it, with a mask of the right shape and no contents.

    Of a decoder-only LLM the last hidden states; of an encoder–decoder logits, whose head stands behind all it writes.
    """
    if model.config.is_encoder_decoder:
        mask = inputs.new_ones(micro.rows, micro.span, dtype=torch.long)
        read = model.get_encoder()(inputs_embeds=inputs, attention_mask=mask).last_hidden_state
        given = {"encoder_outputs": BaseModelOutput(last_hidden_state=read), "attention_mask": mask}
        fed = mask.new_zeros(micro.written, micro.length)
        return model(**given, decoder_input_ids=fed, use_cache=False).logits
    known = inspect.signature(model.base_model.forward).parameters
    mask = inputs.new_ones(micro.rows, 1, micro.span, micro.span, dtype=torch.bool)
    given = {"inputs_embeds": inputs, "attention_mask": mask, "use_cache": False}
    given["position_ids"] = torch.zeros(micro.rows, micro.span, dtype=torch.long, device=inputs.device)
    return model.base_model(**{name: value for name, value in given.items() if name in known}).last_hidden_state
