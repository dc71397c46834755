"""`train.compile`: blocks as torch.compile makes them give the losses and gradients of those that are written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors import safe_open
from torch import nn

from qformer import loading
from qformer.errors import ConfigError
from qformer.processes import Processes
from qformer.train import checkpoint, compiling, loop
from tests import world
from tests.test_many import answers, finished, free_port, launch, one_step
from tests.test_train import gradients, maker_of

pytestmark = pytest.mark.filterwarnings("ignore")  # torch warns of its own doings while it traces


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of data; towers come beside it."""
    folder = tmp_path_factory.mktemp("compiled")
    world.write_pictures(folder, count=13)
    return folder


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    """What one test has compiled is no other's business."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def settings_of(root: Path, *changes: str, name: str = "run", family: str = "llama") -> Any:
    return world.settings(root / "towers", root, root / name, "train.compile=true", *changes, family=family)


def compiled(model: nn.Module) -> list[str]:
    return [name for name, each in model.named_modules() if each._compiled_call_impl is not None]


def check_gradients(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Design decision 4: whole models in float32, 1e-4 relative per tensor."""
    assert found.keys() == expected.keys()
    for name in expected:
        if not name.endswith("key.bias"):
            assert (found[name] - expected[name]).norm() <= 1e-4 * expected[name].norm(), name


def told(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_compiled_run_is_that_of_the_blocks_as_written(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced as for the compiler, which the slow test brings in; monitors at each step, a validation at the end."""
    monkeypatch.setattr(compiling, "BACKEND", "eager")
    monkeypatch.setattr(compiling, "check", lambda device: None)
    made: dict[str, Any] = {}
    build = loading.build

    def kept(settings: Any, **more: Any) -> Any:
        made["model"] = build(settings, **more)
        return made["model"]

    monkeypatch.setattr(loading, "build", kept)
    said: list[str] = []

    def validate(model: Any, step: int) -> dict[str, float]:
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert answers(root, model)[0]
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs  # as it is written
        return {"colours": 1.0}

    changes = ("train.steps=2", "train.monitor_every=1")
    loop.train(settings_of(root, *changes), validate=validate, say=said.append, quiet=True)
    assert "train.compile: blocks are compiled when they are first used, which takes a while: 2 of the encoder, 2 of " \
        "the Q-Former, 2 of the LLM" in said  # fmt: skip
    places = ("vision.model.layers", "connector.qformer.blocks", "language.model.model.layers")
    names = [f"{place}.{number}" for place in places for number in (0, 1)]
    assert compiled(made["model"]) == names
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 4

    plain = (*changes, "train.compile=false")
    loop.train(settings_of(root, *plain, name="plain"), validate=lambda *_: {"colours": 1.0}, say=str, quiet=True)
    assert compiled(made["model"]) == []
    for one, other in zip(told(root / "run"), told(root / "plain"), strict=True):
        for what in ("loss", "gradient_norm", "entropy", "cosine"):
            assert (what in one) == (what in other)
            assert one.get(what, 0.0) == pytest.approx(other.get(what, 0.0), rel=1e-4)
    files = [root / name / "checkpoints" / "step-2" / "adapter.safetensors" for name in ("run", "plain")]
    with safe_open(files[0], "pt") as one, safe_open(files[1], "pt") as other:
        assert set(one.keys()) == set(other.keys())
    checkpoint.same_run(root / "run" / "config.yaml", settings_of(root, *plain))  # it may go on as it is written


def test_where_nothing_can_be_compiled_a_run_is_refused_before_weights_are_read(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor import config

    monkeypatch.setattr(loading, "build", lambda *_, **__: pytest.fail("weights were read"))
    lacking = config.patch({"cpp.cxx": ("no-such-compiler",)})  # type: ignore[attr-defined]
    with lacking, pytest.raises(ConfigError, match="nothing here") as caught:
        loop.train(settings_of(root, name="refused"), say=str, quiet=True)
    assert str(caught.value).startswith("train.compile is true, and torch.compile makes nothing here (No working C++")
    assert str(caught.value).endswith("install a C++ compiler (g++) and, on a GPU, Triton, or set it to false.")


def test_what_a_feature_cache_keeps_is_not_compiled(root: Path, tmp_path: Path) -> None:
    settings = settings_of(
        root, f"vision.cache={tmp_path / 'kept'}", "vision.train_transform={mode: squash, flip: 0.0}", name="cached"
    )
    model = loading.build(settings, report=str)
    assert "0 of the encoder, 2 of the Q-Former, 2 of the LLM" in compiling.compile_blocks(model)
    assert not any(name.startswith("vision") for name in compiled(model))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "changes"),
    [("llama", ("qformer.dropout=0.1",)), ("llama", ("language.gradient_checkpointing=true",)), ("t5", ())],
    ids=["dropout", "checkpointed", "t5"],
)
def test_compiled_losses_and_gradients_are_equal(root: Path, family: str, changes: tuple[str, ...]) -> None:
    """By the real compiler, over micro-batches of unlike shapes, and again by what was compiled then."""
    compiling.check("cpu")
    model = loading.build(settings_of(root, *changes, name=family, family=family), report=str)
    names = list(model.state_dict())
    maker = maker_of(model.settings, model, micro_batch_tokens=40, packed=family == "llama")
    assert len(maker[0].batches) > 2

    def seeded() -> Any:
        torch.manual_seed(3)  # as each step of a run is
        return gradients(model, maker)

    report, wanted = seeded()
    compiling.compile_blocks(model)
    for _ in range(2):
        own, found = seeded()
        assert own.loss == pytest.approx(report.loss, rel=1e-5) and own.counts == report.counts
        check_gradients(found, wanted)
    assert list(model.state_dict()) == names
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 4


SHARED = """
import sys
from pathlib import Path
from tests.test_compiling import step_of_several

step_of_several(Path(sys.argv[1]))
"""


def step_of_several(root: Path) -> None:
    """A step compiled and as written, the LLM whole and in parts, and answers between; traced as for the compiler."""
    compiling.BACKEND = "eager"
    accelerator = Accelerator(cpu=True)
    processes = Processes(accelerator.process_index, accelerator.num_processes)
    assert processes.count == 2
    for shard in ("false", "true"):
        settings = settings_of(root, f"language.shard={shard}", name=f"shard-{shard}-{processes.index}")
        model = loading.build(settings, report=str).settle(accelerator.device, processes)
        wrapped = accelerator.prepare_model(model, device_placement=False)
        plain = one_step(model, wrapped, accelerator, 7, 60)
        with model.together():
            said = answers(root, model)
        compiling.compile_blocks(model)
        step = one_step(model, wrapped, accelerator, 7, 60)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
        assert step["loss"] == pytest.approx(plain["loss"], rel=1e-5)
        check_gradients(step["gradients"], plain["gradients"])
        with compiling.as_written(model), model.together():
            assert answers(root, model) == said
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()


@pytest.mark.slow
def test_two_processes_compile_and_still_equal_themselves(root: Path, tmp_path: Path) -> None:
    world.towers(root / "towers", "llama")
    finished(launch(SHARED, tmp_path, root, options=[f"--master_port={free_port()}", "--nproc_per_node=2"]))
