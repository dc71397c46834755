"""The instruction-aware Q-Former: a BERT whose learned queries read a picture and an instruction.

Li et al. 2023, "BLIP-2", section 3.1; Dai et al. 2023, "InstructBLIP", section 2.3.
B pictures, N reads (rows), Q queries, T instruction ids, P image tokens, V encoder width, D Q-Former width, L language
width.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qformer.devices import sent
from qformer.errors import ConfigError
from qformer.nn.attention import NORM_EPS, CrossAttention, Places, SelfAttention
from qformer.nn.tokens import Tokens

SPREAD = 0.02
"""Standard deviation of new weights and queries, as in BERT."""


@dataclass(frozen=True)
class QFormerSize:
    """The shape of a Q-Former; the defaults are the paper's (BERT-base)."""

    vision_width: int
    hidden: int = 768
    layers: int = 12
    heads: int = 12
    intermediate: int = 3072
    vocabulary: int = 30522
    positions: int = 512
    queries: int = 32
    cross_attention_every: int = 2
    instruction: bool = True
    dropout: float = 0.1
    frames: int = 0
    """Frames of a video that are told apart by a learned embedding; 0: none is, as in the paper."""

    def __post_init__(self) -> None:
        for entry in fields(self):
            name, value = entry.name, getattr(self, entry.name)
            if name == "dropout":
                if not isinstance(value, int | float) or not 0 <= value < 1:
                    raise ConfigError(f"qformer.dropout is {value!r}; it must be a number from 0 to below 1.")
            elif name != "instruction":
                least = 0 if name in ("vocabulary", "positions", "frames") else 1
                if not isinstance(value, int):
                    raise ConfigError(f"qformer.{name} is {value!r}; it must be a whole number.")
                if value < least:
                    raise ConfigError(f"qformer.{name} is {value}; it must be at least {least}.")
        if self.hidden % self.heads:
            raise ConfigError(f"qformer.hidden ({self.hidden}) must divide evenly by qformer.heads ({self.heads}).")
        if self.frames == 1:
            raise ConfigError("qformer.frames is 1, and a single frame is told apart from nothing; set it to 0.")


class FeedForward(nn.Module):
    """LN(x + dropout(W_2 · GELU(W_1 · x))), with the exact GELU."""

    def __init__(self, width: int, intermediate: int, dropout: float):
        super().__init__()
        self.inner = nn.Linear(width, intermediate)
        self.outer = nn.Linear(intermediate, width)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.norm(x + self.dropout(self.outer(F.gelu(self.inner(x)))))


class Block(nn.Module):
    """Queries and text look at each other; the queries also at the picture; each half has its own feed-forward."""

    def __init__(self, size: QFormerSize, number: int):
        super().__init__()
        width, dropout = size.hidden, size.dropout
        self.self_attention = SelfAttention(width, size.heads, dropout)
        self.cross_attention = (
            CrossAttention(width, size.vision_width, size.heads, dropout)
            if number % size.cross_attention_every == 0
            else None
        )
        self.query_feed_forward = FeedForward(width, size.intermediate, dropout)
        self.text_feed_forward = FeedForward(width, size.intermediate, dropout) if size.instruction else None
        self.queries_only = number == size.layers - 1  # text that no later block reads cannot reach the output
        if self.queries_only and self.text_feed_forward is not None:
            self.text_feed_forward.requires_grad_(False)

    def forward(self, x: Tensor, places: Places, tokens: Tokens) -> Tensor:
        """In line x (N · Q + M, D), queries then the M real words -> the same, or (N · Q, D) from the last block."""
        x = self.self_attention(x, places, queries_only=self.queries_only)
        seen, text = places.apart(x)
        if self.cross_attention is not None:
            seen = self.cross_attention(seen.unflatten(0, (places.reads, -1)), tokens).flatten(0, 1)
        seen = self.query_feed_forward(seen)
        if self.text_feed_forward is None or len(text) == 0:
            return seen
        return torch.cat([seen, self.text_feed_forward(text)])


class QFormer(nn.Module):
    """Learned queries that read image tokens with an instruction in mind.

    The arithmetic is BERT's; queries have no position.  The text half of the last block is not computed and takes no
    gradient, but belongs to the state dict, as in published weights.  Without `size.instruction` there are neither
    word nor position embeddings nor text feed-forwards (BLIP-2's second stage).  With `size.frames`, `frame_embedding`
    holds what is added to the query outputs of a video's frames 2, 3 …; it starts at zero, so that a fresh one changes
    nothing, and the first frame is read as a picture is.
    """

    def __init__(self, size: QFormerSize, generator: torch.Generator | None = None):
        """New weights and queries are N(0, 0.02), biases zero, all drawn from `generator`."""
        super().__init__()
        self.size = size
        self.queries = nn.Parameter(torch.empty(size.queries, size.hidden))
        self.word_embeddings = nn.Embedding(size.vocabulary, size.hidden) if size.instruction else None
        self.position_embeddings = nn.Embedding(size.positions, size.hidden) if size.instruction else None
        self.frame_embedding = nn.Parameter(torch.zeros(size.frames - 1, size.hidden)) if size.frames else None
        self.norm = nn.LayerNorm(size.hidden, eps=NORM_EPS)
        self.dropout = nn.Dropout(size.dropout)
        self.blocks = nn.ModuleList(Block(size, number) for number in range(size.layers))
        self._draw(generator)

    def forward(self, tokens: Tokens, instruction: tuple[Tensor, Tensor | None] | None = None) -> Tensor:
        """Query outputs (N, Q, D) of tokens (B, P, V), an instruction each: ids (N, T), mask (N, T) or None.

        The mask is True where an id is real, None where all are.  Text is padded on the right: positions count from the
        row's first id, and nothing is computed of the padding.

        Raises:
            ConfigError: tokens of another width, an instruction that is too long, or one for a Q-Former without text.
        """
        if tokens.values.shape[-1] != self.size.vision_width:
            raise ConfigError(
                f"the image tokens are {tokens.values.shape[-1]} wide and the Q-Former was built for "
                f"{self.size.vision_width}; give it the encoder it was built for."
            )
        places = Places.of(tokens.reads, self.size.queries, instruction)
        x = self.queries.expand(tokens.reads, -1, -1).flatten(0, 1)
        if instruction is not None:
            x = torch.cat([x, places.real_words(self._embed(instruction[0]))])
        x = self.dropout(self.norm(x))
        for block in self.blocks:
            x = block(x, places, tokens)
        return x.unflatten(0, (tokens.reads, -1))

    @torch.no_grad()
    def look(self, tokens: Tokens, instruction: tuple[Tensor, Tensor | None] | None = None) -> tuple[Tensor, Tensor]:
        """For monitors: `forward`'s query outputs (B, Q, D), and `attention_entropy` meant over cross-attentions."""
        entropies: list[Tensor] = []

        def note(module: CrossAttention, inputs: tuple[Tensor, Tokens], _output: Tensor) -> None:
            x, seen = inputs[0], inputs[1].spread()
            entropies.append(attention_entropy(module.probabilities(x, seen.values, seen.mask), seen.mask))

        watched = [module for module in self.modules() if isinstance(module, CrossAttention)]
        hooks = [module.register_forward_hook(note) for module in watched]
        try:
            outputs = self(tokens, instruction)
        finally:
            for hook in hooks:
                hook.remove()
        return outputs, torch.stack(entropies).mean()

    def _embed(self, ids: Tensor) -> Tensor:
        """(B, T) -> words plus positions (B, T, D), before the norm that text and queries share."""
        if self.word_embeddings is None or self.position_embeddings is None:
            raise ConfigError(
                "an instruction was given to a Q-Former that was built without one; leave the instruction out, or "
                "build it with qformer.instruction: true."
            )
        if ids.shape[1] > self.size.positions:
            raise ConfigError(
                f"the instruction has {ids.shape[1]} ids and the Q-Former has {self.size.positions} positions; set "
                f"qformer.instruction_limit to at most {self.size.positions}."
            )
        places = torch.arange(ids.shape[1], device=ids.device)
        return self.word_embeddings(ids) + self.position_embeddings(places)

    @torch.no_grad()
    def _draw(self, generator: torch.Generator | None) -> None:
        self.queries.normal_(0.0, SPREAD, generator=generator)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                module.weight.normal_(0.0, SPREAD, generator=generator)
            if isinstance(module, nn.Linear):
                module.bias.zero_()


class QFormerConnector(nn.Module):
    """Encoder tokens to soft tokens: LayerNorm, Q-Former, linear projection.  All of it is trained and saved."""

    def __init__(
        self,
        qformer: QFormer,
        language_width: int,
        generator: torch.Generator | None = None,
        norm_eps: float = 1e-5,
    ):
        """The projection is drawn as `nn.Linear` draws it (uniform within 1/√D), from `generator`.

        `norm_eps`: of the norm behind the encoder; 1e-5 in LAVIS, 1e-6 in transformers' InstructBLIP.
        """
        super().__init__()
        width = qformer.size.hidden
        self.language_width = language_width
        self.norm = nn.LayerNorm(qformer.size.vision_width, eps=norm_eps)
        self.qformer = qformer
        self.projection = nn.Linear(width, language_width)
        with torch.no_grad():
            for parameter in self.projection.parameters():
                parameter.uniform_(-(width**-0.5), width**-0.5, generator=generator)

    @property
    def size(self) -> QFormerSize:
        """The Q-Former's shape."""
        return self.qformer.size

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""
        return self.projection.weight.dtype

    def forward(self, tokens: Tokens, instruction: tuple[Tensor, Tensor | None] | None = None) -> Tensor:
        """Tokens (B, P, V) of N reads, instruction ids and mask (N, T) or None -> soft tokens (N, Q, L)."""
        return self.projection(self.qformer(self._normed(tokens), instruction))

    def in_time(self, soft: Tensor, frames: Tensor) -> Tensor:
        """Soft tokens (N, Q, L) and each one's frame (N,), 0 of a picture -> with the frames' embedding, projected.

        Frames in the machine's memory are looked at without waiting for the soft tokens' device.

        Raises:
            ConfigError: a video of more frames than are told apart.
        """
        learned = self.qformer.frame_embedding
        if learned is None:
            return soft
        if len(frames) and int(frames.max()) > len(learned):
            raise ConfigError(
                f"a video's frame {int(frames.max()) + 1} is read, and qformer.frames is {len(learned) + 1}; have so "
                f"many looked at (options.frames in the card), or train with a larger qformer.frames."
            )
        table = torch.cat([learned.new_zeros(1, learned.shape[1]), learned])
        return soft + F.linear(table[sent(frames, table.device)], self.projection.weight)[:, None].to(soft.dtype)

    def look(self, tokens: Tokens, instruction: tuple[Tensor, Tensor | None] | None = None) -> tuple[Tensor, Tensor]:
        """For monitors: query outputs (B, Q, D) before the projection, and the mean entropy of their attention."""
        with torch.no_grad():
            return self.qformer.look(self._normed(tokens), instruction)

    def _normed(self, tokens: Tokens) -> Tokens:
        return tokens._replace(values=self.norm(tokens.values))


def query_cosine(outputs: Tensor) -> Tensor:
    """Mean cosine between the outputs (B, Q, D) of different queries of a row; 1: they say the same.  One query: 0."""
    queries = outputs.shape[1]
    if queries == 1:
        return outputs.new_zeros(())
    unit = F.normalize(outputs.to(torch.promote_types(outputs.dtype, torch.float32)), dim=-1)
    return ((unit.sum(1).square().sum(-1) - queries) / (queries * (queries - 1))).mean()


def attention_entropy(probabilities: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean entropy of attention (B, heads, Q, P) over its greatest value, log of the row's real tokens (mask (B, P)).

    1: all tokens are looked at alike; 0: one alone.  A row of a single token counts as 1.
    """
    entropy = torch.special.entr(probabilities).sum(-1).mean((1, 2))
    size = torch.full_like(entropy, probabilities.shape[-1]) if mask is None else mask.sum(-1).to(entropy)
    return torch.where(size > 1, entropy / size.clamp(min=2).log(), 1.0).mean()
