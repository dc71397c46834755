"""The cards as a table and one card as a page."""

from __future__ import annotations

from typing import Literal

from rich.table import Table
from rich.text import Text

from qformer import cards, resources, text
from qformer.cards import TaskCard


def table() -> Table:
    """Every shipped card: role, size, reader, prompt, metric, and p_d at the published sizes (four decimals)."""
    counted = "samples: S_d of sets that are trained on, what is scored of those held out"
    shown = Table(title="task cards", title_justify="left", caption=counted, caption_justify="left")
    for column in ("card", "role", "samples", "p_d", "reader", "metric", "prompt"):
        side: Literal["right", "left"] = "right" if column in ("samples", "p_d") else "left"
        shown.add_column(column, justify=side, no_wrap=column != "prompt")
    loaded = [cards.load(name) for name in resources.names("tasks")]
    shares = published_shares(loaded)
    for card in sorted(loaded, key=lambda card: (card.role, card.name)):
        section = card.train if card.train and card.role == "held_in" else card.eval
        size = section.size if section else None
        shown.add_row(
            card.name,
            card.role.replace("_", "-"),
            f"{size:,}" if size else "",
            f"{shares[card.name]:.4f}" if card.name in shares else "",
            section.reader if section else "",
            card.eval.metric if card.eval else "",
            prompt(card),
        )
    return shown


def published_shares(loaded: list[TaskCard]) -> dict[str, float]:
    """p_d of the shipped held-in cards at their published sizes."""
    sizes = {card.name: c.size for card in loaded if card.role == "held_in" and (c := card.train) and c.size}
    return cards.probabilities(sizes, {}) if sizes else {}


def prompt(card: TaskCard) -> str:
    """The zero-shot prompt where the card is scored, else how many phrasings it is trained with."""
    if card.eval:
        return text.load_templates(card.eval.template).templates[0]
    assert card.train is not None
    count = len(text.load_templates(card.train.template).templates)
    return f"{count} phrasing{'s' if count > 1 else ''} ({card.train.template})"


def card_page(name: str) -> Text:
    """One card in full, as its file has it."""
    card = cards.load(name)
    path = resources.find("tasks", name.partition(":")[0], "task card")
    page = Text()
    page.append(f"{card.title or card.name}  ({card.role.replace('_', '-')})\n", style="bold")
    page.append(path.read_text(encoding="utf-8"))
    for section in (card.train, card.eval):
        if section is not None:
            phrasings = text.load_templates(section.template)
            page.append(
                f"\ntemplates/{phrasings.name} (version {phrasings.version}; {phrasings.source})\n", style="bold"
            )
            for each in phrasings.templates:
                page.append(f"  {each}\n")
    return page
