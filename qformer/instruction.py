"""What a Q-Former reads instructions with: its tokenizer, from settings, a saved adapter or a published model."""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from pathlib import Path
from typing import Any

from qformer import resources
from qformer.backbones import language_loading
from qformer.checkpoints import Published
from qformer.config import QFormerConfig, RunConfig
from qformer.errors import ConfigError, reason
from qformer.nn.qformer import QFormerSize
from qformer.saved import adapter_directory, adapters_of
from qformer.untokenized import MissingTokenizer
from qformer.vlm import TOKENIZER_FOLDER


def instruction_tokenizer(given: QFormerConfig) -> Any | None:
    """What the Q-Former reads with; None where it reads no instruction.

    Raises:
        ConfigError: it is to read, and no tokenizer is named or there.
    """
    if not given.instruction:
        return None
    source = given.tokenizer or _words_of(given.init)
    if source is None:
        raise ConfigError(
            "qformer.instruction is on and there is no tokenizer to read it with; set qformer.init to a BERT "
            "checkpoint, qformer.tokenizer to a BERT tokenizer, or qformer.instruction: false."
        )
    return read_tokenizer(resources.located(str(source)))


def _words_of(init: Any) -> str | Path | None:
    """Where the tokenizer is that comes with the start: a BERT's own, or that of the first adapter which brings one."""
    sources = adapters_of(init)
    if sources is None:
        return init if isinstance(init, str) else None
    for each in sources:
        path = Path(resources.located(each.source))
        places = [path / "qformer_tokenizer"]
        with suppress(ConfigError):
            places.append(adapter_directory(path) / TOKENIZER_FOLDER)
        for folder in places:
            if folder.is_dir():
                return folder
    return None


def saved_tokenizer(
    directory: Path, size: QFormerSize, named: str | Path | None, settings: RunConfig
) -> tuple[RunConfig, Any | None]:
    """What a saved adapter's Q-Former reads with, the one named or its own, and the settings that say so."""
    if not size.instruction:
        return settings, None
    if named is not None:
        settings = dataclasses.replace(settings, qformer=dataclasses.replace(settings.qformer, tokenizer=str(named)))
        tokenizer = read_tokenizer(resources.located(str(named)))
        check_reading(size, tokenizer, settings.qformer)
        return settings, tokenizer
    if (directory / TOKENIZER_FOLDER).is_dir():
        return settings, read_tokenizer(directory / TOKENIZER_FOLDER)
    missing = (
        f"{directory} was saved without the Q-Former's tokenizer (name one, such as "
        f"instruction_tokenizer='bert-base-uncased')"
    )
    return settings, MissingTokenizer(missing, pad=0)


def published_tokenizer(
    published: Published, named: str | Path | None, read: QFormerConfig, revision: str | None
) -> Any:
    """What the Q-Former reads with: the one named, or the source's own; a stand-in where neither is at hand."""
    if named is not None:
        return read_tokenizer(resources.located(str(named)))
    if published.directory is not None and (published.directory / "qformer_tokenizer").is_dir():
        return read_tokenizer(published.directory / "qformer_tokenizer")
    if published.directory is None and read.tokenizer is not None:
        with suppress(ConfigError):
            return read_tokenizer(resources.located(read.tokenizer))
    return MissingTokenizer(
        f"'{published.source}' came without the Q-Former's tokenizer (name one, such as "
        f"instruction_tokenizer='bert-base-uncased')",
        pad=0,
    )


def read_tokenizer(source: str | Path) -> Any:
    """A tokenizer of transformers from a directory or hub id.

    Raises:
        ConfigError: there is none, or it is broken.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(source))
    except Exception as error:  # a file that is not whole raises bare exceptions
        raise ConfigError(f"{source}: no tokenizer can be read from there: {reason(error)}") from None


def check_reading(size: QFormerSize, tokenizer: Any | None, given: QFormerConfig) -> None:
    """Refuse a tokenizer that is not the Q-Former's, and instructions longer than it has positions for.

    Raises:
        ConfigError: with what would fit.
    """
    if tokenizer is None:
        return
    if not language_loading.LEAST_SHARE * size.vocabulary <= len(tokenizer) <= size.vocabulary:
        raise ConfigError(
            f"qformer.tokenizer: '{given.tokenizer or given.init}' has {len(tokenizer)} words and the Q-Former "
            f"{size.vocabulary} word embeddings; use the tokenizer that belongs to qformer.init."
        )
    if given.instruction_limit > size.positions:
        raise ConfigError(
            f"qformer.instruction_limit is {given.instruction_limit} and the Q-Former has {size.positions} positions; "
            f"set it to at most {size.positions}."
        )
