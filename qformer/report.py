"""One self-contained page about a run: what was run, its curves, its mixture, its scores, and what it said to pictures.

The page holds its style sheet, charts and pictures, runs no script, and forbids the browser any request.
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Collection, Iterable, Mapping, Sequence
from html import escape
from importlib import metadata
from pathlib import Path
from typing import Any

from qformer import __version__, charts, config, gallery
from qformer.charts import Mark
from qformer.comparison import PLUG_FILE, ROWS, cell, recipes
from qformer.errors import DataError
from qformer.evaluate import sweep
from qformer.evaluate.files import read_json, read_lines, score_files
from qformer.evaluate.metrics import METRICS
from qformer.evaluate.tables import ROLES, about, beside_in_words, in_words
from qformer.results import Score

FILE = "report.html"
LIBRARIES = ("torch", "transformers", "timm", "accelerate")

CURVES = {
    "loss": ("Loss", "Nats a trained token, each step and its running mean.", None),
    "gap": (
        "Image-shuffle gap",
        "Loss with another sample's picture minus loss with its own, nats a token. At 0 the pictures do not matter.",
        0.0,
    ),
    "validation": ("Validation", "Mean score over the tasks of `validation`; the best checkpoint is kept.", None),
    "cosine": ("Query cosine", "Mean cosine between the queries' outputs. At 1 the queries have collapsed.", 1.0),
}
MORE_CURVES = {
    "gradient_norm": ("Gradient norm", "Before clipping.", None),
    "learning_rate": ("Learning rate", "Warm-up, then cosine.", None),
    "entropy": ("Attention entropy", "Of the cross-attention; 1 looks everywhere alike.", None),
    "samples_per_second": ("Samples per second", "Over all processes.", None),
    "tokens_per_second": ("Tokens per second", "Positions read by the LLM.", None),
}


def write_report(directory: Path) -> Path:
    """Write `report.html` into a run directory, or into any directory that holds an `eval/` folder.

    Sections whose files are missing are left out: a run that was not scored yet has a report too.

    Raises:
        DataError: there is nothing to report on, a file of the run is not what it should be, or the disk is full.
    """
    directory = Path(directory)
    settings = config.read_yaml(directory / "config.yaml") if (directory / "config.yaml").exists() else {}
    lines = read_lines(directory / "metrics.jsonl")
    scores = [Score.read(path) for path in score_files(directory / "eval")]
    if not (settings or lines or scores):
        raise DataError(f"{directory}: holds no config.yaml, metrics.jsonl or eval/*.json; a report needs one of them.")
    mixture = read_json(directory / "mixture.json") if (directory / "mixture.json").exists() else {}
    sections = [
        _head(directory, settings, lines, scores),
        _what_was_run(settings),
        *_by_role(scores, set(mixture)),
        _prompts([read_json(path) for path in sorted(directory.glob(f"eval/{sweep.FOLDER}/*.json"))]),
        _carried(read_json(directory / PLUG_FILE) if (directory / PLUG_FILE).exists() else {}),
        _curves(lines),
        _mixture(mixture),
        _answers(scores, Path(settings.get("data", {}).get("root", "."))),
    ]
    page = PAGE.format(
        title=escape(str(settings.get("name") or directory.name)),
        style=Path(__file__).with_suffix(".css").read_text(encoding="utf-8"),
        body="\n".join(section for section in sections if section),
        version=escape(__version__),
    )
    target = directory / FILE
    part = target.with_suffix(".html.part")
    try:
        part.write_text(page, encoding="utf-8")
        os.replace(part, target)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise DataError(f"{target}: the report cannot be written ({error}); make room or allow writing.") from None
    return target


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{title} · qformer</title>
<style>
{style}</style>
</head>
<body>
<main>
{body}
<footer>Written by qformer {version}.</footer>
</main>
</body>
</html>
"""


def _series(lines: Iterable[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """(step, value) of the lines that have the value as a finite number."""
    return [
        (line["step"], line[key])
        for line in lines
        if isinstance(line.get(key), int | float) and math.isfinite(line[key]) and "step" in line
    ]


def _head(
    directory: Path, settings: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], scores: Sequence[Score]
) -> str:
    name = escape(str(settings.get("name") or directory.name))
    tiles = []
    steps = settings.get("train", {}).get("steps")
    if lines and "step" in lines[-1]:
        done = lines[-1]["step"]
        tiles.append((f"{done:,}", "steps" if done == steps or not steps else f"steps of {steps:,}"))
        if batch := settings.get("train", {}).get("batch_size"):
            tiles.append((f"{done * batch:,}", "samples seen"))
    if loss := _series(lines, "loss"):
        tiles.append((charts.number(charts.smooth(loss)[-1][1]), "loss at the end, nats a token"))
    if gap := _series(lines, "gap"):
        tiles.append((charts.number(gap[-1][1]), "image-shuffle gap at the end"))
    if scores:
        tiles.append((str(len(scores)), "sets scored" if len(scores) > 1 else "set scored"))
    cards = "".join(
        f'<div class="card"><b>{escape(value)}</b><span>{escape(what)}</span></div>' for value, what in tiles
    )
    notice = ""
    if partial := [score for score in scores if score.partial]:
        notice = (
            f'<p class="notice">Scores marked <span class="badge">partial</span> are over a part of the set '
            f"({len(partial)} of {len(scores)} here); they stand apart from scores over all of it, "
            f"and are not to be compared with them.</p>"
        )
    title = f'<h1>{name}</h1>\n<p class="soft">A Q-Former between two frozen towers</p>'
    return f'{title}\n<div class="tiles">{cards}</div>{notice}'


def _what_was_run(settings: Mapping[str, Any]) -> str:
    if not settings:
        return ""
    vision, language, former, data, train = (
        settings.get(section, {}) for section in ("vision", "language", "qformer", "data", "train")
    )
    start = f"started from {former.get('init')}" if former.get("init") else "started from random weights"
    reads = "reads the instruction" if former.get("instruction", True) else "does not read the instruction"
    sets = ", ".join(f"{name} ×{weight:g}" if weight != 1 else name for name, weight in data.get("tasks", {}).items())
    sampling = {"sqrt": "square root of size", "proportional": "size", "uniform": "the same for all"}
    grouped = f"; up to {data['per_picture']} records of a picture together" if data.get("per_picture") else ""
    rate = f"rate {train.get('rate'):g}, warm-up {train.get('warmup_steps')} steps" if "rate" in train else ""
    rows = {
        "Image encoder": _tower(vision),
        "Language model": _tower(language),
        "Q-Former": f"{former.get('queries')} queries, {start}, {reads}" if former else "",
        "Training sets": f"{sets}; shares by {sampling.get(data.get('sampling'), data.get('sampling'))}{grouped}"
        if sets
        else "",
        "Steps": f"{train.get('steps'):,} of {train.get('batch_size')} samples; {rate}" if "steps" in train else "",
        "Precision": str(train.get("precision", "")),
        "Seed": str(settings.get("seed", "")),
        "Versions": f"Python {platform.python_version()}, "
        + ", ".join(f"{name} {metadata.version(name)}" for name in LIBRARIES),
    }
    entries = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in rows.items() if value)
    whole = escape(json.dumps(settings, indent=2, ensure_ascii=False))
    return (
        f'<h2>What was run</h2>\n<div class="card"><dl>{entries}</dl>'
        f"<details><summary>All settings</summary><pre>{whole}</pre></details></div>"
    )


def _tower(section: Mapping[str, Any]) -> str:
    name = str(section.get("name") or "")
    return f"{name}, revision {section['revision']}" if section.get("revision") else name


def _curves(lines: Sequence[Mapping[str, Any]]) -> str:
    main = "".join(_curve(lines, key, *words) for key, words in CURVES.items())
    more = "".join(_curve(lines, key, *words) for key, words in MORE_CURVES.items())
    if not main and not more:
        return ""
    rest = f'<details><summary>More curves</summary><div class="charts">{more}</div></details>' if more else ""
    return f'<h2>Curves</h2>\n<p class="soft">By training step.</p><div class="charts">{main}</div>{rest}'


def _curve(lines: Sequence[Mapping[str, Any]], key: str, title: str, words: str, limit: float | None) -> str:
    points = _series(lines, key)
    if not points:
        return ""
    drawn = [("raw", points), ("main", charts.smooth(points))] if key == "loss" else [("main", points)]
    chart = charts.line_chart(f"{title} by step, {charts.number(points[-1][1])} at the end", drawn, limit)
    return f'<div class="card"><h3>{title}</h3><p class="soft">{words}</p>{chart}</div>'


def _mixture(mixture: Mapping[str, Mapping[str, Any]]) -> str:
    if not mixture:
        return ""
    total = sum(entry["drawn"] for entry in mixture.values()) or 1
    most = max(max(entry["asked"], entry["drawn"] / total) for entry in mixture.values())
    rows = []
    for name, entry in mixture.items():
        share = entry["drawn"] / total
        bars = charts.share_bars(
            f"{name}: asked {entry['asked']:.1%}, drawn {share:.1%}",
            [("asked", entry["asked"]), ("drawn", share)],
            most,
        )
        rows.append(
            f'<tr><td class="name"><b>{escape(name)}</b></td><td class="plot">{bars}</td>'
            + _cell("Asked for", f"{100 * entry['asked']:.2f} %")
            + _cell("Drawn", f"{100 * share:.2f} %", f"{entry['drawn']:,} samples")
            + _cell("Records", f"{entry['records']:,}")
            + _cell("Passes", f"{entry['passes']:.2f}")
            + "</tr>"
        )
    return (
        '<h2>Mixture</h2>\n<p class="soft">Shares of the training samples.</p>'
        + _legend("asked", "drawn")
        + _table(("Set", "", "Asked for", "Drawn", "Records", "Passes"), rows)
    )


def _by_role(scores: Sequence[Score], mixture: Collection[str]) -> list[str]:
    """Scores of held-out and of held-in sets apart, and again apart those of parts.

    A held-out set that was tuned on is held in by this run.
    """
    names = {name.partition(":")[0] for name in mixture}
    roles = [
        "held_in" if score.role == "held_in" or score.task.partition(":")[0] in names else "held_out"
        for score in scores
    ]
    return [
        _scores(
            [score for score, own in zip(scores, roles, strict=True) if own == role and score.partial is partial],
            about(partial, role if len(set(roles)) > 1 else ""),
            KNOWN[role] if len(set(roles)) > 1 else "",
        )
        for partial in (False, True)
        for role in ROLES
    ]


KNOWN = {
    "held_out": "None of these sets was trained on: zero-shot.",
    "held_in": "These sets are trained on, with other pictures: not zero-shot.",
}


def _scores(scores: Sequence[Score], heading: str, known: str) -> str:
    if not scores:
        return ""
    kinds = [kind for kind in BASELINES if any(mark.kind == kind for score in scores for mark in score.baselines)]
    rows = [_score_row(score, kinds, 1.0 if score.percent else _round_up(scores)) for score in scores]
    *others, last = [BASELINES[kind] for kind in kinds] or [""]
    beside = f"{', '.join(others)} and {last}" if others else last
    words = [known, f"Each beside {beside}." if beside else "", "Intervals are 95 %, by bootstrap over pictures."]
    return (
        f'<h2>{heading}</h2>\n<p class="soft">{" ".join(filter(None, words))}</p>'
        + _legend("score", *kinds)
        + _table(("Set", "", "Score", *(LEGEND[kind].capitalize() for kind in kinds), "Samples"), rows)
        + _types(scores)
        + _beside(scores)
    )


def _carried(content: Mapping[str, Any]) -> str:
    """The stages of an adapter that was carried over to another LLM, a row a set, where any of them was scored."""
    found = {name: content["rows"][name]["scores"] for name in ROWS if name in content.get("rows", {})}
    if not found:
        return ""
    rows = []
    for key in dict.fromkeys(key for scores in found.values() for key in scores):
        cells = [_cell(ROWS[name], *cell(scores.get(key)).split("\n")) for name, scores in found.items()]
        title = next(scores[key]["title"] for scores in found.values() if key in scores)
        about = escape(recipes([scores[key] for scores in found.values() if key in scores]))
        name = f'<b>{escape(title)}</b><div class="soft small">{about}</div>'
        rows.append(f'<tr><td class="name">{name}</td>{"".join(cells)}</tr>')
    words = f"From {content['own_language']} to {content['language']}, projection {content['start']}"
    heads = ("Set", *(ROWS[name].capitalize() for name in found))
    return f'<h2>Carried over</h2>\n<p class="soft">{escape(words)}.</p>{_table(heads, rows, names=1)}'


def _types(scores: Sequence[Score]) -> str:
    rows = [
        f'<tr><td class="name"><b>{escape(score.title)}</b>, {escape(kind)}</td>'
        + "".join(
            _cell(head, NONE if entry.get(name) is None else score.shown(entry[name]))
            for head, name in (("Score", "score"), ("Shuffled pictures", "shuffled"))
        )
        + _cell("Samples", f"{entry['samples']:,}")
        + "</tr>"
        for score in scores
        if len(score.by_type) > 1
        for kind, entry in score.by_type.items()
    ]
    table = _table(("Set and type", "Score", "Shuffled pictures", "Samples"), rows, names=1)
    return f"<details><summary>By question type</summary>{table}</details>" if rows else ""


def _beside(scores: Sequence[Score]) -> str:
    rows = [
        f'<tr><td class="name"><b>{escape(score.title)}</b>, {escape(name)}</td>'
        + _cell("Value", beside_in_words(name, value))
        + "</tr>"
        for score in scores
        for name, value in score.beside.items()
    ]
    table = _table(("Set and number", "Value"), rows, names=1)
    return f"<details><summary>Further numbers</summary>{table}</details>" if rows else ""


def _prompts(swept: Sequence[Mapping[str, Any]]) -> str:
    """What each set scores with each of its prompts."""
    tables = []
    for each in swept:
        percent = METRICS[each["metric"]].percent
        rows = []
        for place, one in enumerate(each["prompts"]):
            marks = ["the card's own"] * (place == 0)
            marks += [name for name in ("best", "median", "worst") if each[name] == place]
            about = " · ".join([*marks, one["recipe"]])
            value = in_words(one, percent)
            rows.append(
                f'<tr><td class="name"><b>{escape(one["prompt"])}</b><div class="soft small">{escape(about)}</div></td>'
                f"{_cell('Score', value)}</tr>"
            )
        part = f", {each['samples']:,} of {each['of']:,} samples" if each["partial"] else ""
        head = f"{escape(each['title'])}, {escape(each['metric'])}{part}"
        tables.append(f"<h3>{head}</h3>{_table(('Prompt', 'Score'), rows, names=1)}")
    words = "How much a score hangs on the wording; choosing the best of them by these scores is no zero-shot."
    return f'<h2>Prompts</h2>\n<p class="soft">{words}</p>{"".join(tables)}' if tables else ""


BASELINES = {
    "shuffled": "the same with shuffled pictures (nobody keeps their own)",
    "most_frequent": "always giving the most frequent answer to questions of its type",
    "chance": "choosing blindly among the candidates",
}
LEGEND = {
    "score": "their own pictures",
    "shuffled": "shuffled pictures",
    "most_frequent": "most frequent answer",
    "chance": "chance",
    "asked": "asked for",
    "drawn": "drawn",
}
SHAPES = {
    "most_frequent": '<line class="most_frequent" x1="7" x2="7" y1="1" y2="13"/>',
    "chance": '<line class="chance" x1="7" x2="7" y1="1" y2="13"/>',
    "asked": '<rect class="asked" x="0" y="4" width="14" height="6" rx="2"/>',
    "drawn": '<rect class="drawn" x="0" y="4" width="14" height="6" rx="2"/>',
}


def _legend(*kinds: str) -> str:
    entries = []
    for kind in kinds:
        shape = SHAPES.get(kind, f'<circle class="{kind}" cx="7" cy="7" r="5"/>')
        entries.append(f'<span><svg width="14" height="14" aria-hidden="true">{shape}</svg>{LEGEND[kind]}</span>')
    return f'<div class="legend">{"".join(entries)}</div>'


def _round_up(scores: Sequence[Score]) -> float:
    """The right end of the plots of metrics that are not shares: the same for all of them."""
    marks = [mark for score in scores if not score.percent for mark in score.marks]
    return max([1.0, *(mark.value if mark.high is None else mark.high for mark in marks)])


def _score_row(score: Score, kinds: Sequence[str], high: float) -> str:
    label = f"{score.title}: " + ", ".join(f"{LEGEND[mark.kind]} {score.shown(mark.value)}" for mark in score.marks)
    badge = ' <span class="badge">partial</span>' if score.partial else ""
    step = f"step {score.step:,}" if score.step is not None else ""
    about = " · ".join(escape(part) for part in (score.metric, score.split, score.recipe, step) if part)
    plot = charts.interval_plot(label, score.marks, high, unit=100 if score.percent else 1)
    found = {mark.kind: mark for mark in score.marks}
    cells = [
        _cell(LEGEND[kind].capitalize(), *_value(score, found.get(kind)), strong=kind == "score")
        for kind in ("score", *kinds)
    ]
    parts = [f"of {score.total:,}"] if score.partial else []
    parts += [f"{score.broken:,} broken"] if score.broken else []
    parts += [f"{100 * score.unreachable:.1f} % of truths no candidate"] if score.unreachable else []
    return (
        f'<tr><td class="name"><b>{escape(score.title)}</b>{badge}<div class="soft small">{about}</div></td>'
        f'<td class="plot">{plot}</td>{"".join(cells)}{_cell("Samples", f"{score.samples:,}", ", ".join(parts))}</tr>'
    )


NONE = "–"


def _value(score: Score, mark: Mark | None) -> tuple[str, str]:
    return (score.shown(mark.value), _interval(score, mark)) if mark else (NONE, "")


def _interval(score: Score, mark: Mark) -> str:
    if mark.low is None or mark.high is None:
        return ""
    return f"{score.shown(mark.low).removesuffix(' %')} to {score.shown(mark.high)}"


def _cell(label: str, value: str, below: str = "", *, strong: bool = False) -> str:
    shown = f"<b>{escape(value)}</b>" if strong else escape(value)
    second = f' <span class="interval">{escape(below)}</span>' if below else ""
    kind = "number empty" if value == NONE else "number"
    return f'<td class="{kind}" data-label="{label}"><span>{shown}{second}</span></td>'


def _table(heads: Sequence[str], rows: Sequence[str], names: int = 2) -> str:
    """A table whose columns behind the first `names` hold numbers."""
    head = "".join(f"<th{' class=number' if place >= names else ''}>{name}</th>" for place, name in enumerate(heads))
    return f'<div class="card"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _answers(scores: Sequence[Score], root: Path) -> str:
    galleries = [
        gallery.gallery(score.title, score.predictions, score.root or root, graded=not score.percent)
        for score in scores
        if score.predictions and score.score is not None
    ]
    heading = '<h2>Answers</h2>\n<p class="soft">Right and wrong ones, drawn at random from each set.</p>'
    return "".join([heading, *galleries]) if galleries else ""
