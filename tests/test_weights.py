"""A Q-Former's start from BERT checkpoints of every form, and files that are whole or not there."""

from __future__ import annotations

import errno
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, BertModel

from qformer import weights
from qformer.errors import ConfigError, TrainingError
from qformer.nn.attention import Places
from qformer.nn.qformer import QFormer
from qformer.nn.tokens import Tokens
from qformer.weights import LoadReport, load_strict, load_tensors, save_tensors, start_from_bert, whole_file

SHAPE = {
    "vocab_size": 30,
    "hidden_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "max_position_embeddings": 9,
}


def drawn(model: nn.Module) -> nn.Module:
    """Every parameter drawn anew, so that no norm or bias is at a value that hides a mistake."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


@pytest.fixture
def bert() -> BertModel:
    return drawn(BertModel(BertConfig(**SHAPE)))


@pytest.fixture
def directory(bert: BertModel, tmp_path: Path) -> Path:
    bert.save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def rewrite(directory: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def reconfigure(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def start(source: Path | str, **settings: object) -> tuple[QFormer, LoadReport]:
    given = {"vision_width": 10, "queries": 4, "generator": torch.Generator().manual_seed(7), **settings}
    return start_from_bert(source, **given)


def text_states(qformer: QFormer, ids: Tensor, mask: Tensor, token_type: Tensor) -> Tensor:
    """What the text half computes of the real words when there are no queries, with BERT's token type put back."""
    places = Places.of(len(ids), 0, (ids, mask))
    x = places.real_words(qformer.norm(qformer._embed(ids) + token_type))
    for block in qformer.blocks:
        x = block.text_feed_forward(block.self_attention(x, places))
    return x


def test_the_text_half_computes_what_bert_computes(bert: BertModel, directory: Path):
    qformer, _ = start(directory)
    ids = torch.randint(1, 30, (2, 6))
    mask = torch.arange(6) < torch.tensor([[6], [4]])
    with torch.no_grad():
        ours = text_states(qformer.eval(), ids, mask, bert.embeddings.token_type_embeddings.weight[0])
        theirs = bert(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    torch.testing.assert_close(ours, theirs[mask], rtol=1e-5, atol=1e-5)


def test_sizes_follow_the_checkpoint(directory: Path):
    size = start(directory, queries=6, cross_attention_every=3, dropout=0.2)[0].size
    assert (size.hidden, size.layers, size.heads, size.intermediate) == (12, 3, 3, 20)
    assert (size.vocabulary, size.positions, size.vision_width) == (30, 9, 10)
    assert (size.queries, size.cross_attention_every, size.instruction, size.dropout) == (6, 3, True, 0.2)


def test_query_feed_forwards_are_copies_and_the_rest_is_drawn(directory: Path):
    qformer, report = start(directory)
    for block in qformer.blocks:
        for ours, text in zip(block.query_feed_forward.parameters(), block.text_feed_forward.parameters(), strict=True):
            assert torch.equal(ours, text)
            assert ours.data_ptr() != text.data_ptr()
    assert not qformer.blocks[0].cross_attention.key.bias.any()
    assert torch.equal(qformer.queries, start(directory)[0].queries)
    again, _ = start(directory, generator=torch.Generator().manual_seed(8))
    assert not torch.equal(qformer.queries, again.queries)
    assert torch.equal(qformer.word_embeddings.weight, again.word_embeddings.weight)
    wide, _ = start(directory, queries=500, vision_width=500)
    assert wide.queries.detach().std() == pytest.approx(0.02, rel=0.1)
    assert wide.blocks[0].cross_attention.key.weight.detach().std() == pytest.approx(0.02, rel=0.1)

    names = set(qformer.state_dict())
    assert names == {*report.loaded, *report.copied, *report.made}
    assert len(names) == len(report.loaded) + len(report.copied) + len(report.made)
    assert set(report.made) == {name for name in names if name == "queries" or "cross_attention" in name}
    assert set(report.unused) == {
        "embeddings.token_type_embeddings.weight",
        "pooler.dense.weight",
        "pooler.dense.bias",
    }


def test_the_report_is_a_short_table(directory: Path):
    table = start(directory)[1].table()
    assert table.splitlines()[0] == f"Q-Former from {directory}"
    assert "  made: 21" in table
    assert "    blocks.*.cross_attention.query ×4" in table
    assert "    queries" in table
    assert "  unused: 3\n    embeddings.token_type_embeddings\n    pooler.dense ×2" in table
    assert len(table.splitlines()) < 40
    assert "unused: nothing" in LoadReport("x", (), (), (), ()).table()


def test_without_an_instruction_words_and_positions_stay_unused(directory: Path):
    qformer, report = start(directory, instruction=False)
    assert "embeddings.word_embeddings.weight" in report.unused
    assert "embeddings.position_embeddings.weight" in report.unused
    assert not [name for name in report.loaded if "feed_forward" in name]
    with_text, _ = start(directory)
    assert torch.equal(
        qformer.blocks[1].query_feed_forward.outer.weight, with_text.blocks[1].text_feed_forward.outer.weight
    )
    assert qformer(Tokens(torch.zeros(1, 2, 10))).shape == (1, 4, 12)


def test_models_with_heads_and_old_norm_names_load_the_same(bert: BertModel, directory: Path, tmp_path: Path):
    expected = start(directory)[0].state_dict()
    with_head = BertForMaskedLM(bert.config)
    with_head.bert.load_state_dict(bert.state_dict(), strict=False)
    with_head.save_pretrained(tmp_path / "head")
    found, report = start(tmp_path / "head")
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert [name for name in report.unused if name.startswith("cls.")]

    old = {
        "bert."
        + name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in load_file(directory / "model.safetensors").items()
    }
    rewrite(directory, old)
    found, report = start(directory)
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert "bert.embeddings.token_type_embeddings.weight" in report.unused


def test_pickles_and_shards_load_the_same(directory: Path):
    expected = start(directory)[0].state_dict()
    whole = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    torch.save(whole, directory / "pytorch_model.bin")
    for name, tensor in start(directory)[0].state_dict().items():
        assert torch.equal(tensor, expected[name]), name

    (directory / "pytorch_model.bin").unlink()
    shards = {name: f"model-0000{number % 2 + 1}-of-00002.safetensors" for number, name in enumerate(whole)}
    for shard in set(shards.values()):
        save_file({name: whole[name] for name in whole if shards[name] == shard}, directory / shard)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    for name, tensor in start(directory)[0].state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_half_precision_checkpoints_become_float32(directory: Path):
    rewrite(directory, {name: tensor.half() for name, tensor in load_file(directory / "model.safetensors").items()})
    assert {tensor.dtype for tensor in start(directory)[0].state_dict().values()} == {torch.float32}


def test_fewer_layers_keep_the_first(directory: Path):
    short, report = start(directory, layers=2)
    whole, _ = start(directory)
    assert len(short.blocks) == 2
    assert torch.equal(short.blocks[1].self_attention.key.weight, whole.blocks[1].self_attention.key.weight)
    assert "encoder.layer.2.attention.self.key.weight" in report.unused


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"layers": 4}, r"qformer\.layers is 4 and the BERT checkpoint .*bert has 3; set it to 3 or fewer"),
        ({"hidden": 24}, r"qformer\.hidden is 24 and the BERT checkpoint .*bert has 12; set it to 12, or leave"),
        ({"heads": 2}, r"qformer\.heads is 2 .* has 3"),
        ({"intermediate": 48}, r"qformer\.intermediate is 48 .* has 20"),
    ],
)
def test_sizes_that_the_checkpoint_does_not_have_are_refused(directory: Path, setting: dict[str, int], message: str):
    with pytest.raises(ConfigError, match=message):
        start(directory, **setting)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "roberta"}, "model_type is 'roberta'; the Q-Former starts from a checkpoint of type 'bert'"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"hidden_act": "gelu_new"}, "hidden_act is 'gelu_new'.* with the exact 'gelu'"),
        ({"hidden_act": "gelu_pytorch_tanh"}, "hidden_act is 'gelu_pytorch_tanh'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type 'relative_key'"),
        ({"vocab_size": 31}, r"word_embeddings.weight has shape \(30, 12\) where its config.json implies \(31, 12\)"),
        ({"max_position_embeddings": 8}, r"position_embeddings.weight has shape \(9, 12\)"),
        ({"num_hidden_layers": 5}, r"no tensor for blocks\.3\.self_attention"),
        ({"num_attention_heads": 5}, r"config.json: hidden_size \(12\) does not divide evenly by .* \(5\)"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(directory: Path, changes: dict[str, object], message: str):
    reconfigure(directory, **changes)
    with pytest.raises(ConfigError, match=message):
        start(directory)


def test_a_checkpoint_without_its_files_is_refused(directory: Path, tmp_path: Path):
    (directory / "model.safetensors").rename(tmp_path / "away")
    with pytest.raises(ConfigError, match=r"holds neither model\.safetensors nor pytorch_model\.bin"):
        start(directory)
    (directory / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json: it cannot be read"):
        start(directory)
    (directory / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"bert: it has no config\.json"):
        start(directory)
    with pytest.raises(ConfigError, match="nowhere: there is no such directory"):
        start(tmp_path / "nowhere")


def test_a_broken_shard_index_is_refused(directory: Path):
    (directory / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"index\.json: not an index of shards"):
        start(directory)


def test_a_hub_id_is_read_from_the_hub(directory: Path, monkeypatch: pytest.MonkeyPatch):
    asked = []

    def snapshot(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(directory)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert start("example/bert")[1].source == "example/bert"
    assert [name for name, _ in asked] == ["example/bert"]
    (directory / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="example/bert: it holds neither"):
        start("example/bert")
    assert asked[-1][1] == ["config.json", "pytorch_model*.bin*"]


def test_a_hub_id_that_cannot_be_fetched_is_refused():
    with pytest.raises(
        ConfigError, match="no-such-bert: neither a directory nor a BERT checkpoint that can be fetched"
    ):
        start("no-such-bert")


class Spring:
    """A pickle that would run code when read."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return (os.mkdir, (str(self.mark),))


def test_a_pickle_that_would_run_code_is_refused(directory: Path, tmp_path: Path):
    (directory / "model.safetensors").unlink()
    torch.save({"x": Spring(tmp_path / "sprung")}, directory / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin: no tensors can be read from it safely"):
        start(directory)
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps(Spring(tmp_path / "sprung"), protocol=2))
    with pytest.raises(ConfigError, match="convert it to safetensors"):
        start(directory)
    assert not (tmp_path / "sprung").exists()
    torch.save([torch.ones(1)], directory / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="holds a list, not tensors by name"):
        start(directory)


def test_tensors_come_back_as_they_were_saved(tmp_path: Path):
    tensors = {"a": torch.randn(3, 4).T, "b": torch.arange(3), "c": torch.ones(2, dtype=torch.bfloat16)}
    save_tensors(tmp_path / "x.safetensors", tensors, {"format": "1"})
    back = load_tensors(tmp_path / "x.safetensors")
    assert set(back) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(back[name], tensor)
        assert back[name].dtype == tensor.dtype
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_parameters_that_share_memory_are_each_saved(tmp_path: Path):
    shared = torch.randn(4)
    save_tensors(tmp_path / "x.safetensors", {"a": shared, "b": shared})
    back = load_tensors(tmp_path / "x.safetensors")
    assert torch.equal(back["a"], back["b"])


def test_a_full_disk_leaves_the_old_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"a": torch.ones(2)})

    def full(_handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(weights.os, "fsync", full)
    with pytest.raises(TrainingError, match=r"x\.safetensors: it cannot be written \(No space left on device\)"):
        save_tensors(path, {"a": torch.zeros(2)})
    assert torch.equal(load_tensors(path)["a"], torch.ones(2))
    assert [found.name for found in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_folder_that_is_not_there_is_told(tmp_path: Path):
    with pytest.raises(TrainingError, match=r"x\.safetensors: it cannot be written"):
        save_tensors(tmp_path / "nowhere" / "x.safetensors", {"a": torch.ones(2)})


def test_an_interrupted_write_leaves_nothing_behind(tmp_path: Path):
    def interrupted() -> None:
        with whole_file(tmp_path / "x.json") as work:
            work.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list(tmp_path.iterdir())


def test_files_that_are_not_whole_are_refused(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(ConfigError, match=r"x\.safetensors: there is no such file; check its path"):
        load_tensors(path)
    save_tensors(path, {"a": torch.ones(200)})
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ConfigError, match=r"x\.safetensors: not a whole safetensors file"):
        load_tensors(path)


def test_load_strict_takes_exactly_what_fits():
    module = nn.Linear(2, 3)
    load_strict(module, {"weight": torch.ones(3, 2), "bias": torch.ones(3)}, "here")
    assert torch.equal(module.weight, torch.ones(3, 2))
    wrong = {"weight": torch.zeros(2, 3), **{f"more.{number}": torch.zeros(1) for number in range(10)}}
    with pytest.raises(ConfigError) as caught:
        load_strict(module, wrong, "here")
    message = str(caught.value)
    assert message.startswith("here: the weights do not fit. missing: bias; unexpected: more.0, more.1")
    assert "and 2 more; of another shape: weight (found (2, 3), wanted (3, 2))" in message
    assert torch.equal(module.weight, torch.ones(3, 2))
