"""Showing what a model would be shown: pictures, instruction, the LLM's row, and which tokens are trained on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.text import Text as Styled

from qformer import cards
from qformer.assemble import Item, reads_of
from qformer.backbones.language_loading import load_profile
from qformer.config import RunConfig
from qformer.data.batch import items_of, mixture_of, open_sources
from qformer.data.index import Index
from qformer.errors import DataError
from qformer.instruction import instruction_tokenizer
from qformer.named import located
from qformer.sample import Row, Slot, Turn, Video
from qformer.text import Joiner


def joiner_of(settings: RunConfig) -> Joiner:
    """The joiner of a run, from tokenizers alone: no weight is read."""
    tokenizer, profile = load_profile(located(settings.language))
    return Joiner(tokenizer, profile, instruction_tokenizer(settings.qformer), settings.qformer.instruction_limit)


def render(settings: RunConfig, count: int, *, ids: bool = False) -> list[Styled]:
    """The first `count` samples of a run as they would be shown to the model, one block of text a row.

    With `data.on_error: skip` a broken record's block says what is wrong with it.
    """
    named, multipliers = cards.mixture(settings.data)
    root = Path(settings.data.root)
    index = Index(root, settings.data.index)
    sources = open_sources(named, root, on_error=settings.data.on_error, index=index)
    mixture = mixture_of(sources, settings.data, multipliers, settings.seed)
    joiner = joiner_of(settings)
    blocks = []
    for draw in map(mixture.draw, range(count)):
        try:
            items = items_of(sources[draw.task], draw, settings.seed)
            blocks += [block(joiner, draw.task, item, settings.qformer.queries, ids=ids) for item in items]
        except DataError as error:
            if settings.data.on_error == "fail":
                raise
            blocks.append(Styled(f"broken: {error}\n", style="red"))
    return blocks


def block(joiner: Joiner, task: str, item: Item, queries: int, *, ids: bool) -> Styled:
    """One row: trained tokens are marked with ▸ ◂ and green, soft tokens with ⟨…⟩."""
    text = Styled()
    text.append(f"{item.name}\n", style="bold")
    text.append(f"  set          {task}\n")
    for picture in item.pictures:
        text.append(f"  {_picture(picture)}\n")
    read = joiner.read_ids(item.rendered.turns[0].instruction if item.rendered.turns else item.rendered.instruction)
    text.append("  Q-Former     ")
    if read:
        text.append_text(_words(joiner.instruction_tokenizer, read, ids=ids))
    else:
        text.append("(reads no instruction)")
    text.append("\n  LLM          ")
    row = joiner.row(item.rendered, reads_of(item.pictures), answered=True)
    text.append_text(row_text(joiner, row, queries, names_of(item.pictures), ids=ids))
    text.append("\n")
    return text


def words_of(task: str, item: Item) -> Styled:
    """One row in words, where there is no tokenizer to say its tokens; what is trained is marked as in `block`."""
    text = Styled()
    text.append(f"{item.name}\n", style="bold")
    text.append(f"  set          {task}\n")
    for picture in item.pictures:
        text.append(f"  {_picture(picture)}\n")
    rendered = item.rendered
    turns = rendered.turns or (*rendered.history, Turn(rendered.instruction, rendered.target))
    text.append("  words       ")
    for number, turn in enumerate(turns):
        trained = bool(rendered.turns) or number == len(turns) - 1
        text.append(f" {turn.instruction} ".replace("\n", "⏎"))
        marked = f"▸{turn.answer}◂" if trained else turn.answer
        text.append(marked.replace("\n", "⏎"), style="bold green" if trained else "")
    text.append("\n")
    return text


def names_of(pictures: Sequence[Any]) -> list[str]:
    """What each read of a row is of: pictures and videos by their numbers, frames in time order."""
    names = []
    for number, picture in enumerate(pictures, 1):
        if isinstance(picture, Video):
            names += [f"frame {frame} of {picture.count} of video {number}" for frame in range(1, picture.count + 1)]
        else:
            names.append(f"picture {number}")
    return names


def _picture(picture: Any) -> str:
    if isinstance(picture, Video):
        if isinstance(picture.frames, int):
            shown = f"{picture.count} frames, evenly spread" if picture.count > 1 else "the frame in the middle"
        else:
            shown = f"frames {', '.join(map(str, sorted(picture.frames)))}"
        return f"video        {picture.path} ({shown})"
    return f"picture      {'<bytes>' if isinstance(picture, bytes) else picture}"


def row_text(joiner: Joiner, row: Row, queries: int, names: Sequence[str], *, ids: bool) -> Styled:
    """A row in one line, with what each read is of; with `ids` every token stands with its number."""
    text = Styled()
    for piece in row:
        if isinstance(piece, Slot):
            text.append(f"⟨{queries} soft tokens of {names[piece.read]}⟩", style="cyan")
        elif piece.trained:
            text.append("▸", style="bold green")
            text.append_text(_words(joiner.tokenizer, piece.ids, ids=ids, style="bold green"))
            text.append("◂", style="bold green")
        else:
            text.append_text(_words(joiner.tokenizer, piece.ids, ids=ids))
    return text


def _words(tokenizer: Any, ids_: tuple[int, ...], *, ids: bool, style: str = "") -> Styled:
    if not ids:
        return Styled(tokenizer.decode(list(ids_)).replace("\n", "⏎"), style=style)
    text = Styled()
    for number in ids_:
        text.append(tokenizer.decode([number]).replace("\n", "⏎"), style=style)
        text.append(f"[{number}] ", style="dim")
    return text
