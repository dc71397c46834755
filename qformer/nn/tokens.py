"""What an image encoder gives to a connector."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Tokens(NamedTuple):
    """Encoder outputs of B pictures, P tokens each, V wide."""

    values: Tensor
    """(B, P, V)."""
    mask: Tensor | None = None
    """(B, P) bool, True where a token is real; None: all are."""
    grid: tuple[int, int] | None = None
    """Rows and columns of the patches, where they form a grid."""
