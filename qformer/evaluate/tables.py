"""Scores in tables and in words, as a person reads them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qformer.evaluate.metrics import COUNTS, METRICS

if TYPE_CHECKING:
    from rich.table import Table

ROLES = {"held_out": "held-out ", "held_in": "held-in "}
"""Roles of cards in the order in which scores are shown, and in words before a noun."""


def tables(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Scores of held-out and of held-in sets as tables of their own, and again apart those of parts of sets.

    Neither is to be compared with another's: held-in sets are no zero-shot.
    """
    roles = [role for role in ROLES if any(result["role"] == role for result in results.values())]
    shown = []
    for partial in (False, True):
        for role in roles:
            chosen = {
                key: result
                for key, result in results.items()
                if result["partial"] is partial and result["role"] == role
            }
            if chosen:
                shown.append(as_text(table(chosen, about(partial, role if len(roles) > 1 else ""))))
    return shown


def about(partial: bool, role: str = "") -> str:
    """What scores stand in a table: "Scores on parts of held-in sets"; without a role those of all."""
    kind = ROLES.get(role, "")
    return f"Scores on parts of {kind}sets" if partial else f"Scores on {kind}sets" if kind else "Scores"


def table(results: Mapping[str, Mapping[str, Any]], title: str = "") -> Table:
    """Scores beside their baselines, as `score` returns them."""
    from rich.table import Table

    title = title or about(any(result["partial"] for result in results.values()))
    shown = Table(title=f"{title} (95 % intervals over pictures)")
    ranked = any(result["chance"] for result in results.values())
    columns = ["task", "metric", "score", "shuffled pictures", "most frequent", *(["chance"] if ranked else [])]
    for name in columns:
        shown.add_column(name, justify="left" if name in ("task", "metric") else "right")
    shown.add_column("n", justify="right")
    shown.add_column("recipe")
    for key, result in results.items():
        percent = METRICS[result["metric"]].percent
        entries = [result, result["shuffled"], result["most_frequent"], *([result["chance"]] if ranked else [])]
        marks = [in_words(entry, percent) for entry in entries]
        shown.add_row(key, result["metric"], *marks, samples_in_words(result), result["recipe"])
    return shown


def as_text(shown: Table) -> str:
    """A table as lines of plain text."""
    import io

    from rich.console import Console

    stream = io.StringIO()
    Console(file=stream, width=160, markup=False, emoji=False).print(shown)
    return stream.getvalue().rstrip("\n")


def in_words(entry: Mapping[str, Any] | None, percent: bool) -> str:
    """A score with its interval."""
    if entry is None or entry["score"] is None:
        return "–"
    factor, digits = (100, 1) if percent else (1, 3)
    low, high = entry["interval"]
    around = "" if low is None else f" ({factor * low:.{digits}f} to {factor * high:.{digits}f})"
    return f"{factor * entry['score']:.{digits}f}{around}"


def samples_in_words(result: Mapping[str, Any]) -> str:
    """How many samples were scored, and of a part of a set how many there are."""
    return f"{result['samples']:,}" + (f" of {result['of']:,}, partial" if result["partial"] else "")


def beside_in_words(name: str, value: float | None) -> str:
    """A number that stands beside a score."""
    return "–" if value is None else f"{value:.2f}" if name in COUNTS else f"{100 * value:.1f}"


def remarks(key: str, result: Mapping[str, Any], submitted: Path) -> list[str]:
    """What a person should know of a score besides its number."""
    said = []
    if result["truncations"]:
        said.append(
            f"{key}: {result['truncations']} text(s) were cut to their limits (language.instruction_limit, "
            f"language.target_limit, qformer.instruction_limit)."
        )
    if result["empty"]:
        said.append(f"{key}: {result['empty']:,} of {result['samples']:,} answers hold no word.")
    if result["score"] is None and METRICS[result["metric"]].scored:
        left = f"the {result['samples']:,} samples that are left"
        said.append(f"{key}: {left} have no {result['metric']}; mend the broken records.")
    if result["unreachable"]:
        share = f"{100 * result['unreachable']:.1f} % of {result['samples']:,}"
        said.append(f"{key}: {share} truths are not among the candidates, and count as wrong.")
    if result["metric"] == "submission":
        said.append(f"{key}: not scored, since only the server has its answers; {submitted} is for it.")
        if lacking := result["of"] - result["samples"]:
            said.append(f"{submitted}: {lacking:,} question(s) have no answer in it, and the server wants all.")
    if result["beside"]:
        numbers = ", ".join(f"{name} {beside_in_words(name, value)}" for name, value in result["beside"].items())
        said.append(f"{key}: {numbers}.")
    return said


def other_sizes(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A sentence about the sets whose files hold more or fewer records than the published split."""
    sizes = [
        f"{key} ({result['of']:,} for {result['published_size']:,})"
        for key, result in results.items()
        if result["published_size"] not in (None, result["of"])
    ]
    if not sizes:
        return []
    return [f"not of the published split's size, so to be put beside nothing published: {', '.join(sizes)}."]
