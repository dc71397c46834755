"""What stands in for a tokenizer that a checkpoint came without: ids work, words are refused with a reason."""

from __future__ import annotations

from typing import Any, NoReturn

from qformer.errors import ConfigError


class MissingTokenizer:
    """The ids of the marks, as far as a config tells them; everything else is a ConfigError that says what is missing.

    Calls on tensors (soft prompts, log-likelihoods of rows of ids) need no more than this.
    """

    chat_template = None
    vocab_size = 0

    def __init__(self, where: str, *, bos: int | None = None, eos: int | None = None, pad: int | None = None):
        self.where = where
        self.bos_token_id, self.eos_token_id, self.pad_token_id = bos, eos, pad

    def __len__(self) -> int:
        return 0

    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        """Words cannot become ids."""
        self._refuse()

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        self._refuse()

    def __getstate__(self) -> dict[str, Any]:
        return dict(vars(self))

    def _refuse(self) -> NoReturn:
        raise ConfigError(
            f"{self.where}, so words can neither be read nor written; tensor calls (soft_prompts, log_likelihood) work "
            f"without it."
        )
