"""Another LLM under the same Q-Former: what is kept, where a mapped projection leads, the stages, and every mistake."""

from __future__ import annotations

import dataclasses
import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import qformer
from qformer import checkpoints, cli, config, loading, plugging, run, stages, weights
from qformer.backbones.language import LanguageTower
from qformer.backbones.language_loading import load_language
from qformer.comparison import PLUG_FILE
from qformer.config import LanguageConfig, TrainConfig
from qformer.errors import ConfigError
from qformer.saved import adapter_tensors
from qformer.stages import Stages, carry
from qformer.train import checkpoint, loop
from tests import world
from tests.families import family_llm
from tests.published import tiny_published
from tests.tiny import redraw, tiny_llm, tiny_vision

PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
IDS = torch.tensor([[2, 8, 9, 3], [2, 7, 3, 0]])
FAST = "train.log_every=1"


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("towers")


def llm(towers: Path, family: str) -> str:
    """The Qwen2 that adapters were trained with, or another LLM, drawn from another seed."""
    if family == "qwen2":
        return world.towers(towers, family)["language"]
    directory = towers / f"other-{family}"
    return str(directory if directory.exists() else tiny_llm(directory, family, seed=11))


@pytest.fixture(scope="module")
def saved(towers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untuned adapter of a Qwen2; the directory."""
    folder = tmp_path_factory.mktemp("saved")
    settings = world.settings(towers, folder, folder / "run", family="qwen2")
    model = loading.build(settings, report=lambda _: None)
    redraw(model.connector, 4)
    model.save(folder / "adapter")
    return folder / "adapter"


def plugged(source: Path | str, language: str, **more: Any) -> qformer.VLM:
    return qformer.plug(source, language=language, **{"report": lambda _: None, **more})


def soft(model: qformer.VLM) -> Tensor:
    with torch.no_grad():
        return model.soft_prompts(PIXELS, IDS)


def tower(directory: str | Path) -> LanguageTower:
    return load_language(LanguageConfig(name=str(directory)))


# -- the map ----------------------------------------------------------------------------------------------------------


def test_a_linear_relation_is_recovered() -> None:
    dice = torch.Generator().manual_seed(0)
    old, matrix = torch.randn(90, 24, generator=dice), torch.randn(40, 24, generator=dice)
    shift = torch.randn(40, generator=dice)
    found = plugging.map_words(old + 3.0, (old + 3.0) @ matrix.mT + shift)
    torch.testing.assert_close(found.matrix.float(), matrix, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.shift.float(), shift, rtol=1e-3, atol=1e-3)
    assert found.explained > 0.9999


@pytest.mark.parametrize("count", [40, 300])
def test_a_loose_relation_is_penalised_and_keeps_the_new_spread(count: int) -> None:
    dice = torch.Generator().manual_seed(1)
    matrix = torch.randn(32, 64, generator=dice) / 8
    old, noise = torch.randn(count + 500, 64, generator=dice), torch.randn(count + 500, 32, generator=dice)
    new = old @ matrix.mT + noise
    found = plugging.map_words(old[:count], new[:count])
    mapped = (old[:count].double() @ found.matrix.mT + found.shift).float()
    assert mapped.std(0).norm() == pytest.approx(float(new[:count].std(0).norm()), rel=1e-3)
    plain = torch.linalg.lstsq(old[:count], new[:count]).solution
    unseen = (old[count:].double() @ found.matrix.mT + found.shift).float()
    assert (unseen - new[count:]).norm() < (old[count:] @ plain - new[count:]).norm() * (1.0 if count < 64 else 1.3)
    assert -0.3 < found.explained < 0.6


def test_the_estimate_of_what_is_foretold_is_honest() -> None:
    dice = torch.Generator().manual_seed(2)
    matrix = torch.randn(16, 20, generator=dice) / 4
    old, noise = torch.randn(2200, 20, generator=dice), torch.randn(2200, 16, generator=dice)
    new = old @ matrix.mT + noise
    found = plugging.map_words(old[:200], new[:200])
    truth = new[200:] - new[200:].mean(0)
    assert found.explained == pytest.approx(
        1 - float((noise.square().sum() / 2200 * 2000) / truth.square().sum()), abs=0.1
    )


# -- words ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("families", [("llama", "qwen2"), ("t5", "gpt2"), ("opt", "llama")])
def test_words_are_matched_as_they_read_not_as_they_are_spelt(towers: Path, families: tuple[str, str]) -> None:
    old, new = (tower(llm(towers, family)) for family in families)
    pairs = plugging.shared_words(old, new)
    first, second = (each.tokenizer for each in (old, new))
    found = {first.convert_ids_to_tokens(a): second.convert_ids_to_tokens(b) for a, b in pairs}
    blanks = {family: "Ġ" if family in ("qwen2", "gpt2", "opt") else "▁" for family in families}
    of_old, of_new = (blanks[family] for family in families)
    assert any(a.startswith(of_old) and len(a) > 1 for a in found)
    assert all(a.replace(of_old, "_") == b.replace(of_new, "_") for a, b in found.items())
    for mark in {*first.all_special_tokens, *second.all_special_tokens}:
        assert mark not in found and mark not in found.values()
    assert len({b for _, b in pairs}) == len(pairs)


def test_single_bytes_and_unknown_words_are_no_words() -> None:
    vocabulary = {"a": 0, "<0x62>": 1, "b": 2, "<unk>": 3, "bb": 4}
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, "<unk>")), unk_token="<unk>")
    found = plugging.words(SimpleNamespace(tokenizer=made, words=5))
    assert sorted(found.values()) == [0, 2, 4]


def test_embeddings_are_taken_as_the_llm_reads_them(tmp_path: Path) -> None:
    found = tower(family_llm(tmp_path / "gemma", "gemma3"))
    ids = torch.arange(8)
    raw = found.model.get_input_embeddings().weight[ids]
    torch.testing.assert_close(found.embedded(ids), raw * 32**0.5, rtol=1e-2, atol=1e-2)
    assert found.embedding_norm() == pytest.approx(
        float(found.embedded(torch.arange(found.words)).norm(dim=-1).mean()), rel=1e-5
    )


# -- plug -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def related(towers: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor, Tensor]:
    """A Qwen2 of another width with a Llama's vocabulary, whose shared words lie where a known map takes the others."""
    directory, first = tmp_path_factory.mktemp("related"), tower(llm(towers, "qwen2"))
    tokenizer = AutoTokenizer.from_pretrained(llm(towers, "llama"))
    tokenizer.save_pretrained(directory)
    sizes = AutoConfig.from_pretrained(llm(towers, "qwen2"))
    sizes.hidden_size, sizes.vocab_size, sizes.eos_token_id = 48, len(tokenizer), tokenizer.eos_token_id
    sizes.pad_token_id = tokenizer.pad_token_id
    model = AutoModelForCausalLM.from_config(sizes)
    redraw(model, 9)
    dice = torch.Generator().manual_seed(9)
    matrix, shift = torch.randn(48, 32, generator=dice), torch.randn(48, generator=dice)
    second = SimpleNamespace(tokenizer=tokenizer, words=len(tokenizer))
    with torch.no_grad():
        for a, b in plugging.shared_words(first, second):
            model.get_input_embeddings().weight[b] = matrix @ first.embedded(torch.tensor([a]))[0] + shift
    model.save_pretrained(directory)
    return directory, matrix, shift


def test_mapped_soft_prompts_land_where_the_new_words_are(
    saved: Path, towers: Path, related: tuple[Path, Tensor, Tensor]
) -> None:
    directory, matrix, shift = related
    told: list[str] = []
    old = qformer.load(saved, report=told.append)
    new = plugged(saved, str(directory), report=told.append)
    expected = soft(old) @ matrix.mT + shift
    torch.testing.assert_close(soft(new), expected, rtol=2e-3, atol=2e-3)
    drawn = soft(plugged(saved, str(directory), start="random"))
    assert (drawn - expected).norm() > 0.5 * expected.norm()
    assert "foretells 100%" in told[-1]


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("start", ["mapped", "random"])
def test_all_but_the_projection_is_kept_and_both_kinds_answer(
    saved: Path, towers: Path, family: str, start: str
) -> None:
    told: list[str] = []
    model = plugged(saved, llm(towers, family), start=start, report=told.append)
    before, _ = adapter_tensors(saved)
    now = model.connector.state_dict()
    different = {name for name in now if not torch.equal(now[name], before[name])}
    assert different == {"projection.weight", "projection.bias"}
    assert f"loaded: {len(now) - 2}" in told[0] and "made: 2\n    projection ×2" in told[0]
    assert ("mapped by the" in told[0]) == (start == "mapped")
    [ranked] = model.rank([Image.new("RGB", (32, 32), "red")], ["what colour is it"], ["it is red", "it is blue"])
    assert len(ranked) == 2 and model.language.is_encoder_decoder == (family == "t5")
    assert model.settings.language.name == llm(towers, family)


def test_a_plugged_adapter_is_saved_and_loaded_like_any_other(saved: Path, towers: Path, tmp_path: Path) -> None:
    model = plugged(saved, llm(towers, "llama"))
    model.save(tmp_path / "moved")
    again = qformer.load(tmp_path / "moved", report=str)
    torch.testing.assert_close(soft(again), soft(model))
    with pytest.raises(ConfigError, match="another one"):
        qformer.load(tmp_path / "moved", language=llm(towers, "qwen2"), report=str)


def test_a_drawn_projection_is_as_long_as_words_where_the_source_wants_it(
    saved: Path, towers: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(saved, tmp_path / "adapter")
    described = json.loads((copy / "config.json").read_text())
    described["qformer"]["soft_scale"] = "embeddings"
    (copy / "config.json").write_text(json.dumps(described))
    model = plugged(copy, llm(towers, "gpt2"), start="random")
    weight = model.connector.projection.weight
    expected = model.language.embedding_norm() / weight.numel() ** 0.5
    assert float(weight.detach().std()) == pytest.approx(expected, rel=0.1)


def test_the_new_llm_takes_the_old_ones_limits_and_not_its_profile(towers: Path) -> None:
    own = LanguageConfig(
        name="old", dtype="bfloat16", revision="x", instruction_limit=7, quantization={"a": 1}, packing=False
    )
    spoken = plugging.spoken_by("new", own)
    assert not spoken.packing
    assert (spoken.name, spoken.dtype, spoken.instruction_limit) == ("new", "bfloat16", 7)
    assert spoken.revision is None and spoken.quantization is None
    assert plugging.spoken_by(LanguageConfig(name="n"), own, torch.float32, {"b": 2}).quantization == {"b": 2}


def test_published_models_are_plugged_too(towers: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("published")
    source = tiny_published(folder, "opt")
    model = plugged(source, llm(towers, "llama"))
    now, own = model.connector.state_dict(), checkpoints.read_transformers(source, "source").tensors
    assert torch.equal(now["qformer.queries"], own["qformer.queries"])
    with pytest.raises(ConfigError, match="nothing to carry over"):
        plugged(source, str(source))
    without = shutil.copytree(source, folder / "without")
    for file in without.glob("*"):
        if file.name.startswith(("token", "vocab", "merges", "special", "added")):
            file.unlink()
    with pytest.raises(ConfigError, match="so the words that two LLMs have in common cannot be told"):
        plugged(without, llm(towers, "llama"))


def lavis(saved: Path, file: Path, *, projection: bool = True) -> Path:
    tensors, *_ = loading.read_adapter(saved)
    names = checkpoints.renamed_for(tensors, "lavis", "llm_proj")
    torch.save({"model": {n: t for n, t in names.items() if projection or "llm_proj" not in n}}, file)
    return file


def test_files_of_lavis_say_less_so_more_is_named(towers: Path, tmp_path: Path) -> None:
    folder = tmp_path / "wide"
    settings = world.settings(
        towers, tmp_path, folder, "qformer.init=null", "qformer.hidden=64", "qformer.heads=1", "qformer.layers=2",
        "qformer.intermediate=64", f"qformer.tokenizer={world.towers(towers, 'qwen2')['bert']}", family="qwen2",
    )  # fmt: skip
    loading.build(settings, report=str).save(folder)
    file = lavis(folder, tmp_path / "adapter.pth")
    places = world.towers(towers, "qwen2")
    more = {"vision": places["vision"], "instruction_tokenizer": places["bert"]}
    with pytest.raises(ConfigError, match="name its image encoder"):
        plugged(file, llm(towers, "llama"))
    with pytest.raises(ConfigError, match="does not say which LLM"):
        plugged(file, llm(towers, "llama"), **more)
    model = plugged(file, llm(towers, "llama"), own_language=places["language"], **more)
    assert torch.equal(model.connector.state_dict()["norm.weight"], loading.read_adapter(folder)[0]["norm.weight"])
    with pytest.raises(ConfigError, match="are one LLM"):
        plugged(file, places["language"], own_language=places["language"], **more)
    assert plugged(file, llm(towers, "llama"), start="random", **more).connector.language_width == 32
    with pytest.raises(ConfigError, match="has no projection that could be mapped"):
        plugged(lavis(folder, tmp_path / "stage1.pth", projection=False), llm(towers, "llama"), **more)


def test_mistakes_with_plug_are_answered_in_a_sentence(
    saved: Path, towers: Path, related: tuple[Path, Tensor, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"unknown start 'maped'\. Did you mean 'mapped'"):
        plugged(saved, llm(towers, "llama"), start="maped")
    with pytest.raises(ConfigError, match=r"it was trained with .*qwen2.*nothing to carry over"):
        plugged(saved, llm(towers, "qwen2"))
    with pytest.raises(ConfigError, match="is not the LLM that it was trained with"):
        plugged(saved, llm(towers, "llama"), own_language=llm(towers, "gpt2"))
    with pytest.raises(ConfigError, match=r"which cannot be read .*say where it is with own_language"):
        plugged(saved, llm(towers, "llama"), own_language=str(tmp_path / "gone"))
    assert plugged(saved, llm(towers, "llama"), own_language=str(tmp_path / "gone"), start="random")
    with pytest.raises(ConfigError, match=r"reads an encoder of width 24, and .* is 16 wide"):
        plugged(saved, llm(towers, "llama"), vision=str(tiny_vision(tmp_path / "narrow", width=16)))
    with pytest.raises(ConfigError, match="no LLM can be read from there"):
        plugged(saved, str(tmp_path / "nowhere"))
    broken = shutil.copytree(saved, tmp_path / "broken")
    tensors = weights.load_tensors(broken / "adapter.safetensors")
    weights.save_tensors(broken / "adapter.safetensors", {n: t for n, t in tensors.items() if n != "norm.weight"})
    with pytest.raises(ConfigError, match=r"the adapter is not whole; missing: norm\.weight"):
        plugged(broken, llm(towers, "llama"))
    wide = {**tensors, "projection.weight": torch.zeros(40, 32), "projection.bias": torch.zeros(40)}
    weights.save_tensors(broken / "adapter.safetensors", wide)
    with pytest.raises(ConfigError, match=r"projects to an LLM of width 40, and .* is 32 wide"):
        plugged(broken, llm(towers, "llama"))
    monkeypatch.setattr(plugging, "FEWEST_WORDS", 1000)
    with pytest.raises(ConfigError, match="words in common, and a map between them takes at least 1000"):
        plugged(saved, llm(towers, "llama"))


# -- training parts ---------------------------------------------------------------------------------------------------


def test_parts_to_train_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"train\.only: unknown part 'projektion'\. Did you mean 'projection'"):
        TrainConfig(only=["projektion"])


def test_parts_that_are_not_there_cannot_be_trained(towers: Path, tmp_path: Path) -> None:
    settings = world.settings(towers, tmp_path, tmp_path / "run", "qformer.instruction=false", family="qwen2")
    model = loading.build(settings, report=lambda _: None)
    with pytest.raises(ConfigError, match=r"train\.only is \['text'\], and this Q-Former has nothing of that to train"):
        model.train_only(["text"])


# -- stages -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(towers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps with a Qwen2; the directory."""
    folder = tmp_path_factory.mktemp("source")
    card = world.write_pictures(folder / "data", 12)
    settings = world.settings(
        towers, folder / "data", folder / "run", "train.steps=2", f"evaluate.tasks=[{card}]", "evaluate.shuffled=false",
        family="qwen2",
    )  # fmt: skip
    return loop.train(settings, say=lambda _: None, quiet=True)


def lines(*_: Any) -> None:
    return


def test_stages_train_what_they_say_and_end_in_one_table(source: Path, towers: Path, tmp_path: Path) -> None:
    said: list[str] = []
    out = carry(
        source, llm(towers, "llama"), Stages(warmup_steps=2, steps=1), output=tmp_path / "out", say=said.append,
        quiet=True,
    )  # fmt: skip
    content = json.loads((out / PLUG_FILE).read_text())
    assert list(content["rows"]) == ["before", "warmup", "tuned", "fresh", "source"]
    assert content["steps"] == {"warmup": 2, "tuned": 1, "fresh": 3}
    for row in content["rows"].values():
        assert row["scores"]["colours"]["samples"] == 12 and row["scores"]["colours"]["most_frequent"]
    [table] = [line for line in said if "after warm-up, 2" in line]
    assert "most frequent" in table and all(f" {word}" in table for word in ("before", "fresh", "source"))

    before, _ = adapter_tensors(out / "before" / "checkpoints" / "step-0")
    warm, _ = adapter_tensors(out / "warmup" / "checkpoints" / "step-2")
    tuned, _ = adapter_tensors(out / "checkpoints" / "step-1")
    own, _ = adapter_tensors(source / "checkpoints" / "step-2")
    assert {n for n in warm if not torch.equal(warm[n], before[n])} == {"projection.weight", "projection.bias"}
    assert {n for n in own if not n.startswith("proj") and not torch.equal(own[n], before[n])} == set()
    assert len({n for n in tuned if not torch.equal(tuned[n], warm[n])}) > 20
    warmup, tuning, fresh = (config.load(p / "config.yaml") for p in (out / "warmup", out, out / "fresh"))
    assert (warmup.train.only, tuning.train.only, fresh.train.only) == (["projection"], [], [])
    assert (warmup.train.rate, tuning.train.rate) == (5e-3, 1e-3)
    assert warmup.seed != tuning.seed and fresh.qformer.init == world.towers(towers, "qwen2")["bert"]
    assert "Carried over" in (out / "report.html").read_text()
    assert qformer.load(out, report=str).settings.language.name == llm(towers, "llama")


def test_scores_heed_where_the_index_is_kept(
    source: Path, towers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[str | None] = []
    score = run.score
    monkeypatch.setattr(run, "score", lambda *what, **named: given.append(named["index"]) or score(*what, **named))
    carry(
        source, llm(towers, "llama"), Stages(warmup_steps=0, steps=0), overrides=[f"data.index={tmp_path / 'kept'}"],
        without=["fresh", "source"], output=tmp_path / "out", say=lines, quiet=True,
    )  # fmt: skip
    assert given and set(given) == {str(tmp_path / "kept")}


def test_what_is_done_is_not_done_again(
    source: Path, towers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    train, score = loop.train, run.score

    def trained(settings: Any, **more: Any) -> Path:
        calls.append(Path(settings.directory).name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return train(settings, **more)

    def scored(what: Any, *more: Any, **named: Any) -> Any:
        calls.append(f"score {Path(what).name}")
        return score(what, *more, **named)

    monkeypatch.setattr(loop, "train", trained)
    monkeypatch.setattr(run, "score", scored)

    def again(**more: Any) -> Path:
        return carry(
            source, llm(towers, "llama"), Stages("random", warmup_steps=1, steps=1), output=tmp_path / "out",
            without=["fresh", "source"], say=lines, quiet=True, **more,
        )  # fmt: skip

    with pytest.raises(KeyboardInterrupt):
        again()
    again()
    assert calls == ["warmup", "out", "out", "score before", "score warmup", "score out"]
    again()
    assert len(calls) == 6
    again(limit=5)
    assert calls[6:] == ["score before", "score warmup", "score out"]
    settings = config.load(tmp_path / "out" / "config.yaml")
    for step, message in ((1, None), (2, r"qformer\.init was .*step-1.* and is .*step-2")):
        init = [{"from": f"/moved/out/warmup/checkpoints/step-{step}"}]
        moved = dataclasses.replace(settings, qformer=dataclasses.replace(settings.qformer, init=init))
        with pytest.raises(ConfigError, match=message) if message else nullcontext():
            checkpoint.same_run(tmp_path / "out" / "config.yaml", moved)
    with pytest.raises(ConfigError, match="start was 'random' and is 'mapped'"):
        carry(source, llm(towers, "llama"), output=tmp_path / "out", say=lines)
    with pytest.raises(ConfigError, match=r"train\.rate was 0\.005 and is 0\.1"):
        carry(
            source, llm(towers, "llama"), Stages("random", warmup_steps=1, warmup_rate=0.1, steps=1),
            output=tmp_path / "out", say=lines,
        )  # fmt: skip


def test_an_adapter_that_is_no_run_is_carried_over_with_a_mixture_given(
    saved: Path, source: Path, towers: Path, tmp_path: Path
) -> None:
    card = source.parent / "data" / "colours.yaml"
    asked: dict[str, Any] = {"tasks": [str(card)], "data": card.parent, "output": tmp_path / "out", "say": lines}
    with pytest.raises(ConfigError, match=r"it is no run, so nothing says what to tune on; add data\.tasks"):
        carry(saved, llm(towers, "t5"), **asked)
    out = carry(
        saved, llm(towers, "t5"), Stages(warmup_steps=0, steps=0), without=["source"], quiet=True, limit=4, **asked
    )
    assert list(json.loads((out / PLUG_FILE).read_text())["rows"]) == ["before"]
    out = carry(
        saved, llm(towers, "t5"), Stages(warmup_steps=1, steps=0), without=["source", "fresh", "before"], quiet=True,
        overrides=[f"data.tasks={{{card}: 1.0}}", "train.batch_size=4", "language.instruction_limit=9"], limit=4,
        **asked,
    )  # fmt: skip
    assert not (out / "config.yaml").exists()
    assert config.load(out / "warmup" / "config.yaml").train.batch_size == 4


def test_mistakes_with_stages_are_answered_in_a_sentence(
    source: Path, towers: Path, saved: Path, tmp_path: Path
) -> None:
    new, out = llm(towers, "llama"), tmp_path / "out"
    with pytest.raises(ConfigError, match=r"plug\.steps is -1"):
        Stages(steps=-1)
    with pytest.raises(ConfigError, match=r"plug\.warmup_rate is 0"):
        Stages(warmup_rate=0.0)
    with pytest.raises(ConfigError, match=r"unknown column 'frehs' to leave out\. Did you mean 'fresh'"):
        carry(source, new, without=["frehs"], output=out)
    with pytest.raises(ConfigError, match=r"'vision\.name=x' would change what is carried over"):
        carry(source, new, overrides=["vision.name=x"], output=out)
    with pytest.raises(ConfigError, match="there is no task to score"):
        carry(saved, new, output=out)
    with pytest.raises(ConfigError, match="unknown task card 'nothing'"):
        carry(source, new, tasks=["nothing"], output=out)
    out.mkdir()
    (out / PLUG_FILE).write_text("{")
    with pytest.raises(ConfigError, match=r"plug\.json: it cannot be read"):
        carry(source, new, output=out)
    assert not (out / "before").exists()


def test_shares_of_the_source_are_the_default() -> None:
    settings = config.RunConfig(train=TrainConfig(steps=1200, rate=1e-3))
    plan = Stages().after(settings)
    assert (plan.warmup_steps, plan.steps, plan.warmup_rate, plan.rate) == (60, 240, 5e-3, 1e-3)
    assert Stages(warmup_steps=0).after(settings).warmup_steps == 0
    assert stages._beside("runs/demo", "demo:other") == Path("runs/demo-on-other")


def test_the_command_line_carries_over(
    source: Path, towers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plug", str(source), "--language", llm(towers, "llama"), "--output", str(tmp_path / "out")]
    short = ["--warmup-steps", "1", "--steps", "1", "--limit", "4", "--without", "fresh,source,before"]
    assert cli.main([*words, *short, "--set", FAST, "train.batch_size=4"]) == 0
    out = capsys.readouterr().out
    assert "after warm-up, 1 steps" in out and "4 of 12, partial" in out and f"the adapter: {tmp_path / 'out'}" in out
    assert cli.main([*words, "--without", "everything"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
