"""The one table of an adapter that was carried over to another LLM, from what `plug.json` holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qformer.evaluate.metrics import METRICS
from qformer.evaluate.tables import in_words, samples_in_words

if TYPE_CHECKING:
    from rich.table import Table

PLUG_FILE = "plug.json"
"""In the run directory: what was asked for, and the scores of each stage and of what it is compared with."""
ROWS = {
    "before": "before tuning",
    "warmup": "after warm-up",
    "tuned": "after tuning",
    "fresh": "fresh adapter",
    "source": "source, its own LLM",
}
"""What is compared, and what the table calls it."""


def table(content: Mapping[str, Any], without: Sequence[str] = ()) -> Table:
    """What `plug.json` holds: a row a task, a column for each adapter, and the most frequent answer."""
    from rich.table import Table

    rows = {name: content["rows"][name]["scores"] for name in ROWS if name in content["rows"] and name not in without}
    shown = Table(title=f"From '{content['own_language']}' to '{content['language']}', projection {content['start']}")
    for heading in ("task", "metric"):
        shown.add_column(heading)
    for name in rows:
        count = content["steps"].get(name)
        shown.add_column(ROWS[name] + (f", {count} steps" if count else ""), justify="right")
    for heading in ("most frequent", "n"):
        shown.add_column(heading, justify="right")
    shown.add_column("recipe")
    for key in dict.fromkeys(key for scores in rows.values() for key in scores):
        found = {name: scores[key] for name, scores in rows.items() if key in scores}
        any_one = next(iter(found.values()))
        cells = [cell(found.get(name)) for name in rows]
        percent = METRICS[any_one["metric"]].percent
        frequent = in_words(any_one["most_frequent"], percent)
        shown.add_row(
            key, any_one["metric"], *cells, frequent, samples_in_words(any_one), recipes(list(found.values()))
        )
    return shown


def recipes(scores: Sequence[Mapping[str, Any]]) -> str:
    """The recipes that scores were made by: one, unless LLMs are spoken to in different ways."""
    return " / ".join(dict.fromkeys(score["recipe"] for score in scores))


def cell(entry: Mapping[str, Any] | None) -> str:
    """A score with its interval, and below it the same with shuffled pictures."""
    if entry is None:
        return "–"
    percent = METRICS[entry["metric"]].percent
    beside = f"\nshuffled {in_words(entry['shuffled'], percent)}" if entry["shuffled"] else ""
    return in_words(entry, percent) + beside
