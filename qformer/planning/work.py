"""What a step computes, in floating point operations: a multiplication and an addition are two.

Every matrix product counts, and nothing else, as `torch.utils.flop_counter` has it.  D Q-Former width, V encoder width,
L LLM width, Q queries, T instruction ids, P tokens of a picture, S positions of a tensor row.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from qformer.nn.qformer import QFormerSize
from qformer.planning.shapes import MicroBatch

OF_SOURCE = re.compile(r"(EncDecAttention|encoder_attn|cross_attn|crossattention)\.(k|v|k_proj|v_proj|key|value)$")
"""Layers of a decoder that are applied to what the encoder made."""


@dataclass(frozen=True)
class Stack:
    """Alike blocks one behind the other.

    weights: of matrices applied to each of its own positions, in all layers together; source: of those applied to each
    position of the encoder; attention: heads times the width of each.
    """

    layers: int
    weights: int
    attention: int
    source: int = 0

    def forward(self, rows: int, span: int, source: int = 0) -> float:
        """Rows of `span` positions through it, which also look at `source` positions of an encoder each."""
        linear = 2 * rows * (self.weights * span + self.source * source)
        return linear + 4 * rows * self.layers * self.attention * span * (span + source)


@dataclass(frozen=True)
class LLMWork:
    """The sizes of an LLM that its work follows from; `encoder`: of an encoder–decoder."""

    width: int
    vocabulary: int
    decoder: Stack
    encoder: Stack | None = None

    def forward(self, micro: MicroBatch) -> float:
        """Its blocks, without the head."""
        if self.encoder is None:
            return self.decoder.forward(micro.rows, micro.span)
        read = self.encoder.forward(micro.rows, micro.span)
        return read + self.decoder.forward(micro.written, micro.length, micro.span)

    def step(self, micro: MicroBatch, checkpointing: bool = False) -> float:
        """Forward and backward through frozen blocks: activations alone take gradients; once more if recomputed."""
        return (3 if checkpointing else 2) * self.forward(micro) + self._more(micro)

    def _more(self, micro: MicroBatch) -> float:
        """Attention multiplies two activations, so that its backward pass is twice its forward pass."""
        attention = 4 * micro.rows * micro.span**2
        if self.encoder is None:
            return attention * self.decoder.layers * self.decoder.attention
        decoder = 4 * micro.written * micro.length * (micro.length + micro.span)
        return (
            attention * self.encoder.layers * self.encoder.attention
            + decoder * self.decoder.layers * self.decoder.attention
        )

    def head(self, micro: MicroBatch, parts: bool = False) -> float:
        """Forward and backward through the frozen head, at trained positions; of an encoder–decoder at all written.

        `parts`: whether its logits are written in parts, and once more in the backward pass.
        """
        positions = micro.trained if self.encoder is None else micro.written * micro.length
        return (3 if parts else 2) * 2 * positions * self.width * self.vocabulary


def language_work(model: Any) -> LLMWork:
    """An LLM's sizes, read off its layers; its weights may be on the meta device."""
    config = model.config.get_text_config()
    head, table = model.get_output_embeddings(), model.get_input_embeddings().weight
    vocabulary, width = int(head.weight.shape[0]), int(table.shape[1])
    heads = config.num_attention_heads
    each = getattr(config, "d_kv", None) or getattr(config, "head_dim", None) or config.hidden_size // heads
    if not model.config.is_encoder_decoder:
        return LLMWork(width, vocabulary, _stack(model.base_model, heads * each, config.num_hidden_layers, head))
    encoder, decoder = model.get_encoder(), model.get_decoder()
    read = _stack(encoder, heads * each, config.num_hidden_layers, head)
    layers = getattr(config, "num_decoder_layers", None) or getattr(config, "decoder_layers", config.num_hidden_layers)
    return LLMWork(width, vocabulary, _stack(decoder, heads * each, layers, head), read)


def _stack(module: nn.Module, attention: int, layers: int, head: nn.Module) -> Stack:
    own = source = 0
    for name, each in module.named_modules():
        if each is head or not (isinstance(each, nn.Linear) or type(each).__name__ == "Conv1D"):
            continue
        if OF_SOURCE.search(name):
            source += each.weight.numel()
        else:
            own += each.weight.numel()
    return Stack(int(layers), own, attention, source)


# -- the Q-Former -----------------------------------------------------------------------------------------------------


def former_forward(size: QFormerSize, language_width: int, tokens: int, micro: MicroBatch) -> float:
    """Keys and values of each picture once, then queries and instructions of every read, and the projection.

    The last block's text half is not computed: there queries alone ask, of queries and text.
    """
    width, text = size.hidden, micro.instruction if size.instruction else 0
    span, queries = size.queries + text, size.queries
    looks = -(-size.layers // size.cross_attention_every)
    whole = 8 * width**2 * span + 4 * width * span**2 + 4 * width * size.intermediate * span
    last = 4 * width**2 * (span + queries) + 4 * width * queries * span + 4 * width * size.intermediate * queries
    look = 4 * width**2 * queries + 4 * width * queries * tokens
    read = (size.layers - 1) * whole + last + looks * look + 2 * width * language_width * queries
    return micro.reads * read + micro.pictures * looks * 4 * size.vision_width * width * tokens


def former_step(size: QFormerSize, language_width: int, tokens: int, micro: MicroBatch) -> float:
    """Forward, and a backward pass with gradients of activations and weights, which is twice as much."""
    return 3 * former_forward(size, language_width, tokens, micro)


# -- the encoder ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EncoderWork:
    """Of an encoder: its tokens a picture, their width, and the operations of a picture."""

    tokens: int
    width: int
    picture: float


def encoder_work(tower: Any) -> EncoderWork:
    """One picture through an encoder on the meta device, where nothing is computed and everything counted."""
    size = tower.settings.size
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        values = tower(torch.zeros(1, 3, size, size, device="meta")).values
    return EncoderWork(int(values.shape[1]), int(values.shape[2]), float(counter.get_total_flops()))
