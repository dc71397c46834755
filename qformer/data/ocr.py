"""Words that were read in pictures beforehand: a side file, or a field of the set's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qformer.data.streams import iterate_items, iterate_json
from qformer.data.values import number
from qformer.errors import DataError

MOST = 30
"""Tokens that are kept unless the card's `ocr_tokens` says otherwise: the first ones, as in LAVIS."""


def joined(tokens: Any, most: int = MOST) -> str:
    """The first tokens with commas between them; nothing where there are none."""
    if tokens is None:
        return ""
    if not isinstance(tokens, list):
        raise DataError("'ocr_tokens' must be a list of words")
    kept = [" ".join(str(token).split()) for token in tokens[:most] if token is not None]
    return ", ".join(token for token in kept if token)


def limit(options: Mapping[str, Any]) -> int:
    """The option `ocr_tokens`: how many are kept."""
    return number({"options.ocr_tokens": options.get("ocr_tokens", MOST)}, "options.ocr_tokens")


def read_side_file(path: Path | None, most: int) -> dict[str, str]:
    """By picture, what is written in it: `{"data": [{"image_id", "ocr_tokens"}]}` as Rosetta's files for TextVQA and
    TextCaps, or `{image_id: tokens}`.

    Raises:
        DataError: the file is of another form.
    """
    if path is None:
        return {}
    try:
        return {str(name): joined(tokens, most) for name, tokens in _pairs(path)}
    except DataError as error:
        raise error if str(path) in str(error) else DataError(f"{path}: {error}.") from None
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(
            f"{path}: it is not of the form {{'data': [{{'image_id', 'ocr_tokens'}}]}} or {{image_id: tokens}} "
            f"({type(error).__name__}: {error})."
        ) from None


def _pairs(path: Path) -> Iterator[tuple[Any, Any]]:
    try:
        for row in iterate_json(path, "data"):
            yield row["image_id"], row["ocr_tokens"]
    except KeyError as missing:
        if missing.args[0] != "data":
            raise
        yield from iterate_items(path)
