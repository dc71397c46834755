"""Our scores beside published ones: tables under `configs/published`, each number with the split it is of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qformer import config
from qformer.errors import ConfigError, did_you_mean, lookup

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class PublishedSet:
    """What a card's published scores are of."""

    metrics: list[str]
    """The names here that a score may have to stand beside them."""
    split: str
    """In words."""
    splits: list[str] = field(default_factory=list)
    """The splits, as cards name theirs, that a score may be of to stand beside them; none: any."""

    def takes(self, split: str) -> bool:
        """Whether a score of that split stands beside the published one."""
        return not self.splits or split in self.splits


@dataclass(frozen=True)
class PublishedRow:
    """One model's scores by card, times 100."""

    title: str
    scores: dict[str, float]
    llms: list[str] = field(default_factory=list)
    """Ends of the names of the LLMs it is the row of, if none is named."""
    checked: list[str] = field(default_factory=list)
    """Cards whose score was seen in a second place."""
    averages: dict[str, float] = field(default_factory=dict)
    """Means over several cards, by the name of one of the file's lists."""


@dataclass(frozen=True)
class Published:
    """A file of them."""

    name: str
    version: int
    title: str
    source: str
    sets: dict[str, PublishedSet]
    rows: dict[str, PublishedRow]
    note: str = ""
    averages: dict[str, list[str]] = field(default_factory=dict)
    """What is published as one mean over several cards, and over which."""

    def __post_init__(self) -> None:
        for name, row in self.rows.items():
            for key in (*row.scores, *row.checked):
                if key not in self.sets or key not in row.scores:
                    raise ConfigError(f"rows.{name} names '{key}', which `sets` or its scores do not.")
            for key in row.averages:
                if key not in self.averages:
                    raise ConfigError(f"rows.{name} has a mean '{key}', and `averages` does not say over which cards.")

    def row(self, name: str, llm: str) -> str:
        """The name of a row: the one that is asked for, or that of the LLM.

        Raises:
            ConfigError: there is no such row.
        """
        if name:
            lookup(self.rows, name, f"row of the published table '{self.name}'")
            return name
        for each, row in self.rows.items():
            if any(llm.rstrip("/").lower().removesuffix("-v1.1").endswith(end) for end in row.llms):
                return each
        raise ConfigError(
            f"the published table '{self.name}' has no row for the LLM '{llm}'; name one, as in "
            f"{self.name}:{next(iter(self.rows))}.{did_you_mean(llm, self.rows)}"
        )


def load(name: str) -> Published:
    """A shipped table, or a YAML file of the same form.

    Raises:
        ConfigError: no such file, or a wrong key or type in it.
    """
    return config.shipped(Published, "configs/published", name, "published table")


def compared(results: Mapping[str, Mapping[str, Any]], published: Published, row: str) -> tuple[list[Table], list[str]]:
    """Each score beside the published one with the difference, and in sentences what could not be put beside one.

    Scores of another split than the published one have a table of their own, which gives no difference.
    """
    chosen = published.rows[row]
    title = f"{published.title}: {chosen.title}"
    shown, apart = _table(title), _table(f"{title}; ours are of other splits, so there is no difference to give")
    left_out = []
    for key, result in results.items():
        name = _listed(key, chosen)
        if name is None:
            left_out.append(f"{key}: nothing is published for it in the row '{row}'.")
        elif result["metric"] not in published.sets[name].metrics:
            wanted = " or ".join(published.sets[name].metrics)
            left_out.append(f"{key}: its metric is {result['metric']}, and what is published is {wanted}.")
        elif result["partial"]:
            left_out.append(
                f"{key}: {result['samples']:,} of {result['of']:,} samples were scored, and a part of a set does not "
                f"stand beside a whole one; leave out --limit, or mend what is broken."
            )
        elif result["published_size"] not in (None, result["of"]):
            left_out.append(
                f"{key}: its files hold {result['of']:,} records and the published split {result['published_size']:,}, "
                f"so its score does not stand beside that of the split."
            )
        elif result["score"] is None:
            left_out.append(f"{key}: it has no score.")
        else:
            of, ours, theirs = published.sets[name], 100 * result["score"], chosen.scores[name]
            low, high = (None if end is None else 100 * end for end in result["interval"])
            around = "" if low is None else f" ({low:.1f} to {high:.1f})"
            mark = "" if name in chosen.checked else "*"
            alike = of.takes(result["split"])
            if not alike:
                left_out.append(
                    f"{key}: it was scored on {result['split']}, and what is published is of {of.split}: another "
                    f"split, so the two stand apart and without a difference."
                )
            (shown if alike else apart).add_row(
                key,
                result["metric"],
                f"{ours:.1f}{around}",
                f"{theirs:.1f}{mark}",
                f"{ours - theirs:+.1f}" if alike else "another split",
                f"{result['samples']:,}",
                result["split"],
                of.split,
                result["recipe"],
            )
    for average, theirs in chosen.averages.items():
        cards = published.averages[average]
        whole = [results[key] for key in cards if key in results]
        if len(whole) == len(cards) and all(_as_published(key, results[key], published) for key in cards):
            ours = sum(100 * result["score"] for result in whole) / len(whole)
            counts = f"{sum(result['samples'] for result in whole):,}"
            numbers = (f"{ours:.1f}", f"{theirs:.1f}*", f"{ours - theirs:+.1f}")
            recipes = ", ".join(result["recipe"] for result in whole)
            shown.add_row(average, "mean", *numbers, counts, "", f"mean over {', '.join(cards)}", recipes)
    return [table for table in (shown, apart) if table.rows], left_out


def _table(title: str) -> Table:
    from rich.table import Table

    shown = Table(title=title)
    for heading in ("task", "metric", "ours", "published", "difference", "n", "our split", "published on", "recipe"):
        right = heading in ("ours", "published", "difference", "n")
        shown.add_column(heading, justify="right" if right else "left")
    return shown


def _as_published(key: str, result: Mapping[str, Any], published: Published) -> bool:
    """Whether a score is of all of the split that one part of a published mean is of, as far as that is known."""
    whole = not result["partial"] and result["published_size"] in (None, result["of"])
    alike = key not in published.sets or published.sets[key].takes(result["split"])
    return whole and alike and result["score"] is not None


def remarks(published: Published, row: str) -> list[str]:
    """Where the numbers are from, what the stars say, and what there is to know of the table."""
    said = [f"published: {published.source}"]
    if set(published.rows[row].scores) - set(published.rows[row].checked):
        said.append("* seen in one place alone")
    return [*said, *([published.note] if published.note else [])]


def _listed(key: str, row: PublishedRow) -> str | None:
    """What a card's score is published under: its name with one of its variants, or its name."""
    name, _, variant = key.partition(":")
    for each in (*(f"{name}:{part}" for part in variant.split("+")), name):
        if each in row.scores:
            return each
    return None
