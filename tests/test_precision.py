"""Frozen towers in half precision under autocast to the other half, as the paper's runs have them; GPU kernels."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qformer import devices, loading
from qformer.data.batch import StepData
from qformer.sample import Batch
from qformer.train.step import rehearse, train_step
from tests import world
from tests.test_many import maker_of


@pytest.mark.parametrize(("vision", "language"), [("float16", "bfloat16"), ("float32", "float16")])
def test_a_tower_in_float16_is_trained_in_front_of_and_behind(tmp_path: Path, vision: str, language: str) -> None:
    """Torch refuses to mix both halves; the loss is that without autocast, as near as bfloat16 comes."""
    world.write_pictures(tmp_path / "data", count=6)
    changes = (f"vision.dtype={vision}", f"language.dtype={language}")
    model = loading.build(
        world.settings(tmp_path / "towers", tmp_path / "data", tmp_path / "run", *changes), report=lambda line: None
    )
    [batch] = maker_of(model.settings, model, batch_size=4, micro_batch_tokens=None, rank=0, ranks=1)[0].batches
    with torch.no_grad():
        plain = float(model(batch)["answer"])
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(batch)["answer"]
    loss.backward()
    assert float(loss.detach()) == pytest.approx(plain, rel=2e-2)
    gradients = [each.grad for each in model.trainable().values() if each.grad is not None]
    assert all(each.isfinite().all() for each in gradients) and any(each.any() for each in gradients)


@pytest.mark.parametrize("vision", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("language", ["float32", "float16", "bfloat16"])
def test_towers_in_half_precision_compute_in_their_own(tmp_path: Path, vision: str, language: str) -> None:
    world.write_pictures(tmp_path / "data", count=6)
    changes = (f"vision.dtype={vision}", f"language.dtype={language}")
    model = loading.build(
        world.settings(tmp_path / "towers", tmp_path / "data", tmp_path / "run", *changes), report=lambda line: None
    )
    seen: dict[str, bool] = {}
    parts = {"vision": model.vision.model, "adapter": model.connector.qformer, "language": model.language.model.model}
    for name, each in parts.items():
        each.register_forward_pre_hook(
            lambda *_, name=name: seen.update({name: torch.is_autocast_enabled("cpu")}), prepend=True
        )
    [batch] = maker_of(model.settings, model, batch_size=4, micro_batch_tokens=None, rank=0, ranks=1)[0].batches
    with torch.autocast("cpu", torch.bfloat16):
        model(batch)["answer"].backward()
    assert seen == {"vision": vision == "float32", "adapter": True, "language": language == "float32"}


def test_attention_on_a_gpu_is_not_cudnns(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[bool] = []
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", told.append)
    devices.choose_attention(torch.device("cpu"))
    assert told == []
    devices.choose_attention(torch.device("cuda", 1))
    assert told == [False]


def test_attention_is_chosen_before_a_model_is_put_on_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world.write_pictures(tmp_path / "data", count=6)
    settings = world.settings(tmp_path / "towers", tmp_path / "data", tmp_path / "run")
    asked: list[str] = []
    monkeypatch.setattr(devices, "choose_attention", lambda device: asked.append(device.type))
    model = loading.build(settings, report=lambda line: None).settle(torch.device("cpu"))
    assert asked == ["cpu"]
    model.save(tmp_path / "saved")
    loading.load(tmp_path / "saved", device="cpu")
    assert asked == ["cpu", "cpu"]


@pytest.mark.gpu
def test_a_loader_pins_what_a_step_is_given() -> None:
    made = StepData(
        3, [Batch(torch.ones(2, 3, 4, 4), (), ()), Batch(torch.empty(0), (), (), features=torch.ones(1, 2))]
    )
    [found] = torch.utils.data.DataLoader([made], batch_size=None, pin_memory=True)
    assert found.step == 3 and found.batches[0].pixels.is_pinned()
    assert found.batches[1].features is not None and found.batches[1].features.is_pinned()


def test_weights_are_cast_once_a_step_and_gradients_are_those_of_casting_them_each_time(tmp_path: Path) -> None:
    world.write_pictures(tmp_path / "data", count=6)
    settings = world.settings(tmp_path / "towers", tmp_path / "data", tmp_path / "run")
    model = loading.build(settings, report=lambda line: None)
    batches = maker_of(model.settings, model, batch_size=4, micro_batch_tokens=40, rank=0, ranks=1)[0].batches
    assert len(batches) > 2
    half = lambda: torch.autocast("cpu", torch.bfloat16)  # noqa: E731
    total = sum(model.objective.counts(batch)["answer"] for batch in batches)
    with Casts() as apart:
        for batch in batches:
            with half():
                (model(batch)["answer"] / total).backward()
    wanted = {name: each.grad for name, each in model.trainable().items()}
    model.zero_grad(set_to_none=True)
    alone = SimpleNamespace(
        device=torch.device("cpu"), num_processes=1, autocast=half, no_sync=lambda model: nullcontext(),
        reduce=lambda values, how: values, gather=lambda values: values,
    )  # fmt: skip
    kept: dict[str, torch.Tensor | None] = {}
    optimizer = torch.optim.SGD(model.trainable().values(), lr=0.1)
    optimizer.register_step_pre_hook(
        lambda *_: kept.update({name: each.grad for name, each in model.trainable().items()})
    )
    with Casts() as together:
        train_step(model, model.objective, batches, batches[0], optimizer, alone, None)  # type: ignore[arg-type]
    weights = sum(each.ndim == 2 for each in model.connector.qformer.blocks.parameters())
    assert together.count <= apart.count - (len(batches) - 1) * weights // 2
    for name, gradient in wanted.items():
        found = kept[name]
        assert (found is None) == (gradient is None), name
        assert found is None or gradient is None or torch.equal(found, gradient), name


class Casts(TorchDispatchMode):
    """Counts tensors that are made into another type."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.__name__.startswith("_to_copy")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("ranks", [1, 3])
def test_several_ranks_rehearse_and_one_does_not(tmp_path: Path, ranks: int) -> None:
    """What it is for, four ranks that go on to the bit, is tried by `make drill`."""
    world.write_pictures(tmp_path / "data", count=6)
    settings = world.settings(tmp_path / "towers", tmp_path / "data", tmp_path / "run")
    model = loading.build(settings, report=lambda line: None)
    dummy = maker_of(model.settings, model, batch_size=2, micro_batch_tokens=None, rank=0, ranks=1).assembler.dummy(
        model.vision.settings.size
    )
    passed: list[str] = []
    for name, each in model.trainable().items():
        each.register_hook(lambda gradient, name=name: passed.append(name))
    accelerator = SimpleNamespace(num_processes=ranks, autocast=nullcontext)
    rehearse(model, dummy, accelerator)  # type: ignore[arg-type]
    assert sorted(passed) == sorted(model.trainable() if ranks > 1 else [])
    assert all(each.grad is None for each in model.parameters())
