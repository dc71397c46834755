"""The whole model: answers that do not depend on their batch, pictures encoded once, adapters saved and loaded."""

import json

import pytest
import torch
from PIL import Image

import qformer
from qformer import loading, weights
from qformer.errors import ConfigError, TrainingError
from qformer.sample import Slot, Text
from tests import world

FAMILIES = ("llama", "gpt2", "qwen2", "opt", "t5")
PROMPTS = ["what colour is it", "is it red indeed please", "say the colour of the thing left of the cube", "how many?"]


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    return tmp_path_factory.mktemp("towers")


@pytest.fixture
def model(towers, tmp_path):
    """Builds a model of a family with every adapter weight redrawn, so that pictures and instructions matter."""

    def model(family="llama", *changes):
        world.write_pictures(tmp_path)
        built = loading.build(world.settings(towers, tmp_path, tmp_path / "run", *changes, family=family), report=str)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in built.connector.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
        return built.eval()

    return model


def pictures(count=4):
    colours = list(world.COLOURS.values())
    return [Image.new("RGB", (32 + 3 * n, 40), colours[n % 4]) for n in range(count)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_answers_as_one_by_one(model, family):
    whole = model(family)
    together = whole.generate(pictures(), PROMPTS, max_new_tokens=8)
    assert together == [whole.generate([p], [t], max_new_tokens=8)[0] for p, t in zip(pictures(), PROMPTS, strict=True)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("normalize", ["sum", "mean", "pmi"])
def test_ranks_do_not_depend_on_batch_or_order(model, family, normalize):
    whole = model(family)
    candidates = [["red", "it is blue indeed", "two cats"], ["yes", "no"], ["three"], ["the big tree", "a", "b", "c"]]
    together = whole.rank(pictures(), PROMPTS, candidates, normalize=normalize)
    alone = [
        whole.rank([p], [t], [c], normalize=normalize)[0]
        for p, t, c in zip(pictures(), PROMPTS, candidates, strict=True)
    ]
    turned = whole.rank(pictures(), PROMPTS, [c[::-1] for c in candidates], normalize=normalize)
    for one, two, three in zip(together, alone, turned, strict=True):
        assert one == pytest.approx(two, abs=2e-4) and one == pytest.approx(three[::-1], abs=2e-4)


def test_pictures_and_instructions_both_matter(model):
    whole = model()
    ids = torch.tensor([[2, 8, 9, 3], [2, 10, 11, 3]])
    pixels = torch.randn(2, 3, 32, 32)
    one = whole.soft_prompts(pixels, ids)
    assert one.shape == (2, 4, whole.language.width)
    assert not torch.allclose(one, whole.soft_prompts(pixels.flip(0), ids), atol=1e-3)
    assert not torch.allclose(one, whole.soft_prompts(pixels, ids.flip(0)), atol=1e-3)


def test_without_instruction_the_words_do_not_reach_the_soft_prompts(model):
    whole = model("llama", "qformer.instruction=false")
    assert whole.instruction_tokenizer is None
    batch = whole._prompts([[p] for p in pictures(2)], PROMPTS[:2])
    other = whole._prompts([[p] for p in pictures(2)], PROMPTS[2:])
    assert torch.equal(whole.read(batch), whole.read(other))


def test_each_picture_is_encoded_once(model):
    whole = model()
    seen = []
    whole.vision.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    [picture] = pictures(1)
    whole.generate([picture, picture, picture], PROMPTS[:3], max_new_tokens=2)
    assert seen == [1]


def test_several_pictures_stand_in_order(model):
    whole = model()
    first, second = pictures(2)
    batch = whole._prompts([[first, second]], ["left of <image> is <image> two"])
    slots = [piece.read for piece in batch.rows[0] if isinstance(piece, Slot)]
    assert slots == [0, 1] and len(batch.reads) == 2
    assert whole.generate([[first, second]], ["both"], max_new_tokens=3)


def test_rows_of_the_contract_can_be_made_by_hand(model):
    whole = model()
    soft = torch.randn(1, 4, whole.language.width)
    rows = [(Slot(0), Text((5, 6, 7)), Text((8, 9), trained=True))]
    sums, counts = whole.language.log_likelihood(soft, rows)
    assert sums.shape == (1,) and counts.tolist() == [2]


def test_a_saved_adapter_answers_alike_and_holds_no_tower(model, tmp_path):
    whole = model()
    whole.save(tmp_path / "adapter")
    files = {path.name for path in (tmp_path / "adapter").rglob("*") if path.is_file()}
    assert {"adapter.safetensors", "config.json", "tokenizer.json"} <= files
    names = weights.load_tensors(tmp_path / "adapter" / "adapter.safetensors").keys()
    assert not any(name.startswith(("vision", "language.m")) for name in names)
    again = qformer.load(tmp_path / "adapter")
    assert again.generate(pictures(), PROMPTS, max_new_tokens=6) == whole.generate(
        pictures(), PROMPTS, max_new_tokens=6
    )
    assert again.language.profile == whole.language.profile
    for name, tensor in whole.connector.state_dict().items():
        assert torch.equal(tensor, again.connector.state_dict()[name]), name


def test_saving_over_an_adapter_replaces_it_whole_or_not_at_all(model, tmp_path, monkeypatch):
    whole = model()
    whole.save(tmp_path / "adapter")
    before = (tmp_path / "adapter" / "adapter.safetensors").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights, "save_tensors", full)
    with pytest.raises(TrainingError, match=r"adapter: it cannot be written .*No space left"):
        whole.save(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter.safetensors").read_bytes() == before
    assert not list(tmp_path.glob(".adapter*"))


def test_saving_never_takes_the_place_of_other_files(model, tmp_path):
    built = model()
    mine = tmp_path / "mine"
    mine.mkdir()
    built.save(mine)
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match=r"save: .*mine holds thesis\.txt, which would be lost; give a directory"):
        built.save(mine)
    assert (mine / "thesis.txt").read_text() == "years of work"
    with pytest.raises(ConfigError, match="is a file; give a directory"):
        built.save(mine / "thesis.txt")


def test_what_is_cut_is_counted_wherever_it_is_asked(model):
    built = model()
    built.generate(pictures(1), ["what colour " * 200], max_new_tokens=1)
    asked = built.language.truncations.texts
    assert asked == 2  # by the Q-Former and by the LLM
    built.rank(pictures(1), ["what"], ["red " * 300, "no"])
    assert built.language.truncations.targets == 1


def test_a_profile_travels_with_the_adapter(model, tmp_path):
    whole = model("llama", "language.profile.stop=['indeed']", "language.profile.slots_first=false")
    whole.save(tmp_path / "adapter")
    profile = qformer.load(tmp_path / "adapter").language.profile
    assert profile.stop == ("indeed",) and not profile.slots_first


def test_soft_tokens_start_as_long_as_embeddings_where_asked(model, towers, tmp_path):
    world.write_pictures(tmp_path)
    settings = world.settings(towers, tmp_path, tmp_path / "run", "qformer.soft_scale=embeddings")
    whole = loading.build(settings, report=str)
    batch = whole._prompts([[p] for p in pictures()], PROMPTS)
    length = whole.read(batch).detach().norm(dim=-1).mean()
    assert float(length) == pytest.approx(whole.language.embedding_norm(), rel=0.35)


def test_contract_errors_say_what_would_work(model, tmp_path):
    whole = model()
    with pytest.raises(ConfigError, match=r"generate: unknown key 'beams'\..*Known: .*num_beams"):
        whole.generate(pictures(1), PROMPTS[:1], beams=3)
    with pytest.raises(ConfigError, match="2 images for 1 prompts"):
        whole.generate(pictures(2), PROMPTS[:1])
    with pytest.raises(ConfigError, match="2 lists of candidates for 1 prompts"):
        whole.rank(pictures(1), PROMPTS[:1], [["a"], ["b"]])
    with pytest.raises(ConfigError, match=r"normalize is 'average'; it takes 'sum', 'mean' or 'pmi'"):
        whole.rank(pictures(1), PROMPTS[:1], ["red", "two"], normalize="average")
    with pytest.raises(ConfigError, match="no candidates"):
        whole.rank(pictures(1), PROMPTS[:1], [[]])
    with pytest.raises(ConfigError, match="no adapter there"):
        qformer.load(tmp_path)
    with pytest.raises(ConfigError, match="quantization"):
        qformer.load(tmp_path, quantization="int8")


def test_a_damaged_adapter_is_named(model, tmp_path):
    whole = model()
    whole.save(tmp_path / "adapter")
    tensors = weights.load_tensors(tmp_path / "adapter" / "adapter.safetensors")
    tensors.pop("qformer.queries")
    weights.save_tensors(tmp_path / "adapter" / "adapter.safetensors", tensors)
    with pytest.raises(ConfigError, match=r"adapter\.safetensors.*qformer\.queries"):
        qformer.load(tmp_path / "adapter")
    description = json.loads((tmp_path / "adapter" / "config.json").read_text())
    description["size"]["heads"] = 5
    (tmp_path / "adapter" / "config.json").write_text(json.dumps(description))
    with pytest.raises(ConfigError, match="heads"):
        qformer.load(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"config\.json: it does not describe an adapter \(.*No such file"),
        ("", r"config\.json: it does not describe an adapter \(Expecting value"),
        ('{"vision": {', r"config\.json: it does not describe an adapter"),
        ("{}", r"config\.json: .* \(it lacks vision, language, qformer, max_pixels\); save the adapter again"),
        ("[]", r"config\.json: .* \(it lacks vision"),
        ({"size": None}, r"config\.json: .* \(it lacks 'size'\)"),
        ({"profile": {"layout": "plain"}}, r"config\.json: .* \(.*missing .*'opening'"),
        ({"max_pixels": "many"}, r"config\.json: .* \(max_pixels is 'many'\)"),
        ({"size": {"vision_width": "wide"}}, r"config\.json: .* \(qformer\.vision_width is 'wide'; it must be a whole"),
        ({"size": {"vision_width": 24, "positions": -1}}, r"config\.json: .* \(qformer\.positions is -1"),
        ({"size": {"vision_width": 24, "dropout": 1.5}}, r"config\.json: .* \(qformer\.dropout is 1\.5; it must be"),
        ({"size": 3}, r"config\.json: it does not describe an adapter"),
        (
            {"profile": {"layout": "plain", "opening": [], "end": ["</s>"], "pad": 0}},
            r"\(profile\.end is \('</s>',\)\)",
        ),
        ({"vision": ["vit"]}, r"config\.json: vision is \['vit'\]; it takes named values"),
    ],
)
def test_an_adapter_whose_description_is_damaged_is_named(model, tmp_path, content, message):
    model().save(tmp_path / "adapter")
    file = tmp_path / "adapter" / "config.json"
    if isinstance(content, dict):
        description = {**json.loads(file.read_text()), **content}
        content = json.dumps({name: value for name, value in description.items() if value is not None})
    file.unlink()
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=message):
        qformer.load(tmp_path / "adapter")


def test_an_adapter_without_its_fingerprint_or_tokenizer_is_named(model, tmp_path):
    model().save(tmp_path / "adapter")
    (tmp_path / "adapter" / "instruction_tokenizer" / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match="instruction_tokenizer: no tokenizer can be read from there"):
        qformer.load(tmp_path / "adapter")
    tensors = weights.load_tensors(tmp_path / "adapter" / "adapter.safetensors")
    del tensors["language.fingerprint"]
    weights.save_tensors(tmp_path / "adapter" / "adapter.safetensors", tensors)
    with pytest.raises(ConfigError, match=r"adapter\.safetensors: it lacks 'language\.fingerprint'"):
        qformer.load(tmp_path / "adapter")


def test_nothing_asked_is_nothing_answered(model):
    whole = model()
    assert whole.generate([], []) == whole.rank([], [], ["red"]) == whole.rank([], [], []) == []


def test_what_is_no_picture_or_no_text_is_refused(model):
    whole, one, asked = model(), pictures(1), PROMPTS[:1]
    for images, prompts, message in (
        ([[]], asked, r"images\[0\] is an empty list; give at least one picture"),
        ([None], asked, r"images\[0\] holds a NoneType; it takes a path, the bytes of a file, a PIL image, or a Video"),
        ([[one[0], 3]], asked, r"images\[0\] holds a int"),
        ("picture.png", asked, r"images is a str; it takes a list"),
        (one, "what is it", r"prompts is a str; it takes a list, even of one"),
        (one, [None], r"prompts\[0\] is a NoneType; it takes text"),
    ):
        with pytest.raises(ConfigError, match=f"generate: {message}"):
            whole.generate(images, prompts)
        with pytest.raises(ConfigError, match=f"rank: {message}"):
            whole.rank(images, prompts, ["red", "two"])
    with pytest.raises(ConfigError, match="rank: candidates is a str; it takes a list of texts"):
        whole.rank(one, asked, "red")
    for candidates in ([["red"], "two"], [[1]], [None]):
        with pytest.raises(ConfigError, match=r"rank: candidates\[\d\] is no list of texts|2 lists of candidates"):
            whole.rank(one * len(candidates), asked * len(candidates), candidates)
    with pytest.raises(ConfigError, match=r"generate: decoding\.num_beams is 0; it must be at least 1"):
        whole.generate(one, asked, num_beams=0)


def test_a_tokenizer_with_more_words_than_embeddings_is_refused(towers, tmp_path):
    from tests.tiny import tiny_llm

    world.write_pictures(tmp_path)
    tiny_llm(tmp_path / "many", "gpt2")
    settings = world.settings(towers, tmp_path, tmp_path / "run", f"qformer.tokenizer={tmp_path / 'many'}")
    with pytest.raises(ConfigError, match="word embeddings; use the tokenizer that belongs to"):
        loading.build(settings, report=str)
    settings = world.settings(towers, tmp_path, tmp_path / "run", "qformer.instruction_limit=400")
    with pytest.raises(ConfigError, match="instruction_limit is 400"):
        loading.build(settings, report=str)
    settings = world.settings(towers, tmp_path, tmp_path / "run", "qformer.init=null", "qformer.hidden=32")
    with pytest.raises(ConfigError, match="no tokenizer to read it with"):
        loading.build(settings, report=str)


def test_a_q_former_can_start_from_nothing(towers, tmp_path):
    world.write_pictures(tmp_path)
    places = world.towers(towers, "llama")
    sizes = ["qformer.init=null", "qformer.hidden=16", "qformer.layers=2", "qformer.heads=2"]
    settings = world.settings(towers, tmp_path, tmp_path / "run", *sizes, f"qformer.tokenizer={places['bert']}")
    whole = loading.build(settings, report=str)
    assert whole.connector.size.hidden == 16 and whole.connector.size.intermediate == 64
