"""The shipped cards: each loads, names only what exists, and says what the paper leaves open."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import pytest

from qformer import cards, listing, resources, text
from qformer.cards import load
from qformer.data.readers import READERS
from qformer.errors import ConfigError
from qformer.evaluate.metrics import METRICS

HELD_IN = [
    "aokvqa", "coco_caption", "llava_conversation", "llava_detail", "llava_reasoning", "ocrvqa", "okvqa", "textcaps",
    "vqav2", "vqg_aokvqa", "vqg_okvqa", "vqg_vqav2", "web_capfilt",
]  # fmt: skip
UNSCORED = [name for name in HELD_IN if name.startswith(("llava", "vqg", "web"))]
HELD_OUT = [
    "flickr30k", "gqa", "hatefulmemes", "iconqa", "ivqa", "msrvtt_qa", "msvd_qa", "nocaps", "scienceqa", "textvqa",
    "visdial", "vizwiz", "vsr",
]  # fmt: skip


def with_variants() -> list[str]:
    names = resources.names("tasks")
    return [*names, *(f"{name}:{variant}" for name in names for variant in load(name).variants)]


@pytest.mark.parametrize("name", with_variants())
def test_every_card_names_only_what_there_is(name: str) -> None:
    card = load(name)
    assert card.key == name
    assert card.title
    assert card.licence
    assert card.source
    assert card.downloads
    for section in (card.train, card.eval):
        if section is None:
            continue
        reader = READERS[section.reader]
        assert set(reader.roles) <= set(section.files) <= {*reader.roles, *reader.optional}
        assert set(section.options) <= set(reader.settings)
        assert section.size or card.variant == "per_answer" or "difficult" in str(section.options)  # some are dropped
        assert text.load_templates(section.template).templates
    if card.eval and card.eval.answer == "generate":
        assert card.eval.decoding.num_beams == 5


@pytest.mark.parametrize("name", HELD_IN + HELD_OUT)
def test_the_role_says_which_sections_there_are(name: str) -> None:
    card = load(name)
    assert card.role == ("held_in" if name in HELD_IN else "held_out")
    assert (card.train is not None) == (name in (*HELD_IN, "scienceqa"))
    assert (card.eval is None) == (name in UNSCORED)


def test_held_in_and_held_out_stand_for_the_cards_of_that_role() -> None:
    assert set(cards.load_all(["held_in"], "train")) == set(HELD_IN)
    assert set(cards.load_all(["held_out"], "eval")) == set(HELD_OUT)
    assert set(resources.names("tasks")) == {*HELD_IN, *HELD_OUT} and len({*HELD_IN, *HELD_OUT}) == 26


@pytest.mark.parametrize("name", HELD_OUT)
def test_a_held_out_card_is_refused_in_a_mixture(name: str) -> None:
    with pytest.raises(ConfigError, match=f"'{name}', which is held out"):
        cards.load_all([name], "train")


def test_a_set_without_a_score_is_refused_in_evaluation() -> None:
    with pytest.raises(ConfigError, match="'vqg_vqav2' has no 'eval' section"):
        cards.load_all(["vqg_vqav2"], "eval")


A = {
    "coco_caption": 0.092316, "web_capfilt": 0.456742, "textcaps": 0.040627, "vqav2": 0.081688, "okvqa": 0.011639,
    "aokvqa": 0.016015, "ocrvqa": 0.109795, "vqg_vqav2": 0.081688, "vqg_okvqa": 0.011639, "vqg_aokvqa": 0.016015,
    "llava_conversation": 0.029195, "llava_detail": 0.018694, "llava_reasoning": 0.033948,
}  # fmt: skip
"""p_d at the published sizes, dialogues counted (the paper's formula without its hand-made changes)."""
C = {
    "coco_caption": 0.089343, "web_capfilt": 0.442030, "textcaps": 0.039318, "vqav2": 0.079056, "okvqa": 0.011264,
    "aokvqa": 0.015499, "ocrvqa:bliva": 0.106031, "vqg_vqav2": 0.079056, "vqg_okvqa": 0.011264, "vqg_aokvqa": 0.015499,
    "llava_conversation:turns": 0.060691, "llava_detail": 0.018092, "llava_reasoning": 0.032855,
}  # fmt: skip
"""The same with LLaVA's turns counted, and OCR-VQA as a re-implementation did."""


def size(name: str) -> int:
    card = load(name)
    assert card.train and card.train.size
    return card.train.size


@pytest.mark.parametrize("published", [A, C], ids=["A", "C"])
def test_published_sizes_give_the_published_shares(published: dict[str, float]) -> None:
    shares = cards.probabilities({name: size(name) for name in published}, {})
    assert sum(shares.values()) == pytest.approx(1)
    for name, share in published.items():
        assert f"{shares[name]:.4f}" == f"{share:.4f}"
        assert shares[name] == pytest.approx(share, abs=6e-7)


def test_the_sizes_of_a_re_implementation_give_its_ten_ratios() -> None:
    """BLIVA has LLaVA's turns as one set and no Web CapFilt; √S_d sums to 4362.08."""
    names = ["ocrvqa:bliva", "vqav2:bliva", "okvqa", "aokvqa", "coco_caption", "textcaps"]
    sizes = {name: size(name) for name in (*names, "vqg_vqav2:bliva", "vqg_okvqa", "vqg_aokvqa")}
    sizes["llava"] = sum(size(name) for name in ("llava_conversation:turns", "llava_detail", "llava_reasoning"))
    assert sizes["llava"] == 361_411
    assert sum(each**0.5 for each in sizes.values()) == pytest.approx(4362.08, abs=0.005)
    shares = cards.probabilities(sizes, {})
    ratios = {
        "ocrvqa:bliva": 0.20482112476204395, "vqav2:bliva": 0.15271327995696837, "okvqa": 0.02175930084085304,
        "aokvqa": 0.02993954782443368, "coco_caption": 0.17258428920102808, "llava": 0.1378184390146113,
        "textcaps": 0.07595188977780638, "vqg_vqav2:bliva": 0.15271327995696837, "vqg_okvqa": 0.02175930084085304,
        "vqg_aokvqa": 0.02993954782443368,
    }  # fmt: skip
    assert shares == pytest.approx(ratios, rel=1e-9)


def test_the_table_lists_thirteen_held_in_sets_with_their_sizes_and_shares() -> None:
    from rich.console import Console

    console = Console(width=200, record=True, file=io.StringIO())
    console.print(listing.table())
    counted = "samples: S_d of sets that are trained on, what is scored of those held out"
    assert counted in console.export_text(clear=False)
    rows = [line.split("│") for line in console.export_text(clear=False).splitlines() if "held-in" in line]
    shown = {cells[1].strip(): (cells[3].strip(), cells[4].strip()) for cells in rows}
    assert set(shown) == set(HELD_IN)
    assert shown == {name: (f"{size(name):,}", f"{share:.4f}") for name, share in A.items()}
    assert shown["coco_caption"] == ("566,747", "0.0923")


def test_the_table_lists_thirteen_held_out_sets_with_what_is_scored_how_and_asked_in_which_words() -> None:
    """ScienceQA may be fine-tuned on; what is counted is what is scored.  A preface stands before its prompt."""
    columns = [list(column.cells) for column in listing.table().columns]
    rows = {row[0]: row[1:] for row in zip(*columns, strict=True)}
    assert len(rows) == 26
    for name in HELD_OUT:
        section = load(name).eval
        assert section is not None
        role, samples, share, reader, metric, prompt = rows[name]
        assert (role, samples, share) == ("held-out", f"{section.size:,}", "")
        assert (reader, metric) == (section.reader, section.metric)
        assert prompt.endswith(text.load_templates(section.template).templates[0])
    assert rows["scienceqa"][1] == "2,017"
    question = "Question: {question} Short answer:"
    assert rows["gqa"][-1] == question
    assert rows["textvqa"][-1] == f"OCR tokens: {{ocr}}. {question}"
    assert rows["visdial"][-1] == f"Dialog history: {{history}}\\n {question}"
    assert rows["scienceqa"][-1] == "Context: {context} Question: {question} Options: {options}. Answer:"


@pytest.mark.parametrize("name", HELD_IN)
def test_every_held_in_card_has_its_forms_for_the_ablation_without_templates(name: str) -> None:
    plain, named = load(f"{name}:plain").train, load(f"{name}:dataset_name").train
    assert plain and named
    for section in (plain, named):
        templates = text.load_templates(section.template).templates
        assert len(templates) == 1
        assert templates[0] in ("", "{question}", "{answer}", "{instruction}")
    assert [piece for piece in named.preface if piece not in plain.preface] == [named.preface[0]]
    assert named.preface[0].startswith("[") and ":" in named.preface[0] and named.preface[0].endswith("]")


@pytest.mark.parametrize("name", ["vqav2", "okvqa", "aokvqa", "vqg_vqav2", "vqg_okvqa", "vqg_aokvqa"])
@pytest.mark.parametrize("rule", ["sampled", "uniform_distinct"])
def test_which_of_several_answers_is_trained_on_is_a_variant(name: str, rule: str) -> None:
    card, plain = load(f"{name}:{rule}"), load(name)
    assert card.train and plain.train and plain.train.answer == "most_frequent"
    assert dataclasses.asdict(card.train) == {**dataclasses.asdict(plain.train), "answer": rule}
    assert card.eval == plain.eval
    assert any(f"`{rule}`" in note for note in plain.notes)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("aokvqa", "since its questions are multiple-choice"),
        ("ocrvqa", "full stop from TextVQA's zero-shot prompt"),
        ("textcaps", "full stop from TextVQA's zero-shot prompt"),
    ],
)
def test_a_card_says_what_speaks_against_its_choice(name: str, words: str) -> None:
    assert sum(words in note for note in load(name).notes) == 1


@pytest.mark.parametrize(
    "files", ["{records: r, images: []}", "{records: [r], images: i}", "{records: r, images: [1]}"]
)
def test_files_are_paths_and_pictures_may_lie_in_several(tmp_path: Path, files: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(BASE + f"train: {{reader: jsonl, files: {files}, template: instruction}}\n")
    with pytest.raises(ConfigError, match=r"train\.files\.(records|images) is .*it takes a path, or as files\.images"):
        cards.load(str(file))


def test_every_cards_metric_is_there_and_beside_ciders_stand_two_more() -> None:
    sections = [section for name in with_variants() if (section := load(name).eval) is not None]
    used = {section.metric for section in sections}
    assert used <= set(METRICS) and {"bleu4", "rouge_l"} <= set(METRICS) - used
    assert {"exact_match", "accuracy", "vqa_accuracy", "ivqa_accuracy", "auroc", "retrieval", "submission"} <= used
    for name in ("coco_caption", "flickr30k", "nocaps", "textcaps"):
        plain, meteor = load(name).eval, load(f"{name}:meteor").eval
        assert plain is not None and meteor == dataclasses.replace(plain, metric="meteor")


def test_null_takes_away_what_a_variants_reader_has_not() -> None:
    card = cards.load("textcaps:no_ocr")
    assert card.train and "ocr" not in card.train.files
    assert set(cards.load("textcaps").variants) == set(card.variants)


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


def test_a_card_is_read_anew_when_its_file_changes_and_is_nobody_elses(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    for version in (1, 2):
        file.write_text(f"name: mine\nversion: {version}\nnotes: [one]\n")
        for _ in range(2):
            card = load(str(file))
            assert (card.version, card.notes) == (version, ["one"])
            card.notes.append("another")


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


def test_variants_are_combined_with_a_plus() -> None:
    both = cards.load("scienceqa:hint_and_lecture+lettered")
    assert both.key == "scienceqa:hint_and_lecture+lettered" and both.eval and both.train
    assert both.eval.options == {"split": "test", "context": "hint_and_lecture", "rank": "lettered"}
    assert both.train.options["rank"] == "lettered"
    assert cards.load("scienceqa:lettered+hint_and_lecture") == both  # one card, one file of scores, one recipe
    with pytest.raises(ConfigError, match=r"the card 'scienceqa:hint_and_lecture\+lettered' is named twice"):
        cards.load_all(["scienceqa:hint_and_lecture+lettered", "scienceqa:lettered+hint_and_lecture"], "eval")
    three = cards.load("hatefulmemes:best+no_end+dev_unseen").eval
    assert three and (three.metric_options["pool"], three.end, three.split) == ("best", False, "dev_unseen")
    mirrored = cards.load("vizwiz:hub+lavis_scorer").eval
    assert mirrored and (mirrored.reader, mirrored.metric_options) == ("columns", {"normaliser": "lavis"})
    for name in ("scienceqa", "iconqa"):
        mean = cards.load(f"{name}:letters+mean_per_token").eval
        assert mean and (mean.options["rank"], mean.normalize) == ("letters", "mean")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "scienceqa:letters+lettered",
            r"'letters' and 'lettered' both set train\.options\.rank, and not alike, so they",
        ),
        ("aokvqa:hub+multiple_choice", r"'multiple_choice' and 'hub' both set eval\.options\.difficult, and not alike"),
        (
            "textvqa:no_ocr+hub",
            r"'hub' has a reader of its own, and 'no_ocr' sets eval\.files for the card's, so they",
        ),
        ("iconqa:letters+hub", r"'hub' has a reader of its own, and 'letters' sets eval\.options for the card's"),
        ("aokvqa:test+sampled", r"'test' and 'sampled' both set train, and not alike"),
        ("vizwiz:hub+test_dev", r"'test_dev' and 'hub' both set downloads, and not alike"),
        ("scienceqa:val+leters", r"no variant 'leters'\. Did you mean 'letters'\?"),
        ("scienceqa:val+", r"no variant ''\. Known: "),
        ("scienceqa:val+val", r"the variant 'val' is named twice in 'val\+val'; name it once"),
    ],
)
def test_variants_that_do_not_go_together_are_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cards.load(name)


def test_no_variants_name_could_be_taken_for_a_combination_or_for_habits_of_another_code() -> None:
    habits = [f"as_{name}" for name in resources.names("configs/decoding")]
    assert not [name for name in with_variants() if "+" in name or name.partition(":")[2] in habits]
