"""What a harness asks, and what it is told: translation, batches, the sign of likelihoods; no harness is needed."""

from __future__ import annotations

import configparser
import importlib
import itertools
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from qformer import harness, loading
from qformer.cards import Decoding
from qformer.errors import ConfigError, DataError
from qformer.harness import Answerer, Asked, asked, batches, instruction, pictures, stopped, writing
from qformer.sample import Text
from qformer.text import Joiner
from qformer.vlm import VLM
from tests import world

ROOT = Path(__file__).parent.parent
COLOURS = [Image.new("RGB", (32 + 3 * n, 40), colour) for n, colour in enumerate(world.COLOURS.values())]


# -- translation ------------------------------------------------------------------------------------------------------


class Documents(dict):
    """task -> split -> documents, which remembers what was opened."""

    def __init__(self, documents: list[Any]):
        super().__init__()
        self.opened: list[int] = []
        outer = self

        class Split:
            def __getitem__(self, number: int) -> Any:
                outer.opened.append(number)
                return documents[number]

        self["birds"] = {"test": Split()}


def test_a_request_opens_its_document_when_its_turn_comes() -> None:
    documents = Documents([{"picture": COLOURS[0]}, {"picture": COLOURS[1]}])
    request = asked(
        ("what bird?", {"until": ["\n\n"]}, lambda document: [document["picture"]], 1, "birds", "test"), documents
    )
    assert documents.opened == []
    assert (request.where, request.context, request.wish) == ("birds: test 1", "what bird?", {"until": ["\n\n"]})
    assert request.pictures() == (COLOURS[1],)
    assert documents.opened == [1]


def test_a_continuation_is_a_text_or_made_of_the_document() -> None:
    documents = Documents([{"name": "wren", "label": 3}])
    given = (lambda document: [], 0, "birds", "test")
    assert asked(("a", " wren", *given), documents).continuation() == " wren"
    assert documents.opened == []
    assert asked(("a", lambda document: document["name"], *given), documents).continuation() == "wren"
    with pytest.raises(DataError, match=r"birds: test 0: its target is a int \(3\), .* doc_to_target give the words"):
        asked(("a", lambda document: document["label"], *given), documents).continuation()


def test_a_request_may_come_without_a_document() -> None:
    request = asked(("", "wren"), {})
    assert (request.context, request.continuation(), request.pictures()) == ("", "wren", ())


def test_a_prompt_that_is_no_text_is_refused() -> None:
    with pytest.raises(DataError, match=r"birds: test 0: its prompt is a list; let the task's doc_to_text give one"):
        asked((["a", "b"], {}, None, 0, "birds", "test"), {})


def test_pictures_come_in_order_from_any_nesting() -> None:
    one, two, three, four = COLOURS
    assert pictures([one, [two, None, (three,)], "four.png", b"five"], "x") == (one, two, three, "four.png", b"five")
    assert pictures(four, "x") == (four,)
    assert pictures(None, "x") == pictures([], "x") == ()
    with pytest.raises(DataError, match=r"birds: test 0: doc_to_visual gives a dict; qformer takes PIL images"):
        pictures([{"array": []}], "birds: test 0")


@pytest.mark.parametrize(
    ("context", "count", "expected"),
    [
        ("what bird?", 2, "what bird?"),
        ("<image> or <image>?", 2, "<image> or <image>?"),
        ("<image>what bird?", 2, "what bird?"),
        ("what bird?<image>", 0, "what bird?"),
    ],
)
def test_marks_stay_where_they_are_as_many_as_pictures(context: str, count: int, expected: str) -> None:
    assert instruction(context, count) == expected


@pytest.mark.parametrize(
    ("given", "decoding"),
    [
        ({}, Decoding(max_new_tokens=1024)),
        ({"max_new_tokens": 16, "temperature": 0.0, "top_p": 1.0, "num_beams": 1, "do_sample": False},
         Decoding(max_new_tokens=16)),
        ({"max_new_tokens": None, "top_p": None, "num_beams": None}, Decoding(max_new_tokens=1024)),
        ({"num_beams": 5, "length_penalty": -1, "repetition_penalty": 1.2, "min_new_tokens": 2},
         Decoding(1024, 2, 5, -1.0, 1.2)),
        ({"temperature": 0.2}, Decoding(1024, do_sample=True, temperature=0.2)),
        ({"temperature": 0.2, "do_sample": False}, Decoding(1024)),
        ({"temperature": 0, "do_sample": True, "top_p": 0}, Decoding(1024)),
        ({"do_sample": True, "top_p": 0.9}, Decoding(1024, do_sample=True, top_p=0.9)),
        ({"temperature": 1, "top_k": 1}, Decoding(1024)),
        ({"temperature": 1, "top_k": 0}, Decoding(1024, do_sample=True)),
        ({"num_return_sequences": 1, "no_repeat_ngram_size": 0}, Decoding(1024)),
    ],
)  # fmt: skip
def test_generation_settings_are_translated(given: dict[str, Any], decoding: Decoding) -> None:
    assert writing(given, "birds: test 0") == harness.Writing(decoding)


def test_stops_are_gathered_and_what_means_nothing_is_named() -> None:
    found = writing({"until": "\n\n", "stop_sequences": ["Q:", ""], "visual_cot": True, "image_size": 3}, "birds")
    assert found.stops == ("\n\n", "Q:")
    assert found.unknown == ("image_size", "visual_cot")
    assert writing({"until": None}, "birds").stops == writing({"until": []}, "birds").stops == ()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_return_sequences": 4}, r"generation_kwargs\.num_return_sequences is 4, .*--gen_kwargs num_return_seq"),
        ({"no_repeat_ngram_size": 3}, r"birds: test 0: generation_kwargs\.no_repeat_ngram_size is 3, which qformer"),
        ({"do_sample": True, "top_k": 50}, r"generation_kwargs\.top_k is 50, .*; give --gen_kwargs top_k=0"),
        ({"temperature": "hot"}, r"birds: test 0: generation_kwargs\.temperature is 'hot'; it takes a number"),
        ({"until": [1]}, r"birds: test 0: generation_kwargs\.until is \[1\]; it takes a text or a list of texts"),
        ({"max_new_tokens": "many"}, r"birds: test 0: generation_kwargs: max_new_tokens"),
        ({"max_new_tokens": 0}, r"birds: test 0: generation_kwargs: .*max_new_tokens is 0; it must be at least 1"),
    ],
)
def test_settings_that_are_not_to_be_had_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        writing(given, "birds: test 0")


def test_an_answer_ends_at_the_first_stop() -> None:
    assert stopped("a wren. Q: and this? \n\nA:", ["\n\n", "Q:"]) == "a wren."
    assert stopped("a wren", []) == "a wren"


def test_batches_are_of_one_kind_and_of_like_length() -> None:
    kinds, lengths = ["b", "a", "b", "b", "a", "b"], [1, 5, 9, 4, 6, 7]
    assert list(batches(kinds, lengths, 3)) == [[2, 5, 3], [0], [4, 1]]
    assert list(batches([], [], 3)) == []


# -- answers ----------------------------------------------------------------------------------------------------------

PROMPTS = ["what colour is it", "is it red indeed please", "left of <image> is <image>", "how many?"]
SEEN = [(COLOURS[0],), (COLOURS[1],), (COLOURS[2], COLOURS[3]), (COLOURS[3], COLOURS[0])]
CHOICES = ["it is red", " it is blue indeed", "two cats"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Saves an adapter of a family with every weight redrawn; the directory."""
    folder, made = tmp_path_factory.mktemp("towers"), {}

    def saved(family: str = "llama") -> Path:
        if family not in made:
            data = tmp_path_factory.mktemp(family)
            world.write_pictures(data)
            built = loading.build(world.settings(folder, data, data / "run", family=family), report=str)
            generator = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for parameter in built.connector.parameters():
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
            built.save(data / "adapter")
            made[family] = data / "adapter"
        return made[family]

    return saved


@pytest.fixture
def model(saved: Any) -> Any:
    return lambda family="llama": loading.load(saved(family), report=str)


def requests(wishes: list[Any], prompts: list[str] = PROMPTS, seen: list[Any] = SEEN) -> list[Asked]:
    return [
        Asked(f"colours: test {number}", prompt, wish, lambda n=number: n, lambda n: list(seen[n]))
        for number, (prompt, wish) in enumerate(zip(prompts, wishes, strict=True))
    ]


class Said(list):
    """What was said, once a matter."""

    def __call__(self, about: str, message: str) -> None:
        if about not in [each for each, _ in self]:
            self.append((about, message))


@pytest.mark.parametrize(("family", "size"), [("llama", 3), ("t5", 2), ("llama", 1)])
def test_answers_are_those_of_the_model_whatever_the_batch(model: Any, family: str, size: int) -> None:
    vlm, said, counted = model(family), Said(), []
    wishes = [
        {"max_new_tokens": 8},
        {"max_new_tokens": 5},
        {"max_new_tokens": 8, "num_beams": 2},
        {"max_new_tokens": 8},
    ]
    found = Answerer(vlm, size, said).generate(requests(wishes), counted.append)
    alone = [vlm.generate([list(s)], [p], **w)[0] for s, p, w in zip(SEEN, PROMPTS, wishes, strict=True)]
    assert found == alone
    assert len(set(found)) > 1
    assert sum(counted) == 4
    assert said == []
    ended = [{**wish, "until": [answer[1:3]]} for wish, answer in zip(wishes, alone, strict=True)]
    cut = [stopped(answer, wish["until"]) for answer, wish in zip(alone, ended, strict=True)]
    assert Answerer(vlm, size, said).generate(requests(ended)) == cut != alone


def rank(vlm: VLM, normalize: str, end: bool) -> list[list[float]]:
    return vlm.rank([list(each) for each in SEEN], PROMPTS, CHOICES, normalize=normalize, end=end)


@pytest.mark.parametrize(
    ("family", "normalize", "end"), [("llama", "mean", True), ("llama", "pmi", True), ("t5", "sum", False)]
)
def test_losses_are_minus_likelihoods(model: Any, family: str, normalize: str, end: bool) -> None:
    vlm, opened = model(family), []
    asking = [
        Asked(f"colours: test {n}", prompt, choice, lambda n=n: opened.append(n) or n, lambda n: SEEN[n])
        for choice in CHOICES
        for n, prompt in enumerate(PROMPTS)
    ]
    found = Answerer(vlm, 3, Said()).losses(asking, normalize, end)
    expected = [scores[c] for c in range(len(CHOICES)) for scores in rank(vlm, normalize, end)]
    assert [loss for loss, _ in found] == pytest.approx([-value for value in expected], abs=2e-4)
    assert sorted(opened) == [0, 1, 2, 3]  # a prompt's choices are scored together
    best = [max(range(3), key=scores.__getitem__) for scores in rank(vlm, normalize, end)]
    by_loss = [min(range(3), key=lambda c: found[4 * c + n][0]) for n in range(4)]  # as lmms-eval picks
    assert by_loss == best


def argmax_agrees(vlm: VLM, seen: Any, prompt: str, ids: tuple[int, ...]) -> bool:
    """Whether the likeliest id behind the prompt and each beginning is the next: one step of greedy decoding each."""
    batch = vlm._prompts([seen], [prompt])
    soft, [row] = vlm.read(batch), batch.rows
    for place, wanted in enumerate(ids):
        extended = (*row, Text(ids[:place])) if place else row
        if vlm.language.is_encoder_decoder:
            read, mask = vlm.language._encoded(soft, [row])
            fed = torch.cat([vlm.language._starts(1), torch.tensor([ids[:place]], dtype=torch.long)], dim=1)
            logits = vlm.language._written(read, mask, fed)
        else:
            joined = vlm.language._join(soft, [extended])
            logits = vlm.language.model(inputs_embeds=joined.inputs).logits
        if int(logits[0, -1].argmax()) != wanted:
            return False
    return True


def favour(vlm: VLM, token: int) -> None:
    """From now on the LLM finds this id the likeliest, wherever it stands."""
    head = vlm.language.model.get_output_embeddings()
    head.register_forward_hook(lambda module, given, logits: logits.index_fill(-1, torch.tensor([token]), 30.0))


@pytest.mark.parametrize("family", ["llama", "t5"])
@torch.inference_mode()
def test_greedy_is_what_greedy_decoding_writes(model: Any, family: str) -> None:
    vlm = model(family)
    joiner = Joiner(vlm.language.tokenizer, vlm.language.profile, None)
    [favourite] = joiner.answer_ids("a")
    favour(vlm, favourite)
    choices = ["a", "a a", "a the", "the a", "two cats"]
    asking = [each for choice in choices for each in requests([choice] * 2, PROMPTS[:2], SEEN[:2])]
    flags = [flag for _, flag in Answerer(vlm, 3, Said()).losses(asking, end=False)]
    expected = [
        argmax_agrees(vlm, seen, prompt, joiner.answer_ids(choice))
        for choice, (seen, prompt) in itertools.product(choices, zip(SEEN[:2], PROMPTS[:2], strict=True))
    ]
    assert flags == expected == [True] * 4 + [False] * 6


@torch.inference_mode()
def test_greedy_counts_the_end_mark(model: Any) -> None:
    vlm = model()
    assert vlm.language.profile.separator == ""
    favour(vlm, vlm.language.profile.end[0])
    found = Answerer(vlm, 2, Said()).losses(requests(["", "red"], PROMPTS[:2], SEEN[:2]))
    assert [flag for _, flag in found] == [True, False]  # nothing at all, then the end mark
    assert found[0][0] == pytest.approx(0, abs=1e-4)


def test_without_a_picture_the_llm_is_asked_alone(model: Any) -> None:
    vlm = model()
    seen = [(COLOURS[0],), (), (), (COLOURS[1],)]
    prompts = ["what colour is it", "how many?", "is it red", "how many?"]
    wish = {"max_new_tokens": 6}
    found = Answerer(vlm, 4, Said()).generate(requests([wish] * 4, prompts, seen))
    assert [found[0], found[3]] == vlm.generate([COLOURS[0], COLOURS[1]], [prompts[0], prompts[3]], **wish)
    other = Answerer(vlm, 4, Said()).generate(requests([wish] * 2, prompts[1:3], [(), ()]))
    assert found[1:3] == other
    losses = Answerer(vlm, 4, Said()).losses(requests(["red"] * 4, prompts, seen), "sum")
    row = (Text(vlm.language.profile.opening + tuple(vlm.language.tokenizer("how many?").input_ids[1:])),)
    ids = vlm.joiner().target_ids("red")
    alone = vlm.language.log_likelihood(torch.zeros(0, 4, 32), [(*row, Text(ids, trained=True))])[0]
    assert losses[1][0] == pytest.approx(-float(alone), abs=1e-4)
    with pytest.raises(ConfigError, match=r"colours: test 1: normalize=pmi compares .* there is none; use normalize="):
        Answerer(vlm, 4, Said()).losses(requests(["red"] * 4, prompts, seen), "pmi")


def test_what_is_left_out_is_said_once(model: Any) -> None:
    vlm, said = model(), Said()
    vlm.language.model.config.max_position_embeddings = 138  # 4 soft tokens and a prompt of 128 leave 6
    prompts = ["<image> and <image> what colour", "please " * 200, "<image> red", "how many?"]
    asking = requests([{"image_size": 3, "max_new_tokens": 20}] * 4, prompts, [(COLOURS[0],)] * 4)
    answers = Answerer(vlm, 4, said).generate(asking)
    assert dict(said) == {
        "image_size": "generation_kwargs.image_size means nothing to qformer and is left out.",
        "<image>": "colours: test 0 has 2 <image> marks for 1 pictures: such marks are left out, and the pictures "
        "stand in front.",
        "max_new_tokens": "a task asks for up to 20 new tokens, and the LLM has 138 positions: such answers end where "
        "these do.",
        "cuts": "2 text(s) were cut to their limits (language.instruction_limit, language.target_limit, "
        "qformer.instruction_limit).",
    }
    assert answers[2:] == vlm.generate([COLOURS[0]] * 2, prompts[2:], max_new_tokens=6)


def test_a_broken_picture_is_an_error_that_names_its_document(model: Any, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"colours: test 1: the picture .*broken\.png is not a picture"):
        Answerer(model(), 2, Said()).generate(
            requests([{}] * 2, PROMPTS[:2], [(COLOURS[0],), (str(tmp_path / "broken.png"),)])
        )


# -- the model that lmms-eval finds, under a stand-in for lmms-eval ---------------------------------------------------


class Simple:
    """What lmms-eval's base class has that is used here."""

    def __init__(self) -> None:
        self._rank, self._world_size, self.task_dict = 0, 1, {}
        self.cached: list[Any] = []
        self.cache_hook = SimpleNamespace(add_partial=lambda *given: self.cached.append(given))

    @property
    def rank(self) -> int:
        return self._rank


@dataclass(frozen=True)
class Manifest:
    """lmms-eval's record of a model."""

    model_id: str
    simple_class_path: str


@dataclass
class Result:
    """lmms-eval's record of an answer."""

    text: Any


def handed_on(output: Any) -> tuple[Any, None]:
    """lmms-eval's `unwrap_generation_output`, of a release that hands pairs on as they are."""
    return (output.text if isinstance(output, Result) else output), None


def handed_on_as_text(output: Any) -> tuple[Any, None]:
    """The same of release 0.7.3, which makes texts of pairs."""
    return (output.text if isinstance(output, Result) else str(output)), None


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The plug-in's module, and what it logged."""
    logged: list[str] = []
    logger = SimpleNamespace(info=str, warning=logged.append)
    fakes = {
        "lmms_eval": {}, "lmms_eval.api": {}, "lmms_eval.api.model": {"lmms": Simple}, "lmms_eval.models": {},
        "lmms_eval.api.instance": {"GenerationResult": Result, "unwrap_generation_output": handed_on},
        "lmms_eval.models.registry_v2": {"ModelManifest": Manifest}, "loguru": {"logger": logger},
    }  # fmt: skip
    for name, members in fakes.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "qformer.lmms", raising=False)
    found = importlib.import_module("qformer.lmms")
    yield found, logged
    sys.modules.pop("qformer.lmms", None)


def test_the_entry_point_leads_to_the_class(plugin: Any) -> None:
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg", encoding="utf-8")
    name, _, target = settings["options.entry_points"]["lmms_eval.models"].strip().partition(" = ")
    module, _, attribute = target.partition(":")
    manifest = getattr(importlib.import_module(module), attribute)
    assert manifest == Manifest(name, "qformer.lmms.HarnessModel")
    assert issubclass(plugin[0].HarnessModel, Simple)
    assert plugin[0].HarnessModel.is_simple


def test_the_plug_in_answers_and_scores(plugin: Any, saved: Any, model: Any) -> None:
    module, logged = plugin
    vlm = model()
    built = module.HarnessModel(pretrained=saved(), batch_size="2", device="cpu", dtype="float64")
    assert built.model.language.dtype == torch.float64
    assert (built.device, built.rank, built._world_size) == (torch.device("cpu"), 0, 1)
    built.task_dict = {"colours": {"test": SEEN}}
    settings = {"max_new_tokens": 6, "until": ["\n\n"], "image_size": 3}
    asking = [(prompt, dict(settings), list, n, "colours", "test") for n, prompt in enumerate(PROMPTS)]
    for _ in range(2):
        answers = built.generate_until([SimpleNamespace(args=each) for each in asking])
    assert answers == vlm.generate([list(each) for each in SEEN], PROMPTS, max_new_tokens=6)
    assert asking[0][1] == settings  # lmms-eval makes the key of its cache from them afterwards
    assert logged == ["generation_kwargs.image_size means nothing to qformer and is left out."]
    assert built.cached[0] == ("generate_until", asking[0][:2], answers[0])
    asking = [
        (prompt, f" {choice}", list, n, "colours", "test") for n, prompt in enumerate(PROMPTS) for choice in CHOICES
    ]
    found = built.loglikelihood([SimpleNamespace(args=each) for each in asking])
    expected = [-value for scores in rank(vlm, "mean", True) for value in scores]
    assert [loss for loss, _ in found] == pytest.approx(expected, abs=1e-3)
    assert built.cached[-1] == ("loglikelihood", asking[-1][:2], found[-1])
    with pytest.raises(ConfigError, match=r"one round; leave tasks of output_type generate_until_multi_round out"):
        built.generate_until_multi_round([])


def test_a_likelihood_reaches_the_scorers_as_a_pair(plugin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module, _ = plugin
    assert module._unharmed((2.5, True)) == (2.5, True)
    monkeypatch.setattr(module, "unwrap_generation_output", handed_on_as_text)
    told = module._unharmed((2.5, True))
    assert handed_on_as_text(told)[0] == (2.5, True)
    assert not told.text.strip()  # the cache asks so whether there is anything to store


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, r"--model_args: pretrained is missing; give whatever qformer\.load takes"),
        ({"pretrained": "x", "visoin": "y"}, r"--model_args: unknown argument 'visoin'\. Did you mean 'vision'\?"),
        ({"pretrained": "x", "normalize": "max"}, r"--model_args: normalize is 'max'; it takes 'mean', 'sum' or 'pmi'"),
        ({"pretrained": "x", "batch_size": "auto"}, r"--batch_size is 'auto'; it takes a number of prompts"),
        ({"pretrained": "x", "batch_size": 0}, r"--batch_size is '0'"),
        ({"pretrained": "x", "quantization": "8bit"}, r"--model_args: quantization is '8bit'; it takes JSON, such as"),
        ({"pretrained": "nowhere/at/all"}, r"nowhere/at/all: "),
    ],
)
def test_wrong_arguments_are_one_sentence(plugin: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plugin[0].HarnessModel(**arguments)
