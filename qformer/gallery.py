"""Right and wrong answers of a model beside the pictures they are about, as parts of a page."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from qformer import images, keyed, videos
from qformer.errors import DataError
from qformer.sample import Video

Record = Mapping[str, Any]
"""A line of `eval/TASK.predictions.jsonl`."""

EXAMPLES = 4
"""Right ones, and as many wrong ones."""
THUMBNAIL = 320
"""Longest side of a picture, in pixels."""
SMALL = 128
"""Pictures up to this size keep every pixel."""
MOST_PIXELS = 100_000_000
NO_PICTURE = '<div class="none">no picture at hand</div>'


def gallery(title: str, records: Sequence[Record], root: Path, *, graded: bool = False) -> str:
    """Some right answers, then some wrong ones; of graded ones, some of the best and of the worst.

    Args:
        title: of the data set.
        records: its predictions.
        root: the folder that relative names of pictures start from.
        graded: whether scores have no line between right and wrong, as those of captions.
    """
    shuffled = sorted(records, key=lambda record: keyed.keyed_hash("gallery", record["id"]))
    if graded:
        ordered = sorted(shuffled, key=lambda record: record["score"])
        tenth = max(1, len(ordered) // 10)
        good, bad, words = ordered[-tenth:], ordered[:tenth], ("best tenth", "worst tenth")
        counts = f"{len(ordered):,} answers"
    else:
        good = [record for record in shuffled if record["score"] >= 0.5]
        bad = [record for record in shuffled if record["score"] < 0.5]
        words = "right", "wrong"
        counts = f"{len(good):,} right · {len(bad):,} wrong"
    rows = [
        f'<div class="gallery">{"".join(_figure(record, root, kind, verdict) for record in chosen[:EXAMPLES])}</div>'
        for kind, verdict, chosen in (("right", words[0], good), ("wrong", words[1], bad))
        if chosen
    ]
    return (
        f'<details open><summary>{escape(title)} <span class="soft">{counts}</span></summary>{"".join(rows)}</details>'
    )


def _figure(record: Record, root: Path, kind: str, verdict: str) -> str:
    pictures = "".join(_shown(source, root) for source in record.get("images", ()))
    truths = list(dict.fromkeys(str(reference) for reference in record["references"]))
    truth = " / ".join(truths[:3]) + (f" (and {len(truths) - 3} more)" if len(truths) > 3 else "")
    answer = escape(str(record["prediction"])) or "(nothing)"
    return (
        f'<figure class="{kind}"><div class="pictures">{pictures or NO_PICTURE}</div><figcaption>'
        f'<p class="verdict">{"✓" if kind == "right" else "✗"} {verdict}</p>'
        f'<p class="question"><span class="label">Instruction</span>{escape(str(record["instruction"]))}</p>'
        f'<p><span class="label">Answer</span><span class="answer">{answer}</span></p>'
        f'<p><span class="label">Truth</span>{escape(truth)}</p></figcaption></figure>'
    )


def _shown(source: str, root: Path) -> str:
    """A picture, or frames of a video, as data URIs; a note in their place where the file is gone or broken by now."""
    try:
        if videos.is_video(root / source):
            seen = list(videos.frames(Video(root / source), MOST_PIXELS, source))
        else:
            seen = [images.load_image(root / source, MOST_PIXELS, source)]
    except DataError:
        return NO_PICTURE
    return "".join(f'<img alt="{escape(Path(source).name)}" src="{data_uri(each)}">' for each in seen)


def data_uri(picture: Image.Image) -> str:
    """A thumbnail: PNG where the picture is small, so that drawn scenes stay sharp, JPEG otherwise."""
    form = "PNG" if max(picture.size) <= SMALL else "JPEG"
    thumbnail = picture.copy()
    thumbnail.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    thumbnail.save(buffer, form, quality=82, optimize=True)
    return f"data:image/{form.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
