"""Two runs sample by sample: what differs between their scores, with an interval of the paired difference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qformer.errors import ConfigError, DataError
from qformer.evaluate.files import read_json, read_lines, score_files
from qformer.evaluate.metrics import METRICS, bootstrap
from qformer.evaluate.outcome import Answer, Outcome, Places, averaged
from qformer.evaluate.run import file_name
from qformer.evaluate.tables import ROLES, in_words, samples_in_words
from qformer.sample import Sample

if TYPE_CHECKING:
    from rich.table import Table


WHOSE = ("source", "checkpoint", "step", "adapter")
"""What tells two models apart, of which every comparison is."""


@dataclass(frozen=True)
class Scored:
    """One card's score as a run has it on disk: the content of `TASK.json`, and the lines of its predictions."""

    file: Path
    result: Mapping[str, Any]
    lines: Sequence[Mapping[str, Any]]

    @classmethod
    def read(cls, file: Path) -> Scored:
        """A score file and the predictions beside it.

        Raises:
            DataError: one of them is not there, or not what evaluation writes, or they are not of one evaluation.
        """
        result = read_json(file)
        lines = read_lines(file.with_name(f"{file.stem}.predictions.jsonl"))
        try:
            score, samples = result["score"], result["samples"]
            scored = cls(file, result, lines)
            whole = scored.outcome(list(range(len(lines)))).score
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{file}: it is not what evaluation writes ({error!r}); score the set again.") from None
        if len(lines) != samples or score is None or whole is None or abs(whole - score) > 1e-6:
            raise DataError(
                f"{file}: the predictions beside it do not add up to its score ({len(lines):,} of them for "
                f"{samples:,} samples); score the set again."
            )
        return scored

    def outcome(self, places: Sequence[int]) -> Outcome:
        """The outcome of the predictions at some places."""
        lines = [self.lines[place] for place in places]
        metric = METRICS[self.result["metric"]]
        if metric.mean:
            return averaged([line["score"] for line in lines])
        answers = [
            Answer(line["prediction"], tuple(line.get("candidates", {})), tuple(line.get("candidates", {}).values()))
            for line in lines
        ]
        samples = [Sample(line["id"], self.result["task"], (), references=tuple(line["references"])) for line in lines]
        return metric.score(answers, samples, self.result["recipe_settings"]["metric"]["options"])


def compare(
    one: Path, other: Path, *, tasks: Sequence[str] = (), despite: bool = False
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The scores of two runs, card by card.

    Args:
        one: a directory of scores.
        other: another.
        tasks: cards' keys, or two of them as `gqa=gqa:as_lavis`, the first of `one`; "held_in" and "held_out" stand for
            the cards of that role that both were scored on; by default all that both were.
        despite: whether scores of different recipes are compared, over the samples that both have.

    Returns:
        By card: both scores, the difference (`other` minus `one`) with its interval, how many samples either did
        better, and what else is not alike; and in sentences what could not be compared.

    Raises:
        ConfigError: the recipes of a card differ.  DataError: a directory holds no scores, or none that the other has,
            or broken ones.
    """
    mine, theirs = _score_files(one), _score_files(other)
    asked = _asked(tasks, mine, theirs)
    shared = dict.fromkeys(
        ((first, partial), (second, partial))
        for pairs in asked.values()
        for first, second in pairs
        for partial in (False, True)
        if (first, partial) in mine and (second, partial) in theirs
    )
    there = {(first, second) for (first, _), (second, _) in shared}
    missing = [task for task, pairs in asked.items() if tasks and not there & set(pairs)]
    if missing:
        raise DataError(f"{', '.join(missing)}: not scored in both {one} and {other}; score it in both, alike.")
    if not shared:
        raise DataError(
            f"{one} and {other}: they have no scored set in common; score both on the same tasks, or name two "
            f"that are to be compared, as gqa=gqa:as_lavis."
        )
    notes = [
        f"{key}{' (a part of it)' if partial else ''}: scored in one of the two alone; left out."
        for key, partial in sorted(set(mine) ^ set(theirs))
        if not tasks or (mine | theirs)[key, partial].role in tasks
    ]
    found = {}
    for name, other_name in shared:
        pair = Scored.read(mine[name].file), Scored.read(theirs[other_name].file)
        key = "=".join(dict.fromkeys((name[0], other_name[0])))
        found[file_name(key, partial=name[1])] = {**_pair(*pair, despite=despite), "task": key}
    return found, notes


@dataclass(frozen=True)
class _Found:
    """A score file, and whether its card is held in or held out."""

    file: Path
    role: str


_Files = Mapping[tuple[str, bool], _Found]
"""By their card's key and whether they are of a part of it."""


def _asked(tasks: Sequence[str], mine: _Files, theirs: _Files) -> dict[str, list[tuple[str, str]]]:
    """Pairs of cards' keys by the task that asks for them; a role asks for the cards of it that both have."""
    asked = {}
    for task in tasks or dict.fromkeys(key for key, _ in mine):
        of_role = [(key, key) for key, partial in mine if mine[key, partial].role == task and (key, partial) in theirs]
        pair = task.partition("=")[0], task.rpartition("=")[2]
        asked[task] = of_role if task in ROLES else [pair]
    return asked


def _score_files(directory: Path) -> dict[tuple[str, bool], _Found]:
    files = {}
    for file in score_files(directory):
        content = read_json(file)
        if not isinstance(content.get("task"), str):
            raise DataError(f"{file}: it is not what evaluation writes (it names no task); move it elsewhere.")
        if content.get("score", 0) is not None:  # a set whose answers are a server's has none
            role = str(content.get("role"))
            files[content["task"], file.stem.endswith(".partial")] = _Found(file, role)
    if not files:
        raise DataError(f"{directory}: holds no scores; run qformer eval on it first.")
    return files


def _pair(one: Scored, other: Scored, *, despite: bool) -> dict[str, Any]:
    same = one.result["recipe"] == other.result["recipe"]
    if not same and not despite:
        listed = list(differences(one.result["recipe_settings"], other.result["recipe_settings"]))
        shown = "; ".join(listed[:4]) + ("; …" if len(listed) > 4 else "")
        raise ConfigError(
            f"{one.result['task']}: the two scores are of different recipes, {one.result['recipe']} and "
            f"{other.result['recipe']} ({shown}); score both alike, or add --different-recipes."
        )
    if one.result["metric"] != other.result["metric"]:
        raise ConfigError(
            f"{one.result['task']}: one score is {one.result['metric']} and the other {other.result['metric']}; their "
            f"difference says nothing."
        )
    places = {line["id"]: place for place, line in enumerate(other.lines)}
    both = [(place, places[line["id"]]) for place, line in enumerate(one.lines) if line["id"] in places]
    if not both:
        raise DataError(f"{one.result['task']}: the two runs have no sample in common.")
    first, second = one.outcome([pair[0] for pair in both]), other.outcome([pair[1] for pair in both])
    pictures = [tuple(one.lines[place]["images"]) for place, _ in both]
    difference = None
    if first.score is not None and second.score is not None:
        difference = second.score - first.score
    return {
        "task": one.result["task"],
        "metric": one.result["metric"],
        "one": {"score": first.score, "interval": one.result["interval"], "recipe": one.result["recipe"]},
        "other": {"score": second.score, "interval": other.result["interval"], "recipe": other.result["recipe"]},
        "difference": difference,
        "interval": list(paired_interval(first, second, pictures, one.result["task"]) or (None, None)),
        "better": [
            sum(a > b for a, b in zip(first.scores, second.scores)),
            sum(a < b for a, b in zip(first.scores, second.scores)),
        ],
        "samples": len(both),
        "of": one.result["of"],
        "partial": len(both) < one.result["of"],
        "same_recipe": same,
        "apart": list(differences(_beside(one.result), _beside(other.result))),
    }


def _beside(result: Mapping[str, Any]) -> dict[str, Any]:
    """What a score rests on besides its recipe and its weights: the model's settings, and the libraries."""
    model = {name: value for name, value in (result.get("model") or {}).items() if name not in WHOSE}
    towers = {name: {**model[name], "fingerprint": None} for name in ("vision", "language") if name in model}
    return {"model": {**model, **towers}, "libraries": result.get("libraries") or {}}


def paired_interval(
    first: Outcome, second: Outcome, pictures: Sequence[object], *key: object
) -> tuple[float, float] | None:
    """The 95 % interval of second − first when whole pictures are drawn with replacement, for both the same ones."""

    def difference(places: Places) -> float | None:
        before, after = first.value(places), second.value(places)
        return None if before is None or after is None else after - before

    return bootstrap(second.scores, pictures, "paired", *key, value=difference)


def differences(one: Any, other: Any, where: str = "") -> Iterator[str]:
    """What differs between two recipes, in words, by dotted name."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for name in dict.fromkeys([*one, *other]):
            yield from differences(one.get(name), other.get(name), f"{where}.{name}" if where else name)
    elif one != other:
        yield f"{where} is {_short(one)} and {_short(other)}"


def _short(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else "absent" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "…"


def apart(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What the two runs differ in besides recipes and weights, in sentences; with the cards where not all differ so."""
    said: dict[str, list[str]] = {}
    for name, each in found.items():
        for difference in each["apart"]:
            said.setdefault(difference, []).append(name)
    return [
        f"{', '.join(names) + ': ' if len(names) < len(found) else ''}{difference} (A and B; in no recipe)."
        for difference, names in said.items()
    ]


def tables(found: Mapping[str, Mapping[str, Any]], one: str, other: str) -> list[Table]:
    """Whole sets as one table, parts as another."""
    shown = []
    for partial in (False, True):
        chosen = {name: each for name, each in found.items() if each["partial"] is partial}
        if chosen:
            shown.append(_table(chosen, one, other, " on parts of sets" if partial else ""))
    return shown


def _table(found: Mapping[str, Mapping[str, Any]], one: str, other: str, where: str) -> Table:
    from rich.table import Table

    shown = Table(title=f"A: {one}, B: {other}{where} (95 % intervals of the paired difference over pictures)")
    for heading in ("task", "metric", "A", "B", "B − A", "A better", "B better", "n", "recipe"):
        shown.add_column(heading, justify="left" if heading in ("task", "metric", "recipe") else "right")
    for each in found.values():
        percent = METRICS[each["metric"]].percent
        plain = {"interval": [None, None]}
        recipe = (
            each["one"]["recipe"] if each["same_recipe"] else f"{each['one']['recipe']} / {each['other']['recipe']}"
        )
        difference = in_words({"score": each["difference"], "interval": each["interval"]}, percent)
        sign = "" if each["difference"] is None or difference.startswith("-") else "+"
        shown.add_row(
            each["task"],
            each["metric"],
            in_words({**each["one"], **plain}, percent),
            in_words({**each["other"], **plain}, percent),
            sign + difference,
            *(f"{count:,}" for count in each["better"]),
            samples_in_words(each),
            recipe,
        )
    return shown
