"""The shipped cards: each loads, names only what exists, and says what the paper leaves open."""

from __future__ import annotations

from pathlib import Path

import pytest

from qformer import cards, resources, text
from qformer.data.readers import READERS
from qformer.errors import ConfigError

HELD_IN = ["aokvqa", "coco_caption", "llava_conversation", "vqav2", "vqg_vqav2"]
HELD_OUT = ["gqa", "iconqa", "nocaps", "vsr"]


def with_variants() -> list[str]:
    names = resources.names("tasks")
    return [*names, *(f"{name}:{variant}" for name in names for variant in cards.load(name).variants)]


@pytest.mark.parametrize("name", with_variants())
def test_every_card_names_only_what_there_is(name: str) -> None:
    card = cards.load(name)
    assert card.key == name
    assert card.title
    assert card.licence
    assert card.source
    assert card.downloads
    for section in (card.train, card.eval):
        if section is None:
            continue
        reader = READERS[section.reader]
        assert set(section.files) == set(reader.roles)
        assert set(section.options) <= set(reader.settings)
        assert section.size
        assert text.load_templates(section.template).templates
    if card.eval and card.eval.answer == "generate":
        assert card.eval.decoding.num_beams == 5


@pytest.mark.parametrize("name", HELD_IN + HELD_OUT)
def test_the_role_says_which_sections_there_are(name: str) -> None:
    card = cards.load(name)
    assert card.role == ("held_in" if name in HELD_IN else "held_out")
    assert (card.train is not None) == (name in HELD_IN)
    assert card.eval is not None or name in ("llava_conversation", "vqg_vqav2")


def test_held_in_and_held_out_stand_for_the_cards_of_that_role() -> None:
    assert set(HELD_IN) <= set(cards.load_all(["held_in"], "train"))
    assert set(HELD_OUT) <= set(cards.load_all(["held_out"], "eval"))


@pytest.mark.parametrize("name", HELD_OUT)
def test_a_held_out_card_is_refused_in_a_mixture(name: str) -> None:
    with pytest.raises(ConfigError, match=f"'{name}', which is held out"):
        cards.load_all([name], "train")


def test_a_set_without_a_score_is_refused_in_evaluation() -> None:
    with pytest.raises(ConfigError, match="'vqg_vqav2' has no 'eval' section"):
        cards.load_all(["vqg_vqav2"], "eval")


def test_published_sizes_give_the_published_shares() -> None:
    sizes = {name: cards.load(name).train.size for name in HELD_IN}  # type: ignore[union-attr]
    roots = {name: size**0.5 for name, size in sizes.items()}
    shares = cards.probabilities(sizes, {})
    assert roots["coco_caption"] == pytest.approx(752.826, abs=1e-3)
    assert roots["vqav2"] == roots["vqg_vqav2"] == pytest.approx(666.151, abs=2e-3)
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["coco_caption"] / shares["aokvqa"] == pytest.approx(752.826 / 130.599, rel=1e-4)


BASE = "name: x\nversion: 1\n"
TRAIN = "train: {reader: jsonl, files: {records: r, images: i}, template: instruction%s}\n"


@pytest.mark.parametrize(
    ("text_of_card", "message"),
    [
        ("name: 'x'\nversion: 1\neval: {reader: 'gqa'}\n", "eval lacks files, template, split, answer, metric"),
        ("name: 'x'\n", "the card lacks 'version'"),
        ("name: 'x'\nversion: 1\nrole: held_up\n", "role"),
        ("name: 'x'\nversion: 1\nlicense: 'MIT'\n", "unknown key 'license'.*Did you mean 'licence'"),
        ("name: 'x'\nversion: 'new'\n", "version"),
        ("name: no\nversion: 1\n", "name is the YAML boolean false"),
        ("name: [x\n", "not valid YAML"),
        (BASE + "downloads: a.zip\n", r"downloads is 'a\.zip'; it takes a list"),
        (BASE + "downloads: [{what: a.zip, source: x, into: y}]\n", "downloads.*gigabytes"),
        (BASE + "downloads: [{what: a, source: x, into: y, gigabytes: -1}]\n", r"downloads\.gigabytes is -1"),
        (BASE + "downloads: [{what: a, into: y, url: x}]\n", r"unknown key 'downloads\[0\]\.url'"),
        (BASE + "train: no\n", "train is the YAML boolean false; it takes named values"),
        (BASE + "variants: [v]\n", r"variants is \['v'\]; it takes named values"),
        (BASE + "variants: {v: no}\n", r"variants\.v is the YAML boolean false; it takes named values"),
        (BASE + TRAIN % ", options: [a]", r"train\.options is \['a'\]; it takes named values"),
        (BASE + TRAIN % ", size: 0", r"train\.size is 0; it must be at least 1"),
        (BASE + TRAIN % ", target: '{answer'", r"train\.target: '\{answer' cannot be filled \(expected '\}'"),
        (BASE + TRAIN % ", target: '{}'", r"train\.target: '\{\}' cannot be filled by name"),
    ],
)
def test_a_card_with_a_mistake_says_file_and_key(tmp_path: Path, text_of_card: str, message: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text_of_card)
    with pytest.raises(ConfigError, match=message) as caught:
        cards.load(str(file))
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        ("{v: no}", r"variants\.v is the YAML boolean false"),
        ("[v]", r"variants is \['v'\]"),
        ("{v: {train: [1]}}", r"variant 'v': train is \[1\]; it takes named values"),
        ("{v: {trian: {size: 1}}}", r"variant 'v': unknown key 'trian'\. Did you mean 'train'\?"),
    ],
)
def test_a_variant_with_a_mistake_says_file_and_key(tmp_path: Path, variants: str, message: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(BASE + TRAIN % "" + f"variants: {variants}\n")
    with pytest.raises(ConfigError, match=message) as caught:
        cards.load(f"{file}:v")
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 0}, r"decoding\.max_new_tokens is 0; it must be at least 1"),
        ({"num_beams": 0}, r"decoding\.num_beams is 0; it must be at least 1"),
        ({"min_new_tokens": 31}, r"decoding\.min_new_tokens is 31; it must be at least 0 and at most 30"),
        ({"min_new_tokens": -1}, r"decoding\.min_new_tokens is -1"),
        ({"temperature": 0.0}, r"decoding\.temperature is 0\.0; it must be above 0"),
        ({"top_p": 1.5}, r"decoding\.top_p is 1\.5; it must be above 0 and at most 1"),
        ({"top_p": 0.0}, r"decoding\.top_p is 0\.0"),
        ({"repetition_penalty": -1.0}, r"decoding\.repetition_penalty is -1\.0; it must be above 0"),
        ({"length_penalty": float("nan")}, r"decoding\.length_penalty is nan; it must be a finite number"),
    ],
)
def test_decoding_out_of_range_is_refused(change: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cards.Decoding(**change)  # type: ignore[arg-type]


def test_unknown_names_are_met_with_a_guess() -> None:
    with pytest.raises(ConfigError, match=r"unknown task card 'gqua'\. Did you mean 'gqa'\?"):
        cards.load("gqua")
    with pytest.raises(ConfigError, match=r"no variant 'multi'.*multiple_choice"):
        cards.load("aokvqa:multi")


def test_a_variant_changes_its_keys_and_keeps_the_rest() -> None:
    plain, variant = cards.load("aokvqa"), cards.load("aokvqa:multiple_choice")
    assert plain.eval and variant.eval
    assert variant.eval.files == plain.eval.files
    assert (plain.eval.answer, variant.eval.answer) == ("generate", "rank")
    assert variant.eval.options["form"] == "multiple_choice"
