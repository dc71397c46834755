"""Every shipped card over small files in the official layout: what is read, and the exact text that is rendered.

`python -m tests.test_fixtures` writes the golden file anew; read the difference before it is committed.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from qformer import resources, text
from qformer.cards import EvalCard, TaskCard, TrainCard, load
from qformer.data.readers import open_records
from qformer.evaluate.run import picture_name
from qformer.images import load_image
from qformer.sample import Sample, Turn, Video
from qformer.videos import frames
from tests import fixtures

GOLDEN = fixtures.HERE / "golden.txt"
SHOWN = 6
"""Candidates of a sample that are written out."""


def named() -> list[str]:
    """Every card and every variant that is read from the official files."""
    names = resources.names("tasks")
    variants = [f"{name}:{variant}" for name in names for variant in load(name).variants]
    mirrors = (":hub", ":shards")
    return [*names, *(name for name in variants if not name.endswith(mirrors))]


def read(root: Path, card: TaskCard, section: TrainCard | EvalCard) -> list[Sample]:
    return list(open_records(section, root, card))


def golden(root: Path) -> str:
    """Cards one after the other: each sample as it is asked about and answered, the first one in every phrasing.

    Of a variant only the sections that it changes.
    """
    return "\n".join(line for name in named() for line in _card(root, load(name))) + "\n"


def _card(root: Path, card: TaskCard) -> Iterator[str]:
    base = load(card.name)
    if card.train and (not card.variant or card.train != base.train):
        templates = text.load_templates(card.train.template)
        yield f"==== {card.key}, trained on"
        for number, sample in enumerate(read(root, card, card.train)):
            yield from _sample(root, sample)
            if number == 0 and not sample.turns:
                for each in templates.templates:
                    single = text.Templates(templates.name, 1, "", [each])
                    yield from _rendered(text.render_train(card.train, single, sample, seed=0, number=0))
            else:
                yield from _rendered(text.render_train(card.train, templates, sample, seed=0, number=0))
        yield ""
    if card.eval and (not card.variant or card.eval != base.eval):
        templates = text.load_templates(card.eval.template)
        yield f"==== {card.key}, scored on {card.eval.split}"
        for number, sample in enumerate(read(root, card, card.eval)):
            yield from _sample(root, sample)
            prompts = templates.templates if number == 0 else templates.templates[:1]
            for each in prompts:
                single = text.Templates(templates.name, 1, "", [each])
                yield f"    {text.render_eval(card.eval, single, sample).instruction}".replace("\n", "⏎")
            candidates = text.candidates_of(card.eval, sample) if card.eval.answer == "rank" else ()
            yield from (f"    ? {each}" for each in candidates[:SHOWN])
            if len(candidates) > SHOWN:
                yield f"    ? and {len(candidates) - SHOWN} more"
            for answer, count in Counter(sample.references).items():
                yield f"    = {answer}" + (f" (×{count})" if count > 1 else "")
        yield ""


def _sample(root: Path, sample: Sample) -> Iterator[str]:
    pictures = ", ".join(picture_name(picture, root) for picture in sample.images)
    yield f"  {sample.id}  [{pictures}]"


def _rendered(rows: list[text.Rendered]) -> Iterator[str]:
    for row in rows:
        for turn in row.history:
            yield f"    ({turn.instruction} → {turn.answer})".replace("\n", "⏎")
        for turn in row.turns or (Turn(row.instruction, row.target),):
            yield f"    {turn.instruction} ▸ {turn.answer}".replace("\n", "⏎")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fixtures.root(tmp_path_factory.mktemp("fixtures"))


def test_every_card_and_template_is_rendered_as_it_was(root: Path) -> None:
    assert golden(root) == GOLDEN.read_text(encoding="utf-8")


SHORT = "Question: {} Short answer:"
APPENDIX_E = {
    "flickr30k": (0, "A short image description:"),
    "gqa": (0, SHORT.format("Is the bröd to the left of the cup?")),
    "hatefulmemes": (
        0, 'This is an image with: "look how many people stand here" written on it. Is it hateful? Answer:',
    ),
    "iconqa": (0, "Question: How many circles are there? Options: (a) 3 (b) 5 (c) 7. Short answer:"),
    "ivqa": (0, SHORT.format("What is being cut?")),
    "msrvtt_qa": (0, SHORT.format("what are three people sitting on?")),
    "msvd_qa": (0, SHORT.format("what does a girl do?")),
    "nocaps": (0, "A short image description:"),
    "scienceqa": (
        0,
        "Context: Two magnets lie on a table. Question: Will these magnets attract or repel each other? "
        "Options: (a) attract (b) repel. Answer:",
    ),
    "textvqa": (0, "OCR tokens: MONDAY. Question: what day is on the calendar? Short answer:"),
    "visdial": (
        2,
        "Dialog history: Question: is it sunny? Answer: yes. Question: how many kites are there? Answer: 2.\n "
        "Question: what colour is the kite? Short answer:",
    ),
    "vizwiz": (0, SHORT.format("Can you tell me what this medicine is please?")),
    "vsr": (
        0, 'Based on the image, is this statement true or false? "The cat is under the café table." Answer:',
    ),
}  # fmt: skip
"""By card the place of a sample, and what the paper's appendix makes of it."""


@pytest.mark.parametrize("name", fixtures.HELD_OUT)
def test_the_held_out_sets_are_asked_in_the_words_of_appendix_e(root: Path, name: str) -> None:
    card, (place, asked) = load(name), APPENDIX_E[name]
    assert card.eval is not None
    sample = open_records(card.eval, root, card)[place]
    assert text.render_eval(card.eval, text.load_templates(card.eval.template), sample).instruction == asked


def test_every_training_template_stands_in_the_golden_file() -> None:
    """The words of each phrasing, so that none can drop out of the file unnoticed."""
    written = GOLDEN.read_text(encoding="utf-8")
    sections = [section for name in named() for section in (load(name).train, load(name).eval) if section]
    for name in sorted({section.template for section in sections} - {"instruction"}):
        for template in text.load_templates(name).templates:
            for words in (part.partition("}")[2] for part in ("}" + template).split("{")):
                assert words in written, template


@pytest.mark.parametrize("name", named())
def test_every_record_has_an_id_of_its_own_and_a_picture_that_opens(root: Path, name: str) -> None:
    card = load(name)
    for section in filter(None, (card.train, card.eval)):
        samples = read(root, card, section)
        assert len({sample.id for sample in samples}) == len(samples)
        for sample in samples:
            for picture in sample.images:
                film = isinstance(picture, Video)
                shown = [*frames(picture, 10_000, sample.id)] if film else [load_image(picture, 10_000, sample.id)]
                assert len(shown) == (4 if film else 1)
                assert all(each.size == (40, 36) for each in shown)


def test_no_picture_lies_there_for_nothing(root: Path) -> None:
    asked = {
        picture.path if isinstance(picture, Video) else picture
        for card in map(load, named())
        for section in filter(None, (card.train, card.eval))
        for sample in read(root, card, section)
        for picture in sample.images
    }
    assert {root / name for name in (*fixtures.PICTURES, *fixtures.VIDEOS)} - asked == set()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        GOLDEN.write_text(golden(fixtures.root(Path(folder))), encoding="utf-8")
