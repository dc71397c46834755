"""Starts from several sources: each part from the first that covers it, and a table of where everything came from."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import qformer
from qformer import checkpoints, config, instruction, loading, saved
from qformer.config import QFormerConfig
from qformer.errors import ConfigError
from qformer.nn.qformer import QFormer, QFormerConnector, QFormerSize
from qformer.train import loop
from tests import world
from tests.published import put_in_cache, tiny_published
from tests.tiny import redraw, tiny_llm

SIZE = QFormerSize(
    vision_width=24, hidden=64, layers=2, heads=1, intermediate=48, vocabulary=60, positions=160, queries=4
)
MUTE = QFormerSize(**{**vars(SIZE), "instruction": False})


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("towers")


def write(path: Path, size: QFormerSize, seed: int, projection: bool = True, width: int = 32) -> QFormerConnector:
    """A LAVIS file of a random adapter; the adapter."""
    made = QFormerConnector(QFormer(size), width)
    redraw(made, seed)
    tensors = checkpoints.renamed_for(made.state_dict(), "lavis", "llm_proj")
    torch.save({"model": {n: t for n, t in tensors.items() if projection or "_proj" not in n}}, path)
    return made


def built(towers: Path, folder: Path, init: Any, **qformer_settings: Any) -> tuple[qformer.VLM, str]:
    world.write_pictures(folder)
    settings = world.settings(towers, folder, folder / "run")
    given = {"tokenizer": settings.qformer.init, "queries": 4, "dropout": 0.0, **qformer_settings}
    told: list[str] = []
    settings = dataclasses.replace(settings, qformer=QFormerConfig(init=init, **given))
    return loading.build(settings, report=told.append), told[0]


def words_of(towers: Path) -> QFormerSize:
    """The size above with as many words as the tiny BERT's tokenizer has."""
    words = len(instruction.read_tokenizer(world.towers(towers, "llama")["bert"]))
    return QFormerSize(**{**vars(SIZE), "vocabulary": words})


def test_the_text_half_comes_from_stage_one_and_the_rest_from_stage_two(towers: Path, tmp_path: Path) -> None:
    first = write(tmp_path / "one.pth", words_of(towers), 1, projection=False)
    second = write(tmp_path / "two.pth", MUTE, 2)
    init = [{"from": str(tmp_path / "one.pth"), "parts": ["text"]}, {"from": str(tmp_path / "two.pth")}]
    model, table = built(towers, tmp_path, init)
    for name, tensor in model.connector.state_dict().items():
        source = first if re.search("word_|position_|text_feed", name) else second
        assert torch.equal(tensor, source.state_dict()[name]), name
    assert "one.pth: qformer.blocks.*.text_feed_forward.inner ×4" in table and "two.pth: projection ×2" in table
    assert "made: nothing" in table and "shape differs: nothing" in table


def test_blip_2_becomes_one_that_reads_an_instruction(towers: Path, tmp_path: Path) -> None:
    second = write(tmp_path / "two.pth", MUTE, 2)
    bert = write(tmp_path / "words.pth", words_of(towers), 1, projection=False)
    init = [
        {"from": str(tmp_path / "words.pth"), "parts": ["embeddings"]},
        {"from": "copied", "parts": ["text_feed_forward"]},
        {"from": str(tmp_path / "two.pth")},
    ]
    model, table = built(towers, tmp_path, init)
    for block in model.connector.qformer.blocks:
        for ours, half in zip(block.text_feed_forward.parameters(), block.query_feed_forward.parameters(), strict=True):
            assert torch.equal(ours, half) and ours.data_ptr() != half.data_ptr()
    assert torch.equal(model.connector.qformer.queries, second.qformer.queries)
    assert torch.equal(model.connector.qformer.word_embeddings.weight, bert.qformer.word_embeddings.weight)
    assert "copied: 12" in table

    mute, _ = built(towers, tmp_path, [{"from": str(tmp_path / "two.pth")}], instruction=False)
    assert mute.instruction_tokenizer is None
    with pytest.raises(ConfigError, match=r"no source gives qformer\.word_embeddings\.weight, .*strict: false"):
        built(towers, tmp_path, [{"from": str(tmp_path / "two.pth")}])


def test_a_blip_2_of_transformers_starts_one_that_reads(towers: Path, tmp_path: Path) -> None:
    whole = tiny_published(tmp_path / "published", "opt", kind="blip-2")
    theirs = qformer.load(whole, report=str)
    init = [
        {"from": str(whole), "parts": ["norm", "queries", "self_attention", "cross_attention", "query_feed_forward"]},
        {"from": world.towers(towers, "llama")["bert"], "parts": ["embeddings"]},
        {"from": "copied", "parts": ["text_feed_forward"]},
        {"from": "new", "parts": ["projection"]},
    ]
    model, table = built(towers, tmp_path, init)
    assert theirs.instruction_tokenizer is None and model.connector.size.instruction
    for name, tensor in theirs.connector.state_dict().items():
        assert torch.equal(tensor, model.connector.state_dict()[name]) or "projection" in name, name
    assert "copied: 18" in table and "made: 2\n    projection ×2" in table


def test_a_bert_gives_words_and_both_halves(towers: Path, tmp_path: Path) -> None:
    bert = world.towers(towers, "llama")["bert"]
    fresh = {"from": "new", "parts": ["norm", "queries", "cross_attention", "projection"]}
    model, table = built(towers, tmp_path, [fresh, {"from": bert}])
    plain, _ = built(towers, tmp_path, bert)
    for name, tensor in plain.connector.qformer.state_dict().items():
        if "cross_attention" not in name and name != "queries":
            assert torch.equal(model.connector.qformer.state_dict()[name], tensor), name
    assert "copied: 12" in table and "embeddings.token_type_embeddings" in table


@pytest.mark.parametrize("listed", [False, True])
def test_every_start_heeds_the_norms_epsilon_and_scales_a_new_projection(
    towers: Path, tmp_path: Path, listed: bool
) -> None:
    init: Any = world.towers(towers, "llama")["bert"]
    if listed:
        parts = ["norm", "queries", "cross_attention", "projection"]
        init = [{"from": "new", "parts": parts}, {"from": init}]
    plain, _ = built(towers, tmp_path, init)
    scaled, _ = built(towers, tmp_path, init, norm_eps=1e-6, soft_scale="embeddings")
    assert (plain.connector.norm.eps, scaled.connector.norm.eps) == (1e-5, 1e-6)
    length, other = (float(each.connector.projection.weight.detach().norm()) for each in (scaled, plain))
    assert length == pytest.approx(scaled.language.embedding_norm(), rel=0.1)
    assert other > 2 * length


def test_a_projection_that_a_source_gives_is_not_scaled(towers: Path, tmp_path: Path) -> None:
    given = write(tmp_path / "whole.pth", words_of(towers), 1)
    model, _ = built(towers, tmp_path, [{"from": str(tmp_path / "whole.pth")}], soft_scale="embeddings")
    assert torch.equal(model.connector.projection.weight, given.projection.weight)


def test_a_bert_may_be_a_hub_id_without_an_owner(towers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    bert = world.towers(towers, "llama")["bert"]
    put_in_cache(tmp_path / "hub", Path(bert), "bert-base-uncased")
    fresh = {"from": "new", "parts": ["norm", "queries", "cross_attention", "projection"]}
    model, _ = built(towers, tmp_path, [fresh, {"from": "bert-base-uncased"}])
    again, _ = built(towers, tmp_path, [fresh, {"from": bert}])
    assert all(
        torch.equal(tensor, again.connector.state_dict()[n]) for n, tensor in model.connector.state_dict().items()
    )


def test_a_file_in_the_place_of_a_bert_is_refused(towers: Path, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"")
    with pytest.raises(
        ConfigError, match=r"x\.safetensors: it is a file, and a BERT checkpoint is a directory or hub id"
    ):
        built(towers, tmp_path, str(tmp_path / "x.safetensors"))


def test_another_encoder_keeps_what_fits_and_lists_what_was_made_anew(towers: Path, tmp_path: Path) -> None:
    wide = QFormerSize(**{**vars(words_of(towers)), "vision_width": 40})
    write(tmp_path / "wide.pth", wide, 1)
    with pytest.raises(
        ConfigError, match=r"does not give what it is to give: .*cross_attention\.key\.weight \(64, 40\)"
    ):
        built(towers, tmp_path, [{"from": str(tmp_path / "wide.pth")}])
    model, table = built(towers, tmp_path, [{"from": str(tmp_path / "wide.pth"), "strict": False}])
    assert model.connector.size.vision_width == 24
    assert "shape differs: 4" in table and "cross_attention.key.weight (64, 40), wanted (64, 24)" in table


def test_a_projection_to_another_llm_is_not_taken(towers: Path, tmp_path: Path) -> None:
    whole = tiny_published(tmp_path / "published", "llama", seed=5)
    source = {"from": str(whole)}
    model, table = built(towers, tmp_path, [{"from": "new", "parts": ["projection"]}, source], instruction_limit=40)
    theirs = qformer.load(whole, report=str)
    assert torch.equal(model.connector.qformer.queries, theirs.connector.qformer.queries)
    assert model.connector.norm.eps == 1e-6
    assert "made: 2\n    projection ×2" in table
    other = str(tiny_llm(tmp_path / "other", "llama", seed=9))
    settings = dataclasses.replace(model.settings, qformer=dataclasses.replace(model.settings.qformer, init=[source]))
    settings = dataclasses.replace(settings, language=dataclasses.replace(settings.language, name=other))
    with pytest.raises(ConfigError, match=r"no source gives projection\.weight, projection\.bias"):
        loading.build(settings, report=str)


def test_a_projection_of_lavis_to_the_other_kind_of_llm_is_not_taken_though_it_is_as_wide(
    towers: Path, tmp_path: Path
) -> None:
    made = QFormerConnector(QFormer(MUTE), 32)
    torch.save({"model": checkpoints.renamed_for(made.state_dict(), "lavis", "t5_proj")}, tmp_path / "t5.pth")
    wanted = (
        r"projection\.weight, projection\.bias.* The projection of .*t5\.pth leads to another LLM, so it is not taken"
    )
    for parts in (
        {},
        {"parts": ["norm", "queries", "self_attention", "cross_attention", "query_feed_forward", "projection"]},
    ):
        with pytest.raises(ConfigError, match=wanted):
            built(towers, tmp_path, [{"from": str(tmp_path / "t5.pth"), **parts}], instruction=False)
    _, told = built(towers, tmp_path, [{"from": str(tmp_path / "t5.pth"), "strict": False}], instruction=False)
    assert "made: 2\n    projection ×2" in told and "unused: 2\n    projection ×2" in told
    torch.save({"model": checkpoints.renamed_for(made.state_dict(), "lavis", "opt_proj")}, tmp_path / "opt.pth")
    model, _ = built(towers, tmp_path, [{"from": str(tmp_path / "opt.pth")}], instruction=False)
    assert torch.equal(model.connector.projection.weight, made.projection.weight)


def test_a_saved_adapter_is_a_source(towers: Path, tmp_path: Path) -> None:
    plain, _ = built(towers, tmp_path, world.towers(towers, "llama")["bert"])
    plain.save(tmp_path / "adapter")
    model, _ = built(towers, tmp_path, [{"from": str(tmp_path / "adapter")}])
    for name, tensor in plain.connector.state_dict().items():
        assert torch.equal(model.connector.state_dict()[name], tensor), name


def test_the_list_is_read_from_yaml_and_written_back(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "vision: {name: v}\nlanguage: {name: l}\n"
        "qformer:\n  tokenizer: bert\n  init:\n    - {from: one.pth, parts: [text]}\n"
        "    - {from: two.pth, strict: false}\n"
    )
    settings = config.load(file)
    assert config.init_sources(settings.qformer.init)[0].parts == ("text",)
    config.save(settings, tmp_path / "again.yaml")
    assert config.load(tmp_path / "again.yaml") == settings


@pytest.mark.parametrize(
    ("init", "message"),
    [
        (False, r"qformer\.init is the YAML boolean false; it takes a BERT checkpoint's name, or a list"),
        ([], r"qformer\.init is \[\]"),
        (["one.pth"], r"qformer\.init\[0\] is 'one\.pth'; it takes a mapping with 'from'"),
        ([{"from": "x", "part": ["text"]}], r"unknown key 'part'\. Did you mean 'parts'"),
        ([{"from": "x", "parts": ["texts"]}], r"unknown part 'texts'\. Did you mean 'text'"),
        ([{"from": "x", "strict": "yes"}], r"strict 'yes'; they take a list and true or false"),
    ],
)
def test_a_list_that_cannot_be_is_refused(init: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QFormerConfig(init=init)


def test_new_and_copied_need_parts(towers: Path, tmp_path: Path) -> None:
    for entry in ({"from": "new"}, {"from": "copied", "parts": ["queries"]}):
        with pytest.raises(ConfigError, match=rf"'{entry['from']}' needs parts"):
            built(towers, tmp_path, [{"from": world.towers(towers, "llama")["bert"], "parts": ["text"]}, entry])
    write(tmp_path / "two.pth", MUTE, 2)
    with pytest.raises(ConfigError, match=r"qformer\.queries is 6 and qformer\.init gives 4; set it to 4"):
        built(towers, tmp_path, [{"from": str(tmp_path / "two.pth")}], instruction=False, queries=6)
    write(tmp_path / "x.pth", words_of(towers), 2)
    with pytest.raises(ConfigError, match="no tokenizer to read it with"):
        built(towers, tmp_path, [{"from": str(tmp_path / "x.pth")}], tokenizer=None)


def test_fine_tuning_starts_from_whatever_was_tuned_before(towers: Path, tmp_path: Path) -> None:
    """A run (its best checkpoint), a saved adapter or a file of LAVIS, named alone or in a list."""
    world.write_pictures(tmp_path)
    bert = world.towers(towers, "llama")["bert"]
    settings = world.settings(towers, tmp_path, tmp_path / "run", "train.steps=2", "validation.every=1")
    loop.train(settings, validate=lambda _, step: {"one": -step}, say=lambda _: None, quiet=True)
    loading.load(tmp_path / "run", report=str).save(tmp_path / "adapter")
    write(tmp_path / "tuned.pth", words_of(towers), 3)
    kept = [saved.adapter_tensors(tmp_path / "run" / "checkpoints" / name)[0] for name in ("best", "step-2")]
    assert not torch.equal(kept[0]["qformer.queries"], kept[1]["qformer.queries"])
    for source, tokenizer in (("run", None), ("adapter", None), ("tuned.pth", bert)):
        path = str(tmp_path / source)
        named, _ = built(towers, tmp_path, path, tokenizer=tokenizer)
        listed, _ = built(towers, tmp_path, [{"from": path}], tokenizer=tokenizer)
        wanted = listed.connector.state_dict() if source == "tuned.pth" else kept[0]
        for started in (named, listed):
            found = started.connector.state_dict()
            assert found.keys() == wanted.keys()
            assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items()), source


def test_fine_tuning_starts_from_a_published_model(towers: Path, tmp_path: Path) -> None:
    published = str(tiny_published(tmp_path / "published", "llama", seed=5))
    theirs = qformer.load(published, report=str)
    world.write_pictures(tmp_path)
    settings = world.settings(
        towers, tmp_path, tmp_path / "run", f"vision.name={published}", f"language.name={published}",
        f"qformer.init={published}", "qformer.queries=4", "qformer.instruction_limit=40", "train.steps=1",
    )  # fmt: skip
    started = loading.build(settings, report=str)
    for name, tensor in theirs.connector.state_dict().items():
        assert torch.equal(started.connector.state_dict()[name], tensor), name
    assert loop.train(settings, say=lambda _: None, quiet=True) == tmp_path / "run"
