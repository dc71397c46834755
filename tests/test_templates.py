"""The published prompts, word for word, and what templates may hold."""

from __future__ import annotations

import string

import pytest

from qformer import resources, text
from qformer.errors import ConfigError, DataError

FIELDS = {"question", "answer", "options", "statement", "instruction", "context", "text"}


@pytest.mark.parametrize("name", resources.names("templates"))
def test_every_template_is_filled_from_known_fields_and_says_where_it_is_from(name: str) -> None:
    loaded = text.load_templates(name)
    assert (loaded.name, loaded.version) == (name, 1)
    assert len(loaded.source) > 20
    assert len(set(loaded.templates)) == len(loaded.templates)
    for template in loaded.templates:
        assert template == template.strip()
        assert {field for _, field, _, _ in string.Formatter().parse(template) if field is not None} <= FIELDS


@pytest.mark.parametrize(("name", "count"), [("caption", 13), ("vqa", 10), ("vqg", 6)])
def test_training_templates_are_as_many_as_published(name: str, count: int) -> None:
    assert len(text.load_templates(name).templates) == count


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        ("short_answer", "Question: What is it? Short answer:"),
        ("caption_zero_shot", "A short image description:"),
        ("vsr_zero_shot", 'Based on the image, is this statement true or false? "It is." Answer:'),
        ("iconqa_zero_shot", "Question: What is it? Options: (a) red (b) blue. Short answer:"),
        ("multiple_choice", "Question: What is it? Options: (a) red (b) blue. Short answer:"),
    ],
)
def test_zero_shot_prompts_are_those_of_the_paper(name: str, prompt: str) -> None:
    template, *_ = text.load_templates(name).templates  # the others are what a sweep scores too
    fields = {"question": "What is it?", "statement": "It is.", "options": text.lettered(["red", "blue"])}
    assert text.fill(template, fields, "test") == prompt


def test_the_vqa_templates_quote_the_question_where_the_paper_does() -> None:
    templates = text.load_templates("vqa").templates
    assert templates[8] == 'What is the answer to the following question? "{question}"'
    assert templates[9] == 'The question "{question}" can be answered using the image. A short answer is'


def test_a_field_that_is_not_there_is_named() -> None:
    with pytest.raises(DataError, match=r"no field 'question' .* Known: quest\."):
        text.fill("{question}", {"quest": "x"}, "here")


def test_an_unknown_template_is_named_with_a_guess() -> None:
    with pytest.raises(ConfigError, match=r"unknown template 'captions'\. Did you mean 'caption'\?"):
        text.load_templates("captions")
