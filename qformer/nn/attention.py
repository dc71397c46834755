"""Multi-head attention as in BERT: projections with biases, dropout on the probabilities, residual, norm behind it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qformer.devices import sent
from qformer.nn.tokens import Tokens

NORM_EPS = 1e-12
"""BERT's epsilon in every LayerNorm."""


class Places(NamedTuple):
    """Where the queries and words of N reads stand: in line, one below the other without padding, or in rows.

    In line are first the N · Q queries, read by read, then all real words, M of them; in rows (N, Q + T) each read's
    queries stand before its words, which are padded on the right.
    """

    reads: int
    queries: int
    words: int = 0
    """T: of the longest instruction."""
    mask: Tensor | None = None
    """(N, Q + T) bool, True where a query or a real word stands; None: everywhere."""
    real: Tensor | None = None
    """(M,) the real words' numbers among the N · T; None: all are real."""

    @classmethod
    def of(cls, reads: int, queries: int, instruction: tuple[Tensor, Tensor | None] | None) -> Places:
        """From the ids (N, T) of the words and their mask, True where real; no mask: all are.

        Of a mask in the machine's memory the real words are found without waiting for the ids' device.
        """
        if instruction is None:
            return cls(reads, queries)
        (ids, words), longest = instruction, instruction[0].shape[1]
        if words is None:
            return cls(reads, queries, longest)
        real = words.flatten().nonzero().squeeze(1)
        if len(real) == ids.numel():
            return cls(reads, queries, longest)
        mask = torch.cat([words.new_ones(reads, queries, dtype=torch.bool), words.bool()], dim=1)
        return cls(reads, queries, longest, sent(mask, ids.device), sent(real, ids.device))

    @property
    def seen(self) -> int:
        """N · Q: how many stand in line before the words."""
        return self.reads * self.queries

    def apart(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(N · Q + M, D) -> queries (N · Q, D), words (M, D); two slices would make two gradients to be added."""
        queries, words = x.split([self.seen, len(x) - self.seen])
        return queries, words

    def real_words(self, words: Tensor) -> Tensor:
        """(N, T, D) -> (M, D)."""
        return words.flatten(0, 1) if self.real is None else words.flatten(0, 1).index_select(0, self.real)

    def in_rows(self, x: Tensor) -> Tensor:
        """(N · Q + M, D) -> (N, Q + T, D), zeros where nothing stands."""
        if not self.words:
            return x.unflatten(0, (self.reads, -1))
        queries, words = self.apart(x)
        queries = queries.unflatten(0, (self.reads, -1))
        if self.real is not None:
            words = words.new_zeros(self.reads * self.words, x.shape[1]).index_copy(0, self.real, words)
        return torch.cat([queries, words.unflatten(0, (self.reads, -1))], dim=1)

    def in_line(self, x: Tensor) -> Tensor:
        """(N, Q + T, D) -> (N · Q + M, D)."""
        if not self.words:
            return x.flatten(0, 1)
        queries, words = x.split([self.queries, self.words], dim=1)
        return torch.cat([queries.flatten(0, 1), self.real_words(words)])


class Attention(nn.Module):
    """LN(x + dropout(W_o · attention(x, source))); D is the width of x, S that of the source."""

    def __init__(self, width: int, source_width: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(source_width, width)
        self.value = nn.Linear(source_width, width)
        self.output = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.dropout = nn.Dropout(dropout)

    def _context(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Projected rows (B, N, D) and (B, M, D), mask (B, M) bool or None -> (B, N, D), before the output layer."""
        context = F.scaled_dot_product_attention(
            self._split(query),
            self._split(key),
            self._split(value),
            attn_mask=None if mask is None else mask[:, None, None, :],
            dropout_p=self.dropout.p if self.training else 0.0,
        )
        return context.transpose(1, 2).flatten(2)

    def _closed(self, x: Tensor, context: Tensor) -> Tensor:
        """Output layer, residual and norm."""
        return self.norm(x + self.dropout(self.output(context)))

    def probabilities(self, x: Tensor, source: Tensor, mask: Tensor | None) -> Tensor:
        """What the source is weighed with, without dropout, for monitors: (B, heads, N, M) in float32 at least."""
        query, key = self._split(self.query(x)), self._split(self.key(source))
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None, :], float("-inf"))
        return scores.softmax(-1)

    def _split(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, heads, N, D / heads)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class SelfAttention(Attention):
    """Attention of each read's queries and words to one another."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__(width, width, heads, dropout)

    def forward(self, x: Tensor, places: Places, *, queries_only: bool = False) -> Tensor:
        """In line x (N · Q + M, D), queries first, then the M real words -> the same, or queries alone (N · Q, D).

        Projections and norm see no padding; keys, values and queries are laid out in rows for the product alone.
        """
        asking = x[: places.seen] if queries_only else x
        query = self.query(asking)
        context = self._context(
            query.unflatten(0, (places.reads, -1)) if queries_only else places.in_rows(query),
            places.in_rows(self.key(x)),
            places.in_rows(self.value(x)),
            places.mask,
        )
        return self._closed(asking, context.flatten(0, 1) if queries_only else places.in_line(context))


class CrossAttention(Attention):
    """Attention of a sequence to an encoder's tokens."""

    def forward(self, x: Tensor, tokens: Tokens) -> Tensor:
        """Rows x (N, Q, D), tokens (B, P, V) of N reads -> (N, Q, D).

        Keys and values of a picture are computed once for all reads that look at it.
        """
        key, value, mask = self.key(tokens.values), self.value(tokens.values), tokens.mask
        if tokens.pictures is not None:
            key, value = key.index_select(0, tokens.pictures), value.index_select(0, tokens.pictures)
            mask = None if mask is None else mask.index_select(0, tokens.pictures)
        return self._closed(x, self._context(self.query(x), key, value, mask))
