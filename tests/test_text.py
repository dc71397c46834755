"""Words: templates and answers chosen by key, and rows joined from ids as the profile says."""

import dataclasses
from collections import Counter

import pytest

from qformer import text
from qformer.cards import EvalCard, TrainCard
from qformer.config import ProfileConfig
from qformer.errors import ConfigError, DataError
from qformer.sample import Sample, Slot, Text, Turn, trained_tokens
from qformer.text import Joiner, Rendered, Templates


def templates(*texts):
    return Templates("test", 1, "", list(texts))


def train_card(**changes):
    return TrainCard(reader="jsonl", files={}, template="test", **changes)


def question(number=0, **changes):
    values = {"fields": {"question": "What colour?"}, "references": ("red", "blue", "red"), **changes}
    return Sample(id=f"s{number}", task="set", images=(), **values)


# -- templates and answers --------------------------------------------------------------------------------------------


def test_options_are_lettered_as_the_paper_writes_them():
    assert text.lettered(["blue", "yellow", "pink", "black"]) == "(a) blue (b) yellow (c) pink (d) black"
    many = text.lettered([str(number) for number in range(703)])
    assert "(z) 25 (aa) 26 (ab) 27" in many
    assert many.endswith("(zz) 701 (aaa) 702")


def test_template_is_drawn_by_sample_and_pass_and_evenly():
    many = templates(*[f"{number} {{question}}" for number in range(5)])
    drawn = [text.render_train(train_card(), many, question(n), 0, 0)[0].instruction[0] for n in range(2000)]
    assert drawn == [text.render_train(train_card(), many, question(n), 0, 0)[0].instruction[0] for n in range(2000)]
    assert drawn != [text.render_train(train_card(), many, question(n), 0, 1)[0].instruction[0] for n in range(2000)]
    assert max(abs(count - 400) for count in Counter(drawn).values()) < 5 * (2000 * 0.2 * 0.8) ** 0.5


def test_answer_rules():
    answers = ("cab", "taxi", "cab", "bus")
    assert text.choose_answer(answers, "most_frequent", ("k",)) == "cab"
    drawn = Counter(text.choose_answer(answers, "sampled", (n,)) for n in range(4000))
    assert drawn["cab"] == pytest.approx(2000, abs=160) and drawn["bus"] == pytest.approx(1000, abs=140)
    distinct = Counter(text.choose_answer(answers, "uniform_distinct", (n,)) for n in range(3000))
    assert all(count == pytest.approx(1000, abs=130) for count in distinct.values()) and len(distinct) == 3
    assert text.choose_answer((), "sampled", ()) is None
    for rule in ("most_frequent", "sampled", "uniform_distinct"):  # an annotator may have said nothing
        assert {text.choose_answer(("", "", "", "cab"), rule, (n,)) for n in range(20)} == {"cab"}
        assert text.choose_answer(("", ""), rule, ("k",)) == ""


def test_question_generation_reads_the_answer_and_writes_the_question():
    card = train_card(target="{question}")
    [row] = text.render_train(card, templates("A question whose answer is: {answer}."), question(), 0, 0)
    assert row == Rendered("A question whose answer is: red.", "What colour?")


def test_dialogue_gives_a_row_a_turn_or_one_row():
    turns = (Turn("Q1", "A1"), Turn("Q2", "A2"))
    sample = question(turns=turns)
    each = text.render_train(train_card(turns="each"), templates("x"), sample, 0, 0)
    assert each == [Rendered("Q1", "A1"), Rendered("Q2", "A2", history=turns[:1])]
    whole = text.render_train(train_card(turns="whole"), templates("x"), sample, 0, 0)
    assert whole == [Rendered("Q1", turns=turns)]


def test_zero_shot_prompt_fills_options_from_the_candidates():
    card = EvalCard(
        reader="x", files={}, template="t", split="test", answer="rank", metric="accuracy", candidates=["a", "b"]
    )
    assert text.render_eval(card, templates("Options: {options}."), question()).instruction == "Options: (a) a (b) b."
    own = question(candidates=("3", "5"))
    assert text.render_eval(card, templates("Options: {options}."), own).instruction == "Options: (a) a (b) b."
    card = dataclasses.replace(card, candidates=[])
    assert text.render_eval(card, templates("Options: {options}."), own).instruction == "Options: (a) 3 (b) 5."


def test_a_missing_field_and_an_empty_target_are_named():
    with pytest.raises(DataError, match=r"sample 's0': no field 'quest'.*Did you mean 'question'"):
        text.render_train(train_card(), templates("{quest}"), question(), 0, 0)
    with pytest.raises(DataError, match="sample 's0': the target is empty"):
        text.render_train(train_card(), templates("x"), question(references=("",)), 0, 0)
    with pytest.raises(ConfigError, match="unknown template 'short_answr'"):
        text.load_templates("short_answr")


def test_a_template_file_without_templates_is_refused(tmp_path):
    file = tmp_path / "empty.yaml"
    file.write_text("name: empty\nversion: 1\nsource: ''\ntemplates: []\n")
    with pytest.raises(ConfigError, match="holds no template"):
        text.load_templates(str(file))


@pytest.mark.parametrize("words", ["{question", "say } {x}", "{x!z}", "{x:>5d}", "{}", "{0}", "{a.b}", "{a[0]}"])
def test_a_template_that_cannot_be_filled_is_refused_when_it_is_loaded(tmp_path, words):
    file = tmp_path / "mine.yaml"
    file.write_text(f"name: mine\nversion: 1\nsource: ''\ntemplates: ['{{{{fine}}}}', '{words}']\n")
    with pytest.raises(ConfigError, match="a field is a name in braces") as caught:
        text.load_templates(str(file))
    assert f"{file}: templates: '{words}' cannot be filled" in str(caught.value)


# -- rows -------------------------------------------------------------------------------------------------------------


class Words:
    """A tokenizer of one id a word, with settings for the habits that differ between families."""

    def __init__(self, *, bos=None, eos=2, blank=False, template=None):
        self.bos_token_id, self.eos_token_id, self.pad_token_id = bos, eos, None
        self.cls_token_id, self.sep_token_id = 101, 102
        self.blank, self.chat_template, self.known = blank, template, {}

    def __call__(self, words, add_special_tokens=True, split_special_tokens=False):
        ids = [self.known.setdefault(word, 200 + len(self.known)) for word in words.replace("<|", " <|").split()]
        opened = [self.bos_token_id] if add_special_tokens and self.bos_token_id is not None else []
        return type("Encoding", (), {"input_ids": opened + ids})

    def convert_ids_to_tokens(self, ids):
        return [("▁" if self.blank else "") + "word" for _ in ids]

    def apply_chat_template(self, turns, tokenize, add_generation_prompt):
        assert not tokenize and add_generation_prompt
        return self.template_text(turns)

    def template_text(self, turns):
        return "".join(f"<|{turn['role']}> {turn['content']} <|end> " for turn in turns) + "<|assistant> "


def joined(profile, tokenizer, rendered, reads=(0,), answered=True):
    row = Joiner(tokenizer, profile, None).row(rendered, reads, answered=answered)
    names = {number: word for word, number in tokenizer.known.items()} | {1: "BOS", 2: "EOS"}
    return [
        f"slot{piece.read}"
        if isinstance(piece, Slot)
        else ("+" if piece.trained else "") + " ".join(names[i] for i in piece.ids)
        for piece in row
    ]


def test_plain_row_is_slots_opening_prompt_target_end():
    tokenizer = Words(bos=1)
    profile = text.profile_from_tokenizer(tokenizer)
    assert (profile.layout, profile.opening, profile.end, profile.separator) == ("plain", (1,), (2,), " ")
    assert joined(profile, tokenizer, Rendered("what is it", "a dog")) == ["slot0", "BOS what is it", "+a dog EOS"]


def test_opening_comes_first_where_the_profile_says_so():
    tokenizer = Words(bos=1)
    profile = text.profile_from_tokenizer(tokenizer, ProfileConfig(slots_first=False))
    assert joined(profile, tokenizer, Rendered("q", "a")) == ["BOS", "slot0", "q", "+a EOS"]


def test_an_opening_mark_that_the_tokenizer_does_not_use_is_not_assumed():
    tokenizer = Words(bos=None)
    assert text.profile_from_tokenizer(tokenizer).opening == ()


def test_sentencepiece_brings_its_own_blank():
    assert text.profile_from_tokenizer(Words(blank=True)).separator == ""


def test_chat_row_opens_the_first_user_turn_with_the_slots():
    tokenizer = Words(template="yes")
    profile = text.profile_from_tokenizer(tokenizer)
    row = joined(profile, tokenizer, Rendered("q2", "a2", history=(Turn("q1", "a1"),)))
    end = "<|end>"
    assert row == [
        "<|user>", "slot0", f"q1 {end} <|assistant> a1 {end} <|user> q2 {end} <|assistant>", f"+a2 {end}",
    ]  # fmt: skip


def test_a_system_turn_stands_in_the_head():
    profile = text.profile_from_tokenizer(Words(template="yes"), ProfileConfig(system="be brief"))
    assert profile.head == "<|system> be brief <|end> <|user> "


def test_every_answer_of_a_whole_dialogue_is_trained():
    tokenizer = Words(bos=1)
    profile = text.profile_from_tokenizer(tokenizer)
    row = joined(profile, tokenizer, Rendered("q1", turns=(Turn("q1", "a1"), Turn("q2", "a2"))))
    assert row == ["slot0", "BOS q1", "+a1 EOS", "q2", "+a2 EOS"]


def test_slots_stand_where_the_marks_are():
    tokenizer = Words(bos=1)
    profile = text.profile_from_tokenizer(tokenizer)
    rendered = Rendered("compare <image> with <image> now", "same")
    assert joined(profile, tokenizer, rendered, reads=(0, 1)) == [
        "BOS compare", "slot0", "with", "slot1", "now", "+same EOS",
    ]  # fmt: skip
    with pytest.raises(DataError, match="2 <image> marks and the record 1 pictures"):
        joined(profile, tokenizer, rendered, reads=(0,))
    assert joined(profile, tokenizer, Rendered("both", "a"), reads=(0, 1)) == ["slot0", "slot1", "BOS both", "+a EOS"]


def test_truncation_cuts_words_on_the_left_and_targets_before_the_end_mark():
    tokenizer = Words(bos=1)
    profile = text.profile_from_tokenizer(tokenizer, instruction_limit=4, target_limit=3)
    joiner = Joiner(tokenizer, profile, tokenizer, instruction_limit=4)
    row = joiner.row(Rendered("a b c d e", "v w x y z"), (0,), answered=True)
    words = {number: word for word, number in tokenizer.known.items()}
    assert [words.get(i, i) for i in row[1].ids] == [1, "c", "d", "e"]
    assert [words.get(i, i) for i in row[2].ids] == ["v", "w", 2] and trained_tokens(row) == 3
    assert [words.get(i, i) for i in joiner.read_ids("a b c d e")] == [101, "d", "e", 102]
    assert (joiner.truncations.instructions, joiner.truncations.targets, joiner.truncations.ids) == (2, 1, 2 + 3 + 3)


def test_chat_frame_is_never_cut():
    tokenizer = Words(template="yes")
    profile = text.profile_from_tokenizer(tokenizer, instruction_limit=2)
    assert joined(profile, tokenizer, Rendered("a b c d", "x"))[2] == "c d <|end> <|assistant>"


def test_candidates_are_tokenised_as_targets():
    tokenizer = Words(bos=1)
    joiner = Joiner(tokenizer, text.profile_from_tokenizer(tokenizer), None)
    assert joiner.target_ids("a dog") == (*joiner.answer_ids(" a dog "), 2)


def test_profile_survives_a_trip_through_plain_values():
    import json

    profile = text.profile_from_tokenizer(Words(bos=1, template="yes"), ProfileConfig(stop=["###"]))
    assert text.Profile.from_dict(json.loads(json.dumps(profile.as_dict()))) == profile


def test_encoder_decoder_profile_closes_the_prompt():
    profile = text.profile_from_tokenizer(Words(template="yes"), encoder_decoder=True)
    assert (profile.layout, profile.closing, profile.end) == ("plain", (2,), (2,))


def test_profile_errors_say_what_would_work():
    with pytest.raises(ConfigError, match="no end mark"):
        text.profile_from_tokenizer(Words(eos=None))
    with pytest.raises(ConfigError, match=r"no chat template; use 'plain'"):
        text.profile_from_tokenizer(Words(), ProfileConfig(layout="chat"))
    broken = Words(template="yes")
    broken.template_text = lambda turns: "nothing of it"
    with pytest.raises(ConfigError, match=r"language\.profile\.layout: plain"):
        text.profile_from_tokenizer(broken)


def test_a_chat_template_that_refuses_a_turn_says_what_would_work():
    strict = Words(template="yes")

    def refuse(turns):
        raise RuntimeError("System role not supported")

    strict.template_text = refuse
    with pytest.raises(ConfigError, match=r"\(System role not.*\); in language\.profile leave .*system out"):
        text.profile_from_tokenizer(strict, ProfileConfig(system="be brief"))
    with pytest.raises(ConfigError, match=r"not supported\); in language\.profile set layout: plain"):
        text.profile_from_tokenizer(strict)


def test_a_template_gets_an_empty_system_turn_only_where_it_would_bring_words_of_its_own():
    written = Words.template_text

    def wordy(turns):
        own = [] if turns[0]["role"] == "system" else [{"role": "system", "content": "be good"}]
        return written(Words(), [*own, *turns])

    def refusing(turns):
        if turns[0]["role"] == "system":
            raise RuntimeError("System role not supported")
        return written(Words(), turns)

    heads = {}
    for name, template in {"bare": None, "wordy": wordy, "refusing": refusing}.items():
        tokenizer = Words(template="yes")
        tokenizer.template_text = template or tokenizer.template_text
        heads[name] = text.profile_from_tokenizer(tokenizer).head
    assert heads == {"bare": "<|user> ", "wordy": "<|system>  <|end> <|user> ", "refusing": "<|user> "}


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_what_looks_like_a_mark_in_words_stays_words(tmp_path, family):
    from transformers import AutoTokenizer

    from tests.tiny import tiny_bert, tiny_llm

    reader = AutoTokenizer.from_pretrained(tiny_bert(tmp_path / "bert"))
    tokenizer = AutoTokenizer.from_pretrained(tiny_llm(tmp_path / "llm", family))
    joiner = text.Joiner(tokenizer, text.profile_from_tokenizer(tokenizer), reader)
    mark = tokenizer.eos_token
    row = joiner.row(Rendered(f"what is {mark}", f"it is {mark} red"), [0], answered=True)
    ids = [number for piece in row if isinstance(piece, Text) for number in piece.ids]
    own = len(joiner.profile.opening) + len(joiner.profile.end)
    assert ids.count(tokenizer.eos_token_id) == own and mark in tokenizer.decode(ids[own - 1 : -1])
    assert joiner.read_ids("what is [SEP] it").count(reader.sep_token_id) == 1


def test_neighbouring_texts_are_one_piece():
    row = text._merged([Text((1,)), Text(()), Text((2,)), Slot(0), Text((3,), True), Text((4,), True)])
    assert row == (Text((1, 2)), Slot(0), Text((3, 4), True))
