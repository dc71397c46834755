"""Published weights in every form they come in, moved here and back, and what is said about files that are wrong."""

from __future__ import annotations

import json
import os
import runpy
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

import qformer
from qformer import checkpoints, exporting, instruction, loading, presets
from qformer.config import LanguageConfig
from qformer.errors import ConfigError
from qformer.nn.qformer import QFormer, QFormerConnector, QFormerSize
from qformer.sample import Slot, Text
from tests.published import QFORMER, QUERIES, VISION, tiny_published
from tests.tiny import redraw, tiny_llm

IDS = torch.tensor([[2, 8, 9, 3]])
PIXELS = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(5))
SIZE = QFormerSize(
    vision_width=24, hidden=128, layers=3, heads=2, intermediate=48, vocabulary=30, positions=20, queries=QUERIES
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("published")


@pytest.fixture
def source(folder: Path, tmp_path: Path) -> Path:
    """A copy of a transformers InstructBLIP around a Llama, to be spoilt."""
    return Path(shutil.copytree(tiny_published(folder, "llama"), tmp_path / "source"))


def loaded(where: Path | str, **more: Any) -> qformer.VLM:
    return qformer.load(where, report=str, **more)


def soft(model: qformer.VLM) -> Tensor:
    with torch.no_grad():
        return model.soft_prompts(PIXELS, IDS if model.connector.size.instruction else None)


def numbers(model: qformer.VLM) -> tuple[Tensor, Tensor]:
    """What encoder, adapter and LLM make of one picture and one row: every part has its tensors, or it differs."""
    rows = [(Slot(0), Text((1, 5, 6)), Text((7, 2), trained=True))]
    with torch.no_grad():
        return soft(model), model.language.log_likelihood(soft(model), rows)[0]


def same(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(one, other, strict=True))


def connector(size: QFormerSize = SIZE, width: int = 32) -> QFormerConnector:
    made = QFormerConnector(QFormer(size), width)
    redraw(made, 7)
    return made.eval()


def lavis(made: nn.Module, projection: str = "llm_proj") -> dict[str, Tensor]:
    return checkpoints.renamed_for(made.state_dict(), "lavis", projection)


def write(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def towers(folder: Path, family: str = "llama") -> dict[str, str]:
    return {"vision": str(tiny_published(folder, "llama")), "language": str(tiny_llm(folder / f"own-{family}", family))}


def model_of(name: str) -> tuple[Any, Any]:
    """An LLM as transformers itself reads it, a T5 with LAVIS' exact GELU, and its tokenizer."""
    described = AutoConfig.from_pretrained(name)
    if described.model_type == "t5":
        described.dense_act_fn = "gelu"
    kind = AutoModelForSeq2SeqLM if described.is_encoder_decoder else AutoModelForCausalLM
    return kind.from_pretrained(name, config=described).eval(), AutoTokenizer.from_pretrained(name)


# -- transformers -----------------------------------------------------------------------------------------------------


def test_shards_pickles_and_older_layouts_load_the_same(folder: Path, source: Path, tmp_path: Path) -> None:
    expected = numbers(loaded(source))
    whole = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    older = {"qformer.embeddings.position_ids": torch.arange(40)[None]}
    older["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    torch.save(whole | older, source / "pytorch_model.bin")
    assert same(numbers(loaded(source)), expected)

    (source / "pytorch_model.bin").unlink()
    save_file(
        {f"model.{name}": tensor for name, tensor in whole.items()}, source / "model.safetensors", {"format": "pt"}
    )
    assert same(numbers(loaded(source)), expected)

    (source / "model.safetensors").unlink()
    names = {name: f"model-0000{number % 3 + 1}-of-00003.safetensors" for number, name in enumerate(whole)}
    for shard in set(names.values()):
        save_file({name: whole[name] for name in whole if names[name] == shard}, source / shard, {"format": "pt"})
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    assert same(numbers(loaded(source)), expected)
    for shard in set(names.values()):
        torch.save(load_file(source / shard), source / f"pytorch_{Path(shard).stem}.bin")
    binned = {name: f"pytorch_{Path(shard).stem}.bin" for name, shard in names.items()}
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": binned}))
    (source / "model.safetensors.index.json").rename(tmp_path / "index.json")
    assert same(numbers(loaded(source)), expected)
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": binned}))
    with pytest.raises(ConfigError, match=r"vision\.name '.*': its weights cannot be read \('metadata'\)"):
        loaded(source)  # transformers, which reads the towers, wants that too
    (tmp_path / "index.json").rename(source / "model.safetensors.index.json")
    (source / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"names model-00002-of-00003\.safetensors, which is not there"):
        loaded(source)


def test_blip_2_for_retrieval_gives_the_text_half(tmp_path: Path) -> None:
    from transformers import Blip2Config, Blip2ForImageTextRetrieval

    inner = {**QFORMER, "vocab_size": 50, "use_qformer_text_input": True}
    model = Blip2ForImageTextRetrieval(
        Blip2Config(vision_config=VISION, qformer_config=inner, num_query_tokens=QUERIES)
    )
    redraw(model, 1)
    model.save_pretrained(tmp_path / "itm")
    found = checkpoints.read_transformers(tmp_path / "itm", "itm")
    assert found.size.instruction and (found.size.vocabulary, found.size.positions) == (50, 40)
    assert found.language_width is None and "itm_head.weight" in found.unused
    theirs = model.state_dict()
    for ours, name in {
        "qformer.word_embeddings.weight": "embeddings.word_embeddings.weight",
        "qformer.norm.weight": "qformer.layernorm.weight",
        "qformer.blocks.1.text_feed_forward.inner.weight": "qformer.encoder.layer.1.intermediate.dense.weight",
    }.items():
        assert torch.equal(found.tensors[ours], theirs[name])


def test_without_tokenizers_tensor_calls_work_and_text_calls_say_what_is_missing(source: Path, tmp_path: Path) -> None:
    from PIL import Image

    whole = loaded(source)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).unlink()
    shutil.rmtree(source / "qformer_tokenizer")
    bare = loaded(source)
    assert torch.equal(soft(bare), soft(whole))
    rows = [(Slot(0), Text((1, 5, 6)), Text((7, 2), trained=True))]
    assert torch.equal(
        bare.language.log_likelihood(soft(bare), rows)[0], whole.language.log_likelihood(soft(whole), rows)[0]
    )
    picture = Image.new("RGB", (32, 32))
    with pytest.raises(ConfigError, match=r"came without the Q-Former's tokenizer .*bert-base-uncased.* work without"):
        bare.generate([picture], ["what is it"])
    bare.save(tmp_path / "bare")
    assert torch.equal(soft(loaded(tmp_path / "bare")), soft(whole))


def test_a_saved_adapter_reads_with_the_tokenizer_that_is_named(source: Path, tmp_path: Path) -> None:
    from PIL import Image

    reader = Path(shutil.move(source / "qformer_tokenizer", tmp_path / "reader"))
    loaded(source).save(tmp_path / "bare")
    asked: Any = [Image.new("RGB", (32, 32))], ["what is it"]
    with pytest.raises(
        ConfigError, match=r"bare was saved without the Q-Former's tokenizer \(name one, such as instruction_token"
    ):
        loaded(tmp_path / "bare").generate(*asked)
    named = loaded(tmp_path / "bare", instruction_tokenizer=reader)
    whole = loaded(source, instruction_tokenizer=reader)
    assert named.generate(*asked, max_new_tokens=5) == whole.generate(*asked, max_new_tokens=5)
    words = named.joiner().read_ids("what is it")
    assert loading.unplug(tmp_path / "bare", instruction_tokenizer=reader).tokenizer("what is it").input_ids == [*words]
    named.save(tmp_path / "whole")
    assert loaded(tmp_path / "whole").joiner().read_ids("what is it") == words
    other = tiny_llm(tmp_path / "other", "llama")
    with pytest.raises(ConfigError, match=rf"'{other}' has \d+ words and the Q-Former \d+ word embeddings"):
        loaded(tmp_path / "bare", instruction_tokenizer=other)


def test_towers_named_elsewhere_take_the_place_of_its_own(folder: Path, source: Path) -> None:
    own = loaded(source)
    other = tiny_published(folder, "llama", num_key_value_heads=4, seed=3)
    moved = loaded(source, vision=str(other))
    assert not torch.allclose(soft(moved), soft(own), atol=1e-3)
    assert torch.equal(moved.connector.projection.weight, own.connector.projection.weight)
    with pytest.raises(ConfigError, match=r"'.*own-llama' is another one .*qformer\.plug"):
        loaded(source, language=str(tiny_llm(folder / "own-llama", "llama", seed=4)))


def test_the_llm_inside_may_be_read_from_a_directory_of_its_own(source: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    own = loaded(source)
    alone = AutoModelForCausalLM.from_config(own.language.model.config)
    alone.load_state_dict(own.language.model.state_dict())
    alone.save_pretrained(tmp_path / "llm")
    own.language.tokenizer.save_pretrained(tmp_path / "llm")
    apart = loaded(source, language=str(tmp_path / "llm"))
    assert apart.settings.language.name == str(tmp_path / "llm")
    assert same(numbers(apart), numbers(own)) and apart.language.profile == own.language.profile


def test_another_encoder_under_a_published_adapter_keeps_what_fits(source: Path, tmp_path: Path) -> None:
    from tests.tiny import tiny_vision

    wide = str(tiny_vision(tmp_path / "wide", width=32))
    with pytest.raises(ConfigError, match=r"reads an encoder of width 24, and '.*wide' is 32 wide; .*strict=False"):
        loaded(source, vision=wide)
    told: list[str] = []
    swapped = qformer.load(source, vision=wide, strict=False, report=told.append)
    assert "shape differs: 6\n    norm.weight (24,), wanted (32,)" in told[0] and "made: nothing" in told[0]
    before, after = loaded(source).connector.state_dict(), swapped.connector.state_dict()
    anew = {name for name in after if not torch.equal(after[name], before[name])}
    assert len(anew) == 6 and all(name.startswith("norm.") or ".cross_attention." in name for name in anew)


def test_a_model_saved_from_a_published_one_comes_back(source: Path, tmp_path: Path) -> None:
    model = loaded(source)
    model.save(tmp_path / "adapter")
    again = loaded(tmp_path / "adapter")
    assert again.connector.norm.eps == model.connector.norm.eps == 1e-6
    assert torch.equal(soft(again), soft(model))
    assert again.language.profile == model.language.profile


def test_the_table_says_where_every_tensor_went(source: Path) -> None:
    told: list[str] = []
    tensors = load_file(source / "model.safetensors")
    save_file(tensors | {"itm_head.weight": torch.ones(2, 32)}, source / "model.safetensors", {"format": "pt"})
    qformer.load(source, report=told.append)
    [table] = told
    for line in ("loaded: 95", "made: nothing", "unused: 1\n    itm_head", "shape differs: nothing"):
        assert line in table


def test_a_loose_load_makes_what_is_missing_and_lists_it(source: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    del tensors["language_projection.weight"], tensors["language_projection.bias"]
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ConfigError, match=r"missing or of another shape: projection\.weight, projection\.bias\. With st"
    ):
        loaded(source)
    told: list[str] = []
    qformer.load(source, strict=False, report=told.append)
    assert "made: 2\n    projection ×2" in told[0]


# -- LAVIS ------------------------------------------------------------------------------------------------------------


def test_every_lavis_file_gives_the_same_adapter(folder: Path, tmp_path: Path) -> None:
    made, named = connector(), towers(folder)
    trimmed = lavis(made)
    strays = {
        "Qformer.bert.embeddings.position_ids": torch.arange(20)[None],
        "llm_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }
    runner = {"model": trimmed | strays, "optimizer": {"state": {}}, "config": {"run": 1}, "scaler": None, "iters": 3}
    files = {
        "bare": trimmed,
        "released": {"model": trimmed},
        "runner": runner,
    }
    for name, content in files.items():
        model = loaded(write(tmp_path / f"{name}.pth", content), **named)
        for own, tensor in made.state_dict().items():
            assert torch.equal(model.connector.state_dict()[own], tensor), (name, own)
    assert model.connector.norm.eps == 1e-5
    tuned = {"model": trimmed | {"visual_encoder.pos_embed": torch.ones(1, 17, 24)}}
    told: list[str] = []
    qformer.load(write(tmp_path / "tuned.pth", tuned), **named, report=told.append)
    assert "unused: nothing" in told[0] and "holds an encoder that was tuned with the adapter" in told[1]
    tokens = model.encode(PIXELS)
    with torch.no_grad():
        expected = made(tokens, (IDS, torch.ones_like(IDS).bool()))
    torch.testing.assert_close(soft(model), expected, rtol=1e-5, atol=1e-5)
    assert model.language.profile.opening == model.language.profile.end == (2,)


def test_stage_two_reads_no_instruction_and_stage_one_has_no_projection(folder: Path, tmp_path: Path) -> None:
    mute = QFormerSize(**{**vars(SIZE), "instruction": False})
    model = loaded(write(tmp_path / "two.pth", {"model": lavis(connector(mute))}), **towers(folder))
    assert model.instruction_tokenizer is None and soft(model).shape == (1, QUERIES, 32)

    first = {name: tensor for name, tensor in lavis(connector()).items() if "_proj" not in name}
    first |= {
        "temp": torch.tensor(0.07),
        "itm_head.weight": torch.ones(2, 128),
        "vision_proj.weight": torch.ones(8, 128),
    }
    stage_one = write(tmp_path / "one.pth", {"model": first})
    with pytest.raises(ConfigError, match=r"projection\.weight, projection\.bias"):
        loaded(stage_one, **towers(folder))
    told: list[str] = []
    model = qformer.load(stage_one, **towers(folder), strict=False, report=told.append)
    assert "made: 2\n    projection ×2" in told[0] and "unused: 3" in told[0]


def test_a_lavis_file_needs_both_towers(folder: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "x.pth", {"model": lavis(connector())})
    with pytest.raises(ConfigError, match=r"holds the adapter alone; name both towers"):
        loaded(file)
    with pytest.raises(ConfigError, match=r"projects to an LLM of width 48, and '.*' is 32 wide"):
        loaded(write(tmp_path / "y.pth", lavis(connector(width=48))), **towers(folder))


@pytest.mark.parametrize(
    ("projection", "family", "message"),
    [
        ("llm_proj", "t5", r"\(llm_proj\) leads to a decoder-only LLM, and '.*' is an encoder–decoder; name the LLM"),
        ("opt_proj", "t5", r"\(opt_proj\) leads to a decoder-only LLM"),
        ("t5_proj", "llama", r"\(t5_proj\) leads to an encoder–decoder, and '.*' is a decoder-only LLM; name the LLM"),
    ],
)
def test_an_llm_of_the_other_kind_is_refused_though_it_is_as_wide(
    folder: Path, tmp_path: Path, projection: str, family: str, message: str
) -> None:
    file = write(tmp_path / "x.pth", {"model": lavis(connector(), projection)})
    with pytest.raises(ConfigError, match=message):
        loaded(file, **towers(folder, family))


@pytest.mark.parametrize(("projection", "family"), [("llm_proj", "llama"), ("t5_proj", "t5")])
def test_the_comparison_with_lavis_computes_what_the_model_does(
    folder: Path, tmp_path: Path, projection: str, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = tiny_published(folder, "llama") / "qformer_tokenizer"
    size = replace(SIZE, vocabulary=len(instruction.read_tokenizer(words)))
    file = write(tmp_path / "x.pth", {"model": lavis(connector(size), projection)})
    side = runpy.run_path(str(Path(__file__).parent.parent / "benchmarks" / "against_lavis.py"))
    monkeypatch.setitem(side["by_qformer"].__globals__, "pixels", lambda: PIXELS)
    named = towers(folder, family)  # once: a tokenizer that is made again need not be the same
    found = side["by_qformer"](file, named["vision"], named["language"], words)
    llm, tokenizer = model_of(named["language"])
    prompt, answer = (tokenizer(text, add_special_tokens=False).input_ids for text in (side["PROMPT"], "a dog"))
    prompt, answer = ([*prompt, 1], [*answer, 1]) if family == "t5" else ([2, *prompt], [*answer, 2])
    read = torch.tensor(prompt if family == "t5" else prompt + answer)
    told = torch.cat([found["soft prompts"][0], llm.get_input_embeddings()(read)])[None]
    labels = answer if family == "t5" else [-100] * (QUERIES + len(prompt)) + answer
    loss = llm(inputs_embeds=told, labels=torch.tensor([labels])).loss
    assert found["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    assert len(found["greedy tokens"]) == 1 and found["soft prompts"].abs().sum() > 0


# -- there and back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "options"), [("llama", {}), ("t5", {}), ("t5", {"untied": True}), ("opt", {"kind": "blip-2"})]
)
def test_transformers_here_and_back_is_tensor_equal(
    folder: Path, tmp_path: Path, family: str, options: dict[str, Any]
) -> None:
    source = tiny_published(folder, family, **options)
    assert loaded(source).export_transformers(tmp_path / "back") == ()
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
    assert torch.equal(soft(loaded(tmp_path / "back")), soft(loaded(source)))


@pytest.mark.parametrize("instruction", [True, False])
@pytest.mark.parametrize(("projection", "family"), [("llm_proj", "llama"), ("opt_proj", "opt"), ("t5_proj", "t5")])
def test_lavis_here_and_back_is_tensor_equal(
    folder: Path, tmp_path: Path, projection: str, family: str, instruction: bool
) -> None:
    trimmed = lavis(connector(replace(SIZE, instruction=instruction)), projection)
    named = towers(folder, family)
    plain = LanguageConfig(name=named["language"])  # the preset's end mark is none of the tiny tokenizer's
    model = loaded(write(tmp_path / "x.pth", {"model": trimmed}), vision=named["vision"], language=plain)
    model.save(tmp_path / "adapter")
    [file, *notes] = qformer.export(tmp_path / "adapter", tmp_path / "out", "lavis")
    assert file == str(tmp_path / "out" / "adapter.pth") and not notes
    back = torch.load(file, weights_only=True)["model"]
    assert back.keys() == trimmed.keys()
    for name, tensor in trimmed.items():
        assert torch.equal(back[name], tensor), name


@pytest.mark.parametrize(("family", "projection"), [("llama", "llm_proj"), ("t5", "t5_proj")])
def test_an_exported_model_answers_alike_through_the_processor(
    folder: Path, tmp_path: Path, family: str, projection: str
) -> None:
    from PIL import Image
    from transformers import InstructBlipForConditionalGeneration, InstructBlipProcessor

    reader = tiny_published(folder, "llama") / "qformer_tokenizer"
    size = QFormerSize(**{**vars(SIZE), "vocabulary": len(instruction.read_tokenizer(reader))})
    file = write(tmp_path / "x.pth", {"model": lavis(connector(size), projection)})
    ours = loaded(file, **towers(folder, family), instruction_tokenizer=reader)
    notes = ours.export_transformers(tmp_path / "whole")
    assert ["epsilon 1e-06" in note for note in notes] == [True]
    theirs = InstructBlipForConditionalGeneration.from_pretrained(tmp_path / "whole").eval()
    processor = InstructBlipProcessor.from_pretrained(tmp_path / "whole", backend="pil")
    picture, prompt = Image.new("RGB", (50, 41), (200, 30, 90)), "what colour is it"
    given = processor(images=picture, text=prompt, return_tensors="pt")
    assert (given["input_ids"] == theirs.config.image_token_id).sum() == QUERIES
    front = given["input_ids"].shape[1] if family == "llama" else 1
    for decoding in ({}, {"num_beams": 3}):
        with torch.no_grad():
            ids = theirs.generate(**given, max_new_tokens=8, min_new_tokens=1, do_sample=False, **decoding)
        [answer] = ours.generate([picture], [prompt], max_new_tokens=8, **decoding)
        assert processor.tokenizer.decode(ids[0, front:], skip_special_tokens=True).strip() == answer and answer
    if family == "t5":
        assert theirs.language_model.config.dense_act_fn == "gelu"
    assert loaded(tmp_path / "whole").connector.norm.eps == 1e-5


def test_what_transformers_cannot_express_is_refused_with_the_reason(folder: Path, tmp_path: Path) -> None:
    import dataclasses

    from qformer.config import TransformConfig, VisionConfig
    from tests.tiny import tiny_vision

    whole = tiny_published(folder, "llama")
    model = loaded(whole)
    profile = model.language.profile
    model.language.profile = dataclasses.replace(profile, slots_first=False)
    with pytest.raises(ConfigError, match="soft tokens before everything, and here they stand inside"):
        model.export_transformers(tmp_path / "out")
    cropped = VisionConfig(name=str(whole), norm=False, eval_transform=TransformConfig(mode="crop"))
    with pytest.raises(ConfigError, match=r"squashes pictures, and vision\.eval_transform\.mode is 'crop'"):
        loaded(whole, vision=cropped).export_transformers(tmp_path / "out")
    larger = VisionConfig(name=str(whole), norm=False, image_size=48)
    with pytest.raises(ConfigError, match=r"takes 32 pixels a side, and vision\.image_size is 48"):
        loaded(whole, vision=larger).export_transformers(tmp_path / "out")
    vit = VisionConfig(name=str(tiny_vision(tmp_path / "vit")), norm=False)
    with pytest.raises(ConfigError, match=r"its encoder is an EVA-CLIP of its own, and '.*vit' is a ViTModel"):
        loaded(whole, vision=vit).export_transformers(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match=r"export: .*mine holds thesis\.txt, which would be lost; give a directory"):
        loaded(whole).export_transformers(tmp_path / "mine")


def test_every_other_reason_is_told_too(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    from qformer.backbones.vision import load_vision
    from qformer.config import VisionConfig

    whole, out = tiny_published(folder, "llama"), tmp_path / "out"
    for settings, message in (
        ({"norm": True}, r"reads every token, class token first, without the encoder's own norm"),
        ({"norm": False, "class_token": False}, r"reads every token, class token first"),
        ({"norm": False, "block": 0}, r"reads the encoder's last block, and vision\.block is 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            loaded(whole, vision=VisionConfig(name=str(whole), **settings)).export_transformers(out)
    model = loaded(whole)
    language, profile = model.language, model.language.profile
    language.profile = dataclasses.replace(profile, decoder_opening=(1,))
    with pytest.raises(ConfigError, match=r"starts a decoder with one id, and the profile's decoder_opening is \(1,\)"):
        model.export_transformers(out)
    language.profile = profile
    state = language.model.state_dict()
    with monkeypatch.context() as patch:
        patch.setattr(language.model, "state_dict", lambda: {**state, "x.SCB": torch.ones(1)})
        with pytest.raises(ConfigError, match=r"no place for language_model\.x\.SCB \(a quantised LLM cannot"):
            model.export_transformers(out)
    with monkeypatch.context() as patch:
        patch.setattr(language.model.config, "hidden_size", 48)
        with pytest.raises(ConfigError, match="the LLM's hidden size 48, and its embeddings are 32 wide"):
            model.export_transformers(out)
    rotary = load_vision(VisionConfig(name="eva02_tiny_patch14_224", pretrained=False, norm=False))
    with pytest.raises(
        ConfigError, match=r"EVA-CLIP-g \(absolute positions, no layer scale\), and this EVA is another"
    ):
        exporting._eva(rotary.model, 224)
    with pytest.raises(ConfigError, match="export: 'opt_pro' is no projection of LAVIS; it has t5_proj, llm_proj"):
        exporting.to_lavis({}, SIZE, "opt_pro", 1e-5, out)
    assert not out.exists()


def test_what_an_export_lacks_is_noted(source: Path, tmp_path: Path) -> None:
    import dataclasses

    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).unlink()
    model = loaded(source)
    model.language.profile = dataclasses.replace(model.language.profile, stop=("Question:",))
    assert model.export_transformers(tmp_path / "out") == (
        "there is no processor, since the LLM's or the Q-Former's tokenizer is missing.",
        "transformers knows nothing of the stop strings ['Question:'].",
    )
    assert torch.equal(soft(loaded(tmp_path / "out")), soft(model))


# -- bad input --------------------------------------------------------------------------------------------------------


def test_a_truncated_file_is_named(source: Path, tmp_path: Path) -> None:
    whole = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        ConfigError, match=r"model\.safetensors: not a whole safetensors file .*fetch or write it again"
    ):
        loaded(source)
    pickled = write(tmp_path / "x.pth", {"model": lavis(connector())})
    pickled.write_bytes(pickled.read_bytes()[:3000])
    with pytest.raises(ConfigError, match=r"x\.pth: no tensors can be read from it safely .*fetch it again"):
        loaded(pickled)


def test_a_shard_of_the_llm_that_is_missing_is_not_put_down_to_the_encoder(source: Path) -> None:
    whole = load_file(source / "model.safetensors")
    held = {name: f"model-{1 + name.startswith('language_model.')}.safetensors" for name in whole}
    save_file({n: t for n, t in whole.items() if held[n].startswith("model-1")}, source / "model-1.safetensors")
    (source / "model.safetensors").unlink()
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": held}))
    with pytest.raises(ConfigError, match=r"source: .* names model-2\.safetensors, which is not there; fetch"):
        loaded(source)


def test_a_mislabelled_file_is_named(source: Path, tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("Not found\n")
    with pytest.raises(ConfigError, match=r"text\.pth: no tensors can be read .* \(it is no file of torch's\)"):
        loaded(tmp_path / "text.pth")
    with pytest.raises(ConfigError, match=r"enc\.pth: it holds no Q-Former; it looks like an image encoder"):
        loaded(write(tmp_path / "enc.pth", {"patch_embed.proj.weight": torch.ones(1)}))
    with pytest.raises(ConfigError, match=r"model\.pth: 'model' is a list where named tensors belong"):
        loaded(write(tmp_path / "model.pth", {"model": [1]}))
    with pytest.raises(ConfigError, match=r"list\.pth: it holds a list, not tensors by name"):
        loaded(write(tmp_path / "list.pth", [1]))
    with pytest.raises(
        ConfigError, match=r"model\.safetensors: tensors alone do not tell .*; give the directory it is"
    ):
        loaded(source / "model.safetensors")
    shutil.copy(source / "config.json", source / "model.safetensors")
    with pytest.raises(ConfigError, match=r"model\.safetensors: not a whole safetensors file"):
        loaded(source)


class Spring:
    """A pickle that would run code when read."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.mark),))


def test_a_pickle_with_code_in_it_is_refused_and_not_run(source: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "x.pth", {"model": {"query_tokens": Spring(tmp_path / "sprung")}})
    with pytest.raises(ConfigError, match=r"x\.pth: no tensors can be read from it safely"):
        loaded(file)
    (source / "model.safetensors").unlink()
    write(source / "pytorch_model.bin", {"query_tokens": Spring(tmp_path / "sprung")})
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin: no tensors can be read from it safely"):
        loaded(source)
    assert not (tmp_path / "sprung").exists()


def test_tensors_of_another_shape_and_missing_ones_are_named(folder: Path, tmp_path: Path) -> None:
    spoilt = lavis(connector())
    spoilt["Qformer.bert.encoder.layer.1.attention.self.value.weight"] = torch.ones(128, 127)
    del spoilt["Qformer.bert.encoder.layer.2.output_query.dense.bias"]
    with pytest.raises(
        ConfigError, match=r"query_feed_forward\.outer\.bias, .*self_attention\.value\.weight \(128, 127\), wanted"
    ):
        loaded(write(tmp_path / "x.pth", spoilt), **towers(folder))


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("ln_vision.weight", torch.ones(24, dtype=torch.int8), r"norm\.weight is int8, and weights are dense"),
        ("llm_proj.bias", torch.empty(32, device="meta"), r"projection\.bias is not dense"),
        ("Qformer.bert.encoder.layer.0.crossattention.self.key.weight", torch.ones(3), r"has shape \(3,\), which is"),
        (
            "Qformer.bert.embeddings.word_embeddings.weight",
            None,
            r"a part alone \(word embeddings: none, pos",
        ),
        ("query_tokens", torch.ones(4, 128), "its Q-Former lacks blocks, cross-attention or feed-forwards"),
    ],
)
def test_what_cannot_be_an_adapter_is_refused_loosely_too(
    folder: Path, tmp_path: Path, name: str, tensor: Tensor | None, message: str
) -> None:
    spoilt = {**lavis(connector()), name: tensor}
    file = write(tmp_path / "x.pth", {each: value for each, value in spoilt.items() if value is not None})
    for strict in (True, False):
        with pytest.raises(ConfigError, match=message):
            loaded(file, **towers(folder), strict=strict)


def test_blocks_that_look_at_no_steady_distance_are_refused(tmp_path: Path) -> None:
    size = QFormerSize(**{**vars(SIZE), "layers": 5, "cross_attention_every": 2})
    spoilt = {name: t for name, t in lavis(connector(size)).items() if "layer.4.crossattention" not in name}
    with pytest.raises(ConfigError, match=r"blocks \[0, 2\] of 5 look at the picture, which no single distance"):
        checkpoints.read_lavis(write(tmp_path / "x.pth", spoilt))


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("qformer_config", {"hidden_size": 64}, r"hidden 64 \(the tensors say 32\)"),
        ("qformer_config", {"num_hidden_layers": 2}, r"layers 2 \(the tensors say 3\)"),
        ("qformer_config", {"vocab_size": 30522}, r"vocabulary 30522 \(the tensors say"),
        ("qformer_config", {"num_attention_heads": 5}, "num_attention_heads 5, which does not divide"),
        ("qformer_config", {"hidden_act": "relu"}, "hidden_act 'relu'"),
        ("", {"num_query_tokens": 32}, r"queries 32 \(the tensors say 4\)"),
        (
            "qformer_config",
            {"hidden_size": "wide"},
            r"can make nothing of its config\.json \(.*\); fetch it again",
        ),
        ("", {"vision_config": [24]}, r"can make nothing of its config\.json"),
        ("", {"qformer_norm_eps": "small"}, r"qformer_norm_eps is 'small'; it takes a number"),
        ("vision_config", {"intermediate_size": 40}, r"vision\.name '.*': its weights cannot be read"),
        ("text_config", {"hidden_size": 16}, r"language\.name is '.*', and no LLM can be read from there"),
    ],
)
def test_a_config_that_lies_about_sizes_is_refused(
    source: Path, part: str, changes: dict[str, Any], message: str
) -> None:
    described = json.loads((source / "config.json").read_text())
    (described[part] if part else described).update(changes)
    (source / "config.json").write_text(json.dumps(described))
    with pytest.raises(ConfigError, match=message):
        loaded(source)


def test_a_saved_adapter_that_lacks_something_is_named(source: Path, tmp_path: Path) -> None:
    loaded(source).save(tmp_path / "adapter")
    file, described = tmp_path / "adapter" / "adapter.safetensors", tmp_path / "adapter" / "config.json"
    tensors = load_file(file)
    del tensors["language.fingerprint"]
    save_file(tensors, file)
    with pytest.raises(ConfigError, match=r"adapter\.safetensors: it lacks 'language\.fingerprint'"):
        loaded(tmp_path / "adapter")
    described.write_text(json.dumps({"format": 1, "vision": {}, "language": {}}))
    with pytest.raises(ConfigError, match=r"config\.json: .*it lacks qformer, max_pixels\)"):
        loaded(tmp_path / "adapter")
    described.write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json: it does not describe an adapter"):
        loaded(tmp_path / "adapter")


def test_a_tokenizer_with_fewer_ids_than_the_embedding_is_refused(folder: Path, tmp_path: Path) -> None:
    reader = tiny_published(folder, "llama") / "qformer_tokenizer"
    size = QFormerSize(**{**vars(SIZE), "vocabulary": 3000})
    file = write(tmp_path / "x.pth", {"model": lavis(connector(size))})
    with pytest.raises(
        ConfigError, match=r"has \d+ words and the Q-Former 3000 word embeddings; use the tokenizer that"
    ):
        loaded(file, **towers(folder), instruction_tokenizer=reader)


def test_an_llm_with_the_tokenizer_of_another_is_refused(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    directory = tiny_llm(tmp_path / "llm", "llama")
    model = AutoModelForCausalLM.from_pretrained(directory)
    model.resize_token_embeddings(600, mean_resizing=False)
    model.save_pretrained(directory)
    file = write(tmp_path / "x.pth", {"model": lavis(connector())})
    with pytest.raises(
        ConfigError, match=r"its tokenizer has \d+ words and the model 600 embeddings, so it is another"
    ):
        loaded(file, vision=towers(folder)["vision"], language=str(directory))


def test_a_hub_id_without_network_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"someone/some-model: neither a path here nor a model that can be fetched"):
        loaded("someone/some-model")
    with pytest.raises(ConfigError, match=r"nowhere\.pth: there is no such file or directory"):
        loaded(tmp_path / "nowhere.pth")
    with pytest.raises(ConfigError, match="there is no such file or directory; give one, or a hub id"):
        loaded("nothing.pth")


def test_presets_are_data(tmp_path: Path) -> None:
    assert presets.load("lavis_vicuna").language.profile.opening == [2]
    with pytest.raises(ConfigError, match="unknown preset 'lavis_lama'"):
        presets.load("lavis_lama")


@pytest.mark.parametrize(
    ("family", "options", "projection"),
    [("llama", {}, "llm_proj"), ("t5", {}, "t5_proj"), ("opt", {"kind": "blip-2"}, "opt_proj")],
)
def test_what_comes_from_transformers_goes_to_lavis_under_its_own_name(
    folder: Path, tmp_path: Path, family: str, options: dict[str, Any], projection: str
) -> None:
    source = tiny_published(folder, family, **options)
    loaded(source).save(tmp_path / "saved")
    for number, place in enumerate((source, tmp_path / "saved")):
        file = qformer.export(place, tmp_path / str(number), "lavis")[0]
        assert f"{projection}.weight" in torch.load(file, weights_only=True)["model"]
