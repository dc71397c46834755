"""Multi-head attention as in BERT: projections with biases, dropout on the probabilities, residual, norm behind it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qformer.nn.tokens import Tokens

NORM_EPS = 1e-12
"""BERT's epsilon in every LayerNorm."""


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

    def attend(self, x: Tensor, source: Tensor, mask: Tensor | None, rows: Tensor | None = None) -> Tensor:
        """Rows x (B, N, D), source (B, M, S), mask (B, M) bool or None -> (B, N, D).

        With `rows` (B,) source and mask may be fewer: x's n-th row attends to source `rows[n]`, whose keys and values
        are computed once for all rows that do.
        """
        key, value = self._split(self.key(source)), self._split(self.value(source))
        if rows is not None:
            key, value = key.index_select(0, rows), value.index_select(0, rows)
            mask = None if mask is None else mask.index_select(0, rows)
        context = F.scaled_dot_product_attention(
            self._split(self.query(x)),
            key,
            value,
            attn_mask=None if mask is None else mask[:, None, None, :],
            dropout_p=self.dropout.p if self.training else 0.0,
        )
        context = context.transpose(1, 2).flatten(2)
        return self.norm(x + self.dropout(self.output(context)))

    def probabilities(self, x: Tensor, source: Tensor, mask: Tensor | None) -> Tensor:
        """What `attend` weighs the source with, without dropout, for monitors: (B, heads, N, M) in float32 at least."""
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
    """Attention of a sequence to itself."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__(width, width, heads, dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None, first: int | None = None) -> Tensor:
        """Rows x (B, N, D), mask (B, N) bool or None -> (B, N, D), or (B, first, D): the first rows alone."""
        return self.attend(x[:, :first], x, mask)


class CrossAttention(Attention):
    """Attention of a sequence to an encoder's tokens."""

    def forward(self, x: Tensor, tokens: Tokens) -> Tensor:
        """Rows x (N, Q, D), tokens (B, P, V) of N reads -> (N, Q, D)."""
        return self.attend(x, tokens.values, tokens.mask, tokens.pictures)
