"""What an image encoder gives to a connector."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Tokens(NamedTuple):
    """Encoder outputs of B pictures, P tokens each, V wide, and who looks at them."""

    values: Tensor
    """(B, P, V)."""
    mask: Tensor | None = None
    """(B, P) bool, True where a token is real; None: all are."""
    grid: tuple[int, int] | None = None
    """Rows and columns of the patches, where they form a grid."""
    pictures: Tensor | None = None
    """(N,) whole numbers: which of the B pictures each of N reads looks at; None: the n-th read at the n-th."""

    @property
    def reads(self) -> int:
        """N: how many look."""
        return len(self.values if self.pictures is None else self.pictures)

    def spread(self) -> Tokens:
        """The same with a copy of its picture for every read."""
        if self.pictures is None:
            return self
        mask = None if self.mask is None else self.mask.index_select(0, self.pictures)
        return Tokens(self.values.index_select(0, self.pictures), mask, self.grid)
