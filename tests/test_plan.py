"""What a run would take, reckoned before anything is loaded: numbers worked by hand, and torch's own counter."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from qformer import cli, config, hub
from qformer.assemble import Prepared
from qformer.backbones import fused
from qformer.backbones.stacks import blocks_of
from qformer.config import RunConfig
from qformer.errors import ConfigError, DataError
from qformer.nn.qformer import QFormer, QFormerConnector, QFormerSize
from qformer.nn.tokens import Tokens
from qformer.planning import memory, plan, shapes, speed, trace, work
from qformer.planning.memory import Activations, Choice, Weights
from qformer.planning.shapes import LLMKind, MicroBatch
from qformer.planning.trace import Held, LanguageHeld
from qformer.sample import Slot, Text
from tests import world

MICRO = MicroBatch(pictures=3, reads=5, instruction=7, rows=2, span=20, trained=6, positions=36, packed=True)
BOTH = dataclasses.replace(MICRO, rows=4, span=11, written=4, length=6, packed=False)
SIZE = QFormerSize(
    vision_width=24, hidden=32, layers=4, heads=4, intermediate=64, vocabulary=50, positions=40, queries=4
)
LLAMA = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 90, "attn_implementation": "eager",
}  # fmt: skip
T5 = {
    "d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4, "vocab_size": 90,
    "feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0, "attn_implementation": "eager",
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run over records that are here, with tiny towers whose weights are not."""
    folder = tmp_path_factory.mktemp("plan")
    world.write_pictures(folder / "data")
    settings = world.settings(folder / "towers", folder / "data", folder / "runs" / "one")
    for file in (folder / "towers").rglob("*.safetensors"):
        file.unlink()
    return settings


def shown(settings: RunConfig, **options: Any) -> str:
    """What `qformer plan` prints."""
    console = Console(width=200, highlight=False, markup=False)
    with console.capture() as captured:
        for block in plan.plan(settings, **options):
            console.print(block, soft_wrap=not isinstance(block, Table))
    return captured.get()


def rows(text: str) -> dict[str, list[str]]:
    """The rows of all tables by their first column."""
    cells = ([cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if line[:1] == "│")
    return {first: rest for first, *rest in cells if rest}


# -- operations -------------------------------------------------------------------------------------------------------


def test_operations_worked_by_hand() -> None:
    stack = work.Stack(layers=2, weights=1000, attention=8, source=100)
    assert stack.forward(rows=3, span=5) == 2 * 3 * 5 * 1000 + 2 * 3 * (5 * 100) * 0 + 2 * 3 * 4 * 8 * 25
    assert stack.forward(rows=1, span=2, source=4) == 2 * 2 * 1000 + 2 * 4 * 100 + 2 * 4 * 8 * 2 * (2 + 4)
    llm = work.LLMWork(width=16, vocabulary=50, decoder=work.Stack(2, 1000, 8))
    micro = MicroBatch(pictures=1, reads=1, instruction=3, rows=3, span=5, trained=4, positions=15)
    assert llm.step(micro) == 2 * 30_000 + 3 * (2 * 3 * 4 * 8 * 25) == 74_400
    assert llm.step(micro, checkpointing=True) == 74_400 + 34_800
    assert llm.head(micro) == 4 * 4 * 16 * 50 and llm.head(micro, parts=True) == 6 * 4 * 16 * 50


def test_one_block_of_a_q_former_worked_by_hand() -> None:
    """One read of two tokens by one query of width two, with one word of instruction."""
    size = QFormerSize(vision_width=3, hidden=2, layers=1, heads=1, intermediate=8, queries=1)
    micro = MicroBatch(pictures=1, reads=1, instruction=1, rows=1, span=9, trained=1, positions=9)
    attention = 2 * (2 * 2) * (1 + 2 + 2 + 1) + 2 * 2 * (1 * 2 * 2)  # query, keys, values, output; scores, sums
    look = 2 * (2 * 2) * 2 + 2 * 2 * (1 * 2 * 2) + 2 * 2 * (3 * 2) * 2
    rest = 2 * 2 * (2 * 8) + 2 * (2 * 5)  # feed-forward, projection
    assert work.former_forward(size, language_width=5, tokens=2, micro=micro) == attention + look + rest
    assert work.former_step(size, 5, 2, micro) == 3 * (attention + look + rest)


@pytest.mark.parametrize("instruction", [True, False])
@pytest.mark.parametrize("every", [1, 2, 3])
def test_the_adapters_operations_are_those_that_torch_counts(instruction: bool, every: int) -> None:
    """Attention with dropout is made of plain products, all of which torch's counter sees."""
    size = dataclasses.replace(SIZE, instruction=instruction, cross_attention_every=every)
    connector = QFormerConnector(QFormer(size), 48)
    ids = torch.ones(MICRO.reads, MICRO.instruction, dtype=torch.long)
    tokens = Tokens(torch.randn(MICRO.pictures, 9, 24), pictures=torch.tensor([0, 0, 1, 2, 2]))
    given = (ids, ids.bool()) if instruction else None
    with FlopCounterMode(display=False) as forward:
        soft = connector(tokens, given)
    with FlopCounterMode(display=False) as both:
        connector(tokens, given).sum().backward()
    assert forward.get_total_flops() == work.former_forward(size, 48, 9, MICRO)
    assert both.get_total_flops() == work.former_step(size, 48, 9, MICRO)
    assert soft.shape == (5, 4, 48)


def counted(model: Any, micro: MicroBatch, queries: int = 4) -> tuple[int, int]:
    """Operations of a frozen LLM's blocks and of its head, forward and backward, as torch counts them."""
    model.requires_grad_(False)
    width = model.get_input_embeddings().weight.shape[1]
    inputs = torch.randn(micro.rows, micro.span, width, requires_grad=True)
    with FlopCounterMode(display=False) as whole:
        out = trace.run_language(model, inputs, micro)
        if not model.config.is_encoder_decoder:
            out = model.get_output_embeddings()(out.flatten(0, 1)[: micro.trained])
        out.sum().backward()
    positions = micro.written * micro.length or micro.trained
    head = 4 * positions * width * model.get_output_embeddings().weight.shape[0]
    return whole.get_total_flops() - head, head


def test_a_frozen_decoders_operations_are_those_that_torch_counts() -> None:
    model = LlamaForCausalLM(LlamaConfig(**LLAMA))
    sizes = work.language_work(model)
    blocks, head = counted(model, MICRO)
    rotary = blocks - sizes.step(MICRO)  # the angles of rotary positions are a product of a position and a number
    assert 0 <= rotary <= 2 * MICRO.rows * MICRO.span * 8
    assert head == sizes.head(MICRO)


def test_a_frozen_encoder_decoders_operations_are_those_that_torch_counts() -> None:
    model = T5ForConditionalGeneration(T5Config(**T5))
    sizes = work.language_work(model)
    assert sizes.encoder is not None and sizes.decoder.source == 2 * 2 * 32 * 32
    blocks, head = counted(model, BOTH)
    rows, written, read = BOTH.written, BOTH.length, BOTH.span
    # Of the first block of the decoder, which reads words, no gradient reaches what stands before the first look at
    # the encoder: the attention to itself, and what asks in that look.
    itself = 2 * rows * written * 4 * 32 * 32 + 2 * 4 * rows * written**2 * 32
    asking = 2 * rows * written * 32 * 32 + 2 * rows * written * read * 32
    assert (blocks, head) == (sizes.step(BOTH) - itself - asking, sizes.head(BOTH))


def test_an_encoders_operations_are_those_of_one_picture(run: RunConfig) -> None:
    found = plan.sizes(run)
    assert (found.encoder.tokens, found.encoder.width) == (17, 24)
    patches = 2 * 16 * 24 * 3 * 64
    block = 2 * 17 * (4 * 24 * 24 + 2 * 24 * 48) + 4 * 17 * 17 * 24
    assert found.encoder.picture == patches + 2 * block


# -- rows -------------------------------------------------------------------------------------------------------------


def prepared(name: str, prompt: int, target: int, picture: str = "", read: int = 3) -> Prepared:
    row = (Slot(0), Text((0,) * prompt), Text((0,) * target, trained=True))
    return Prepared(name, (picture or name,), (hash(name), *[0] * (read - 1)), row)


def test_the_shape_of_rows_that_share_a_picture() -> None:
    group = [prepared("a", 5, 3, "p", read=4), prepared("b", 2, 1, "p", read=6), prepared("c", 1, 2, "q")]
    packed = shapes.shape(group, queries=4, kind=LLMKind(64, encoder_decoder=False, packs=True))
    assert (packed.pictures, packed.reads, packed.instruction, packed.trained, packed.positions) == (2, 3, 5, 6, 26)
    assert (packed.rows, packed.span, packed.packed) == (1, 26, True)
    padded = shapes.shape(group, queries=4, kind=LLMKind(64, encoder_decoder=False, packs=False))
    assert (padded.rows, padded.span, padded.computed) == (3, 12, 36)
    coder = shapes.shape(group, queries=4, kind=LLMKind(64, encoder_decoder=True, packs=False))
    assert (coder.rows, coder.span, coder.written, coder.length) == (3, 4 + 5 + 1, 3, 3)
    assert coder.computed == 3 * 10 + 3 * 3


def test_rows_that_are_here_are_counted_in_their_own_tokens(run: RunConfig) -> None:
    found = plan.sizes(run)
    data = plan.look(run, found)
    assert data.missing == () and data.untokenized == "" and data.steps.read_from == ("colours",)
    assert len(data.steps.steps) == run.train.steps and data.steps.samples == 6
    assert data.steps.mean("pictures") == data.steps.mean("reads") == 6
    mean = data.steps.mean("positions") / 6
    assert 4 + 8 < mean < 4 + 60
    halves = plan.look(run, found, ranks=2)
    assert halves.steps.samples == 3 and halves.steps.mean("pictures") == 3


def test_without_a_tokenizer_letters_are_counted(run: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(_: RunConfig) -> None:
        raise ConfigError("there is none.")

    monkeypatch.setattr(plan, "joiner_of", none)
    data = plan.look(run, plan.sizes(run))
    assert data.untokenized == "there is none."
    lines = (Path(run.data.root) / "records.jsonl").read_text().splitlines()
    targets = [json.loads(line)["target"] for line in lines]  # four steps of six are all of them
    assert 4 * data.steps.mean("trained") == sum(len(target) // 4 + 1 for target in targets)
    notes = str([*plan.rows(data)][1])
    assert "Counted in letters, 4 a token: colours." in notes
    assert "No tokenizer can be had here: there is none." in notes


def test_draws_of_broken_records_have_no_rows(run: RunConfig, tmp_path: Path) -> None:
    records = Path(run.data.root) / "records.jsonl"
    card = tmp_path / "broken.yaml"
    card.write_text(
        (Path(run.data.root) / "colours.yaml").read_text().replace("records.jsonl", str(tmp_path / "r.jsonl"))
    )
    lines = records.read_text().splitlines()
    (tmp_path / "r.jsonl").write_text("\n".join(['{"id": "x"}'] * 20 + lines[:4]))
    settings = dataclasses.replace(run, data=dataclasses.replace(run.data, tasks={str(card): 1.0}, on_error="skip"))
    notes = str([*plan.rows(plan.look(settings, plan.sizes(settings)))][1])
    assert re.search(r"  \d+ draws were of broken records, which have no row\.", notes)
    (tmp_path / "r.jsonl").write_text("\n".join(['{"id": "x"}'] * 20))
    with pytest.raises(DataError, match=r"plan: all of the first 24 draws are of broken records; qformer data check"):
        plan.look(settings, plan.sizes(settings))


def test_what_is_not_trained_has_neither_gradient_nor_averages(run: RunConfig) -> None:
    whole = plan.sizes(run).weights
    part = plan.sizes(dataclasses.replace(run, train=dataclasses.replace(run.train, only=["projection"]))).weights
    assert part.trained == 32 * 32 + 32
    assert part.trained + part.frozen == whole.trained + whole.frozen


def test_every_held_in_set_has_stated_lengths() -> None:
    from qformer import cards

    stated = shapes.stated_lengths()
    assert set(stated.sets) == set(config.load("instructblip_flant5xl").data.tasks)
    for name in ("vqav2", "coco_caption", "llava_detail"):
        assert cards.load(name).category in stated.categories
    for each in (*stated.sets.values(), *stated.categories.values(), stated.other):
        for three in (each.prompt, each.target, each.read or [1, 1, 1]):
            assert len(three) == 3 and sorted(three) == three and three[0] > 0


# -- memory -----------------------------------------------------------------------------------------------------------


def test_bytes_that_live_are_counted_and_those_that_died_are_not() -> None:
    with torch._subclasses.FakeTensorMode(), trace.LiveBytes() as live:
        kept = torch.empty(100)
        view = kept.view(10, 10).t()
        assert live.live == 400
        most = live.highest(lambda: (torch.empty(1000) + 1).sum())[1]
        assert (live.live, most) == (400, 400 + 2 * 4000)
        del kept
        assert live.live == 400  # the view holds it
        del view
        assert live.live == 0


def saved_bytes(work_of: Any, ignored: Iterator[torch.nn.Parameter]) -> int:
    """Bytes of all storages that a forward pass keeps for its backward pass, by torch's own hooks, parameters apart."""
    own = {each.untyped_storage().data_ptr() for each in ignored}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = work_of()
    assert out.requires_grad
    return sum(kept.values())


def test_activations_traced_are_those_that_a_real_pass_keeps() -> None:
    """A Llama of three layers, traced at one and two, and the adapter at two and four blocks of six."""
    config_ = LlamaConfig(**{**LLAMA, "attn_implementation": "sdpa", "num_hidden_layers": 5})
    with torch.device("meta"):
        blank = LlamaForCausalLM(config_).requires_grad_(False)
    held = trace.language_held(blank, MICRO, queries=4)
    assert len(blank.model.layers) == 5 and held.blocks[0][0] == 5
    model = LlamaForCausalLM(config_).requires_grad_(False)
    inputs = torch.randn(MICRO.rows, MICRO.span, 32, requires_grad=True)
    real = saved_bytes(lambda: trace.run_language(model, inputs, MICRO), model.parameters())
    assert held.kept == pytest.approx(real, rel=0.1)
    assert held.recomputed(100.0) == held.base.kept + 500 + held.blocks[0][1].kept
    size = dataclasses.replace(SIZE, layers=6, hidden=64)
    connector = QFormerConnector(QFormer(size), 48)
    tokens = Tokens(torch.randn(5, 9, 24))
    ids = torch.ones(5, 7, dtype=torch.long)
    real = saved_bytes(lambda: connector(tokens, (ids, ids.bool())), connector.parameters())
    found = trace.former_held(size, 48, 9, dataclasses.replace(MICRO, pictures=5))
    assert found.kept == pytest.approx(real, rel=0.1)


def test_an_encoder_decoders_stacks_are_told_apart() -> None:
    with torch.device("meta"):
        model = T5ForConditionalGeneration(T5Config(**T5)).requires_grad_(False)
    assert [(name, len(blocks)) for name, blocks in blocks_of(model)] == [
        ("encoder.block", 3), ("decoder.block", 2),
    ]  # fmt: skip
    held = trace.language_held(model, BOTH, queries=4)
    assert [number for number, _ in held.blocks] == [3, 2] and held.kept > held.base.kept > 0
    assert held.blocks[0][1].kept != held.blocks[1][1].kept
    assert [len(blocks) for _, blocks in blocks_of(model)] == [3, 2] and next(model.parameters()).is_meta


GIVEN = Weights(vision=1000, blocks=8000, rest=500, trained=200, frozen=50)
HELD = Activations(
    encoder=Held(0, 300), adapter=Held(400, 500), boundary=10, computed=64,
    language=LanguageHeld(Held(50), ((4, Held(1000)),), Held(100, 150, 200)),
)  # fmt: skip
CHOICE = Choice("float16", "float32", computed=64)


def test_memory_worked_by_hand() -> None:
    kept = memory.weights(GIVEN, CHOICE)
    assert kept == {"image encoder": 2000, "LLM": 34_000, "adapter, float32": 1000, "AdamW's two averages": 1600}
    assert memory.weights(GIVEN, dataclasses.replace(CHOICE, bits=8))["LLM"] == 8000 + 2000
    assert memory.weights(GIVEN, dataclasses.replace(CHOICE, bits=4))["LLM"] == 8000 * 0.5625 + 2000
    spread = dataclasses.replace(CHOICE, language="bfloat16", gpus=4, sharded=True)
    assert memory.weights(GIVEN, spread)["LLM"] == 4000 + 1000
    moment, held = memory.peak(GIVEN, HELD, CHOICE)
    assert moment == "where the LLM's backward pass begins"
    assert sum(held.values()) == 38_600 + 400 + 4050 + 200
    several = dataclasses.replace(CHOICE, several=True, checkpointing=True, computed=32)
    assert sum(memory.peak(GIVEN, HELD, several, context=7)[1].values()) == 38_607 + 800 + (400 + 1090 + 200) / 2
    light = dataclasses.replace(HELD, language=LanguageHeld(Held(0), (), Held(0)), adapter=Held(1), encoder=Held(0))
    assert memory.peak(GIVEN, light, CHOICE)[0] == "where the adapter's backward pass ends"


def test_what_to_change_comes_in_a_sensible_order() -> None:
    choice = Choice("float32", "float32", computed=3000)
    changes = [change for change, _ in memory.lighter(choice, longest=700, on_gpu=True)]
    assert changes == [
        "train.micro_batch_tokens=2048", "train.micro_batch_tokens=1024", "language.gradient_checkpointing=true",
        "language.dtype=bfloat16", "vision.dtype=bfloat16", "language.quantization={load_in_8bit: true}",
        "language.quantization={load_in_4bit: true}", "or, with all its bits, language.shard=true on 2 GPUs",
        "or, with all its bits, language.shard=true on 4 GPUs", "or, with all its bits, language.shard=true on 8 GPUs",
    ]  # fmt: skip
    before = sum(memory.peak(GIVEN, HELD, dataclasses.replace(CHOICE, computed=64))[1].values())
    small = Choice("float16", "float32", computed=64)
    for _, each in memory.lighter(small, longest=10, on_gpu=False):
        after = sum(memory.peak(GIVEN, HELD, each)[1].values())
        assert after < before
        before = after
    full = Choice("bfloat16", "bfloat16", bits=4, checkpointing=True, computed=100)
    assert list(memory.lighter(full, 10, on_gpu=True)) == []


@pytest.mark.parametrize(
    ("given", "bits"),
    [
        (None, None), ({}, None), ({"load_in_4bit": True}, 4), ({"load_in_8bit": True}, 8),
        ({"quant_method": "quanto", "weights": "int4"}, 4), ({"quant_method": "quanto", "weights": "int8"}, 8),
    ],
)  # fmt: skip
def test_bits_of_a_quantisation(given: dict[str, Any] | None, bits: int | None) -> None:
    assert memory.bits_of(given) == bits


# -- time -------------------------------------------------------------------------------------------------------------


def test_every_known_gpu_is_whole() -> None:
    found = speed.known()
    assert {"a100-40", "a100-80", "h100", "h200", "b200", "l40s", "rtx-4090", "rtx-3090", "v100-32", "t4"} <= set(
        found.gpus
    )
    for shares in (found.efficiency, found.compiled):
        assert set(shares) == set(speed.PARTS) and all(0 < each <= 1 for each in shares.values())
    assert set(found.launch) <= set(speed.PARTS) and all(0 < each < 1e-4 for each in found.launch.values())
    for name, each in found.gpus.items():
        assert each.source and each.memory >= 15 and each.bandwidth >= 300 and each.float32 and each.float16, name
        assert each.float16 >= each.float32 and each.bfloat16 in (None, each.float16), name


def test_seconds_worked_by_hand() -> None:
    settings = RunConfig()
    rate = speed.on("h200", dataclasses.replace(settings, train=config.TrainConfig(precision="bfloat16")), 0.5)
    assert set(rate.rates.values()) == {989e12 * 0.5} and rate.optimizer == 28 / 4800e9
    plain = speed.on("a100-40", settings)
    assert plain.rates["language"] == pytest.approx(19.5e12 * 0.45)
    assert rate.launch == {} and plain.launch == speed.known().launch
    found = speed.Speed({"head": 10.0, "language": 10.0, "adapter": 10.0}, 0.5, {"language": 2.0, "adapter": 1.0})
    work = {"head": 40.0, "encoder": 0.0, "language": 40.0, "adapter": 40.0}
    assert found.seconds(work, {"language": 3, "adapter": 3}) == {"head": 4.0, "language": 6.0, "adapter": 4.0}


def test_compiled_blocks_reach_more_and_are_launched_for_nothing() -> None:
    compiled = dataclasses.replace(RunConfig(), train=config.TrainConfig(precision="bfloat16", compile=True))
    rate = speed.on("h200", compiled)
    assert rate.launch == {}
    assert rate.rates == {part: 989e12 * share for part, share in speed.known().compiled.items()}


@pytest.mark.parametrize(
    ("name", "changes", "seconds", "gigabytes"),
    [
        ("instructblip_flant5xl", ("train.micro_batch_tokens=4096",), 1.25, 23.7),
        ("instructblip_flant5xl", ("train.micro_batch_tokens=16384",), 1.01, None),
        ("instructblip_vicuna7b", ("train.micro_batch_tokens=8192",), 0.946, 58.8),
        ("instructblip_vicuna7b", ("train.micro_batch_tokens=16384",), 0.905, None),
        ("instructblip_vicuna7b", ("train.micro_batch_tokens=8192", "train.compile=true"), 0.733, None),
    ],
)
def test_the_plan_is_near_what_an_h200_took(
    name: str, changes: tuple[str, ...], seconds: float, gigabytes: float | None, tmp_path: Path
) -> None:
    """`benchmarks/gpu.md`; within the 15 per cent that a plan is asked to keep.  Norms and activations were as
    transformers writes them then.
    """
    settings = config.load(name, [*changes, f"data.root={tmp_path / 'nowhere'}", f"data.index={tmp_path / 'index'}"])
    with hub.asked_if_there():
        found = plan.sizes(settings)
    data = plan.look(settings, found)
    with fused.as_written(found.model):
        made = plan.reckon(settings, found, data.steps, speed.on("h200", settings))
    assert made.step == pytest.approx(seconds, rel=0.15)
    if gigabytes is not None:  # of tensors
        assert made.bytes - memory.CONTEXT == pytest.approx(gigabytes * 1e9, rel=0.15)
    assert ("adapter" in made.launched) == ("train.compile=true" not in changes)


def test_fused_blocks_are_fewer_operations_and_keep_less(run: RunConfig) -> None:
    """By counting: each block of a T5 has two or three norms, of eight operations there and ten or more back."""
    settings = dataclasses.replace(run, language=dataclasses.replace(run.language, name=language_of(run, "t5")))
    model = plan.sizes(settings).model
    assert not model.training  # dropout would be kept for a backward pass that a frozen tower has none of
    with trace.as_on_a_gpu():
        fewer = trace.language_held(model, BOTH, queries=4)
    with fused.as_written(model):
        more = trace.language_held(model, BOTH, queries=4)
    norms = [2, 3]
    for (_, few), (_, many), number in zip(fewer.blocks, more.blocks, norms, strict=True):
        assert 15 * number <= many.launches - few.launches <= 30 * number and few.kept < many.kept
    assert fewer.launches(False) < 0.6 * more.launches(False)
    assert all(0.3 * each.launches < each.forward_launches < 0.6 * each.launches for _, each in fewer.blocks)
    forward = sum(number * each.forward_launches for number, each in fewer.blocks)
    assert fewer.launches(True) == fewer.launches(False) + forward
    assert fused.rms_norm.__name__ == "rms_norm"  # put back


def test_this_machine_is_timed_by_single_blocks(run: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "REPEATS", 3)
    for family in ("llama", "t5"):
        settings = dataclasses.replace(run, language=dataclasses.replace(run.language, name=language_of(run, family)))
        found = plan.sizes(settings)
        steps = plan.look(settings, found).steps
        rate = plan.speed_of(settings, found, steps, "here", None, torch.device("cpu"))
        assert set(rate.rates) == set(speed.PARTS) and all(1e5 < each < 1e14 for each in rate.rates.values())
        assert 0 < rate.optimizer < 1e-3
        assert next(found.model.parameters()).is_meta and next(found.tower.parameters()).is_meta


def language_of(run: RunConfig, family: str) -> str:
    return world.towers(Path(run.language.name).parent, family)["language"]


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_papers_run_is_planned_with_neither_hub_nor_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nowhere = f"data.root={tmp_path / 'nowhere'}"
    assert cli.main(["plan", "instructblip_flant5xl", "--gpu", "h200", nowhere]) == 0
    text = capsys.readouterr().out
    table = rows(text)
    assert "instructblip_flant5xl: 60,000 steps of 192, on one h200" in text
    assert table["LLM"] and "2,849,757,184" in text and "985,894,528" in text and "182,537,728" in text
    assert 150 < float(table["pictures encoded"][0]) <= 192 * 1.1
    assert "Not here, and taken as configs/planning/lengths.yaml states them, unmeasured: coco_caption" in text
    assert re.search(r"memory: [\d.]+ GB of 141 GB", text) and "It fits:" in text
    assert table["AdamW's two averages"] == ["1.46 GB"]
    assert (
        "Taken, measured in part, on one H200: of the peak of h200 (NVIDIA, H200 data sheet, SXM) encoder 45%" in text
    )
    assert "Launching kernels takes longer than computing them: adapter." in text
    assert "GPU hours; the paper's run of FlanT5-XL took 576: 16 A100 of 40 GB for 1.5 days." in text
    operations = float(table["encoder"][0])
    assert operations == pytest.approx(5.2e11, rel=0.1)  # 39 blocks over 257 tokens
    assert table["feature cache, if you turn it on"][0].endswith("TB")
    assert table["checkpoints"][0] == "8.13 GB" and table["data"][0] == "451 GB"


def test_a_run_that_does_not_fit_is_told_what_to_change(run: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    found = plan.sizes(run)
    steps = plan.look(run, found).steps
    made = plan.reckon(run, found, steps, speed.on("t4", run))
    room = made.bytes - 1
    lines = list(plan.fit(found, made, "t4", room / memory.USABLE))
    assert re.match(r"It does not fit into 95% of 1\.0\d GB\. What to change", lines[0])
    assert re.fullmatch(r"  language\.gradient_checkpointing=true: [\d.]+ [GM]B", lines[1])
    assert lines[-1] == "  and then it fits."
    lines = list(plan.fit(found, made, "t4", 1e6))
    assert lines[-1] == "  and still it does not fit: take a smaller LLM, or a larger GPU."
    assert len(lines) > 6


def test_what_to_change_on_this_machine_takes_what_a_plan_of_it_takes(
    run: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the byte: on a CPU with what a process holds beside its tensors."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def planned(settings: RunConfig) -> tuple[plan.Sizes, plan.Plan]:
        found = plan.sizes(settings)
        steps = plan.look(settings, found).steps
        return found, plan.reckon(settings, found, steps, speed.on("t4", settings), on_cpu=True)

    found, made = planned(run)
    told = list(plan.fit(found, made, plan.HERE, (made.bytes - 1) / memory.USABLE))[1]
    changed = dataclasses.replace(run, language=dataclasses.replace(run.language, gradient_checkpointing=True))
    wanted = planned(changed)[1].bytes
    assert told == f"  language.gradient_checkpointing=true: {plan._size(wanted)}"
    assert wanted > memory.AT_WORK


def test_several_gpus_share_a_step(run: RunConfig) -> None:
    text = shown(run, gpu="t4", gpus=2)
    assert "on 2 t4" in text and rows(text)["pictures encoded"] == ["3"]
    assert re.search(r"Nor what travels between GPUs: [\d.]+ [kM]B of gradients a step\.", text)
    assert re.search(r"memory: [\d.]+ GB of 16 GB on each GPU", text)


def test_this_machine_is_planned_where_no_gpu_is_named(
    run: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "REPEATS", 3)
    file = tmp_path / "run.yaml"
    config.save(run, file)
    assert cli.main(["plan", str(file), "train.steps=7200"]) == 0
    text = capsys.readouterr().out
    assert "7,200 steps of 6, on this machine, whose parts are timed" in text
    assert "Timed here: single blocks of each part" in text and "libraries, driver" in text
    step = float(re.findall(r"time: ([\d.e-]+) s a step", text)[0])
    minutes = re.findall(r"samples/s, ([\d.]+) (minutes|hours) for all steps", text)[0]
    assert float(minutes[0]) * (60 if minutes[1] == "hours" else 1) == pytest.approx(step * 120, rel=0.2, abs=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpu", "h20"], r"unknown GPU 'h20'\. Did you mean 'h200'\? Known: a10, a100-40, "),
        (["--gpu", "h200", "--gpus", "0"], r"plan: --gpus is 0; it takes a number of GPUs, at least 1\."),
        (["--gpu", "h200", "--gpus", "9"], r"plan: --gpus is 9, and a step has 6 samples \(train\.batch_size\)"),
        (["--gpus", "2"], r"plan: --gpus goes with a known GPU's name, and this machine is timed as it is; add --gpu"),
        (["--efficiency", "0.5"], r"plan: --efficiency goes with a known GPU's name"),
        (["--gpu", "h200", "--efficiency", "1.5"], r"plan: --efficiency is 1\.5; it is a share of the peak, above 0"),
        (["--gpu", "h200", "--efficiency", "0"], r"plan: --efficiency is 0; it is a share"),
        (
            ["--gpu", "t4", "train.precision=bfloat16"],
            r"plan: the settings have the encoder computed in bfloat16, for which 't4' is not known to have a peak; it "
            r"has float16, float32\. Change train\.precision",
        ),
        (["--gpu", "h200", "vision.nme=x"], r"command line: unknown key 'vision\.nme'\. Did you mean 'name'\?"),
        (["--gpu", "h200", "language.dtype=float8"], r"plan: the settings have the language computed in float8, for"),
        (["language.dtype=float8"], r"language\.dtype is 'float8'; it takes float32, bfloat16"),
        (["vision.dtype=float8"], r"vision\.dtype is 'float8'; it takes float32, bfloat16"),
        (["--gpu", "h200", "language.name=nobody/nothing"], r"language\.name is 'nobody/nothing', and no LLM can be"),
    ],
)
def test_what_cannot_be_planned_ends_in_a_sentence(
    options: list[str], message: str, run: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    config.save(run, file)
    assert cli.main(["plan", str(file), *options]) == 2
    assert re.match(f"qformer: {message}", capsys.readouterr().err)
